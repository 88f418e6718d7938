"""Synthetic runs that the views are tried on: finished ones, made once, and one that is being written."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.synthetic import synthetic_meta, synthetic_steps, write_synthetic_run
from workbench.live.store import Run, RunWriter

SHAPE = {"n_layers": 3, "n_experts": 8, "top_k": 2, "seed": 1, "domains": ("python", "docs", "names")}


class Growing:
    """A run being written: ``grow(n)`` adds n steps."""

    def __init__(self, folder: Path):
        self.writer = RunWriter.create(folder, synthetic_meta(n_steps=1000, **SHAPE))
        self.steps = synthetic_steps(self.writer, n_steps=1000, **SHAPE)
        self.run = Run(folder)

    def grow(self, n: int) -> None:
        for _ in range(n):
            next(self.steps)


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("view-runs")
    write_synthetic_run(root / "first", 211, **SHAPE)
    write_synthetic_run(root / "second", 211, **SHAPE | {"seed": 9})
    write_synthetic_run(root / "single", 111, **SHAPE | {"top_k": 1})
    return root


@pytest.fixture
def run(runs_folder: Path) -> Run:
    return Run(runs_folder / "first")


@pytest.fixture
def other(runs_folder: Path) -> Run:
    return Run(runs_folder / "second")


@pytest.fixture
def single(runs_folder: Path) -> Run:
    """One expert per token."""
    return Run(runs_folder / "single")


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    run = Growing(tmp_path / "growing")
    yield run
    run.writer.close()


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Growing]:
    """A second run that is being written."""
    run = Growing(tmp_path / "another")
    yield run
    run.writer.close()
