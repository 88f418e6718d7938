"""What is refused of a program by reading it, before anything of it runs: syntax, imports, names.

This names early what would be stopped later. It is no wall: Python has more ways to a name than a reader finds.
"""

import ast
from collections.abc import Collection

FORBIDDEN = frozenset(
    {
        "__import__", "breakpoint", "compile", "delattr", "dir", "eval", "exec", "exit", "getattr", "globals", "help",
        "input", "locals", "memoryview", "open", "quit", "setattr", "vars",
    }
)  # fmt: skip
DUNDERS = frozenset({"__init__"})
LONGEST = 64 * 1024  # characters
DEEPEST = 60


def refusal(code: str, modules: Collection[str]) -> tuple[str, str] | None:
    """The kind of what is refused ("syntax", "import" or "name") and where it stands; None where nothing is.

    Args:
        modules: what may be imported, by full name, such as "torch.nn".
    """
    if len(code) > LONGEST:
        return "syntax", f"{len(code)} characters are more than {LONGEST}"
    try:
        tree = ast.parse(code)
        if _depth(tree) > DEEPEST:
            return "syntax", f"is nested deeper than {DEEPEST}"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return "syntax", f"does not parse{line}: {type(error).__name__}"
    for node in ast.walk(tree):
        if found := _refused(node, modules):
            kind, what = found
            return kind, f"{what} in line {node.lineno}"
    return None


def _refused(node: ast.AST, modules: Collection[str]) -> tuple[str, str] | None:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        inside = [f"{module}.{alias.name}" for alias in node.names]
        starred = [name for name in inside if name.endswith(".*")]
        names = starred or [module, *(name for name in inside if _is_module(name))]
    else:
        return _refused_name(node)
    wrong = next((name for name in names if name not in modules), None)
    return ("import", wrong) if wrong is not None else None


def _is_module(name: str) -> bool:
    """Whether "from torch import utils" would bring a module along; a name that is none is looked up when it runs."""
    import sys

    return name in sys.modules


def _refused_name(node: ast.AST) -> tuple[str, str] | None:
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute):
        name = node.attr
        if not name.startswith("__"):
            return None
    else:
        return None
    hidden = name.startswith("__") and name not in DUNDERS
    return ("name", name) if name in FORBIDDEN or hidden else None


def _depth(node: ast.AST, so_far: int = 0) -> int:
    if so_far > DEEPEST:
        return so_far
    return max((_depth(child, so_far + 1) for child in ast.iter_child_nodes(node)), default=so_far)
