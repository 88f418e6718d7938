"""A notebook over a grid: each point once, what failed again, the same on each engine, in one thread."""

import json
from pathlib import Path

import pytest

from tests.test_notebook_runner import write
from workbench.cli import main
from workbench.engines import Workers
from workbench.errors import InputError
from workbench.notebook_grid import points, run_grid

PARAMETERS = """\
seed: int = 0  # 0..10
name: str = "a"  # one of: a, b
fails: bool = False
"""
CODE = """\
import os, pathlib
if fails and not pathlib.Path(os.environ["GRID_MENDED"]).exists():
    raise RuntimeError(f"seed {seed} fails")
if name == "b":
    import torch
    draw = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], draw.tolist())
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRID_MENDED", str(tmp_path / "mended"))
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, CODE, parameters=PARAMETERS)


def printed(output: str) -> str:
    (text,) = (
        "".join(part["text"])
        for cell in json.loads(Path(output).read_text())["cells"]
        for part in cell.get("outputs", ())
        if part["output_type"] == "stream"
    )
    return text


def test_each_combination_is_a_point_in_the_types_that_the_notebook_declares(path: Path):
    assert points(path, {"seed": ["1", 2], "name": ["a", "b"]}) == [
        {"seed": 1, "name": "a"}, {"seed": 1, "name": "b"}, {"seed": 2, "name": "a"}, {"seed": 2, "name": "b"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"sed": [1]}, "parameter of nb 'sed' is unknown; did you mean 'seed'"),
        ({"seed": [1, 11]}, "seed is 11 but must be"),
        ({"seed": ["1", 1]}, "seed=1 twice"),
        ({"seed": []}, "no value of seed"),
        ({"seed": [0] * 101, "name": ["a"] * 100}, "10100 points but may have 10000"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_runs(path: Path, tmp_path: Path, grid: dict, said: str):
    with pytest.raises(InputError, match=said):
        run_grid(path, grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_kept_and_what_failed_is_run_again(path: Path, tmp_path: Path):
    seen = []
    grid = {"seed": [0], "fails": [False, True]}
    rows = run_grid(path, grid, tmp_path / "out", progress=lambda *event: seen.append(event))
    assert [row.state for row in rows] == ["done", "failed"]
    assert rows[1].error.endswith("RuntimeError: seed 0 fails") and rows[1].output.endswith("-failed.ipynb")
    assert "seed 0 fails" in Path(rows[1].output).read_text(), "kept as far as it came"
    assert [event[:2] for event in seen] == [(1, 2), (2, 2)]
    (tmp_path / "mended").touch()
    again = run_grid(path, grid, tmp_path / "out")
    assert [row.state for row in again] == ["kept", "done"]
    assert len([*(tmp_path / "out").iterdir()]) == 2, "the failed one is gone"
    write(tmp_path, CODE + "# another notebook", parameters=PARAMETERS)
    assert run_grid(path, {"seed": [0], "fails": [False]}, tmp_path / "out")[0].state == "done"


def test_a_kernel_has_one_thread_and_the_same_numbers_on_each_engine(path: Path, tmp_path: Path):
    grid = {"seed": [3, 4], "name": ["b"]}
    here = run_grid(path, grid, tmp_path / "here")
    for engine in ("loky", "dask"):
        there = run_grid(path, grid, tmp_path / engine, Workers(2, engine))
        assert [printed(row.output) for row in there] == [printed(row.output) for row in here]
    assert printed(here[0].output).split()[:2] == ["1", "1"]


def test_from_a_shell_a_table_ends_it_and_a_failure_is_its_status(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["sweep", "nb.ipynb", "--grid", "fails=false,true", "name=a"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["fails", "name", "state", "seconds", "output", "or", "error"]
    assert [line.split()[:3] for line in out[1:]] == [["False", "a", "done"], ["True", "a", "failed"]]
    assert main(["sweep", "nb.ipynb", "--grid", "fails=false", "name=a", "--out", "out/nb", "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["kept"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "seed"], "NAME=A,B,C"),
        (["--grid", "seed=1", "seed=2"], "'seed' twice"),
        (["--grid", "seed=1", "--engine", "dsk"], "did you mean 'dask'"),
        (["--grid", "seed=1", "--address", "a:1"], "engine loky is this machine"),
    ],
)
def test_wrong_words_are_one_line(path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str):
    assert main(["sweep", "nb.ipynb", *words]) == 2
    assert said in capsys.readouterr().err
