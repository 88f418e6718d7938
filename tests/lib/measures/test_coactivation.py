"""Co-activation matrices: a hand-computed layer, the identities of fixed K, and the null of lift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.measures.coactivation import (
    KINDS,
    Pair,
    cluster_order,
    coactivation,
    coactivation_counts,
    conditional,
    effective_partners,
    jaccard,
    joint_share,
    lift,
    lift_corrected,
    lift_null,
    npmi,
    selection_mask,
    tokens_and_k,
    top_pairs,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
INDICES = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 3]])  # 4 tokens, K = 2 of 4
COUNTS = torch.tensor([[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]])


def random_mask(n_tokens: int, n_experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return selection_mask(torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k], n_experts)


def test_hand_computed():
    counts = coactivation_counts(selection_mask(INDICES, 4))
    assert counts.dtype == torch.int64 and torch.equal(counts, COUNTS)
    assert tokens_and_k(counts) == (4, 2)
    assert conditional(counts)[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert joint_share(counts)[0, 1] == 0.5
    assert jaccard(counts)[0, 1].item() == pytest.approx(2 / 3)
    assert lift(counts)[0, 1].item() == pytest.approx(4 * 2 / (3 * 2))
    assert lift_corrected(counts)[0, 1].item() == pytest.approx((4 / 3) / (4 * 1 / (2 * 3)))
    assert lift_corrected(counts).diagonal().isnan().all()  # an expert with itself has no null
    assert npmi(counts)[0, 1].item() == pytest.approx(math.log(4 / 3) / -math.log(0.5))
    assert npmi(counts)[0, 3] == -1


def test_effective_partners():
    assert effective_partners(COUNTS)[:2].tolist() == pytest.approx([1 / (4 / 9 + 1 / 9), 1])  # meets 1 twice, 2 once
    fixed = coactivation_counts(selection_mask(torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5]]), 7))
    assert effective_partners(fixed)[:6].tolist() == pytest.approx([2] * 6)  # K - 1 fixed ones
    assert effective_partners(fixed)[6].isnan()  # never chosen
    assert effective_partners(torch.ones(5, 5).expand(2, -1, -1)).tolist() == [[4] * 5] * 2


@PROPERTY
@given(st.integers(1, 60), st.integers(2, 9), st.integers(1, 9), st.integers(0, 99))
def test_identities_of_fixed_k(n_tokens, n_experts, top_k, seed):
    top_k = min(top_k, n_experts)
    counts = coactivation_counts(random_mask(n_tokens, n_experts, top_k, seed))
    assert torch.equal(counts, counts.T)
    assert tokens_and_k(counts) == (n_tokens, top_k)
    off = conditional(counts).fill_diagonal_(0).sum(1)
    used = counts.diagonal() > 0
    torch.testing.assert_close(off[used], torch.full_like(off[used], top_k - 1))
    assert off[~used].isnan().all()
    assert conditional(counts).diagonal()[used].eq(1).all() and jaccard(counts).diagonal()[used].eq(1).all()
    values = npmi(counts)
    assert values[~values.isnan()].abs().le(1 + 1e-12).all()
    if top_k == n_experts:  # every matrix of shares is all ones
        for measure in (conditional, joint_share, jaccard, lift):
            assert (measure(counts) == 1).all()
    if top_k == 1:
        assert torch.equal(counts, counts.diagonal().diag())


@pytest.mark.parametrize(("n_experts", "top_k", "value"), [(8, 2, 0.571), (16, 4, 0.80), (4, 4, 1.0), (4, 1, 0.0)])
def test_null_of_lift(n_experts, top_k, value):
    assert lift_null(n_experts, top_k) == pytest.approx(value, abs=1e-3)
    if top_k > 1:
        counts = coactivation_counts(random_mask(40_000, n_experts, top_k, 0))
        off = ~torch.eye(n_experts, dtype=torch.bool)
        assert lift(counts)[off].mean().item() == pytest.approx(value, abs=0.01)
        assert lift_corrected(counts)[off].mean().item() == pytest.approx(1, abs=0.01)


def test_null_of_a_variable_number_of_experts():
    """Every expert on independently with probability 0.3: lift is 1, and so is its own null."""
    mask = torch.rand(40_000, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    result = coactivation(coactivation_counts(mask), "lift", n_tokens=40_000)
    assert result.null == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_null_is_where_random_routing_lies(kind):
    result = coactivation(coactivation_counts(random_mask(40_000, 8, 3, 1)), kind)
    off = ~torch.eye(8, dtype=torch.bool)
    assert result.undefined_reason is None
    assert result.values[off].mean().item() == pytest.approx(result.null, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_undefined_says_why(kind):
    single = coactivation(coactivation_counts(random_mask(50, 4, 1, 0)), kind)
    assert single.values.isnan().all() and math.isnan(single.null)
    assert "K = 1" in single.undefined_reason
    assert "no tokens" in coactivation(torch.zeros(4, 4), kind).undefined_reason


def test_leading_dimensions():
    stack = torch.stack([COUNTS, coactivation_counts(random_mask(30, 4, 3, 0)), torch.zeros(4, 4, dtype=torch.int64)])
    for kind, measure in KINDS.items():
        values = measure(stack, None)
        for i in range(2):
            torch.testing.assert_close(values[i], measure(stack[i], None), equal_nan=True, msg=kind)
        assert values[2].isnan().all()
    torch.testing.assert_close(lift(stack[:2], torch.tensor([4, 30])), lift(stack[:2]))


def test_weighted_variant():
    weights = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]])
    counts = coactivation_counts(weights)
    assert counts.dtype == torch.float64
    torch.testing.assert_close(counts, weights.double().T @ weights.double())


def test_unknown_kind():
    with pytest.raises(InputError, match="did you mean 'jaccard'"):
        coactivation(COUNTS, "jacard")
    with pytest.raises(InputError, match="top_k is 5"):
        lift_null(4, 5)


def test_cluster_order_finds_blocks_and_keeps_unused_experts_last():
    group = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    similarity = torch.where(group[:, None] == group, 3.0, 0.1)
    similarity[6], similarity[:, 6] = torch.nan, torch.nan
    order = cluster_order(similarity)
    assert sorted(order.tolist()) == list(range(7)) and order[-1] == 6
    assert group[order[:6]].diff().abs().sum() == 1  # the two groups are contiguous
    assert torch.equal(order, cluster_order(similarity))
    assert cluster_order(torch.full((2, 2), torch.nan)).tolist() == [0, 1]
    with pytest.raises(InputError, match="negative"):
        cluster_order(torch.full((3, 3), -1.0))


def test_top_pairs():
    values = torch.tensor([[9.0, 2.0, torch.nan], [2.0, 9.0, 3.0], [torch.nan, 3.0, 9.0]])
    assert top_pairs(values, 5) == [Pair(1, 2, 3.0), Pair(0, 1, 2.0)]
    directed = torch.tensor([[1.0, 0.2], [0.7, 1.0]])
    assert [pair[:2] for pair in top_pairs(directed, 1)] == [(1, 0)]
