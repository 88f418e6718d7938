"""The byte model: kept as it was trained, better than counting pairs, and hurt by a cut of its ranks."""

import math

import pytest
import torch
from torch import nn

from workbench.beds import byte_model
from workbench.errors import InputError
from workbench.lib.data.types import TextDomains

LEARNED = byte_model.SMOKE | {"cap": 65_536, "width": 48, "steps": 250, "length": 48, "batch": 16}
"""As little as makes it better than a bigram."""


def test_it_beats_bigrams_and_needs_its_ranks():
    whole, half, quarter = byte_model.measure(LEARNED)
    assert whole.best < whole.reached < whole.trivial < 8
    assert whole.reached + 0.02 < half.reached < quarter.reached - 0.02


def test_it_is_trained_once(monkeypatch):
    trained = byte_model.base(byte_model.SMOKE)
    monkeypatch.setattr(byte_model, "train", None)
    again = byte_model.base(byte_model.SMOKE)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))
    with pytest.raises(TypeError):
        byte_model.base(byte_model.SMOKE, seed=1)


def test_cut_ranks_are_the_best_approximation_of_that_rank():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    weight, values = layer.weight.detach().clone(), torch.linalg.svdvals(layer.weight.detach())
    byte_model.cut_ranks(layer, 0.5)
    assert int(torch.linalg.matrix_rank(layer.weight)) == 6
    torch.testing.assert_close((layer.weight - weight).square().sum(), values[6:].square().sum())
    with pytest.raises(InputError, match=r"share is 0 but must be above 0 and at most 1"):
        byte_model.cut_ranks(layer, 0)


def test_what_it_is_compared_with():
    a, b = torch.tensor([7, 8] * 300, dtype=torch.uint8), torch.randint(256, (600,), dtype=torch.uint8)
    texts = TextDomains("two", ("a", "b"), {split: {"a": a, "b": b} for split in ("train", "test")}, {})
    bigram = byte_model.bigram_bits(texts)
    assert bigram["a"] == pytest.approx(math.log2((300 + 256) / 301), rel=1e-2)  # 300 pairs seen, one added to 256
    assert bigram["b"] > 7
    bits = byte_model.lzma_bits(texts)
    assert bits["a"] < 0.5 and bits["b"] < 1  # the second text was seen in training
