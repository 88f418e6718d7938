"""The Triton kernel of `walsh_hadamard` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import dispatch, walsh_hadamard
from workbench.kernels.walsh_hadamard import triton

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def check(x):
    out = walsh_hadamard(x, backend="triton")
    assert dispatch.last_backend("walsh_hadamard") == "triton" and out.dtype == x.dtype
    expected = walsh_hadamard(x, backend="reference")
    if x.dtype == torch.bfloat16:  # to which the interpreter cuts off, where a GPU rounds
        assert torch.allclose(out, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, expected)


@dtypes
@pytest.mark.parametrize("length", [1, 2, 4, 32, 256])
def test_equals_the_reference_to_the_last_bit(dtype, length):
    check(draw(5, length, dtype=dtype))


@dtypes
@pytest.mark.parametrize("length", [8, 64, 1024])
def test_several_passes(dtype, length, monkeypatch):
    monkeypatch.setattr(triton, "NEAR", 3)
    monkeypatch.setattr(triton, "FAR", 2)
    monkeypatch.setattr(triton, "HELD", 64)
    assert len(triton.passes(length)) == {8: 1, 64: 3, 1024: 5}[length]
    check(draw(3, length, dtype=dtype))


def test_a_row_of_two_passes_as_they_are():
    assert [(apart, along) for apart, along, _ in triton.passes(2**14)] == [(1, 2**12), (2**12, 4)]
    check(draw(1, 2**14))


def test_the_edges_of_the_rows():
    lines = triton.passes(64)[0][2]
    for rows in (0, 1, lines - 1, lines, lines + 1):
        check(draw(rows, 64))
    check(draw(2, 3, 8)[:, ::2])  # rows that lie apart, in several dimensions


def test_values_that_are_not_numbers_stay_in_their_row():
    x = draw(3, 16)
    x[1, 5], clean = torch.inf, walsh_hadamard(x[[0, 2]])
    assert torch.equal(walsh_hadamard(x, backend="triton")[[0, 2]], clean)


def test_gradients_and_registration():
    x = draw(3, 8).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(walsh_hadamard(x, backend=b).square().sum(), x)[0] for b in ("triton", "reference")
    )
    assert torch.equal(ours, theirs)
    torch.library.opcheck(torch.ops.workbench.walsh_hadamard.default, (x, "triton"))
