"""From one layer to the next: hand-computed counts, row sums, and information against shuffling."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.measures.coactivation import selection_mask
from workbench.lib.measures.transition import (
    cross_layer_information,
    transition_counts,
    transition_lift,
    transition_probability,
)


def random_mask(n_tokens: int, n_experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return selection_mask(torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k], n_experts)


def test_hand_computed():
    here, following = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[0], [1], [2], [2]])
    counts = transition_counts(selection_mask(here, 3), selection_mask(following, 3))
    assert counts.tolist() == [[1, 1, 0], [0, 0, 2], [0, 0, 0]]
    probability = transition_probability(counts)
    assert probability[:2].tolist() == [[0.5, 0.5, 0], [0, 0, 1]] and probability[2].isnan().all()
    lift = transition_lift(counts)
    assert lift[1, 2] == 2 and lift[0, 2] == 0 and lift[2].isnan().all()
    assert cross_layer_information(counts).value.item() == pytest.approx(math.log(2))


def test_rows_sum_to_k_of_the_next_layer_and_random_layers_are_at_the_null():
    counts = transition_counts(random_mask(50_000, 6, 2, 0), random_mask(50_000, 8, 3, 1))
    assert counts.sum() == 50_000 * 2 * 3
    probability = transition_probability(counts, next_top_k=3)
    torch.testing.assert_close(probability.sum(1), torch.full((6,), 3.0, dtype=torch.float64))
    assert (probability - 3 / 8).abs().max() < 0.02
    assert (transition_lift(counts) - 1).abs().max() < 0.05


def test_the_null_of_cross_layer_information_is_the_mean_over_shuffles():
    here, following = random_mask(40, 5, 2, 0), random_mask(40, 6, 3, 1)
    generator = torch.Generator().manual_seed(2)
    shuffles = [transition_counts(here, following[torch.randperm(40, generator=generator)]) for _ in range(3000)]
    samples = cross_layer_information(torch.stack(shuffles), 2, 3, null="first_order").value
    result = cross_layer_information(transition_counts(here, following), 2, 3)
    assert abs(samples.mean() - result.null) < 4 * samples.std() / math.sqrt(3000)
    first = cross_layer_information(transition_counts(here, following), 2, 3, null="first_order").null.item()
    assert first == pytest.approx(3 * 3 / (2 * 2 * 3 * 39))
    assert first == pytest.approx(result.null.item(), rel=0.1)


def test_same_tokens_are_required():
    with pytest.raises(InputError, match="next_mask has 5 tokens"):
        transition_counts(random_mask(4, 3, 1, 0), random_mask(5, 3, 1, 0))
