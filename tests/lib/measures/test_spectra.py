"""Singular values by every method, and the measures of a spectrum against closed forms and their orderings."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.measures.spectra import (
    SpectrumResult,
    as_matrix,
    effective_rank,
    energy_entropy_rank,
    energy_rank,
    low_rank_singular_values,
    measures,
    minmax_spectrum,
    normalised_spectrum,
    participation_ratio,
    rms_operator_norm,
    singular_values,
    spectral_norm,
    stable_rank,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
RANKS = (stable_rank, participation_ratio, energy_entropy_rank, effective_rank)  # in ascending order, always


def gaussian(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("method", ["svd", "gram", "auto"])
@pytest.mark.parametrize("shape", [(7, 7), (30, 8), (8, 30), (1, 5), (5, 1), (3, 20, 6)])
def test_exact_methods_against_numpy(method, shape):
    w = gaussian(*shape)
    result = singular_values(w, method)
    np.testing.assert_allclose(result.values, np.linalg.svd(w.numpy(), compute_uv=False), rtol=1e-7)
    assert result.exact and (result.tail_energy == 0).all() and result.undefined_reason is None
    assert result.method == ("gram" if method == "auto" else method)


def test_randomised_is_exact_for_low_rank_and_leaves_the_tail():
    w = gaussian(300, 12) @ gaussian(12, 400, seed=1)
    result = singular_values(w, "rsvd", 12, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.values, torch.linalg.svdvals(w)[:12])
    assert not result.exact and result.tail_energy.item() == pytest.approx(0, abs=1e-6 * w.square().sum().item())
    top = singular_values(w, "rsvd", 5, torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(w)
    assert (top.values <= exact[:5] * (1 + 1e-12)).all()  # never above
    assert top.tail_energy.item() == pytest.approx(exact[5:].square().sum().item(), rel=1e-3)


def test_randomised_is_close_even_for_a_flat_spectrum():
    w = gaussian(300, 300)
    values = singular_values(w, "rsvd", 8, torch.Generator().manual_seed(0)).values
    assert (values / torch.linalg.svdvals(w)[:8]).min() > 0.88


def test_randomised_takes_stacks():
    stack = gaussian(2, 50, 6) @ gaussian(2, 6, 40, seed=1)
    result = singular_values(stack, "rsvd", 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.values, torch.linalg.svdvals(stack)[:, :6])
    assert result.tail_energy.shape == (2,)


def test_randomised_is_seeded_and_whole_when_asked_for_all():
    w = gaussian(40, 30)
    a, b = (singular_values(w, "rsvd", 5, torch.Generator().manual_seed(1)).values for _ in range(2))
    assert torch.equal(a, b)
    whole = singular_values(w, "rsvd", 99, torch.Generator().manual_seed(1))
    assert whole.exact
    torch.testing.assert_close(whole.values, torch.linalg.svdvals(w))


def test_auto_takes_the_randomised_way_above_its_limit():
    result = singular_values(gaussian(257, 260, dtype=torch.float32), generator=torch.Generator().manual_seed(0))
    assert (result.method, result.exact, result.values.shape) == ("rsvd", False, (64,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_computed_in_float32_or_better(dtype):
    w = gaussian(20, 10).to(dtype)
    for method in ("svd", "gram"):
        values = singular_values(w.requires_grad_(), method).values
        assert values.dtype == torch.float64 and not values.requires_grad
        torch.testing.assert_close(values, torch.linalg.svdvals(w.detach().double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["svd", "gram", "rsvd"])
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_zero_and_not_finite_matrices_are_undefined(method, bad):
    stack = torch.stack([gaussian(6, 4), torch.full((6, 4), bad, dtype=torch.float64)])
    result = singular_values(stack, method)
    torch.testing.assert_close(result.values[0], torch.linalg.svdvals(stack[0]))
    assert result.values[1].isnan().all() and "1 of 2 matrices" in result.undefined_reason
    assert "zero or not finite" in singular_values(stack[1], method).undefined_reason
    for name, value in measures(result, (6, 4)).items():
        assert value[1].isnan(), name
        assert not value[0].isnan(), name


@pytest.mark.parametrize("shapes", [((20, 3), (3, 30)), ((2, 5), (5, 30)), ((4, 20, 3), (4, 3, 10))])
def test_low_rank_without_the_product(shapes):
    b, a = gaussian(*shapes[0]), gaussian(*shapes[1], seed=1)
    result = low_rank_singular_values(b, a, scale=0.5)
    exact = torch.linalg.svdvals(0.5 * b @ a)
    r = result.values.shape[-1]
    torch.testing.assert_close(result.values, exact[..., :r])
    torch.testing.assert_close(exact[..., r:], torch.zeros_like(exact[..., r:]), atol=1e-12, rtol=0)
    assert result.exact and result.method == "qr"


def test_fresh_adapter_is_undefined():
    assert low_rank_singular_values(torch.zeros(6, 2), gaussian(2, 5).float()).values.isnan().all()


def test_identity_and_rank_one():
    for measure in RANKS:
        assert measure(torch.ones(9)).item() == pytest.approx(9)
        assert measure(torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert energy_rank(torch.ones(10), 0.9) == 9 and energy_rank(torch.ones(10), 1.0) == 10
    assert energy_rank(torch.tensor([3.0, 0.0, 0.0]), 0.99) == 1


def test_closed_forms_of_a_geometric_spectrum():
    """s_k = 2^-k, k = 0 .. n - 1."""
    n = 12
    s = 2.0 ** -torch.arange(n, dtype=torch.float64)
    q, p = 1 / 4, 1 / 2  # ratios of the energies and of the values
    assert stable_rank(s).item() == pytest.approx((1 - q**n) / (1 - q))
    assert participation_ratio(s).item() == pytest.approx(((1 - q**n) / (1 - q)) ** 2 * (1 - q**2) / (1 - q ** (2 * n)))
    for measure, ratio in ((effective_rank, p), (energy_entropy_rank, q)):
        weights = [(1 - ratio) * ratio**k / (1 - ratio**n) for k in range(n)]
        assert measure(s).item() == pytest.approx(math.exp(scipy.stats.entropy(weights)))
    assert energy_rank(s, 0.9) == 2  # 3/4, 15/16
    assert energy_rank(s, 0.99) == 4  # 63/64 < .99 < 255/256
    assert rms_operator_norm(3 * s, (4, 9)).item() == pytest.approx(3 * 1.5)


@PROPERTY
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda v: max(v) > 1e-3), st.floats(1e-3, 1e3))
def test_orderings_and_scale_invariance(values, scale):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    ranks = [measure(s).item() for measure in RANKS]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(ranks))
    assert ranks[0] >= 1 - 1e-9 and ranks[-1] <= int((s > 0).sum()) * (1 + 1e-9)
    for measure, rank in zip(RANKS, ranks, strict=True):
        assert measure(scale * s).item() == pytest.approx(rank, rel=1e-6)
    assert spectral_norm(s) <= s.norm() * (1 + 1e-12)
    torch.testing.assert_close(s.norm(), stable_rank(s).sqrt() * spectral_norm(s))
    assert energy_rank(s, 0.9) <= energy_rank(s, 0.99) <= len(s)


def test_rotations_change_nothing():
    w = gaussian(12, 9)
    left, right = (torch.linalg.qr(gaussian(n, n, seed=n)).Q for n in (12, 9))
    plain, rotated = (measures(singular_values(m), (12, 9)) for m in (w, left @ w @ right))
    for name in plain:
        torch.testing.assert_close(plain[name], rotated[name])


def test_leading_dimensions():
    s = singular_values(gaussian(3, 2, 8, 5)).values
    for measure in (*RANKS, spectral_norm, energy_rank, normalised_spectrum, minmax_spectrum):
        torch.testing.assert_close(measure(s)[1, 1], measure(s[1, 1]))


def test_the_whole_energy_is_reached_whatever_the_rounding():
    for seed in range(30):
        s = gaussian(40, seed=seed).abs().sort(descending=True).values
        assert 1 <= energy_rank(s, 1.0) <= 40
        assert 1 <= energy_rank(s[:20], 1.0, 1e-14) <= 20


def test_zero_spectrum_is_undefined():
    for measure in (*RANKS, energy_rank):
        assert measure(torch.zeros(4)).isnan(), measure.__name__
    assert minmax_spectrum(torch.ones(3)).isnan().all()


def test_partial_spectrum_gives_only_what_it_can():
    w = gaussian(60, 50)
    whole = measures(singular_values(w), (60, 50))
    exact = singular_values(w).values
    partial = SpectrumResult(exact[:40], exact[40:].square().sum(), False, "rsvd")
    some = measures(partial, (60, 50))
    for name in ("spectral_norm", "rms_operator_norm", "frobenius_norm", "stable_rank", "energy_rank_90"):
        torch.testing.assert_close(some[name], whole[name])
    for name in ("effective_rank", "energy_entropy_rank", "participation_ratio"):
        assert some[name].isnan()
    assert whole["energy_rank_99"] > 40 and some["energy_rank_99"].isnan()  # beyond what was computed


def test_as_matrix():
    assert as_matrix(torch.zeros(4, 3)).shape == (4, 3)
    assert as_matrix(torch.zeros(8, 3, 2, 5)).shape == (8, 30)
    assert as_matrix(torch.zeros(8, 3, 7)).shape == (8, 21)
    for bad in (torch.zeros(4), torch.zeros(0, 4)):
        with pytest.raises(InputError, match="weight has shape"):
            as_matrix(bad)


def test_bad_arguments():
    with pytest.raises(InputError, match="did you mean 'gram'"):
        singular_values(torch.ones(2, 2), "grams")
    with pytest.raises(InputError, match="k is 0"):
        singular_values(torch.ones(2, 2), "rsvd", 0)
    with pytest.raises(InputError, match="shape"):
        singular_values(torch.ones(0, 2))
    with pytest.raises(InputError, match="theta is 0"):
        energy_rank(torch.ones(2), 0)
