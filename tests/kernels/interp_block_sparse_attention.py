"""Block gating and block-sparse attention in Triton under the interpreter; run by test_interpreter in a process of its
own.
"""

import pytest
import torch

from workbench.kernels import block_gate_topk, block_sparse_attention, dispatch
from workbench.kernels.block_sparse_attention.triton import BACKWARD_KV, FORWARD, MERGE, column_tiles

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
VARLEN = torch.tensor([0, 1, 33, 33, 70], dtype=torch.int32)


def draw(n, heads=2, kv_heads=1, d=16, dtype=torch.float32, loud=1.0):
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, heads, d), (n, kv_heads, d), (n, kv_heads, d), (n, heads, d))
    q, k, v, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return (q * loud).requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def run(q, k, v, grad, index, backend):
    out = block_sparse_attention(q, k, v, index, backend=backend)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def check(q, k, v, grad, index):
    """The kernels against float64, relative to the largest value of each result."""
    found = run(q, k, v, grad, index, "triton")
    assert dispatch.last_backend("block_sparse_attention.backward") == "triton"
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for ours, exact in zip(found, run(*wide, grad.double(), index, "reference"), strict=True):
        assert ours.dtype == q.dtype
        assert (ours - exact).abs().max() <= TOLERANCE[q.dtype] * exact.abs().max().clamp_min(1)
    return found


@dtypes
@pytest.mark.parametrize(
    "n, block, top_k, sequences",
    [(70, 16, 3, None), (70, 16, 3, VARLEN), (66, 80, 2, None), (1, 4, 2, None), (40, 8, 16, None), (50, 10, 1, None)],
)
def test_gate_and_attention(dtype, n, block, top_k, sequences):
    q, k, v, grad = draw(n, dtype=dtype)
    index = block_gate_topk(q, k, block, top_k, sequences, backend="triton")
    assert dispatch.last_backend("block_gate_topk") == "triton"
    wide = (q.detach().double(), k.detach().double())
    exact = block_gate_topk(*wide, block, top_k, sequences, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(index.tensors(), exact.tensors(), strict=True))
    check(q, k, v, grad, index)


@pytest.mark.parametrize("rows", [-1, 0, 1])
def test_the_edges_of_a_tile(rows):
    """Columns with one row less, as many rows, and one more than a tile of the forward and of the backward has."""
    for tile in (FORWARD[4, False][0], BACKWARD_KV[4, False][0]):
        q, k, v, grad = draw(tile + rows, heads=1)
        check(q, k, v, grad, block_gate_topk(q, k, tile + 1, 1, backend="triton"))
        assert tile + rows > MERGE


def test_large_scores():
    q, k, v, grad = draw(40, loud=50.0)
    check(q, k, v, grad, block_gate_topk(q, k, 8, 3, backend="triton"))


@pytest.mark.parametrize("d", [32, 64])
def test_other_widths(d):
    q, k, v, grad = draw(40, d=d)
    check(q, k, v, grad, block_gate_topk(q, k, 8, 3, backend="triton"))


def test_strided_inputs():
    q, k, v, grad = draw(40)
    by_head = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    across = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    index = block_gate_topk(q, k, 8, 3, backend="triton")
    plain = run(q, k, v, grad, index, "triton")
    for strided in (by_head, across):
        assert torch.equal(block_gate_topk(*strided[:2], 8, 3, backend="triton").blocks, index.blocks)
        for ours, same in zip(run(*strided, grad, index, "triton"), plain, strict=True):
            assert torch.equal(ours, same)


def test_two_runs_are_equal_bit_by_bit():
    q, k, v, grad = draw(70)
    index = block_gate_topk(q, k, 16, 3, backend="triton")
    first, second = (run(q, k, v, grad, index, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ties_take_the_first_block():
    q, k = torch.ones(40, 1, 16), torch.ones(40, 1, 16)
    assert block_gate_topk(q, k, 4, 3, backend="triton").blocks[36, 0].tolist() == [0, 1, 9]
    k[:] = -0.0
    assert block_gate_topk(q, k, 4, 3, backend="triton").blocks[36, 0].tolist() == [0, 1, 9]


def test_no_numbers_stay_in_their_block():
    q, k, v, _ = draw(44)
    index = block_gate_topk(q, k, 8, 2, backend="triton")
    with torch.no_grad():
        v[40] = torch.nan
        out = block_sparse_attention(q, k, v, index, backend="triton")
    assert torch.equal(out.isnan().any(-1).any(-1).nonzero()[:, 0], torch.arange(40, 44))


def test_tiles_cover_every_row_of_every_column_once():
    q, k, _, _ = draw(70)
    for sequences in (None, VARLEN):
        index = block_gate_topk(q, k, 8, 3, sequences)
        for block_m in (4, 16, 64):
            column, row = column_tiles(index, block_m)
            covered = []
            for c, first in zip(column.tolist(), row.tolist(), strict=True):
                if c >= 0:
                    end = min(first + block_m, int(index.col_offs[c + 1]))
                    assert int(index.col_offs[c]) <= first < end
                    covered += range(first, end)
            assert covered == list(range(int(index.col_offs[-1])))
