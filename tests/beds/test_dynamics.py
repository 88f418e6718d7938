"""Forecasts: windows of trajectories that stay in their split, and a model between persistence and the truth."""

import pytest
import torch

from workbench.beds import dynamics
from workbench.errors import InputError
from workbench.lib import data


@pytest.fixture(scope="module")
def task():
    return dynamics.make()


def test_windows_are_consecutive_points_of_trajectories_of_their_split(task):
    states = data.load("dynamics", families=("pendulum",)).states["pendulum"]
    learned = states[:9, :22].flatten(0, 2)
    seen = set()
    for split, part in (dynamics.SPLITS | dynamics.ADAPTATION).items():
        x, y = task.splits[split]["pendulum"]
        environments = range(9, 13) if split in dynamics.ADAPTATION else range(9)
        starts = states.shape[2] - 7
        rows = torch.cat([x, y], 1).view(len(environments), -1, starts, 8, 2)
        wanted = (states[list(environments), part] - learned.mean(0)) / learned.std(0)
        for start in (0, 5, starts - 1):
            torch.testing.assert_close(rows[:, :, start], wanted[:, :, start : start + 8])
        ends = {row.numpy().tobytes() for row in rows[:, :, 0, 0].flatten(0, 1)}
        assert seen.isdisjoint(ends)
        seen |= ends
    assert task.manifest["pendulum"]["ahead"] == 5 and task.domains == dynamics.PLANAR


def test_a_perceptron_is_better_than_persistence_and_not_perfect(task):
    rows = {row.case: row for row in dynamics.measure({"steps": 150, "batch": 128})}
    for case in ("planar families, test", "planar families, adapted", "lorenz, test"):
        assert 0.05 < rows[case].reached < 0.6 * rows[case].trivial
    assert rows["planar families, adapted"].reached > rows["planar families, test"].reached


def test_persistence_repeats_the_last_point(task):
    batch = task.batch("train", 4, torch.Generator().manual_seed(0))
    said = dynamics.Persistence(5)(batch.inputs)
    assert said.shape == batch.targets.shape
    assert torch.equal(said[:, 0], batch.inputs[:, -1]) and torch.equal(said[:, 4], batch.inputs[:, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("lorenz", "duffing")}, "families have .* variables but must all have the same number"),
        ({"seen": 30, "ahead": 20}, "together at most 40"),
        ({"families": ("pendula",)}, "family 'pendula' is unknown; did you mean 'pendulum'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        dynamics.make(**options)
