"""Token rounding: what the four modes promise about counts, order and weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.lib.core.routing import Routing
from workbench.lib.kernels.sonicmoe import MODES, padded_fraction, rounded_counts, token_rounding, topk_routing


def logits(n=48, e=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(-1, 1, e)  # experts of unequal load
    return torch.randn(n, e, generator=generator).to(dtype) + spread.to(dtype)


def naive_rounding(routing: Routing, targets: list[int]) -> dict[tuple[int, int], float]:
    """{(token, expert): weight}: each expert's wish list in plain Python, cut at its target."""
    pairs = zip(routing.token.tolist(), routing.expert.tolist(), routing.weight.tolist(), strict=True)
    chosen = {(t, e): w for t, e, w in pairs}
    kept = {}
    for e, target in enumerate(targets):
        own = sorted((key for key in chosen if key[1] == e), key=lambda key: (-chosen[key], key[0]))
        rest = [(t, e) for t in range(routing.n_tokens) if (t, e) not in chosen]
        rest.sort(key=lambda key: (-routing.probs[key].item(), key[0]))
        for key in (own + rest)[:target]:
            kept[key] = chosen.get(key, routing.probs[key].item())
    return kept


@given(
    n=st.integers(16, 70),
    e=st.integers(1, 7),
    k=st.integers(1, 3),
    tile=st.integers(1, 16),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_sonicmoe_rounded_counts_are_multiples_within_their_bounds(n, e, k, tile, mode, seed):
    counts = topk_routing(logits(n, e, seed), min(k, e)).counts
    rounded = rounded_counts(counts, tile, mode, n, torch.Generator().manual_seed(seed))
    largest = n // tile * tile
    assert (rounded % tile == 0).all() and (rounded >= 0).all() and (rounded <= n).all()
    free = counts <= largest  # an expert with more cannot be rounded up
    off = (rounded - counts)[free]
    if mode == "nearest":
        assert (2 * off.abs() <= tile).all()
    elif mode == "down":
        assert (off <= 0).all() and (off > -tile).all()
    elif mode == "up":
        assert (off >= 0).all() and (off < tile).all()
    else:
        assert (off.abs() < tile).all()
    assert (rounded[~free] == largest).all()
    assert (rounded == counts)[counts % tile == 0].all()


@given(
    n=st.integers(12, 40),
    k=st.integers(1, 3),
    tile=st.integers(1, 12),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_sonicmoe_rounding_keeps_a_prefix_of_every_experts_wish_list(n, k, tile, mode, seed):
    routing = topk_routing(logits(n, 5, seed), k)
    rounded = token_rounding(routing, tile, mode, torch.Generator().manual_seed(seed))
    targets = rounded_counts(routing.counts, tile, mode, n, torch.Generator().manual_seed(seed))
    assert torch.equal(rounded.counts, targets)
    assert padded_fraction(rounded.counts, tile) == 0
    expected = naive_rounding(routing, targets.tolist())
    pairs = zip(rounded.token.tolist(), rounded.expert.tolist(), rounded.weight.tolist(), strict=True)
    assert {(t, e): w for t, e, w in pairs} == expected
    assert (rounded.token.diff() >= 0).all() and rounded.n_tokens == n


@pytest.mark.parametrize("mode", MODES)
def test_sonicmoe_tiles_of_one_row_are_token_choice(mode):
    routing = topk_routing(logits(), 3)
    rounded = token_rounding(routing, 1, mode)
    assert torch.equal(rounded.mask(), routing.mask())
    assert torch.equal(rounded.dense(), routing.dense())


def test_sonicmoe_stochastic_rounding_keeps_the_expected_counts():
    counts, generator = torch.tensor([0, 3, 32, 50, 63, 100]), torch.Generator().manual_seed(0)
    draws = torch.stack([rounded_counts(counts, 32, "stochastic", 128, generator) for _ in range(2000)]).double()
    error = 32 * ((counts % 32 / 32) * (1 - counts % 32 / 32) / 2000).sqrt()
    assert ((draws.mean(0) - counts).abs() <= 4 * error).all()
    assert (draws[:, 0] == 0).all() and (draws[:, 2] == 32).all()  # whole tiles are left alone
    assert all(len(draws[:, i].unique()) == 2 for i in (1, 3, 4, 5))


def test_sonicmoe_stochastic_rounding_repeats_for_a_seed():
    routing = topk_routing(logits(200), 2)

    def experts(seed):
        return token_rounding(routing, 64, "stochastic", torch.Generator().manual_seed(seed)).mask()

    assert torch.equal(experts(0), experts(0))
    assert any(not torch.equal(experts(0), experts(seed)) for seed in range(1, 6))


def test_sonicmoe_small_probabilities_keep_their_order():
    """The best of the tokens an expert did not get comes first, however improbable it is."""
    x = torch.full((8, 3), -40.0)
    x[:, 0] = 0.0
    x[:, 1] = torch.linspace(-36, -30, 8)  # probabilities from 2e-16 to 9e-14, below float32's distance from 1
    x[0, 1] = 5.0
    routing = topk_routing(x, 1)
    assert routing.counts.tolist() == [7, 1, 0]
    added = token_rounding(routing, 4, "up").mask()[:, 1].nonzero().flatten()
    assert added.tolist() == [0, 5, 6, 7]


def test_sonicmoe_an_expert_with_more_than_the_largest_multiple_is_cut_to_it():
    x = torch.zeros(20, 2)
    x[:, 0] = torch.linspace(1, 2, 20)
    routing = topk_routing(x, 1)
    for mode in MODES:
        rounded = token_rounding(routing, 16, mode)
        assert rounded.counts.tolist() == [16, 0]
    assert (topk_routing(x, 1).counts == torch.tensor([20, 0])).all()


def test_sonicmoe_gradients_reach_kept_and_added_weights():
    x = logits(12, 4, dtype=torch.float64).requires_grad_()

    def weights(x):
        return token_rounding(topk_routing(x, 2), 6, "up").weight

    assert weights(x).numel() > 24
    assert torch.autograd.gradcheck(weights, (x,), atol=1e-7)
