"""The random-matrix null: against sampled Gaussian matrices, the known fractions, and planted spikes."""

import pytest
import torch
from scipy import integrate

from workbench.errors import InputError
from workbench.lib.measures.random_matrix import (
    bulk_std,
    marchenko_pastur_spectrum,
    mp_edge,
    null_measures,
    outliers,
    soft_rank,
    stable_rank_null,
)
from workbench.lib.measures.spectra import measures, singular_values


def gaussian(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "fractions"),
    [(1, (0.80, 0.60, 0.50, 0.51, 0.25)), (2, (0.93, 0.78, 0.67, 0.66, 0.35)), (4, (0.97, 0.88, 0.80, 0.76, 0.44))],
)
def test_fractions_of_the_null(ratio, fractions):
    n = 200
    null = null_measures((n * ratio, n))
    names = ("effective_rank", "energy_entropy_rank", "participation_ratio", "energy_rank_90", "stable_rank")
    assert [null[name] / n for name in names] == pytest.approx(fractions, abs=0.012)
    sampled = measures(singular_values(gaussian(n, n * ratio)), (n, n * ratio))
    for name, value in null.items():
        assert value == pytest.approx(sampled[name].item(), rel=0.04), name
    assert null["stable_rank"] == stable_rank_null((n, n * ratio))


@pytest.mark.parametrize("shape", [(150, 150), (150, 300), (600, 150)])
def test_spectrum_overlays_a_sampled_one(shape):
    sampled = torch.linalg.svdvals(gaussian(*shape, std=0.3))
    curve = marchenko_pastur_spectrum(shape, std=0.3)
    assert curve.shape == (150,) and (curve.diff() < 0).all()
    assert (curve - sampled).abs().max() < 0.03 * sampled[0]
    assert curve[0].square() < mp_edge(shape, 0.3)


def test_quantiles_against_the_integrated_density():
    n, m = 50, 200
    q, low, high = n / m, (1 - 0.5) ** 2, (1 + 0.5) ** 2
    values = marchenko_pastur_spectrum((m, n)).square() / m
    for k in (0, 9, 25, 49):
        x = values[k].item()
        mass, _ = integrate.quad(
            lambda t: ((high - t) * (t - low)) ** 0.5 / (2 * torch.pi * q * t), x, high, epsabs=1e-9
        )
        assert mass == pytest.approx((k + 0.5) / n, abs=1e-5)


def test_edge_by_hand():
    assert mp_edge((100, 25), 2.0).item() == pytest.approx(4 * (10 + 5) ** 2)
    assert mp_edge((25, 100), 2.0) == mp_edge((100, 25), 2.0)
    assert mp_edge((100, 25), torch.tensor([1.0, 2.0])).tolist() == pytest.approx([225, 900])
    assert stable_rank_null((100, 100)) == pytest.approx(25)


def test_noise_has_no_outliers_but_rarely():
    values = torch.linalg.svdvals(gaussian(100, 120, 80))
    counts = outliers(values, (120, 80))
    assert counts.sum() <= 4  # one per cent each
    assert (outliers(values, (120, 80), 1.0) <= 1).all()
    torch.testing.assert_close(bulk_std(values, (120, 80)).mean().item(), 1.0, rtol=0.01, atol=0)
    assert soft_rank(values, (120, 80)).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n_spikes", [1, 5])
def test_planted_spikes_are_counted_and_do_not_move_the_bulk(n_spikes):
    noise = gaussian(300, 200, std=0.1)
    u, v = (torch.linalg.qr(gaussian(n, n_spikes, seed=n)).Q for n in (300, 200))
    values = torch.linalg.svdvals(noise + 10 * u @ v.T)
    assert outliers(values, (300, 200)) == n_spikes
    assert bulk_std(values, (300, 200)).item() == pytest.approx(0.1, rel=0.04)
    assert soft_rank(values, (300, 200)) < 0.15


def test_undefined_and_bad_input():
    assert outliers(torch.full((5,), torch.nan), (5, 6)).isnan()
    assert bulk_std(torch.ones(2, 5), (5, 6)).shape == (2,)
    with pytest.raises(InputError, match="must hold all 6"):
        bulk_std(torch.ones(5), (6, 7))
    with pytest.raises(InputError, match="shape is"):
        mp_edge((0, 5))
