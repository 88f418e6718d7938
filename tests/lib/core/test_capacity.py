"""Who gets a place of an expert, by each policy; tables against the (T, E, C) einsum; the layer that has a limit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.capacity import POLICIES, Capacity, capacity_of, decode, encode, first, keep, slots
from workbench.lib.core.experts import GLUExperts, expert_outputs
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter, TopKRouter
from workbench.lib.core.routing import Context, Routing


def drawn(n_tokens: int, n_experts: int, top_k: int, seed: int, dtype=torch.float64) -> Routing:
    """A routing of distinct experts, unevenly loaded."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.linspace(0, 1, n_experts)
    indices = (torch.rand(n_tokens, n_experts, generator=generator) + lean).argsort(-1)[:, :top_k]
    return Routing.fixed(indices, torch.rand(n_tokens, top_k, generator=generator, dtype=dtype), n_experts)


def one_hot(routing: Routing, capacity: int) -> Tensor:
    """(T, E, C) 1 where a token has a place, by counting one pair after another."""
    table = torch.zeros(routing.n_tokens, routing.n_experts, capacity, dtype=torch.float64)
    taken = [0] * routing.n_experts
    kept = torch.ones_like(routing.expert, dtype=torch.bool) if routing.kept is None else routing.kept
    for token, expert, served in zip(*(part.tolist() for part in (routing.token, routing.expert, kept)), strict=True):
        if served:
            table[token, expert, taken[expert]] = 1
            taken[expert] += 1
    return table


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9), st.integers(0, 2**31))
def test_each_expert_keeps_as_many_as_it_has_places_by_the_policy(n_tokens, n_experts, top_k, capacity, seed):
    routing = drawn(n_tokens, n_experts, min(top_k, n_experts), seed)
    for policy in POLICIES:
        kept = keep(routing, capacity, policy, torch.Generator().manual_seed(seed))
        assert kept.shape == routing.expert.shape and kept.dtype == torch.bool
        for expert in range(n_experts):
            mine = routing.expert == expert
            assert int((kept & mine).sum()) == min(capacity, int(mine.sum()))
            served, dropped = (kept & mine).nonzero(), (~kept & mine).nonzero()
            if len(served) and len(dropped):
                if policy == "probability":
                    assert routing.weight[served].min() >= routing.weight[dropped].max()
                if policy == "position":
                    assert served.max() < dropped.min()
        if capacity >= n_tokens:
            assert kept.all()


def test_of_equal_weights_the_first_are_kept():
    routing = Routing.fixed(torch.zeros(6, 1, dtype=torch.long), torch.full((6, 1), 0.5), 2)
    assert keep(routing, 2).tolist() == [True, True, False, False, False, False]
    assert first(routing.expert, 2, 2, torch.tensor([0, 0, 1, 0, 1, 1])).tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def test_random_selection_is_uniform_in_position_and_independent_of_weights_where_the_position_policy_is_not():
    draws, capacity = 5000, 7
    routing = drawn(48, 3, 1, seed=0)
    generator = torch.Generator().manual_seed(1)
    often = sum(keep(routing, capacity, "random", generator).double() for _ in range(draws)) / draws
    share = (capacity / routing.counts).clamp(max=1)[routing.expert]
    assert (routing.counts > capacity).sum() >= 2  # there is something to drop
    error = (share * (1 - share) / draws).sqrt()
    assert ((often - share).abs() <= 4 * error).all()
    assert not ((keep(routing, capacity, "position").double() - share).abs() <= 4 * error).any()


