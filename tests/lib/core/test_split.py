"""A feed-forward block cut into experts: what is cut, and when it is the block again."""

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLU, expert_outputs
from workbench.lib.core.split import WAYS, neuron_slices, split_glu

D, F = 12, 24


def block(seed: int = 0) -> GLU:
    torch.manual_seed(seed)
    return GLU(D, F)


X = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("n_experts", [1, 3, 8, 24])
def test_slices_are_disjoint_alike_in_size_and_cover_every_neuron(method: str, n_experts: int):
    slices = neuron_slices(block(), n_experts, method, seed=3)
    assert slices.shape == (n_experts, F // n_experts)
    assert slices.flatten().sort().values.tolist() == list(range(F))
    assert torch.equal(slices, neuron_slices(block(), n_experts, method, seed=3))


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("n_experts", [1, 3, 8])
def test_all_experts_at_equal_weights_are_the_dense_block(method: str, n_experts: int):
    dense = block()
    layer = split_glu(dense, n_experts, n_experts, method=method)
    nn.init.zeros_(layer.router.projection.weight)  # of equal weights 1 / E
    torch.testing.assert_close(layer(X), dense(X), atol=1e-6, rtol=1e-5)
    assert count_params(layer) == count_params(dense) + n_experts * D


def test_some_experts_at_equal_weights_are_their_neurons_scaled_up():
    dense = block()
    layer = split_glu(dense, 4, 2, seed=5)
    nn.init.zeros_(layer.router.projection.weight)
    chosen = layer.router(X.flatten(0, 1)).indices
    slices = neuron_slices(dense, 4, seed=5)
    gate, up = dense.gate_up(X.flatten(0, 1)).chunk(2, dim=-1)
    hidden = nn.functional.silu(gate) * up
    for token, experts in enumerate(chosen):
        kept = torch.zeros(F).index_fill(0, slices[experts].flatten(), 1.0)
        expected = 4 / 2 * dense.down(hidden[token] * kept)
        torch.testing.assert_close(layer(X).flatten(0, 1)[token], expected, atol=1e-6, rtol=1e-5)


def test_each_expert_says_its_part_of_the_sum_and_the_block_is_left_alone():
    dense = block()
    before = {name: p.clone() for name, p in dense.named_parameters()}
    layer = split_glu(dense, 6, 2)
    with torch.no_grad():
        torch.testing.assert_close(expert_outputs(layer.experts, X.flatten(0, 1)).mean(0), dense(X).flatten(0, 1))
        layer.experts.gate_up.zero_()
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())


def test_kmeans_puts_copies_of_a_neuron_into_one_expert():
    dense, copies = block(), torch.arange(F) % 4
    with torch.no_grad():
        for half in dense.gate_up.weight.chunk(2):
            half.copy_(half[:4][copies])
    slices = neuron_slices(dense, 4, "kmeans")
    assert sorted(copies[row].unique().tolist() for row in slices) == [[0], [1], [2], [3]]


def test_what_cannot_be_split_says_why():
    with pytest.raises(InputError, match="n_experts is 5 but must divide the block's hidden width, 24"):
        split_glu(block(), 5, 2)
    with pytest.raises(InputError, match="n_experts is 0"):
        split_glu(block(), 0, 1)
    with pytest.raises(InputError, match="top_k is 5"):
        split_glu(block(), 4, 5)
    with pytest.raises(InputError, match="method 'rand' is unknown; did you mean 'random'"):
        split_glu(block(), 4, 2, method="rand")
