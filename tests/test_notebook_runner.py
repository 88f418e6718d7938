"""`workbench run`: everything is checked before a kernel starts, and what fails is kept."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import notebook
from workbench.errors import InputError
from workbench.notebook import NotebookError, Parameter

PARAMETERS = """\
import math  # not a parameter

preset: str = "small"  # one of: smoke, small, full
seed: int = 0  # 0..2_147_483_647
temperature: float = 1  # 0.01..: of the softmax
rate: float = 1e-3  # 1e-6..1.0
top_k: int | None = None  # 1..8: None leaves the recipe's own
shared = True  # a shared expert
names: str = "python docs"
layers = 2; experts = 4  # ..64: of each layer
title: str | None = None
"""


def write(folder: Path, *code: str, name: str = "nb.ipynb", parameters: str | None = PARAMETERS) -> Path:
    import nbformat  # heavy enough for only the process that runs these tests to pay for it
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    cells = [new_markdown_cell("# A notebook")]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in code]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / name)
    return folder / name


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


# -- what a notebook declares


def test_the_parameters_cell_is_the_declaration(tmp_path: Path):
    found = notebook.parameters(write(tmp_path))
    assert list(found) == [
        "preset", "seed", "temperature", "rate", "top_k", "shared", "names", "layers", "experts", "title"
    ]  # fmt: skip
    assert found["preset"] == Parameter("preset", "str", "small", choices=("smoke", "small", "full"))
    assert found["seed"] == Parameter("seed", "int", 0, low=0, high=2**31 - 1)
    assert found["temperature"] == Parameter("temperature", "float", 1, low=0.01, help="of the softmax")
    assert found["rate"] == Parameter("rate", "float", 1e-3, low=1e-6, high=1)
    assert found["top_k"] == Parameter("top_k", "int", None, True, low=1, high=8, help="None leaves the recipe's own")
    assert found["shared"] == Parameter("shared", "bool", True, help="a shared expert")
    assert found["names"] == Parameter("names", "str", "python docs")
    assert found["experts"] == Parameter("experts", "int", 4, high=64, help="of each layer")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("steps: int = 3  # 5..9", "parameter steps is 3 but must be a whole number of at least 5 and at most 9"),
        ("preset = 'tiny'  # one of: smoke, small", "parameter preset 'tiny' is unknown"),
        ("size = [1, 2]", "parameter size is .* but must be int, float, str or bool"),
        ("size: list[int] = [1, 2]", "but must be int, float, str or bool"),
        ("end = None", "but must be int, float, str or bool"),
        ("steps = 2 * 3", "parameter steps must have a literal default, not 2 \\* 3"),
        ("%matplotlib inline", "parameters cell is not plain Python"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_told(tmp_path: Path, cell: str, message: str):
    with pytest.raises(InputError, match=message):
        notebook.parameters(write(tmp_path, parameters=cell))


# -- values


@pytest.mark.parametrize(
    ("name", "given_value", "value"),
    [
        ("seed", "7", 7), ("seed", 7, 7), ("seed", "1_000", 1000), ("temperature", "2", 2.0), ("temperature", 2, 2.0),
        ("rate", "1e-6", 1e-6), ("top_k", "none", None), ("top_k", None, None), ("top_k", "8", 8),
        ("shared", "false", False), ("shared", "True", True), ("names", "none", "none"), ("names", "", ""),
        ("title", "none", None), ("title", "7", "7"), ("preset", "smoke", "smoke"), ("experts", "-3", -3),
    ],
)  # fmt: skip
def test_a_value_takes_the_declared_type(tmp_path: Path, name: str, given_value, value):
    coerced = notebook.check(write(tmp_path), {name: given_value})[name]
    assert coerced == value and type(coerced) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "-1", "parameter seed is '-1' but must be a whole number of at least 0 and at most 2147483647"),
        ("seed", "1.0", "must be a whole number"),
        ("seed", 1.0, "must be a whole number"),
        ("seed", True, "must be a whole number"),
        ("seed", "none", "must be a whole number"),
        ("seed", "", "must be a whole number"),
        ("top_k", "9", "must be a whole number of at least 1 and at most 8 or none"),
        ("temperature", "0", "must be a number of at least 0.01"),
        ("temperature", "nan", "must be a number of at least 0.01"),
        ("temperature", "inf", "must be a number of at least 0.01"),
        ("shared", "yes", "must be true or false"),
        ("shared", 1, "must be true or false"),
        ("names", 3, "must be text"),
        ("preset", "smol", "parameter preset 'smol' is unknown; did you mean 'smoke' or 'small'"),
        ("sed", "1", "parameter of nb 'sed' is unknown; did you mean 'seed'"),
        ("math", "1", "parameter of nb 'math' is unknown"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(tmp_path: Path, name: str, value, message: str):
    with pytest.raises(InputError, match=message):
        notebook.check(write(tmp_path), {name: value})


@given(st.integers(), st.integers(), st.integers())
def test_bounds_admit_exactly_the_interval(low: int, high: int, value: int):
    parameter = Parameter("n", "int", low, low=float(low), high=float(high))
    if float(low) <= value <= float(high):
        assert parameter.coerce(str(value)) == value
    else:
        with pytest.raises(InputError, match="parameter n is"):
            parameter.coerce(str(value))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_float_survives_the_shell(value: float):
    assert Parameter("x", "float", 0.0).coerce(repr(value)) == value


@given(st.text())
def test_any_text_is_itself(text: str):
    assert Parameter("s", "str", "").coerce(text) == text


# -- which notebook, and where to


def test_a_notebook_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch):
    path = write(tmp_path, name="01_routing.ipynb")
    monkeypatch.setattr(notebook, "FOLDER", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert notebook.find("01_routing") == path
    assert notebook.find("01_routing.ipynb") == path
    assert notebook.find("../01_routing") == Path("../01_routing.ipynb")
    assert notebook.find(path) == path
    with pytest.raises(InputError, match="notebook '01_rooting' is unknown; did you mean '01_routing'"):
        notebook.find("01_rooting")
    for name in ("nowhere/01_routing", "", ".", "..", str(tmp_path)):
        with pytest.raises(InputError, match="is unknown"):
            notebook.find(name)


def test_the_name_of_the_output_tells_parameters_apart(tmp_path: Path):
    path = write(tmp_path)
    names = {notebook.default_output(path, values) for values in ({}, {"seed": 1}, {"seed": 2}, {"seed": 2})}
    assert len(names) == 3
    assert notebook.default_output(path, {"seed": 1, "rate": 0.1}) == notebook.default_output(
        path, {"rate": 0.1, "seed": 1}
    )


def test_what_is_wrong_is_told_before_anything_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    plain = write(tmp_path, name="plain.ipynb", parameters=None)
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    strange = write(tmp_path, name="strange.ipynb")
    strange.write_text(strange.read_text().replace('"python3"', '"julia"'))
    (tmp_path / "file").write_text("")
    wrong = [
        ((path, {"sed": "1"}), "did you mean 'seed'"),
        ((plain, {"seed": "1"}), "has no cell tagged 'parameters'"),
        ((broken, {"seed": "1"}), "cannot be read"),
        ((strange, {}), "'julia' is unknown"),
        ((path, {}, path), "is the notebook itself"),
        ((path, {}, tmp_path / "out.html"), "must end in .ipynb"),
        ((path, {}, tmp_path / "file" / "out.ipynb"), "cannot be written"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            notebook.run(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


# -- running


@pytest.mark.notebook
def test_a_run_has_the_parameters_and_keeps_its_output(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show = "import json; print(json.dumps([preset, seed, temperature, top_k, shared]))"
    path = write(tmp_path, show, name="with {braces}.ipynb")
    original = path.read_bytes()
    output = notebook.run(path, {"seed": "3", "shared": "false", "temperature": "2", "top_k": "none"})
    assert output.parent == Path("out") and output.name.startswith("with {braces}-")
    assert json.loads(cells(output)[-1]["outputs"][0]["text"][0]) == ["small", 3, 2.0, None, False]
    assert path.read_bytes() == original


@pytest.mark.notebook
def test_a_failed_run_is_kept_with_the_error(tmp_path: Path):
    path = write(tmp_path, "print('before')", "raise RuntimeError('on purpose')", "print('after')")
    output = tmp_path / "kept" / "failed.ipynb"
    with pytest.raises(NotebookError, match=r"In \[3\]: RuntimeError: on purpose") as caught:
        notebook.run(path, output=output)
    assert caught.value.output == output
    outputs = [cell["outputs"] for cell in cells(output) if "outputs" in cell]
    assert any(part.get("ename") == "RuntimeError" for parts in outputs for part in parts)
    assert outputs[-1] == []


@pytest.mark.notebook
def test_a_kernel_that_dies_is_a_failed_run(tmp_path: Path):
    path = write(tmp_path, "import os; os.write(2, b'last words'); os._exit(1)")
    with pytest.raises(NotebookError, match=r"the kernel ended: .*last words"):
        notebook.run(path, output=tmp_path / "died.ipynb")
    assert cells(tmp_path / "died.ipynb")
