"""The Triton kernel of `dct2_rows` and `dct3_rows` under the interpreter; run by test_interpreter in a process."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import dct2_rows, dct3_rows, dispatch
from workbench.kernels.dct import triton

transforms = pytest.mark.parametrize("transform", [dct2_rows, dct3_rows])


def check(transform, x):
    out = transform(x, backend="triton")
    assert dispatch.last_backend("dct_rows") == "triton" and out.dtype == x.dtype
    exact = transform(x.double(), backend="reference")
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
    assert torch.allclose(out.double(), exact, atol=tolerance, rtol=tolerance)


@transforms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_reference(transform, dtype):
    check(transform, draw(5, 24, dtype=dtype))


@transforms
def test_the_edges_of_the_tiles(transform, monkeypatch):
    monkeypatch.setattr(triton, "SIDE", 16)
    monkeypatch.setattr(triton, "STEP", 16)
    for rows, m in ((0, 8), (1, 1), (15, 16), (16, 17), (17, 40)):
        check(transform, draw(rows, m))
    check(transform, draw(2, 3, 20)[:, ::2])  # rows that lie apart


def test_values_that_are_not_numbers_stay_in_their_row():
    x = draw(3, 16)
    clean = dct2_rows(x[[0, 2]], backend="triton")
    x[1, 5] = torch.inf
    assert torch.equal(dct2_rows(x, backend="triton")[[0, 2]], clean)


def test_gradients_and_registration():
    x = draw(3, 8).requires_grad_()
    ours, theirs = (torch.autograd.grad(dct2_rows(x, backend=b).square().sum(), x)[0] for b in ("triton", "reference"))
    assert torch.allclose(ours, theirs, atol=1e-5)
    torch.library.opcheck(torch.ops.workbench.dct_rows.default, (x, False, "triton"))
