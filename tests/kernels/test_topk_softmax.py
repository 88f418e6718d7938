"""The K largest logits and their weights, against torch, in values, ties, gradients and types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.kernels import topk_softmax

PATHS = ("reference", "cpu")


def logits_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_softmax_then_topk(backend, renormalize):
    logits = logits_of(9, 7)
    score, index = topk_softmax(logits, 3, renormalize=renormalize, backend=backend)
    probs, expected = logits.softmax(1).topk(3, dim=1)
    if renormalize:
        probs = probs / probs.sum(1, keepdim=True)
    assert torch.equal(index, expected) and torch.allclose(score, probs, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(1, 6), st.data())
def test_of_equal_logits_the_first_wins_on_every_path(n_tokens, n_experts, data):
    k = data.draw(st.integers(1, n_experts))
    values = st.lists(st.integers(0, 2), min_size=n_tokens * n_experts, max_size=n_tokens * n_experts)
    logits = torch.tensor(data.draw(values), dtype=torch.float32).reshape(n_tokens, n_experts)
    for renormalize in (True, False):
        slow = topk_softmax(logits, k, renormalize=renormalize, backend="reference")
        fast = topk_softmax(logits, k, renormalize=renormalize, backend="cpu")
        assert torch.equal(slow[1], fast[1]) and torch.allclose(slow[0], fast[0], atol=1e-6)
        for row, chosen in zip(logits.tolist(), slow[1].tolist(), strict=True):
            assert chosen == sorted(range(n_experts), key=lambda e, row=row: (-row[e], e))[:k]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_registration_and_compilation(backend, renormalize):
    logits = logits_of(5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_softmax(x, 3, renormalize=renormalize, backend=backend)[0], logits)
    torch.library.opcheck(torch.ops.workbench.topk_softmax.default, (logits, 3, renormalize, backend))

    def loss(x):
        return topk_softmax(x, 3, renormalize=renormalize, backend=backend)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(call(logits), logits)[0] for call in (compiled, loss))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_whatever_the_logits(dtype):
    logits = logits_of(4, 5, dtype=dtype).requires_grad_()
    score, index = topk_softmax(logits, 2)
    assert score.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.allclose(score.sum(1), torch.ones(4))
    score[:, 0].sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.any()


def test_views_and_wrong_input():
    logits = logits_of(6, 5)
    assert torch.equal(topk_softmax(logits.T.contiguous().T, 2)[0], topk_softmax(logits, 2)[0])
    for call, message in [
        (lambda: topk_softmax(logits[0], 2), r"logits is torch.float64 of shape \(5,\)"),
        (lambda: topk_softmax(logits.long(), 2), "must be floating point"),
        (lambda: topk_softmax(logits, 0), "k is 0 but must be between 1 and the number of experts, 5"),
        (lambda: topk_softmax(logits, 6), "k is 6"),
        (lambda: topk_softmax(logits, 2, backend="grouped_mm"), "backend of topk_softmax 'grouped_mm' is unknown"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_several_nan_are_ordered_as_in_the_reference():
    logits = torch.randn(3, 6)
    logits[0, [1, 4]] = torch.nan
    logits[2] = torch.nan
    found = [topk_softmax(logits, 3, renormalize=True, backend=backend)[1] for backend in ("reference", "cpu")]
    assert torch.equal(*found) and found[0][0, :2].tolist() == [1, 4] and found[0][2].tolist() == [0, 1, 2]
