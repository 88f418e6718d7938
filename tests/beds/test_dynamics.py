"""Forecasts: windows of trajectories that stay in their split, and a model between persistence and the truth."""

import pytest
import torch

from workbench.beds import dynamics
from workbench.beds.dynamics import MIXED, forecasts
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


def test_forecasts_are_whole_trajectories_of_each_environment_in_units_of_its_family():
    task = forecasts(environments=3, starts=5, points=6, new=2)
    states = task.trajectories
    assert task.domains == MIXED and states.shape == (12, 5, 6, 2) and task.times.shape == (4, 6)
    for family in range(4):
        mine = states[task.family == family].flatten(0, 2)
        torch.testing.assert_close(mine.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.std(0), torch.ones(2), atol=1e-5, rtol=0)
    found = data.load("dynamics", families=MIXED)
    assert task.times[1].equal(found.times["pendulum"][:6]) and not task.times[0].equal(task.times[1])
    assert task.splits["test"]["pendulum"][1].shape == (3, 6, 6, 2)
    assert task.new["adapt"].shape == (8, 4, 6, 2) and task.new["adapted"].shape == (8, 28, 6, 2)
    assert task.new_family.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_whole_batch_of_forecasts_has_every_environment_once():
    task = forecasts(environments=3, starts=2, points=4)
    batch = task.batch("train", 12, torch.Generator())
    assert batch.inputs.tolist() == list(range(12)) and torch.equal(batch.targets, task.trajectories)
    fewer = task.batch("train", 5, torch.Generator().manual_seed(0))
    assert len(fewer) == 5 and torch.equal(task.family[fewer.inputs], fewer.domain)


def test_what_a_forecast_is_off_is_the_mean_square_of_all_points_but_the_first():
    task = forecasts(("pendulum",), environments=2, starts=2, points=3)
    trajectories = task.splits["test"]["pendulum"][1]

    class Says(torch.nn.Module):
        def forward(self, environment, x0, times, context=None):
            assert torch.equal(x0, trajectories[:, :, 0]) and times.shape == (2, 3)
            return trajectories + torch.tensor([9.0, 1.0, 2.0])[:, None]

    assert task.evaluate(Says(), "test")["mse"] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 1}, "points is 1 but must be between 2 and 40"),
        ({"environments": 10}, "environments is 10 but must be between 1 and 9"),
        ({"starts": 23}, "starts is 23 but must be between 1 and 22"),
        ({"new": 5}, "new is 5 but must be between 1 and 4"),
        ({"families": ("lorenz", "pendulum")}, "must all have the same number"),
    ],
)
def test_forecasts_that_have_no_place_are_named(options, said):
    with pytest.raises(InputError, match=said):
        forecasts(**options)
