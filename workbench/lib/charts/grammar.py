"""Strict parsers of exactly the scripts the templates emit: each reads a script back to its metadata, or refuses it.

Nothing is run. What was read is rendered again and compared with the script, so that a script is accepted only if it
is, character by character, the script of the chart it is read as.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from workbench.errors import InputError, unknown
from workbench.lib.charts.spec import COLOURS, LANGUAGES, ChartSpec, Series
from workbench.lib.charts.templates import LATEX_CORNER, LATEX_SPECIAL, R_CORNER, render, rgb

Call = tuple[str, list, dict[str, Any]]


class ScriptError(InputError):
    """A script that is none of the templates'."""


def parse(script: str, language: str) -> ChartSpec:
    """The chart of a script.

    Raises:
        ScriptError: it is no script that `render` gives for any chart.
        InputError: unknown language.
    """
    if language not in LANGUAGES:
        raise unknown("language", language, LANGUAGES)
    try:
        spec = {"python": _python, "r": _r, "latex": _latex}[language](script)
    except Exception as error:  # a script can be anything at all
        raise ScriptError(f"script is no {language} chart of the templates: {error!r}") from error
    again = render(spec, language).splitlines()
    for i, (line, expected) in enumerate(zip(script.splitlines(), again, strict=False)):
        if line != expected:
            raise ScriptError(f"script has {line!r} in line {i + 1} but must have {expected!r} there")
    if script != render(spec, language):
        raise ScriptError(f"script has {len(script.splitlines())} lines but must have {len(again)}, each with its end")
    return spec


def _python(script: str) -> ChartSpec:
    calls = _calls(script)[1:]  # the first one makes the axes
    text = {name: _plain(args[0]) for name, args, _ in calls if name in ("set_title", "set_xlabel", "set_ylabel")}
    drawn = [call for call in calls if call[0] in ("bar", "barh", "plot", "scatter", "pie")]
    kind = {"plot": "line"}.get(drawn[0][0], drawn[0][0])
    legend = next((keywords["loc"] for name, _, keywords in calls if name == "legend"), "")
    grid = any(name == "grid" for name, _, _ in calls)
    if kind == "pie":
        _, (values,), keywords = drawn[0]
        return _pie(text["set_title"], map(_plain, keywords["labels"]), map(_tab, keywords["colors"]), values)
    kind = "grouped" if "width" in drawn[0][2] else kind
    categories: Sequence[str] = () if kind == "scatter" else drawn[0][1][0]
    if kind == "grouped":
        categories = next(args[1] for name, args, _ in calls if name == "set_xticks")
    series = [
        Series(
            _plain(keywords.get("label", "")),
            _tab(keywords["color"]),
            tuple(args[1]),
            tuple(args[0]) if kind == "scatter" else (),
        )
        for _, args, keywords in drawn
    ]
    categories = tuple(map(_plain, categories))
    labels = text["set_title"], text["set_xlabel"], text["set_ylabel"]
    return ChartSpec(kind, *labels, categories, tuple(series), legend, grid)


def _r(script: str) -> ChartSpec:
    calls = _calls(_r_as_python(script))
    title = next(keywords for name, _, keywords in calls if name == "title")
    legend = next(((args[0], keywords["legend"]) for name, args, keywords in calls if name == "legend"), None)
    drawn = [call for call in calls if call[0] in ("barplot", "plot", "lines", "points", "pie")]
    first, args, keywords = drawn[0]
    if first == "pie":
        return _pie(title["main"], keywords["labels"], map(_hex, keywords["col"]), args[0])
    categories: Sequence[str] = ()
    if first == "barplot":
        kind = "grouped" if "beside" in keywords else "barh" if "horiz" in keywords else "bar"
        rows, colours = (args[0], keywords["col"]) if kind == "grouped" else ([args[0]], [keywords["col"]])
        points = [((), row, colour) for row, colour in zip(rows, colours, strict=True)]
        categories = keywords["names_arg"]
    else:
        kind = "line" if "type" in keywords else "scatter"
        points = [(() if kind == "line" else a[0], a[-1], k["col"]) for _, a, k in drawn]
        if kind == "line":
            categories = next(k["labels"] for name, _, k in calls if name == "axis")
    names = legend[1] if legend else [""] * len(points)
    series = tuple(Series(n, _hex(c), tuple(y), tuple(x)) for n, (x, y, c) in zip(names, points, strict=True))
    corner = {there: here for here, there in R_CORNER.items()}[legend[0]] if legend else ""
    grid = any(name == "grid" for name, _, _ in calls)
    return ChartSpec(kind, title["main"], title["xlab"], title["ylab"], tuple(categories), series, corner, grid)


