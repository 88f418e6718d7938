"""Load statistics against hand-computed values, their bounds and identities, and their nulls against simulation."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.measures.routing import (
    churn,
    counts_by_class,
    drop_rates,
    effective_support,
    effective_support_size,
    load_balance_value,
    load_stats,
    null_load_stats,
    null_max_vio,
    probability_load_gap,
    router_confidence,
    routing_information,
    saturation,
    token_entropy,
    total_variation,
    uniform_counts,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def random_routing(n_tokens: int, n_experts: int, top_k: int, seed: int = 0, skew: float = 0.0) -> torch.Tensor:
    """(N, K) experts drawn without replacement, uniformly or with a preference for low indices."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.exp(-skew * torch.arange(n_experts, dtype=torch.float64)).expand(n_tokens, -1)
    return torch.multinomial(weights, top_k, generator=generator)


def test_hand_computed():
    # 8 pairs on 4 experts, mean 2; relative deviations 1, 0, 0, -1
    stats = load_stats(torch.tensor([4, 2, 2, 0]))
    assert stats.cv.item() == pytest.approx(math.sqrt(0.5))
    assert stats.max_vio.item() == 1
    assert (stats.min_ratio.item(), stats.min_deviation.item()) == (0, -1)
    assert (stats.dead.item(), stats.starved.item()) == (1, 1)
    entropy = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    assert stats.entropy.item() == pytest.approx(entropy / math.log(4))
    assert stats.effective_experts.item() == pytest.approx(math.exp(entropy))
    assert stats.gini == 2 * (0.25 + 0.25 + 0.5 + 0.25 + 0.25) / (2 * 4)  # every |f_i - f_j| counts twice
    assert stats.jain.item() == pytest.approx(1 / 1.5)
    assert stats.null_cv.item() == pytest.approx(math.sqrt(3 / 8))
    assert stats.drop_rate is None


def test_balanced_and_collapsed():
    balanced = load_stats(torch.full((16,), 10), top_k=2)
    assert balanced.cv == balanced.max_vio == balanced.dead == balanced.starved == 0
    assert balanced.gini.item() == pytest.approx(0, abs=1e-15)
    assert balanced.min_ratio == balanced.entropy == balanced.jain == 1
    collapsed = load_stats(torch.tensor([0, 0, 7, 0]))
    assert collapsed.max_vio == 3  # E/K - 1
    assert collapsed.cv.item() ** 2 == pytest.approx(3)
    assert collapsed.gini == 0.75  # (E - 1)/E
    assert collapsed.jain == 0.25
    assert (collapsed.entropy, collapsed.effective_experts, collapsed.dead) == (0, 1, 3)


def test_entropy_is_flat_near_balance():
    """One of 64 experts at three times its share: entropy hardly moves, MaxVio is 2."""
    counts = torch.full((64,), 61.0)
    counts[0] = 3 * (counts.sum() - counts[0]) / (64 - 3)
    stats = load_stats(counts)
    assert stats.entropy.item() == pytest.approx(0.995, abs=1e-3)
    assert stats.max_vio.item() == pytest.approx(2)


@PROPERTY
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any))
def test_identities_and_bounds(values):
    counts = torch.tensor(values)
    stats = load_stats(counts)
    f = np.array(values) / sum(values)
    n = len(values)
    assert stats.cv.item() ** 2 == pytest.approx(n * (f**2).sum() - 1, abs=1e-9)
    assert stats.max_vio.item() == pytest.approx(n * f.max() - 1, abs=1e-9)
    assert stats.gini.item() == pytest.approx(np.abs(f[:, None] - f).sum() / (2 * n), abs=1e-12)
    assert stats.jain.item() == pytest.approx(1 / (1 + stats.cv.item() ** 2))
    assert stats.entropy.item() == pytest.approx(scipy.stats.entropy(values) / math.log(n))
    assert 0 <= stats.cv.item() ** 2 <= n - 1 + 1e-9
    assert -1e-12 <= stats.gini <= (n - 1) / n + 1e-12
    assert 1 - 1e-9 <= stats.effective_experts <= n + 1e-9
    shuffled = load_stats(counts[torch.randperm(n, generator=torch.Generator().manual_seed(0))])
    torch.testing.assert_close(shuffled.gini, stats.gini)
    torch.testing.assert_close(load_stats(counts * 7).cv, stats.cv)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_fixed_k_bounds_are_attained(top_k):
    counts = torch.zeros(8)
    counts[:top_k] = 5
    stats = load_stats(counts, top_k)
    assert stats.max_vio.item() == pytest.approx(8 / top_k - 1)
    assert stats.cv.item() ** 2 == pytest.approx(8 / top_k - 1)
    assert stats.entropy.item() == pytest.approx(math.log(top_k) / math.log(8))


