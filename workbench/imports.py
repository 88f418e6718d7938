"""What the modules of a package import from it, read from the source; and with it, all the code a module stands on.

Imports inside functions count too; those for type checkers alone bind nothing at run time and do not. Modules are named
without the package, "" being the package itself.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from workbench.catalogue import FAMILIES, PACKAGE

COMPILED = (".c", ".h")  # what a kernel builds from the files beside it

Imports = dict[str, set[str]]  # module -> modules


def read(package: Path = PACKAGE) -> Imports:
    """What every module of a package imports from that package."""
    modules = modules_of(package)
    return {name: imported(path.read_text(encoding="utf-8"), package) - {name} for name, path in modules.items()}


@cache
def modules_of(package: Path = PACKAGE) -> dict[str, Path]:
    """Module -> its file."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}


def imported(source: str, package: Path = PACKAGE) -> set[str]:
    """The modules of a package that a source imports."""
    return set(_imported(ast.parse(source), package.name, modules_of(package)))


def files_below(source: str, package: Path = PACKAGE) -> list[Path]:
    """All files of a package that a source stands on: what it imports, what that imports, and C beside any of them.

    What is chosen at run time counts whether it is chosen or not: modules named "workbench.lib.data.text:load", systems
    named by their slug, as in `adapt(model, "mixlora")`, and for `import_module(f"{__name__}.{backend}")` all that lie
    in that package. The package's own `__init__` is left out: it imports nothing before it is asked for a name.
    """
    modules, found = modules_of(package), {""}
    new = _below(source, "", package) - found
    while new:
        found |= new
        texts = {name: modules[name].read_text(encoding="utf-8") for name in new}
        new = {below for name, text in texts.items() for below in _below(text, name, package)} - found
    python = {modules[name] for name in found - {""}}
    compiled = {path for folder in {path.parent for path in python} for path in folder.iterdir()}
    return sorted(python | {path for path in compiled if path.suffix in COMPILED})


@cache  # by the text, so that a changed file is read anew
def _below(source: str, module: str, package: Path) -> frozenset[str]:
    """What a module imports or may come to import, and the packages all of these are in."""
    tree, modules, found = ast.parse(source), modules_of(package), set()
    for node in _at_run_time(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            head, _, name = node.value.partition(":")[0].partition(".")
            found |= {name} if head == package.name else set()
            found |= {f"lib.{family}.{node.value.replace('-', '_')}" for family in FAMILIES}
        elif isinstance(node, ast.JoinedStr) and ast.unparse(node).startswith("f'{__name__}."):
            found |= {name for name in modules if name.rpartition(".")[0] == module}
    found = (found & modules.keys()) | set(_imported(tree, package.name, modules))
    names = (name.split(".") for name in (*found, module))
    return frozenset(found | {".".join(parts[:i]) for parts in names for i in range(1, len(parts))} & modules.keys())


def _imported(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    def inside(name: str) -> str | None:
        head, _, rest = name.partition(".")
        return rest if head == package else None

    for node in _at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (found for alias in node.names if (found := inside(alias.name)) is not None)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise SyntaxError(f"line {node.lineno}: imports are written in full")
            if (base := inside(node.module)) is not None:
                names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
                yield from (name if name in modules else base for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and inside(node.value) in modules:
            yield inside(node.value)  # import_module("workbench.cli.commands")


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from _at_run_time(child)