def _latex(script: str) -> ChartSpec:
    inverse = {",".join(map(str, rgb(name))): name for name in COLOURS}
    colours = [inverse[code] for code in re.findall(r"^\\definecolor\{c\d+\}\{RGB\}\{([\d,]+)\}$", script, re.M)]
    if pie := re.search(r"^\\pie\[.*?\]\{(.*)\}$", script, re.M):
        slices = re.findall(r"(\d+)/\{([^{}]*)\}", pie[1])
        title = re.search(r"^\\node at \(0,4\) \{(.*)\};$", script, re.M)[1]
        return _pie(_untex(title), [_untex(n) for _, n in slices], colours, [int(v) for v, _ in slices])
    options = re.search(r"^\\begin\{axis\}\[(.*)\]$", script, re.M)[1]
    text = {key: _untex(value) for key, value in re.findall(r"(title|xlabel|ylabel)=\{([^{}]*)\}", options)}
    ticks = re.search(r"ticklabels=\{((?:\{[^{}]*\}(?:, )?)+)\}", options)
    categories = tuple(_untex(t) for t in re.findall(r"\{([^{}]*)\}", ticks[1])) if ticks else ()
    plots = re.findall(r"^\\addplot\[(.*)=c\d+\] coordinates \{(.*)\};$", script, re.M)
    names = [_untex(n) for n in re.findall(r"^\\addlegendentry\{(.*)\}$", script, re.M)] or [""] * len(plots)
    style = options.split(",")[0]
    if style in ("ybar", "xbar"):
        kind = "barh" if style == "xbar" else "grouped" if len(plots) > 1 else "bar"
    else:
        kind = "scatter" if plots[0][0].startswith("only marks") else "line"
    series = []
    for name, colour, (_, pairs) in zip(names, colours, plots, strict=True):
        a, b = zip(*((int(x), int(y)) for x, y in re.findall(r"\((\d+), (\d+)\)", pairs)), strict=True)
        values, x = (a, b) if kind == "barh" else (b, a)
        series.append(Series(name, colour, values, x if kind == "scatter" else ()))
    corner = re.search(r"legend pos=([a-z ]+)", options)
    legend = {there: here for here, there in LATEX_CORNER.items()}[corner[1]] if corner else ""
    labels = text["title"], text["xlabel"], text["ylabel"]
    return ChartSpec(kind, *labels, categories, tuple(series), legend, "grid=major" in options)


def _pie(title: str, names, colours, values) -> ChartSpec:
    slices = tuple(Series(n, c, (v,)) for n, c, v in zip(names, colours, values, strict=True))
    return ChartSpec("pie", title, "", "", (), slices)


def _calls(source: str) -> list[Call]:
    """Every statement that is a call or assigns one: (last part of its name, arguments, keyword arguments)."""
    statements = [node for node in ast.parse(source).body if isinstance(node, ast.Expr | ast.Assign)]
    return [_call(node.value) for node in statements]


def _call(node: ast.AST) -> Call:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
    return name, [_value(a) for a in node.args], {k.arg: _value(k.value) for k in node.keywords}


def _value(node: ast.AST) -> Any:
    """A literal, or R's c(...) and rbind(...) as a list."""
    if isinstance(node, ast.Call):
        if node.func.id not in ("c", "rbind") or node.keywords:
            raise ValueError(f"a call of {node.func.id} is no value")
        return [_value(a) for a in node.args]
    return ast.literal_eval(node)


def _r_as_python(script: str) -> str:
    """R's calls are Python's, but for three words that are no names there. Strings are left alone."""
    parts = re.split(r'("[^"\n]*")', script)
    for old, new in (("names.arg=", "names_arg="), ("TRUE", "True"), ("FALSE", "False")):
        parts = [part if part.startswith('"') else part.replace(old, new) for part in parts]
    return "".join(parts)


def _tab(colour: str) -> str:
    return colour.removeprefix("tab:")


def _hex(code: str) -> str:
    return {colour.upper(): name for name, colour in COLOURS.items()}[code]


def _plain(text: str) -> str:
    return text.replace("\\$", "$")


def _untex(text: str) -> str:
    return re.sub(rf"\\([{re.escape(LATEX_SPECIAL)}])", r"\1", text)
