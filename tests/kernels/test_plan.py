"""The plan of routed pairs, against what it must mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.kernels import RoutePlan


def random_pairs(n_tokens: int, n_experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a random number of distinct experts for each token, and the offsets of the tokens."""
    mask = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed)) < 0.4
    return mask.nonzero()[:, 1], torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_every_pair_has_its_row(n_tokens, n_experts, seed):
    expert, tok_offs = random_pairs(n_tokens, n_experts, seed)
    plan = RoutePlan.build(expert, n_experts, tok_offs=tok_offs)
    token = torch.arange(n_tokens).repeat_interleave(tok_offs.diff())
    assert torch.equal(plan.order[plan.inv].long(), torch.arange(expert.numel()))
    assert torch.equal(plan.tok.long(), token[plan.order])
    assert torch.equal(plan.offs.diff().long(), torch.bincount(expert, minlength=n_experts))
    for e in range(n_experts):
        pairs = plan.order[plan.offs[e] : plan.offs[e + 1]]
        assert (expert[pairs] == e).all() and (pairs.diff() > 0).all()  # of this expert, in their order
    assert (plan.n_tokens, plan.n_experts, plan.n_pairs, plan.top_k) == (n_tokens, n_experts, expert.numel(), None)
    assert all(getattr(plan, name).dtype == torch.int32 for name in ("order", "inv", "tok", "offs", "tok_offs"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_a_fixed_number_of_experts_is_the_variable_one_without_offsets(dtype):
    expert = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :3].reshape(-1).to(dtype)
    fixed = RoutePlan.build(expert, 5, top_k=3)
    ragged = RoutePlan.build(expert, 5, tok_offs=torch.arange(0, 22, 3))
    assert fixed.tok_offs is None and fixed.n_tokens == 7
    for name in ("order", "inv", "tok", "offs"):
        assert torch.equal(getattr(fixed, name), getattr(ragged, name))
    assert torch.equal(fixed.token_offsets(), ragged.token_offsets())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_tiles_cover_each_row_once(n_tokens, n_experts, block, seed):
    expert, tok_offs = random_pairs(n_tokens, n_experts, seed)
    plan = RoutePlan.build(expert, n_experts, tok_offs=tok_offs)
    owner, first = plan.tiles(block)
    assert owner.shape == first.shape == (plan.n_pairs // block + n_experts,)
    rows = []
    for e, row in zip(owner.tolist(), first.tolist(), strict=True):
        if e >= 0:
            assert plan.offs[e] <= row < plan.offs[e + 1]
            rows += range(row, min(row + block, int(plan.offs[e + 1])))
    assert rows == list(range(plan.n_pairs))
    used = (owner >= 0).tolist()
    assert used == sorted(used, reverse=True) and torch.equal(owner < 0, first < 0)


def test_wrong_input_is_named():
    expert = torch.tensor([0, 1, 2, 1])
    cases = [
        (lambda: RoutePlan.build(expert.float(), 3, top_k=2), r"expert is torch.float32 .* must be integers"),
        (lambda: RoutePlan.build(expert.view(2, 2), 3, top_k=2), r"expert is .*\(2, 2\) but must be"),
        (lambda: RoutePlan.build(expert, 0, top_k=2), "n_experts is 0 but must be from 1 to"),
        (lambda: RoutePlan.build(expert, 3), "top_k is None and tok_offs is None but exactly one"),
        (lambda: RoutePlan.build(expert, 3, top_k=2, tok_offs=expert), "exactly one of them must be given"),
        (lambda: RoutePlan.build(expert, 3, top_k=3), "top_k is 3 but must be at least 1 and divide .* 4"),
        (lambda: RoutePlan.build(expert, 3, top_k=0), "top_k is 0"),
        (lambda: RoutePlan.build(expert, 2, top_k=2), "expert holds values from 0 to 2 .* n_experts - 1 = 1"),
        (lambda: RoutePlan.build(-expert, 3, top_k=2), "expert holds values from -2 to 0"),
        (lambda: RoutePlan.build(expert, 3, tok_offs=torch.tensor([0, 2])), "must rise from 0 to .* 4"),
        (lambda: RoutePlan.build(expert, 3, tok_offs=torch.tensor([0, 3, 2, 4])), "must rise from 0"),
        (lambda: RoutePlan.build(expert, 3, tok_offs=torch.tensor([0.0, 4.0])), "tok_offs is torch.float32"),
        (lambda: RoutePlan.build(expert, 3, top_k=2).tiles(0), "block_m is 0"),
        (lambda: RoutePlan.build(torch.empty(2**31, device="meta", dtype=torch.int32), 3, top_k=2), "fewer than 2"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
