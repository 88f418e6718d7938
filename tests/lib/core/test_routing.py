"""Routing: the pair list, its dense views, and what a capacity limit leaves of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.routing import Routing


def test_fixed_k_views_are_the_tensors_it_was_made_of():
    indices, weights = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    routing = Routing.fixed(indices, weights, 3)
    assert routing.top_k == 2 and routing.n_tokens == 2
    assert torch.equal(routing.indices, indices) and torch.equal(routing.weights, weights)
    assert routing.token.tolist() == [0, 0, 1, 1]
    assert routing.counts.tolist() == [1, 1, 2]
    assert torch.allclose(routing.dense(), torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.6, 0.4]]))


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31))
def test_ragged_round_trips_any_mask(n_tokens, n_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n_tokens, n_experts, generator=generator) < 0.4
    weights = torch.rand(n_tokens, n_experts, generator=generator)
    routing = Routing.ragged(mask, weights)
    assert torch.equal(routing.mask(), mask)
    assert torch.equal(routing.dense(), weights * mask)
    assert torch.equal(routing.counts, mask.sum(0)) and torch.equal(routing.active_counts, mask.sum(1))


def test_views_of_a_variable_k_routing_are_refused():
    routing = Routing.ragged(torch.eye(3, dtype=torch.bool), torch.ones(3, 3))
    with pytest.raises(InputError, match="variable number"):
        _ = routing.indices


def test_served_keeps_the_kept_pairs_in_token_order():
    routing = Routing.fixed(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]]), 2)
    routing.kept = torch.tensor([True, False, True, True])
    served = routing.served()
    assert served.expert.tolist() == [0, 1, 0] and served.token.tolist() == [0, 1, 1] and served.top_k is None
    assert torch.equal(served.dense(), routing.dense())
    assert routing.counts.tolist() == [2, 2]  # the decision itself is counted before the limit
