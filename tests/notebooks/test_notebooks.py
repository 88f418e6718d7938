"""The notebooks as they are stored, and as nbval and papermill run them.

nbval runs each once, at smoke, and compares the cells marked NBVAL_CHECK_OUTPUT with their stored outputs. These cells
show what does not depend on the preset, so the stored outputs of the small preset are compared. papermill runs some
of them with other parameters.
"""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workbench import notebook

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = notebook.names()
PLOTLY = "application/vnd.plotly.v1+json"
MARK = "NBVAL_CHECK_OUTPUT"
VARIANTS = {  # what papermill runs beside the defaults: the tour, whose cells depend on the most, and families
    "00_tour": {"seed": 3, "n_experts": 5, "top_k": 1},
    "01_routing": {"seed": 7},
    "02_sharing": {"seed": 7},
    "03_subspaces": {"seed": 7},
    "05_adapters": {"seed": 7},
    "06_low_rank": {"seed": 7},
    "07_merging": {"seed": 7},
    "08_modality": {"seed": 7},
    "10_data_mixtures": {"seed": 7},
    "11_distributed": {"seed": 7},
    "12_serving": {"seed": 7},
    "13_features": {"seed": 7},
    "14_search": {"seed": 7},
    "15_imaging": {"seed": 7},
    "16_dynamics": {"seed": 7},
}
COUNT_FIGURES = f"""
FIGURES = 0


def pytest_runtest_teardown(item):
    global FIGURES
    FIGURES += sum("{PLOTLY}" in output.get("data", {{}}) for output in item.test_outputs or [])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"figures: {{FIGURES}}")
"""


def read(name: str):
    import nbformat  # heavy enough for only the process that runs these tests to pay for it

    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(content) -> list:
    return [cell for cell in content.cells if cell.cell_type == "code"]


def test_there_is_a_tour_and_what_is_run_twice_exists():
    assert "00_tour" in NAMES and set(VARIANTS) < set(NAMES)


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
def test_pictures_are_inside_the_notebook(name):
    """JupyterLab serves the folder of the notebooks and nothing beside it."""
    for cell in read(name).cells:
        shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)|<img[^>]*src=[\"']([^\"']*)", cell.source)
        for target in map("".join, shown if cell.cell_type == "markdown" else ()):
            picture = target.removeprefix("attachment:")
            assert picture != target, f"{target} is not attached to its cell"
            attached = base64.b64decode(cell.attachments[picture]["image/png"])
            assert attached == (FOLDER.parent / "docs" / picture).read_bytes(), "run notebooks/store.py"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_machine_is_stored(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert "papermill" not in read(name).metadata
    noise = re.findall(r"/(?:tmp|home|root|Users)/[\w.-]+", re.sub(r'"image/png": "[^"]*"', "", text))
    assert not noise, noise


@pytest.mark.notebook
@pytest.mark.parametrize("name", VARIANTS)
def test_papermill_runs_it_with_other_parameters(name, tmp_path, monkeypatch):
    """Plain papermill, from a directory that is not the repository."""
    import nbformat
    import papermill

    monkeypatch.chdir(tmp_path)
    given = {"preset": "smoke"} | VARIANTS[name]
    papermill.execute_notebook(str(FOLDER / f"{name}.ipynb"), "out.ipynb", given, progress_bar=False)
    executed = nbformat.read("out.ipynb", as_version=4)
    assert not [o for cell in code(executed) for o in cell.outputs if o.output_type == "error"]
    assert sum(PLOTLY in o.get("data", {}) for cell in code(executed) for o in cell.outputs) >= 6


def with_parameters(content, given: dict):
    """The notebook with a cell that sets parameters, and its stored outputs kept (papermill would clear them)."""
    from nbformat.v4 import new_code_cell

    place = next(i for i, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", []))
    content.cells.insert(place + 1, new_code_cell("\n".join(f"{key} = {value!r}" for key, value in given.items())))
    return content


def nbval(content, folder: Path) -> subprocess.CompletedProcess:
    """Run a notebook from a folder of its own, by pytest with nbval and no other plugin."""
    import nbformat

    nbformat.write(content, folder / "run.ipynb")
    (folder / "conftest.py").write_text(COUNT_FIGURES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "nbval.plugin", "-p", "no:cacheprovider", "--nbval-lax"]
    options = ["--nbval-current-env", "--nbval-cell-timeout=900", "--nbval-kernel-startup-timeout=300"]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *options, f"--rootdir={folder}", "-c", os.devnull, "run.ipynb"],
        cwd=folder,
        env=alone | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.notebook
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_at_smoke_and_its_marked_cells_show_what_is_stored(name, tmp_path):
    content = with_parameters(read(name), {"preset": "smoke"})
    marked = [cell for cell in code(content) if MARK in cell.source]
    assert len(marked) >= 2 and all(cell.outputs for cell in marked), "a marked cell without outputs is not compared"
    result = nbval(content, tmp_path)
    first_failures = result.stdout.partition("= FAILURES =")[2][:6000]
    assert result.returncode == 0, first_failures or result.stdout[-3000:]
    assert f"{len(code(content))} passed" in result.stdout
    assert int(re.search(r"^figures: (\d+)", result.stdout, re.MULTILINE)[1]) >= 6


@pytest.mark.notebook
def test_a_marked_cell_that_shows_something_else_is_noticed(tmp_path):
    """And one that is not marked is not compared."""
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    def cell(source: str, stored: str):
        return new_code_cell(source, execution_count=1, outputs=[new_output("stream", text=stored)])

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [cell("print(1)", "2\n"), cell(f"# {MARK}\nprint(1)", "1\n"), cell(f"# {MARK}\nprint(1)", "2\n")]
    result = nbval(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path)
    assert result.returncode == 1 and "1 failed, 2 passed" in result.stdout, result.stdout[-2000:]
    assert "figures: 0" in result.stdout