def test_the_generator_is_all_the_randomness():
    routing = drawn(64, 3, 2, seed=0)
    once, again, other = (keep(routing, 5, "random", torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)
    torch.manual_seed(3)
    assert torch.equal(keep(routing, 5, "random"), once)
    state = torch.get_rng_state()
    for policy in ("position", "probability"):
        keep(routing, 5, policy)
    keep(routing, 5, "random", torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_has_no_claim_gets_no_place_and_takes_none(policy: str):
    routing, mask = drawn(40, 3, 2, seed=0), torch.arange(40) % 3 > 0
    kept = keep(routing, 6, policy, torch.Generator().manual_seed(0), mask)
    assert not kept[~mask[routing.token]].any()
    assert torch.bincount(routing.expert[kept], minlength=3).tolist() == routing.only(mask).counts.clamp(max=6).tolist()
    if policy != "random":
        assert torch.equal(kept[mask[routing.token]], keep(routing.only(mask), 6, policy))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(1, 5), st.integers(0, 7), st.sampled_from(POLICIES), st.integers(0, 2**31))
def test_tables_are_the_einsum_bit_for_bit_and_no_place_is_taken_twice(n_tokens, n_experts, capacity, policy, seed):
    routing = drawn(n_tokens, n_experts, 1, seed)
    routing.kept = keep(routing, capacity, policy, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    x = torch.randn(n_tokens, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(n_experts, capacity, 4, dtype=torch.float64, requires_grad=True)
    table = one_hot(routing, capacity)
    place = slots(routing, capacity)
    assert len(place[routing.kept].unique()) == int(routing.kept.sum())
    assert (place[~routing.kept] == n_experts * capacity).all()
    rows, expected = encode(x, routing, capacity), torch.einsum("tec,td->ecd", table, x)
    assert torch.equal(rows, expected)
    weighted = table * routing.dense()[:, :, None]
    back, also = decode(y, routing), torch.einsum("tec,ecd->td", weighted, y)
    assert torch.equal(back, also)
    for ours, theirs, inputs in ((rows, expected, x), (back, also, y)):
        upstream = torch.randn_like(ours)
        found = (torch.autograd.grad(one, inputs, upstream)[0] for one in (ours, theirs))
        assert torch.equal(*found)


@pytest.mark.parametrize("ragged", [False, True])
def test_tables_of_several_experts_a_token(ragged: bool):
    routing = drawn(30, 5, 3, seed=2)
    if ragged:  # and a token without any
        mask = routing.mask() & (torch.arange(30) > 0)[:, None]
        routing = Routing.ragged(mask, routing.dense())
    routing.kept = keep(routing, 8, "random", torch.Generator().manual_seed(0))
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, rows = one_hot(routing, 8), encode(x, routing, 8)
    assert torch.equal(rows, torch.einsum("tec,td->ecd", table, x))
    sums = torch.einsum("te,td->td", routing.dense(), x)  # experts that say what they hear
    assert torch.allclose(decode(rows, routing), sums, atol=1e-15, rtol=0)


def test_with_room_for_all_and_weight_one_a_token_comes_back_as_it_was():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    routing = drawn(20, 4, 1, seed=0, dtype=torch.float32)
    routing.weight = torch.ones(20)
    assert routing.kept is None and torch.equal(decode(encode(x, routing, 20), routing), x)
    with pytest.raises(InputError, match="capacity is 2 but an expert has"):
        encode(x, routing, 2)


def test_places_are_counted_by_the_decimal_of_the_factor():
    assert math.ceil(1.1 * 100 / 10) == 12 and capacity_of(100, 10, 1.1) == 11
    assert [capacity_of(256, 16, factor) for factor in (1, 1.0, 0.5, 1.25, 0.01)] == [16, 16, 8, 20, 1]
    assert capacity_of(8, 16, 1.0, minimum=4) == 4 and capacity_of(0, 16, 1.0) == 1
    assert all(capacity_of(3 * n, 4, 4 / 3) in (n, n + 1) for n in range(1, 50))


def test_a_layer_drops_by_its_capacity_and_tells_what_it_dropped():
    torch.manual_seed(0)
    layer = MoELayer(
        LinearRouter(8, 4, 1, coefficients={"lbl": 1.0}), GLUExperts(4, 8, 4), None, Capacity(0.5, "random")
    )
    seen: list[Routing] = []
    layer.observe(lambda _, routing, __: seen.append(routing))
    x, context = torch.randn(40, 8), Context()
    y = layer(x, context)
    (routing,) = seen
    assert torch.equal(torch.bincount(routing.expert[routing.kept], minlength=4), routing.counts.clamp(max=5))
    assert torch.equal(y.abs().sum(1) > 0, routing.kept)
    alone = TopKRouter(4, 1, coefficients={"lbl": 1.0}).route(layer.router.projection(x))
    assert torch.equal(context.aux, alone.losses["lbl"])  # counts what was chosen, not what was kept
    rows = encode(x, routing, 5)
    outputs = torch.stack([expert_outputs(layer.experts, part)[e] for e, part in enumerate(rows)])
    assert torch.allclose(decode(outputs, routing), y, atol=1e-6)
    kept = [routing.kept, *(layer(x) is None or seen[-1].kept for _ in range(2))]
    assert not torch.equal(kept[0], kept[1])  # drawn anew
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and torch.equal(seen[-1].kept, seen[-2].kept)
    layer(x.flip(0))
    assert not torch.equal(seen[-1].kept.flip(0), seen[-2].kept) and not torch.equal(seen[-1].kept, seen[-2].kept)


def test_evaluation_may_have_another_factor():
    torch.manual_seed(0)
    layer = MoELayer(LinearRouter(8, 4, 1), GLUExperts(4, 8, 4), None, Capacity(0.5, "position", 3, evaluation=4.0))
    seen: list[Routing] = []
    layer.observe(lambda _, routing, __: seen.append(routing))
    for size in (40, 4):
        layer.train()(torch.randn(size, 8))
    layer.eval()(torch.randn(40, 8))
    train, few, evaluation = seen
    assert [layer.capacity.places(r, t) for r, t in ((train, True), (few, True), (evaluation, False))] == [5, 3, 40]
    assert not train.kept.all() and evaluation.kept.all()


def test_what_is_no_capacity_is_refused():
    for wrong in (0.0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=f"capacity_factor is {wrong} but must be above 0 and finite"):
            Capacity(wrong)
    with pytest.raises(InputError, match="evaluation is 0"):
        Capacity(1.0, evaluation=0)
    with pytest.raises(InputError, match="minimum is 0"):
        Capacity(1.0, minimum=0)
    with pytest.raises(InputError, match="policy"):
        Capacity(1.0, "probs")
    routing = drawn(4, 2, 1, seed=0)
    with pytest.raises(InputError, match="policy"):
        keep(routing, 1, "first")
    with pytest.raises(InputError, match="capacity is -1"):
        keep(routing, -1)
