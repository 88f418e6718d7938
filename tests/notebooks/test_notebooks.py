"""The notebooks as they are stored, and as papermill and nbval run them.

nbval compares the cells marked NBVAL_CHECK_OUTPUT with their stored outputs. These cells show what does not depend on
the preset, so the stored outputs of the small preset are compared with a run at smoke.
"""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from workbench import notebook

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = notebook.names()
PLOTLY = "application/vnd.plotly.v1+json"
MARK = "NBVAL_CHECK_OUTPUT"
VARIANTS = {  # a second parameter set each, beside the defaults at smoke
    "00_tour": {"seed": 3, "n_experts": 5, "top_k": 1},
    "01_routing": {"seed": 7},
    "04_lora_experts": {"seed": 7},
    "09_attention": {"seed": 7},
    "17_kernels": {"seed": 7},
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(content: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in content.cells if cell.cell_type == "code"]


def test_there_is_a_tour_and_every_notebook_has_a_second_parameter_set():
    assert "00_tour" in NAMES and set(VARIANTS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_as_a_reader_finds_it(name):
    content = read(name)
    declared = notebook.parameters(FOLDER / f"{name}.ipynb")
    assert {"preset", "seed", "device"} <= set(declared) and declared["preset"].default == "small"
    assert content.cells[0].cell_type == "markdown" and content.cells[0].source.startswith("# ")
    outputs = [output for cell in code(content) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert all(cell.execution_count for cell in code(content)), "run notebooks/store.py"
    figures = [output.data for output in outputs if PLOTLY in output.get("data", {})]
    assert len(figures) >= 6
    for data in figures:  # seen without running and without JavaScript
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        title = data[PLOTLY]["layout"]["title"]
        assert title["text"], "every figure has a title"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 3e6


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_machine_is_stored(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert "papermill" not in read(name).metadata
    noise = re.findall(r"/(?:tmp|home|root|Users)/[\w.-]+", re.sub(r'"image/png": "[^"]*"', "", text))
    assert not noise, noise


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_papermill_runs_it_with_other_parameters(name, tmp_path, monkeypatch):
    """Plain papermill, from a directory that is not the repository."""
    monkeypatch.chdir(tmp_path)
    given = {"preset": "smoke"} | VARIANTS[name]
    papermill.execute_notebook(str(FOLDER / f"{name}.ipynb"), "out.ipynb", given, progress_bar=False)
    executed = nbformat.read("out.ipynb", as_version=4)
    assert not [o for cell in code(executed) for o in cell.outputs if o.output_type == "error"]
    assert sum(PLOTLY in o.get("data", {}) for cell in code(executed) for o in cell.outputs) >= 6


def with_parameters(content: nbformat.NotebookNode, given: dict) -> nbformat.NotebookNode:
    """The notebook with a cell that sets parameters, and its stored outputs kept (papermill would clear them)."""
    place = next(i for i, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", []))
    source = "\n".join(f"{key} = {value!r}" for key, value in given.items())
    content.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    return content


def nbval(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "-q"]
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:timeout",
        f"--rootdir={path.parent}",
        "-c",
        "/dev/null",
    ]
    return subprocess.run([*command, *options, path.name], cwd=path.parent, capture_output=True, text=True)


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_nbval_finds_the_stored_outputs_of_the_marked_cells(name, tmp_path):
    content = with_parameters(read(name), {"preset": "smoke"})
    marked = [cell for cell in code(content) if MARK in cell.source]
    assert len(marked) >= 2 and all(cell.outputs for cell in marked), "a marked cell without outputs is not compared"
    nbformat.write(content, tmp_path / f"{name}.ipynb")
    result = nbval(tmp_path / f"{name}.ipynb")
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{len(code(content))} passed" in result.stdout


@pytest.mark.notebook
def test_nbval_notices_an_output_that_differs(tmp_path):
    content = with_parameters(read("00_tour"), {"preset": "smoke"})
    last = next(i for i, cell in enumerate(content.cells) if MARK in cell.source)
    content.cells = content.cells[: last + 1]
    content.cells[last].outputs[0].text = json.dumps("equal to something else")
    nbformat.write(content, tmp_path / "tampered.ipynb")
    result = nbval(tmp_path / "tampered.ipynb")
    assert result.returncode == 1 and "1 failed" in result.stdout, result.stdout[-2000:]
