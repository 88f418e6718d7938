"""Decisions are read from whatever a router returns or experts are given, in any order, and as what they are."""

import pytest
import torch
from torch import Tensor

from workbench.live.probes.decisions import read

N, E, K = 14, 5, 2
LOGITS = torch.randn(N, E, generator=torch.Generator().manual_seed(0))
PROBS = LOGITS.softmax(-1)
WEIGHTS, INDICES = PROBS.topk(K, -1)
MAP = torch.zeros(N, E, dtype=torch.bool).scatter(1, INDICES, True)
FIRST = torch.zeros_like(MAP).scatter(1, INDICES[:, :1], True)
ONE_HOT = torch.nn.functional.one_hot(INDICES, E)
DENSE = PROBS * MAP
COUNTS = MAP.sum(0)
THIRD = torch.arange(E) == 3
SIGMOID = LOGITS.sigmoid()

#: what is returned, K where it is known, the expected map, and the expected weights (N, E) up to a factor of each token
SHAPES = {
    "logits, weights, indices": ([LOGITS, WEIGHTS, INDICES], None, MAP, DENSE),
    "indices, weights": ([INDICES, WEIGHTS], None, MAP, DENSE),
    "weights, indices, counts": ([WEIGHTS, INDICES, COUNTS], None, MAP, DENSE),
    "32-bit indices, probabilities": ([INDICES.int(), PROBS], None, MAP, DENSE),
    "boolean map, weights of all": ([MAP, DENSE], None, MAP, DENSE),
    "boolean map alone": ([MAP], None, MAP, MAP.float()),
    "map of 0 and 1, logits": ([MAP.long(), LOGITS], None, MAP, DENSE),
    "one-hot for each choice": ([ONE_HOT, LOGITS], None, MAP, DENSE),
    "one-hot over two axes, one weight, logits": (
        [FIRST.view(2, 7, E).long(), PROBS.amax(1).view(2, 7, 1), LOGITS.view(2, 7, E)],
        None,
        FIRST,
        PROBS * FIRST,
    ),
    "first choices, weights of all": ([FIRST.long(), DENSE], None, MAP, DENSE),
    "scores with zeros, logits": ([SIGMOID * MAP, LOGITS], K, MAP, SIGMOID * MAP),
    "logits alone": ([LOGITS], K, MAP, DENSE),
    "probabilities, logits": ([PROBS, LOGITS], K, MAP, DENSE),
    "one index a token": ([PROBS.argmax(1), PROBS.amax(1)], 1, FIRST, PROBS * FIRST),
    "one of them for nobody": ([torch.where(INDICES == 3, E, INDICES), WEIGHTS], None, MAP & ~THIRD, DENSE * ~THIRD),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_decision_is_read_as_what_it_is(name: str):
    parts, top_k, chosen, weights = SHAPES[name]
    for given in (parts, parts[::-1]):
        found = read(given, N, E, top_k)
        assert torch.equal(found.mask(), chosen)
        share = found.dense() / found.dense().sum(1, keepdim=True)
        expected = weights / weights.sum(1, keepdim=True)
        assert torch.allclose(share, expected, atol=1e-6, equal_nan=True)
        if any(part.shape[-1] == E and part.is_floating_point() and part.all() for part in given):
            normalised = SIGMOID / SIGMOID.sum(1, keepdim=True) if "scores" in name else PROBS
            assert torch.allclose(found.probs, normalised, atol=1e-6)


@pytest.mark.parametrize("rule", ["softmax", "sigmoid", "another"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_those_that_the_weights_come_from(rule: str, dtype: torch.dtype):
    """Weights of the unbiased scores, normalised and scaled, as DeepSeek-V3 has them; chosen by others."""
    scores = {"softmax": PROBS, "sigmoid": SIGMOID, "another": LOGITS.square() + 1}[rule]
    chosen = (scores + torch.rand(N, E, generator=torch.Generator().manual_seed(1))).topk(K, -1).indices
    weights = scores.gather(1, chosen)
    weights = (2.5 * weights / weights.sum(1, keepdim=True)).to(dtype)
    found = read([LOGITS, weights, chosen], N, E, K)
    assert torch.equal(found.indices, chosen) and torch.equal(found.weights, weights.float())
    if rule == "another":
        assert found.probs is None
    else:
        assert torch.allclose(found.probs, scores / scores.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [LOGITS],  # K is not known
        [COUNTS, torch.arange(N * K), torch.arange(N * K)],
        [INDICES[: N // 2], WEIGHTS[: N // 2]],
        [INDICES + E, WEIGHTS],
    ],
    ids=["nothing", "logits without K", "lists of pairs", "other tokens", "no experts"],
)
def test_what_says_no_decision_is_none(parts: list[Tensor]):
    assert read(parts, N, E, None) is None


def test_with_two_experts_zero_and_one_are_a_map_unless_both_are_chosen():
    both = torch.tensor([[0, 1], [1, 0], [1, 0]])
    assert read([both], 3, 2, 1).counts.tolist() == [2, 1]
    assert read([both], 3, 2, 2).counts.tolist() == [3, 3]
