"""The tail exponent: known exponents, agreement with the `powerlaw` package, and honesty on small samples."""

import math
import warnings

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.measures.power_law import bootstrap_alpha, fit_power_law


def pareto(n: int, alpha: float, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_recovers_the_exponent(alpha):
    fit = fit_power_law(pareto(2000, alpha))
    assert abs(fit.alpha - alpha) < 3 * fit.stderr
    assert fit.distance < 0.03 and fit.undefined_reason is None
    fixed = fit_power_law(pareto(2000, alpha), x_min=1.0)
    assert (fixed.m, fixed.x_min) == (2000, 1.0)
    assert abs(fixed.alpha - alpha) < 3 * fixed.stderr


def test_fixed_start_by_hand():
    fit = fit_power_law(torch.tensor([math.e, 1.0, math.e**2, 0.01]), x_min=1.0)
    assert fit.alpha == pytest.approx(1 + 3 / 3)
    assert (fit.m, fit.stderr) == (3, pytest.approx(1 / math.sqrt(3)))
    assert fit.alpha_hat == pytest.approx(2 * math.log10(math.e**2))
    # distribution of the fit at 1, e, e^2: 0, 1 - 1/e, 1 - 1/e^2; of the sample: 0, 1/3, 2/3
    assert fit.distance == pytest.approx(max(1 - 1 / math.e - 1 / 3, 1 - math.e**-2 - 2 / 3))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_powerlaw_package(seed):
    powerlaw = pytest.importorskip("powerlaw")
    values = pareto(400, 2.2, seed) + 0.3 * pareto(400, 6.0, seed + 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(values.numpy(), xmin=fit_power_law(values).x_min, verbose=False)
    ours = fit_power_law(values)
    assert ours.m < 400 and ours.alpha == pytest.approx(theirs.power_law.alpha, rel=1e-6)
    assert ours.distance == pytest.approx(theirs.power_law.D, abs=2 / ours.m)  # they look on both sides of each step


def test_the_start_minimises_the_distance():
    values = pareto(150, 2.2)
    best = fit_power_law(values)
    others = [fit_power_law(values, float(x)).distance for x in values.sort().values[:-2]]
    assert best.distance == pytest.approx(min(others))


def test_scale_moves_the_start_only():
    values = pareto(300, 3.0)
    a, b = fit_power_law(values), fit_power_law(1000 * values)
    assert (b.alpha, b.m, b.x_min / a.x_min) == (pytest.approx(a.alpha), a.m, pytest.approx(1000))


def test_small_samples_are_marked_and_what_cannot_be_fitted_is_nan():
    small = fit_power_law(pareto(127, 2.5))
    assert not math.isnan(small.alpha) and "127 values" in small.undefined_reason
    assert fit_power_law(pareto(128, 2.5)).undefined_reason is None
    for values in (torch.zeros(200), torch.ones(200), torch.full((200,), torch.nan), torch.tensor([])):
        fit = fit_power_law(values)
        assert math.isnan(fit.alpha) and fit.m == 0 and "no tail" in fit.undefined_reason
    padded = torch.cat([pareto(200, 2.5), torch.zeros(50)])  # a matrix of lower rank
    assert fit_power_law(padded) == fit_power_law(pareto(200, 2.5))


def test_a_gaussian_matrix_has_a_large_exponent():
    w = torch.randn(400, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert fit_power_law(torch.linalg.svdvals(w).square()).alpha > 4


def test_bootstrap_band():
    values = pareto(200, 2.5)
    low, high = bootstrap_alpha(values, 60, generator=torch.Generator().manual_seed(0))
    assert low < 2.5 < high and low < fit_power_law(values).alpha < high
    assert (low, high) == bootstrap_alpha(values, 60, generator=torch.Generator().manual_seed(0))
    assert all(np.isnan(bootstrap_alpha(torch.ones(10), 5)))


def test_bad_arguments():
    with pytest.raises(InputError, match="x_min is 0"):
        fit_power_law(torch.ones(3), 0)
    with pytest.raises(InputError, match="samples is 1"):
        bootstrap_alpha(torch.ones(3), 1)
