"""How the parts of the package hold together: no circle of imports, and every floor stands on floors below it.

`workbench.imports` reads them from the source; studies take from it all the code that a kept row stands on.
"""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from workbench.catalogue import FAMILIES
from workbench.imports import PACKAGE, Imports, files_below, read

#: From the ground up. A module imports from its own part and from floors below; parts of one floor not from each other.
FLOORS = (
    ("", "errors"),  # "": the package itself, which imports nothing before it is asked for a name
    ("paths", "catalogue", "sealed", "attached"),
    ("imports",),
    ("engines",),
    ("kernels",),
    ("lib",),
    ("lib.data", "lib.measures"),
    ("lib.charts", "lib.core"),
    tuple(f"lib.{family}" for family in FAMILIES),
    ("beds",),
    ("bench", "figures"),
    ("studies",),
    tuple(f"studies.{family}" for family in FAMILIES),
    ("live",),
    ("doctor", "merging", "notebook", "sliders", "verdicts"),
    ("notebook_grid",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}


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


def test_a_module_stands_on_all_that_what_it_imports_imports(tmp_path: Path):
    sources = {
        "__init__.py": "",
        "a.py": "def f():\n    from workbench.lib.b import x",
        "d.py": "",
        "e.py": "",
        "kernels/c.py": "",
        "kernels/native.c": "",
        "kernels/tile.h": "",
        "lib/__init__.py": "",
        "lib/b.py": "import workbench.kernels.c\nfrom workbench.a import f\nLOADERS = {1: 'workbench.e:load'}",
        "lib/notes.txt": "",
        "lib/merging/one_two.py": "",
        "lib/op/__init__.py": "import_module(f'{__name__}.{backend}')",
        "lib/op/x.py": "",
        "lib/op/deep/y.py": "",
    }
    root = tmp_path / "workbench"
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    below = files_below("import workbench\nfrom workbench.a import f", root)
    assert [path.relative_to(root).as_posix() for path in below] == [
        "a.py", "e.py", "kernels/c.py", "kernels/native.c", "kernels/tile.h", "lib/__init__.py", "lib/b.py"
    ]  # fmt: skip
    assert [path.stem for path in files_below("adapt(model, 'one-two')", root)] == ["__init__", "one_two"]
    below = files_below("from workbench.lib.op import x", root)
    assert [path.name for path in below if path.parent.name == "op"] == ["__init__.py", "x.py"]
    assert files_below("import json", root) == []


def test_a_real_study_stands_on_its_method_its_bed_and_the_kernels(imports: Imports):
    source = (PACKAGE / "studies" / "routing" / "rmoe.py").read_text(encoding="utf-8")
    below = {path.relative_to(PACKAGE).as_posix() for path in files_below(source)}
    assert {
        "lib/routing/rmoe.py",
        "beds/python_text.py",
        "lib/data/text.py",
        "kernels/moe_mlp/cpu.py",
        "kernels/moe_mlp/native.c",
    } <= below
    source = (PACKAGE / "studies" / "lora_experts" / "lora_mixer.py").read_text(encoding="utf-8")
    assert PACKAGE / "lib" / "lora_experts" / "mixlora.py" in files_below(source)  # its adapt(model, "mixlora")
    assert not {"cli/commands.py", "live/server.py", "studies/routing/dynamoe.py", "__init__.py"} & below
