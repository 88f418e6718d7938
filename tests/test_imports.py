"""How the parts of the package hold together: no circle of imports, and every floor stands on floors below it.

Imports are read from the source, those inside functions too; those for type checkers alone bind nothing at run time.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from workbench.catalogue import FAMILIES, PACKAGE

#: From the ground up. A module imports from its own part and from floors below; parts of one floor not from each other.
FLOORS = (
    ("", "errors"),  # "": the package itself, which imports nothing before it is asked for a name
    ("paths", "catalogue", "sealed"),
    ("kernels",),
    ("lib",),
    ("lib.data", "lib.measures"),
    ("lib.charts", "lib.core"),
    tuple(f"lib.{family}" for family in FAMILIES),
    ("beds",),
    ("bench", "figures"),
    ("live",),
    ("studies",),
    tuple(f"studies.{family}" for family in FAMILIES),
    ("doctor", "notebook"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}

Imports = dict[str, set[str]]  # module -> modules, both without "workbench."


def read(package: Path) -> Imports:
    """What every module of a package imports from that package."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix("__init__").removesuffix("."): path for name, path in files.items()}
    sources = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    return {name: set(_imported(tree, package.name, modules)) - {name} for name, tree in sources.items()}


def _imported(tree: ast.AST, package: str, modules: dict[str, Path]) -> Iterator[str]:
    def inside(name: str) -> str | None:
        head, _, rest = name.partition(".")
        return rest if head == package else None

    for node in _at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (found for alias in node.names if (found := inside(alias.name)) is not None)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are written in full"
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


def circle(imports: Imports) -> list[str]:
    """A circle of imports, as the modules on it; empty where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def part(module: str) -> str:
    """The part of the package, as `FLOORS` names it, that a module belongs to."""
    head, *_ = names = module.split(".")
    pair = ".".join(names[:2])
    return pair if pair in HEIGHT or head == "lib" else head


def upwards(imports: Imports) -> list[str]:
    """Imports that do not go down, from one part of the package to another."""
    pairs = [(module, found) for module, all_ in imports.items() for found in sorted(all_)]
    return [f"{a} -> {b}" for a, b in pairs if part(a) != part(b) and HEIGHT[part(a)] <= HEIGHT[part(b)]]


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read(PACKAGE)


def test_no_circle_of_imports(imports: Imports):
    assert circle(imports) == []


def test_every_floor_imports_from_floors_below_it(imports: Imports):
    assert {part(module) for module in imports} - HEIGHT.keys() == set(), "a new part has its floor in FLOORS"
    assert upwards(imports) == []


def test_a_family_imports_from_no_sibling_at_any_floor(imports: Imports):
    """A study may use what stands below it of its own family, and no other's."""
    pairs = [(a, b) for a, found in imports.items() for b in found if a.startswith("studies.") and b.startswith("lib.")]
    families = [(a, b, a.split(".")[1], b.split(".")[1]) for a, b in pairs]
    assert [f"{a} -> {b}" for a, b, mine, other in families if other in FAMILIES and mine != other] == []


def package(folder: Path, **sources: str) -> Imports:
    for name, source in sources.items():
        path = folder / "workbench" / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read(folder / "workbench")


@pytest.mark.parametrize(
    "back",
    [
        "import workbench.live.a",
        "from workbench.live import a",
        "from workbench.live.a import x",
        "def f():\n    from workbench.live.a import x",
        "import_module('workbench.live.a')",
    ],
)
def test_a_circle_is_seen_however_it_is_closed(tmp_path: Path, back: str):
    imports = package(tmp_path, live__a="from workbench.live.b import x", live__b=back)
    assert set(circle(imports)) == {"live.a", "live.b"}


def test_what_only_a_type_checker_reads_closes_no_circle(tmp_path: Path):
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from workbench.live.a import x"
    assert circle(package(tmp_path, live__a="from workbench.live.b import x", live__b=back)) == []


def test_a_way_up_and_a_sibling_are_seen(tmp_path: Path):
    imports = package(
        tmp_path,
        kernels__a="def f():\n    import workbench.lib.core.a",
        lib__routing__a="from workbench.lib.merging.a import x\nfrom workbench.lib.routing.b import x",
        lib__routing__b="from workbench.errors import x",
        lib__merging__a="",
        lib__core__a="",
    )
    assert upwards(imports) == ["kernels.a -> lib.core.a", "lib.routing.a -> lib.merging.a"]
