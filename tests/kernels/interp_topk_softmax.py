"""The Triton kernel of `topk_softmax` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, topk_softmax
from workbench.kernels.topk_softmax.triton import MAX_EXPERTS, tile

INF, NAN = float("inf"), float("nan")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
both = pytest.mark.parametrize("renormalize", [True, False])


def check(logits, k, renormalize=True):
    score, index = topk_softmax(logits, k, renormalize=renormalize, backend="triton")
    expected_score, expected = topk_softmax(logits, k, renormalize=renormalize, backend="reference")
    assert score.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, expected)
    assert torch.allclose(score, expected_score, rtol=1e-5, atol=1e-6, equal_nan=True)
    again = topk_softmax(logits, k, renormalize=renormalize, backend="triton")
    assert torch.equal(score.nan_to_num(), again[0].nan_to_num()) and torch.equal(index, again[1])


@dtypes
@both
@pytest.mark.parametrize("n_experts, k", [(1, 1), (7, 1), (7, 3), (7, 7), (16, 4), (17, 8), (65, 2)])
def test_equals_the_reference(dtype, renormalize, n_experts, k):
    check(draw(9, n_experts, dtype=dtype), k, renormalize)
    assert dispatch.last_backend("topk_softmax") == "triton"


@both
def test_the_edges_of_the_rows(renormalize):
    rows = tile(20)[0]
    for n_tokens in (0, 1, rows - 1, rows, rows + 1):
        check(draw(n_tokens, 20), 3, renormalize)
    check(draw(2, 1500), 5, renormalize)  # a row wider than the usual tile


@both
def test_of_equal_logits_the_first_wins(renormalize):
    few = torch.randint(3, (40, 11), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 4, 11):
        check(few, k, renormalize)
    check(torch.zeros(2, 9), 9, renormalize)
    check(torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -1.0, -0.0]]), 3, renormalize)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which computes for the interpreter
@both
def test_values_that_are_not_numbers(renormalize):
    rows = [
        [1.0, NAN, 3.0, INF],
        [NAN, -INF, NAN, 2.0],
        [-NAN, NAN, NAN, NAN],
        [-INF, -INF, -INF, -INF],
        [-INF, 2.0, -INF, 1.0],
        [INF, 1.0, INF, -INF],
        [3e38, -3e38, 1e-45, -1e-45],
    ]
    for k in (1, 2, 3, 4):
        check(torch.tensor(rows), k, renormalize)


def test_spaced_rows_columns_and_what_lies_between():
    logits = draw(9, 12)
    spaced = torch.full((9, 40), NAN)
    spaced[:, :12] = logits
    clean = topk_softmax(logits, 3, backend="triton")
    for view in (spaced[:, :12], logits.T.contiguous().T):
        for ours, theirs in zip(topk_softmax(view, 3, backend="triton"), clean, strict=True):
            assert torch.equal(ours, theirs)


def test_a_row_that_begins_past_2_to_the_31(far_rows):
    logits = draw(3, 12, dtype=torch.float16)
    ours, expected = (topk_softmax(x, 3, backend="triton") for x in (far_rows(logits), logits))
    assert all(map(torch.equal, ours, expected))


@both
def test_gradients_and_registration(renormalize):
    logits = draw(5, 6).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(topk_softmax(logits, 3, renormalize=renormalize, backend=b)[0].square().sum(), logits)[0]
        for b in ("triton", "reference")
    )
    assert torch.allclose(ours, theirs, atol=1e-6)
    torch.library.opcheck(torch.ops.workbench.topk_softmax.default, (logits, 3, renormalize, "triton"))


def test_what_the_path_cannot_do_is_named():
    with pytest.raises(InputError, match=r"logits is torch.float64 but the triton path must have float32"):
        topk_softmax(draw(2, 3, dtype=torch.float64), 2, backend="triton")
    with pytest.raises(InputError, match=rf"logits has {MAX_EXPERTS + 1} experts but .* at most {MAX_EXPERTS}"):
        topk_softmax(torch.zeros(1, MAX_EXPERTS + 1), 2, backend="triton")
