"""Gradient conflict from Gramians: closed forms, a real network, and the correction for noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.measures.conflict import (
    conflict_rate,
    conflict_stats,
    corrected_cosine,
    cosine_matrix,
    gramians,
    mean_gramian,
    overlap_cosine,
    self_cosine,
    token_conflict,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def stats_of(*gradients: list[float], second=None, n_parameters=None):
    """Statistics of noiseless gradients (both halves equal), or of two given halves."""
    first = [[torch.tensor(g, dtype=torch.float64)] for g in gradients]
    other = first if second is None else [[torch.tensor(g, dtype=torch.float64)] for g in second]
    return conflict_stats(gramians(first, other), n_parameters)


def test_hand_computed():
    # angles of 0, 120 and 90 degrees; lengths 1, 2, 1
    stats = stats_of([1, 0], [-1, math.sqrt(3)], [0, 1], n_parameters=100)
    cosine = [[1, -0.5, 0], [-0.5, 1, math.sqrt(3) / 2], [0, math.sqrt(3) / 2, 1]]
    torch.testing.assert_close(stats.cosine, torch.tensor(cosine, dtype=torch.float64))
    torch.testing.assert_close(stats.corrected, stats.cosine)
    torch.testing.assert_close(stats.self_cosine, torch.ones(3, dtype=torch.float64))
    assert stats.rate.item() == pytest.approx(1 / 3)
    assert stats.gcd.item() == pytest.approx((1.5 + 1 + 1 - math.sqrt(3) / 2) / 3)
    assert stats.magnitude.item() == pytest.approx(0.5 / 3)
    assert stats.max_neg.item() == pytest.approx(0.5)
    assert stats.gms.item() == pytest.approx((0.8 + 1 + 0.8) / 3)
    total = (1 + math.sqrt(3)) ** 2  # the sum is (0, 1 + sqrt 3)
    assert stats.diversity.item() == pytest.approx(6 / total)
    assert stats.cancellation.item() == pytest.approx(1 - math.sqrt(total) / 4)
    assert (stats.n_pairs.item(), stats.band) == (3, 0.1)
    singular = torch.linalg.svdvals(torch.tensor([[1, 0], [-1, math.sqrt(3)]], dtype=torch.float64))
    assert stats_of([1, 0], [-1, math.sqrt(3)]).condition.item() == pytest.approx((singular[0] / singular[1]).item())


def test_copies_negations_and_orthogonal_tasks():
    same = stats_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert same.cosine[0, 1].item() == pytest.approx(1) and same.rate == 0
    assert same.diversity.item() == pytest.approx(1 / 2)
    assert same.cancellation.item() == pytest.approx(0) and same.condition == torch.inf
    opposed = stats_of([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0])
    assert opposed.cosine[0, 1].item() == pytest.approx(-1) and opposed.max_neg.item() == pytest.approx(1)
    assert (opposed.rate, opposed.gcd.item(), opposed.cancellation) == (1, pytest.approx(2), 1)
    assert opposed.diversity == torch.inf
    orthogonal = stats_of([1.0, 0.0], [0.0, 1.0])
    assert (orthogonal.cosine[0, 1], orthogonal.max_neg, orthogonal.rate, orthogonal.gcd) == (0, 0, 0, 1)
    assert orthogonal.diversity.item() == pytest.approx(1) and orthogonal.condition.item() == pytest.approx(1)


def test_rounding_does_not_hide_what_is_singular_or_cancels():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
        assert stats_of(a.tolist(), (3 * a).tolist()).condition == torch.inf
        cancelling = stats_of(a.tolist(), b.tolist(), (-a - b).tolist())
        assert cancelling.diversity == torch.inf and cancelling.cancellation == 1
        assert cancelling.condition == torch.inf


@PROPERTY
@given(st.integers(2, 5), st.integers(2, 12), st.integers(0, 999), st.floats(0.01, 100))
def test_properties(n, dim, seed, scale):
    first, second = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    halves = gramians([[g] for g in first], [[g] for g in second])
    stats = conflict_stats(halves)
    torch.testing.assert_close(stats.cosine, stats.cosine.mT)
    assert (stats.cosine.diagonal() == 1).all() and (stats.cosine.abs() <= 1 + 1e-12).all()
    gradient = (first + second) / 2
    torch.testing.assert_close(stats.cosine, _cosine(gradient))
    torch.testing.assert_close(mean_gramian(halves), gradient @ gradient.T)
    # rescaling one task's loss by a positive number changes no cosine
    factor = torch.ones(n, 1, dtype=torch.float64)
    factor[0] = scale
    rescaled = conflict_stats(gramians([[g] for g in first * factor], [[g] for g in second * factor]))
    for name in ("cosine", "corrected", "self_cosine", "rate", "gcd", "max_neg"):
        torch.testing.assert_close(getattr(rescaled, name), getattr(stats, name), equal_nan=True)
    pairs = stats.cosine[tuple(torch.triu_indices(n, n, 1))]
    torch.testing.assert_close(stats.gcd, (1 - pairs).mean())
    torch.testing.assert_close(stats.max_neg, -pairs.min())
    assert (stats.max_neg > 0) == (stats.rate > 0)
    assert 0 <= stats.cancellation <= 1 and stats.diversity >= 1 / n - 1e-12 and 0 <= stats.gms <= 1
    if dim >= n:
        values = torch.linalg.svdvals(gradient)
        torch.testing.assert_close(stats.condition, values[0] / values[-1], rtol=1e-5, atol=0)


def _cosine(gradient: torch.Tensor) -> torch.Tensor:
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_zero_gradients_are_undefined_never_zero():
    stats = stats_of([1.0, 0.0], [0.0, 0.0], [-1.0, 1.0])
    assert stats.cosine[1].isnan().all() and stats.cosine[:, 1].isnan().all()
    assert stats.self_cosine[1].isnan() and stats.corrected[1, 1].isnan() and stats.condition.isnan()
    assert (stats.n_pairs, stats.rate) == (1, 1)  # the one pair that is defined
    assert stats.gms.item() == pytest.approx(2 * math.sqrt(2) / 3)
    nothing = stats_of([0.0, 0.0], [0.0, 0.0])
    for name in ("rate", "gcd", "magnitude", "max_neg", "gms", "diversity", "condition", "cancellation"):
        assert getattr(nothing, name).isnan(), name
    single = stats_of([1.0, 2.0])
    assert single.rate.isnan() and single.max_neg.isnan() and single.n_pairs == 0


def test_below_noise_is_undefined():
    stats = stats_of([1.0, 0.0], [0.0, 1.0], second=[[-1.0, 0.5], [0.1, 1.0]])
    assert stats.self_cosine[0] < 0
    assert stats.corrected[0].isnan().all() and stats.corrected[1, 1] == 1
    assert not stats.cosine.isnan().any()


def test_correction_recovers_the_cosine_under_noise():
    """Two tasks with true cosine -0.6 in 4000 dimensions, under noise that hides most of it."""
    generator = torch.Generator().manual_seed(0)
    dim, repeats = 4000, 60
    truth = torch.zeros(2, dim, dtype=torch.float64)
    truth[0, 0], truth[1, 0], truth[1, 1] = 30, -0.6 * 30, 0.8 * 30
    halves = truth + 1.2 * torch.randn(repeats, 2, 2, dim, generator=generator, dtype=torch.float64)
    gram3 = torch.stack([gramians([[g] for g in h[0]], [[g] for g in h[1]]) for h in halves])
    stats = conflict_stats(gram3)
    assert stats.cosine.shape == (repeats, 2, 2) and stats.rate.shape == (repeats,)
    raw, corrected = stats.cosine[:, 0, 1].mean().item(), stats.corrected[:, 0, 1].nanmean().item()
    assert -0.25 < raw < -0.1
    assert corrected == pytest.approx(-0.6, abs=0.08)
    # the halves of one task agree as far as signal^2 / (signal^2 + noise^2)
    assert stats.self_cosine.mean().item() == pytest.approx(900 / (900 + 1.44 * dim), abs=0.02)


def test_random_directions_stay_in_the_band():
    gradients = torch.randn(40, 2500, generator=torch.Generator().manual_seed(0))
    stats = stats_of(*gradients.tolist(), n_parameters=2500)
    pairs = stats.cosine[tuple(torch.triu_indices(40, 40, 1))]
    assert pairs.std().item() == pytest.approx(stats.band, rel=0.1)
    assert stats.rate.item() == pytest.approx(0.5, abs=0.06)  # orthogonal, not "half in conflict"
    assert conflict_rate(stats.cosine, 4 * stats.band) == 0


def test_gramians_sum_over_parameters_of_any_shape_and_skip_missing_ones():
    generator = torch.Generator().manual_seed(0)
    first = [[torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)] for _ in range(3)]
    second = [[torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)] for _ in range(3)]
    first[1][0] = None
    flat = [
        torch.stack([torch.cat([torch.zeros(12) if g[0] is None else g[0].flatten(), g[1]]) for g in half]).double()
        for half in (first, second)
    ]
    expected = torch.stack([flat[0] @ flat[0].T, flat[1] @ flat[1].T, flat[0] @ flat[1].T])
    torch.testing.assert_close(gramians(first, second), expected)
    with pytest.raises(InputError, match="must hold the same tasks"):
        gramians(first, second[:2])
    with pytest.raises(InputError, match=r"gram3 has shape \(2, 3, 3\)"):
        conflict_stats(expected[:2])


def test_leading_dimensions_match_single_steps():
    generator = torch.Generator().manual_seed(1)
    steps = [gramians(*([[g] for g in torch.randn(3, 6, generator=generator)] for _ in range(2))) for _ in range(4)]
    together = conflict_stats(torch.stack(steps))
    for i, step in enumerate(steps):
        for name, value in vars(conflict_stats(step)).items():
            if name != "band":
                torch.testing.assert_close(getattr(together, name)[i], value, equal_nan=True, msg=name)
    for measure in (mean_gramian, corrected_cosine, self_cosine):
        torch.testing.assert_close(measure(torch.stack(steps))[2], measure(steps[2]), equal_nan=True)
    torch.testing.assert_close(cosine_matrix(mean_gramian(steps[0])), together.cosine[0])


def test_overlap_cosine_sees_the_shared_coordinates_only():
    gradients = torch.tensor([[1.0, 2.0, 9.0, 0.0], [0.0, -2.0, 0.0, 5.0], [0.0, 0.0, 0.0, 1.0], [3.0, 4.0, 1.0, 0.0]])
    shared = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0]]).bool()
    cosine = overlap_cosine(gradients, shared)
    torch.testing.assert_close(cosine, cosine.T, equal_nan=True)
    assert cosine[0, 1] == -1  # one shared column, opposite signs
    assert cosine[0, 2].isnan()  # disjoint
    assert cosine[0, 3].item() == pytest.approx(11 / (math.sqrt(5) * 5))
    torch.testing.assert_close(cosine.diagonal(), torch.ones(4, dtype=torch.float64))


def test_token_conflict():
    gradients = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-0.2, 0.1], [0.0, 0.0]])  # the last has none
    assert token_conflict(gradients).item() == pytest.approx(1 / 3)
    assert token_conflict(gradients, threshold=1.1) == 1
    assert token_conflict(gradients.expand(2, 4, 2)).shape == (2,)
    assert token_conflict(torch.tensor([[1.0], [-1.0]])).isnan()  # the mean has no direction