def test_leading_dimensions_are_independent():
    history = torch.tensor([[[4, 2, 2, 0], [1, 1, 1, 1]], [[0, 0, 7, 0], [0, 0, 0, 0]]])
    stats = load_stats(history, n_tokens=torch.tensor([[8, 4], [7, 1]]), capacity=2)
    for i in range(2):
        for j in range(2):
            one = load_stats(history[i, j], n_tokens=[8, 4, 7, 1][2 * i + j], capacity=2)
            for name, value in vars(one).items():
                torch.testing.assert_close(getattr(stats, name)[i, j], value, equal_nan=True)


def test_starved_is_below_a_tenth_of_the_fair_share():
    # fair share 100: 0 and 9 are below a tenth of it, 10 is not
    stats = load_stats(torch.tensor([0, 9, 10, 381]))
    assert (stats.dead, stats.starved) == (1, 2)


def test_no_tokens_is_undefined_never_zero():
    stats = load_stats(torch.zeros(4, dtype=torch.int64), capacity=1)
    assert all(value.isnan() for value in vars(stats).values())
    assert load_stats(torch.tensor([3])).entropy.isnan()  # one expert has no entropy to normalise


def test_capacity_drop_rate():
    # capacity 2 of (5, 2, 1, 0): three of eight pairs are too many
    assert load_stats(torch.tensor([5, 2, 1, 0]), capacity=2).drop_rate == 3 / 8
    assert load_stats(torch.tensor([5, 2, 1, 0]), capacity=5).drop_rate == 0


@pytest.mark.parametrize(("arguments", "part"), [({"top_k": 5}, "top_k is 5"), ({"capacity": -1}, "capacity is -1")])
def test_bad_arguments(arguments, part):
    with pytest.raises(InputError, match=part):
        load_stats(torch.tensor([1, 2, 3, 4]), **arguments)
    with pytest.raises(InputError, match="counts holds -1"):
        load_stats(torch.tensor([1, -1]))


@pytest.mark.parametrize(("n_experts", "top_k"), [(32, 1), (8, 2), (16, 4), (4, 4), (8, 2.5)])
def test_uniform_counts_are_uniform_fixed_k_routing(n_experts, top_k):
    """Mean, variance and covariance of the counts of uniformly drawn K-sets are known exactly."""
    n_tokens, samples = 200, 20_000
    counts = uniform_counts(n_tokens, n_experts, top_k, samples, torch.Generator().manual_seed(1))
    assert (counts.sum(1) == n_tokens * top_k).all()
    assert counts.min() >= 0 and counts.max() <= n_tokens
    low, more = math.floor(top_k), top_k - math.floor(top_k)
    variance = n_tokens * ((1 - more) * _bernoulli(low / n_experts) + more * _bernoulli((low + 1) / n_experts))
    mean = n_tokens * top_k / n_experts
    error = math.sqrt(variance / samples)
    assert (counts.mean(0) - mean).abs().max() <= 5 * error + 1e-12
    torch.testing.assert_close(counts.var(0), torch.full_like(counts[0], variance), rtol=0.07, atol=1e-9)
    covariance = torch.cov(counts.T)
    off = covariance[~torch.eye(n_experts, dtype=torch.bool)]
    # the counts have a fixed sum, so that every covariance is -variance/(E - 1)
    assert (off + variance / (n_experts - 1)).abs().max() <= 6 * variance / math.sqrt(samples) + 1e-9


def _bernoulli(p: float) -> float:
    return p * (1 - p)


def test_uniform_counts_against_direct_simulation():
    """The whole distribution of MaxVio, against routing drawn token by token."""
    counts = torch.stack(
        [torch.bincount(random_routing(64, 8, 2, seed).flatten(), minlength=8) for seed in range(1500)]
    )
    direct = load_stats(counts, 2).max_vio
    fast = load_stats(uniform_counts(64, 8, 2, 1500, torch.Generator().manual_seed(0)), 2).max_vio
    assert scipy.stats.ks_2samp(direct, fast).pvalue > 1e-3


def test_null_cv_is_the_mean_square_under_random_routing():
    counts = uniform_counts(1024, 32, 1, 4000, torch.Generator().manual_seed(0))
    stats = load_stats(counts)
    assert stats.null_cv[0].item() ** 2 == pytest.approx(0.0303, abs=1e-4)
    assert stats.cv.square().mean().item() == pytest.approx(stats.null_cv[0].item() ** 2, rel=0.02)


