"""Randomisation with fixed margins: keeps them, reaches every assignment equally often, finds what is planted."""

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.measures.coactivation import selection_mask
from workbench.lib.measures.curveball import coactivation_scores, trade


def skewed_mask(n_tokens: int, n_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    weights = torch.linspace(0.2, 3, n_experts).expand(n_tokens, -1)
    indices = torch.multinomial(weights, top_k, generator=torch.Generator().manual_seed(seed))
    return selection_mask(indices, n_experts)


def test_trades_keep_both_margins():
    rows = skewed_mask(100, 9, 3).numpy().T.copy()
    before, sums = rows.copy(), (rows.sum(0), rows.sum(1))
    rng = np.random.default_rng(0)
    for _ in range(10):
        trade(rows, rng)
        assert (rows.sum(0) == sums[0]).all() and (rows.sum(1) == sums[1]).all()
    assert (rows != before).any()


def test_all_assignments_are_reached_equally_often():
    """Three experts, three tokens, all margins 1: the six permutation matrices."""
    rows, rng = np.eye(3, dtype=bool), np.random.default_rng(0)
    seen: dict[bytes, int] = {}
    for _ in range(6000):
        trade(rows, rng)
        trade(rows, rng)
        trade(rows, rng)
        seen[rows.tobytes()] = seen.get(rows.tobytes(), 0) + 1
    assert len(seen) == 6
    assert max(abs(count - 1000) for count in seen.values()) < 150


def test_random_routing_with_uneven_loads_has_unremarkable_scores():
    """Lift corrected by one number would call the popular pairs special; the scores do not."""
    scores = coactivation_scores(skewed_mask(1500, 10, 3), 150, torch.Generator().manual_seed(0))
    z = scores.z[~scores.z.isnan()]
    assert z.numel() == 90
    assert abs(z.mean()) < 0.5 and 0.6 < z.std() < 1.5 and z.abs().max() < 4.5
    assert torch.equal(scores.z.nan_to_num(), scores.z.T.nan_to_num())
    # experts 0 and 1 are the rarest, 8 and 9 the most popular
    assert scores.mean[8, 9] > 3 * scores.mean[0, 1]


def test_a_planted_pair_stands_out():
    mask = skewed_mask(600, 8, 2)
    mask[:60] = False
    mask[:60, 0] = mask[:60, 1] = True  # two rare experts, always together in a tenth of the tokens
    z = coactivation_scores(mask, 100, torch.Generator().manual_seed(0)).z
    assert z[0, 1] == z.nan_to_num(-99).max() and z[0, 1] > 6


@pytest.mark.parametrize("top_k", [1, 5])
def test_no_freedom_is_undefined(top_k):
    assert coactivation_scores(skewed_mask(50, 5, top_k), 20).z.isnan().all()


def test_seeded_and_validated():
    mask = skewed_mask(80, 6, 2)
    a, b = (coactivation_scores(mask, 10, torch.Generator().manual_seed(3)).z for _ in range(2))
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
    with pytest.raises(InputError, match="samples is 1"):
        coactivation_scores(mask, 1)
