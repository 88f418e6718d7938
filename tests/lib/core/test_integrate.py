"""Fixed-step RK4 over many systems at once: its order, scipy and torchdiffeq as oracles, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.integrate import DivergedError, rk4


def oscillator(t, x):
    return torch.stack([x[..., 1], -x[..., 0]], -1)


def error(points: int) -> float:
    times = torch.linspace(0, 2.0, points, dtype=torch.float64)
    found = rk4(oscillator, torch.tensor([1.0, 0.0], dtype=torch.float64), times)
    return (found[-1] - torch.tensor([math.cos(2.0), -math.sin(2.0)], dtype=torch.float64)).abs().max().item()


def test_half_the_step_has_a_sixteenth_of_the_error():
    for points in (11, 21, 41):
        assert error(points) / error(2 * points - 1) == pytest.approx(16, rel=0.1)


def test_substeps_are_points_between():
    x0, fine = torch.randn(3, 2, dtype=torch.float64), torch.linspace(0, 2, 13, dtype=torch.float64)
    torch.testing.assert_close(rk4(oscillator, x0, fine[::4], substeps=4), rk4(oscillator, x0, fine)[::4])


def test_the_explicit_time_is_that_of_each_stage():
    """A field of t alone is integrated by Simpson's rule, which is exact for cubics."""
    times = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)  # an uneven grid
    found = rk4(lambda t, x: (4 * t**3).expand_as(x), torch.zeros(1, dtype=torch.float64), times)
    torch.testing.assert_close(found[:, 0], times**4)


def test_every_system_may_have_a_grid_of_its_own():
    x0 = torch.randn(3, 4, 2, dtype=torch.float64)
    grids = torch.linspace(0, 1, 6, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None]
    together = rk4(oscillator, x0, grids[:, None], substeps=2)
    for system, grid in enumerate(grids):
        torch.testing.assert_close(together[:, system], rk4(oscillator, x0[system], grid, substeps=2))


def test_scipy_and_torchdiffeq_find_the_same():
    integrate = pytest.importorskip("scipy.integrate")
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def field(t, x):  # van der Pol's, three of them
        return torch.stack([x[..., 1], rate * (1 - x[..., 0] ** 2) * x[..., 1] - x[..., 0]], -1)

    x0 = torch.tensor([[2.0, 0.0], [0.5, 1.0], [1.0, -1.0]], dtype=torch.float64)
    times = torch.linspace(0, 3, 16, dtype=torch.float64)
    found = rk4(field, x0, times, substeps=20)
    for system in range(3):
        one = integrate.solve_ivp(
            lambda t, s, a=float(rate[system]): (s[1], a * (1 - s[0] ** 2) * s[1] - s[0]),
            (0, 3), x0[system].numpy(), "DOP853", times.numpy(), rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        np.testing.assert_allclose(found[:, system].numpy(), one.y.T, atol=1e-6)
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.testing.assert_close(found, torchdiffeq.odeint(field, x0, times, rtol=1e-10, atol=1e-12), atol=1e-6, rtol=0)


def test_gradients_are_those_of_the_steps():
    x0, times = torch.randn(2, 2, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rk4(oscillator, x, times), (x0,))


def test_a_stiff_system_is_named():
    rate = torch.tensor([1.0, 1e6])

    def field(t, x):
        return -rate[:, None, None] * x

    said_by = r"trajectory \[1, 0\] leaves the finite numbers by point 2 \(time 2\)"
    with pytest.raises(DivergedError, match=said_by) as said:
        rk4(field, torch.ones(2, 3, 1), torch.arange(8.0))
    assert isinstance(said.value, FloatingPointError) and said.value.where == (1, 0) and said.value.point == 2
    states = rk4(field, torch.ones(2, 3, 1), torch.arange(8.0), check=False)
    assert states[:, 0].isfinite().all() and not states[-1, 1].isfinite().any()


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (torch.tensor([0.0]), "times has 1 point but must have at least 2"),
        (torch.zeros(3, 0), "times has 0 points"),
        (torch.tensor([0.0, 1.0, 1.0]), "times does not rise"),
        (torch.tensor([0.0, math.nan]), "times does not rise"),
        (torch.tensor([[0.0, 1.0], [0.0, 2.0]]), r"times has grids of shape \(2,\) but x0 has systems of shape \(3,\)"),
    ],
)
def test_a_grid_that_is_none_is_named(times, said):
    with pytest.raises(InputError, match=said):
        rk4(oscillator, torch.ones(3, 2), times)


def test_substeps_are_at_least_one():
    with pytest.raises(InputError, match="substeps is 0 but must be at least 1"):
        rk4(oscillator, torch.ones(2), torch.arange(3.0), substeps=0)