def test_null_bands():
    generator = torch.Generator().manual_seed(0)
    band = null_load_stats(512, 16, 2, (0.05, 0.95), 2000, generator)
    assert band.cv[0] < load_stats(torch.full((16,), 64), 2).null_cv < band.cv[1]
    fresh = load_stats(uniform_counts(512, 16, 2, 4000, generator), 2, 512)
    covered = ((fresh.cv >= band.cv[0]) & (fresh.cv <= band.cv[1])).double().mean()
    assert covered.item() == pytest.approx(0.9, abs=0.03)
    again = null_max_vio(512, 16, 2, (0.05, 0.95), 2000, torch.Generator().manual_seed(0))
    assert torch.equal(again, band.max_vio)
    assert (null_max_vio(100, 4, 4) == 0).all()  # K = E leaves nothing to chance
    with pytest.raises(InputError, match="top_k is 9"):
        null_max_vio(100, 8, 9)
    with pytest.raises(InputError, match="n_tokens is 0"):
        null_max_vio(0, 8)


def test_balance_value_is_blind_to_the_load_where_probabilities_are_uniform():
    uniform, skewed = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert load_balance_value(uniform, uniform) == 1
    assert load_balance_value(skewed, uniform) == 1  # fooled
    assert load_balance_value(skewed, skewed) == 4
    assert probability_load_gap(skewed, uniform) == 0.75  # not fooled
    assert load_balance_value(torch.tensor([8, 0]), torch.tensor([0.5, 1.5])) == 0.5  # any scale: 2 * (1 * 1/4)


def test_total_variation():
    a, b = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert total_variation(a, b) == 0.5
    assert total_variation(a).item() == pytest.approx(1 / 3)
    assert total_variation(torch.stack([a, b]), b).tolist() == pytest.approx([0.5, 0.0])
    assert total_variation(torch.zeros(3)).isnan()


def test_drop_rates_of_pairs_and_tokens_differ():
    token = torch.tensor([0, 0, 1, 1, 3, 3])  # token 2 has no pair
    kept = torch.tensor([True, False, False, False, True, True])
    pairs, tokens = drop_rates(kept, token)
    assert (pairs.item(), tokens.item()) == (0.5, pytest.approx(1 / 3))
    empty = torch.tensor([], dtype=torch.int64)
    assert all(rate.isnan() for rate in drop_rates(empty.bool(), empty))


def test_confidence_entropy_and_support():
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    assert router_confidence(probs).item() == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert token_entropy(probs).item() == pytest.approx((0 + 1 + 0.5) / 3)
    assert effective_support(probs).item() == pytest.approx((1 + 4 + 2) / 3)
    padded = torch.cat([probs, torch.full((2, 4), torch.nan)])
    mask = torch.tensor([True, True, True, False, False])
    for measure in (router_confidence, token_entropy, effective_support):
        torch.testing.assert_close(measure(padded, mask), measure(probs))
        assert measure(probs, torch.zeros(3, dtype=torch.bool)).isnan()
        assert measure(probs.expand(5, 3, 4)).shape == (5,)


def test_effective_support_size_of_weights():
    weights = torch.tensor([[1.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.1, 0.1, 0.1], [0.75, 0.25, 0.0]])
    expected = torch.tensor([1, 2, 3, 1 / (0.75**2 + 0.25**2)]).double()
    torch.testing.assert_close(effective_support_size(weights), expected)
    torch.testing.assert_close(effective_support_size(7 * weights), effective_support_size(weights))
    assert effective_support_size(torch.zeros(2, 3)).isnan().all()


def test_counts_by_class():
    counts = counts_by_class(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(InputError, match="label holds 5"):
        counts_by_class(torch.tensor([0]), torch.tensor([5]), 3, 4)


def test_routing_information_extremes():
    separate = routing_information(torch.tensor([[50, 0], [0, 50]]))
    assert separate.value.item() == pytest.approx(math.log(2))
    assert separate.normalised.item() == pytest.approx(1)
    independent = routing_information(torch.tensor([[25, 25], [25, 25]]))
    assert independent.value.item() == pytest.approx(0, abs=1e-12)
    assert independent.corrected < 0  # less than chance would give
    assert routing_information(torch.tensor([[3, 4]])).normalised.isnan()  # one class: nothing to know


def test_saturation_and_churn():
    now, then = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]])
    assert saturation(now, then) == 0.75  # as sets: 2 of 2 and 1 of 2
    assert churn(now, then) == 0.25
    assert churn(now, now) == 0
    random = saturation(random_routing(20_000, 16, 4, 0), random_routing(20_000, 16, 4, 1))
    assert random.item() == pytest.approx(4 / 16, abs=0.005)
    with pytest.raises(InputError, match="shape"):
        saturation(now, then[:, :1])
