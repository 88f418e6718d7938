"""Trajectories: that they solve their equations, and the same each time."""

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import dynamics
from workbench.lib.data.dynamics import FAMILIES, integrate


@pytest.mark.parametrize("family", ["pendulum", "glycolysis", "lorenz"])
def test_slopes_of_a_trajectory_are_those_of_the_field(family):
    found = data.load("dynamics", families=(family,))
    states, parameter = found.states[family], float(found.parameters[family][3])
    assert states.shape[:3] == (13, 32, 40) and states.isfinite().all()
    start, step = states[3, :, 7].double().numpy(), 1e-3
    ahead = integrate(family, parameter, start, np.array([0.0, step, 2 * step]))
    slope = (ahead[:, 2] - ahead[:, 0]) / (2 * step)
    field = np.stack(FAMILIES[family].field(ahead[:, 1].T, parameter), 1)
    np.testing.assert_allclose(slope, field, rtol=1e-3, atol=1e-2 * np.abs(field).max())
    # and the points between two that are kept
    seconds = found.times[family].double().numpy()[[0, 1]]
    later = integrate(family, parameter, start, np.array([0.0, seconds[1]]))[:, 1]
    np.testing.assert_allclose(later, states[3, :, 8].numpy(), rtol=1e-3, atol=1e-3)


def test_a_pendulum_loses_energy_and_prey_and_predators_return():
    found = data.load("dynamics", families=("pendulum", "lotka-volterra"))
    a = found.parameters["pendulum"][:, None, None]
    angle, rate = found.states["pendulum"].unbind(-1)
    energy = rate.square() / 2 + a * (1 - angle.cos())
    assert (energy.diff(dim=-1) < 1e-4).all() and (energy[..., -1] < 0.75 * energy[..., 0]).all()
    a = found.parameters["lotka-volterra"][:, None, None]
    prey, predators = found.states["lotka-volterra"].double().unbind(-1)
    kept = prey / 2 - prey.log() / 2 + predators / 2 - a * predators.log()  # constant along every orbit
    assert (kept - kept[..., :1]).abs().max() < 1e-4


def test_families_are_alone_and_environments_differ(home):
    both, one = data.load("dynamics", families=("duffing", "van-der-pol")), dynamics.load(("van-der-pol",))
    assert torch.equal(both.states["van-der-pol"], one.states["van-der-pol"])
    assert len(one.parameters["van-der-pol"].unique()) == 13
    low, high = FAMILIES["van-der-pol"].parameter
    assert low < one.parameters["van-der-pol"].min() and one.parameters["van-der-pol"].max() < high


def test_wrong_families_are_named():
    with pytest.raises(InputError, match="family 'pendula' is unknown"):
        dynamics.load(("pendula",))
    with pytest.raises(InputError, match="each once"):
        dynamics.load(("duffing", "duffing"))
