"""The Triton kernels of `column_topk` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import column_topk, dispatch, gather_columns
from workbench.kernels.column_topk import triton


def check(x, k, norm):
    ours = column_topk(x, k, norm=norm, backend="triton")
    assert dispatch.last_backend("column_topk") == "triton"
    for found, exact in zip(ours, column_topk(x, k, norm=norm, backend="reference"), strict=True):
        assert torch.equal(found, exact)
    assert torch.equal(gather_columns(x, ours[0], backend="triton"), ours[1])


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_reference(dtype, norm):
    check(draw(20, 12, dtype=dtype), 5, norm)


@pytest.mark.parametrize("norm", [1, 2])
def test_the_edges_of_the_tiles(norm, monkeypatch):
    monkeypatch.setattr(triton, "ROWS", 8)
    monkeypatch.setattr(triton, "COLUMNS", 8)
    monkeypatch.setattr(triton, "TILES", 2)
    for n, m, k in ((1, 1, 1), (7, 8, 8), (16, 9, 3), (17, 17, 9), (40, 5, 2)):
        check(draw(n, m), k, norm)
    check(draw(3, 17, 9), 4, norm)
    check(draw(9, 17).T, 4, norm)


def test_sums_are_the_same_each_time():
    x = draw(300, 4)
    first, again = (triton.column_norms(x[None], 2) for _ in range(2))
    assert torch.equal(first, again) and torch.allclose(first[0], x.square().sum(0))


def test_registration():
    torch.library.opcheck(torch.ops.workbench.column_topk.default, (draw(5, 6), 2, 1, "triton"))
