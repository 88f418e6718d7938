"""How layers share a pool of experts."""

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.measures.pools import top_set_jaccard, top_set_union


def test_same_disjoint_and_overlapping_sets():
    same = torch.tensor([[5, 4, 0, 0], [1, 9, 0, 0]])
    assert (top_set_jaccard(same, 2), top_set_union(same, 2)) == (1, 0.5)
    disjoint = torch.tensor([[5, 4, 0, 0], [0, 0, 1, 9]])
    assert (top_set_jaccard(disjoint, 2), top_set_union(disjoint, 2)) == (0, 1)
    overlapping = torch.tensor([[5, 4, 1, 0], [0, 4, 5, 1], [5, 0, 4, 1]])  # {0,1}, {1,2}, {0,2}
    assert top_set_jaccard(overlapping, 2).item() == pytest.approx(1 / 3)
    assert top_set_union(overlapping, 2) == 0.75


def test_unused_experts_fill_no_set():
    traffic = torch.tensor([[5, 0, 0, 0], [5, 3, 0, 0]])
    assert (top_set_jaccard(traffic, 3), top_set_union(traffic, 3)) == (0.5, 0.5)


def test_undefined_and_bad_input():
    assert top_set_jaccard(torch.ones(1, 4), 2).isnan()
    with pytest.raises(InputError, match="top is 16"):
        top_set_union(torch.ones(2, 4))
