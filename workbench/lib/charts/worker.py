"""The process that runs chart scripts, see `verdict.run_python`: scripts come in on stdin, results go to a file.

A script is run only if it is a list of calls of the drawing methods below with literal arguments.
"""

import ast
import base64
import json
import sys
from collections.abc import Callable

ALLOWED = {
    *("bar", "barh", "plot", "scatter", "pie", "set_title", "set_xlabel", "set_ylabel", "set_xticks", "set_yticks"),
    *("set_xlim", "set_ylim", "legend", "grid"),
}
HEAD = [ast.unparse(node) for node in ast.parse("import matplotlib.pyplot as plt\nfig, ax = plt.subplots()").body]


def refuse(script: str) -> str | None:
    """Why a script is not run, or None."""
    try:
        body = ast.parse(script).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"no Python: {error}"
    if [ast.unparse(node) for node in body[:2]] != HEAD:
        return "does not begin with the import of pyplot and plt.subplots()"
    for node in body[2:]:
        call = node.value if isinstance(node, ast.Expr) else None
        method = call.func if isinstance(call, ast.Call) else None
        named = isinstance(method, ast.Attribute) and isinstance(method.value, ast.Name) and method.value.id == "ax"
        if not named or method.attr not in ALLOWED:
            return f"line {node.lineno} is no call of a drawing method of ax"
        try:
            for value in (*call.args, *(keyword.value for keyword in call.keywords)):
                ast.literal_eval(value)
        except ValueError:
            return f"line {node.lineno} has an argument that is no literal"
    return None


def main() -> None:
    """Read {"scripts", "size", "out"} from stdin; append one JSON line a script to the file `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    request = json.load(sys.stdin)
    size = request["size"]
    pixels = size or 64
    # One figure for all: making one takes longer than drawing in it.
    matplotlib.rcParams.update({"font.size": 7, "figure.dpi": 32, "axes.linewidth": 0.6, "lines.markersize": 4})
    figure = plt.figure(figsize=(pixels / 32, pixels / 32))

    def subplots():
        figure.clear()
        ax = figure.add_axes((0.2, 0.2, 0.75, 0.65))
        return figure, ax

    with open(request["out"], "a") as out:
        for script in request["scripts"]:
            out.write(json.dumps(one(script, subplots, figure, size)) + "\n")
            out.flush()


def one(script: str, subplots: Callable, figure, size: int) -> dict:
    """{"error"} or {"spec", "image"}: of a script, its metadata as JSON and its pixels in base64."""
    import matplotlib.pyplot as plt

    from workbench.lib.charts.figure import extract_spec

    if (reason := refuse(script)) is not None:
        return {"error": reason}
    found, real = {}, plt.subplots
    plt.subplots = subplots
    try:
        exec(compile(script, "<chart>", "exec"), {})
        if size:
            figure.canvas.draw()
            found["image"] = base64.b64encode(figure.canvas.buffer_rgba().tobytes()).decode()
        found["spec"] = extract_spec(figure).to_json()
    except Exception as error:  # whatever a script does wrong is its result
        found["error"] = f"{type(error).__name__}: {error}"
    finally:
        plt.subplots = real
    return found


if __name__ == "__main__":
    main()
