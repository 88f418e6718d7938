"""The Triton kernels of `hashed_lookup` under the interpreter; test_interpreter runs it by itself."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import Lookups, dispatch, hashed_lookup

SIZES = (7, 40, 5)
POOLED = Lookups(
    (0, 1, 1, 2, 0), (0, 0, 3, 0, 1), (7, 40, 30, 5, 6), (3, 0, 2**40, -1, -1), (0, 1, 1, 2, 2), (0, 0, 1, 1, 2)
)


def problem(n=4, dim=5, dtype=torch.float32):
    tables = [draw(size, dim, dtype=dtype, seed=i).requires_grad_() for i, size in enumerate(SIZES)]
    ids = torch.randint(-(2**63), 2**63 - 1, (n, 3), generator=torch.Generator().manual_seed(0))
    ids[:, 2] %= 5
    return tables, ids


def check(ours, theirs, dtype):
    if dtype == torch.bfloat16:  # to which the interpreter cuts off, where a GPU rounds
        assert torch.allclose(ours, theirs, rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_reference_to_the_last_bit(dtype, mean):
    tables, ids = problem(dtype=dtype)
    out, expected = (hashed_lookup(tables, ids, POOLED, mean=mean, backend=b) for b in ("triton", "reference"))
    assert dispatch.last_backend("hashed_lookup") == "reference" and out.dtype == dtype
    check(out, expected, dtype)
    grad = draw(*out.shape, dtype=dtype, seed=9)
    grads = (torch.autograd.grad(y, tables, grad) for y in (out, expected))
    for ours, theirs in zip(*grads, strict=True):
        check(ours, theirs, dtype)


def test_rows_are_moved_where_they_lie():
    tables, ids = problem()
    moved = [[t.detach().clone().requires_grad_() for t in tables] for _ in range(2)]
    for given, path in zip(moved, ("triton", "reference"), strict=True):
        hashed_lookup(given, ids, POOLED, lr=0.25, backend=path).square().sum().backward()
    for ours, theirs in zip(*moved, strict=True):
        assert ours.grad is None and torch.allclose(ours, theirs, atol=1e-5)


def test_several_tiles_wide_rows_and_none():
    tables, ids = problem(n=33)
    assert torch.equal(*(hashed_lookup(tables, ids, POOLED, backend=b) for b in ("triton", "reference")))
    tables, ids = problem(n=2, dim=130)
    assert torch.equal(*(hashed_lookup(tables, ids, POOLED, backend=b) for b in ("triton", "reference")))
    assert hashed_lookup(tables, ids[:0], POOLED, backend="triton").shape == (0, 390)


def test_registration():
    tables, ids = problem(n=3)
    ops = torch.ops.workbench
    torch.library.opcheck(ops.hashed_lookup.default, (tables, ids, POOLED.flat(), True, "triton"))
    rows = ops.hashed_lookup(tables, ids, POOLED.flat(), True, "triton")[1]
    torch.library.opcheck(ops.hashed_gather.default, (tables, rows, POOLED.flat(), True, "triton"))
    grad = draw(3, 15).requires_grad_()
    torch.library.opcheck(ops.hashed_scatter.default, (grad, rows, POOLED.flat(), SIZES, 5, True, "triton"))
