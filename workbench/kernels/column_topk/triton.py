"""`column_topk` in Triton: sums of columns in blocks of rows, added up in a fixed order; and the gather.

Between the two the k largest of m sums are found by torch. Every entry of the matrix is read once, and once more where
it is gathered.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

ROWS, COLUMNS = 32, 64  # of a tile
TILES = 8  # tiles of rows that a program adds up


@triton.jit
def _norms(x, out, n, m, parts, NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
           WIDE: tl.constexpr):  # fmt: skip
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < m
    acc = tl.zeros((COLUMNS,), dtype=WIDE)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        at = batch * n * m + row.to(tl.int64)[:, None] * m + column[None, :]
        values = tl.load(x + at, mask=(row < n)[:, None] & inside[None, :], other=0.0).to(WIDE)
        acc += tl.sum(tl.abs(values) if NORM == 1 else values * values, axis=0)
    tl.store(out + (batch * parts + part) * m + column, acc, mask=inside)


@triton.jit
def _gather(x, index, out, n, m, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < k
    chosen = tl.load(index + batch * k + column, mask=there, other=0)
    mask = (row < n)[:, None] & there[None, :]
    line = batch * n + row.to(tl.int64)
    values = tl.load(x + line[:, None] * m + chosen[None, :], mask=mask, other=0.0)
    tl.store(out + line[:, None] * k + column[None, :], values, mask=mask)


def column_norms(x: Tensor, norm: int) -> Tensor:
    """As `reference.column_norms`."""
    batch, n, m = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = triton.cdiv(n, ROWS * TILES)
    sums = torch.empty(batch, parts, m, dtype=wide, device=x.device)
    _norms[(triton.cdiv(m, COLUMNS), parts, batch)](
        x, sums, n, m, parts, NORM=norm, ROWS=ROWS, COLUMNS=COLUMNS, TILES=TILES,
        WIDE=tl.float64 if wide == torch.float64 else tl.float32, num_warps=4, num_stages=2,
    )  # fmt: skip
    return sums.sum(1)


def gather_columns(x: Tensor, index: Tensor) -> Tensor:
    """As `reference.gather_columns`."""
    (batch, n, m), k = x.shape, index.shape[-1]
    out = x.new_empty(batch, n, k)
    _gather[(triton.cdiv(k, COLUMNS), triton.cdiv(n, ROWS), batch)](
        x, index, out, n, m, k, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4, num_stages=1
    )
    return out


def launches() -> "list[Launch]":
    """What is compiled ahead of time: both norms and the gather, of sides that are multiples of 16."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, kernel: str, function, note: str, **constants) -> "Launch":
        constants |= {"ROWS": ROWS, "COLUMNS": COLUMNS}
        names = [name for name in function.arg_names if name not in constants]
        types = {"n": "i32", "m": "i32", "k": "i32", "parts": "i32", "index": "*i32"}
        types["out"] = f"*{dtype}" if kernel == "gather" else "*fp32"
        return Launch(
            kernel=f"column_topk/{kernel}",
            function=function,
            signature={name: types.get(name, f"*{dtype}") for name in names},
            constants=constants,
            divisible=tuple(name for name in names if name != "parts"),
            num_warps=4,
            num_stages=1 if kernel == "gather" else 2,
            dtype=dtype,
            shape=note,
            gemm=False,
        )

    return [
        made
        for dtype in ("bf16", "fp16", "fp32")
        for made in (
            *(launch(dtype, "norms", _norms, f"{p}-norm", NORM=p, TILES=TILES, WIDE=tl.float32) for p in (1, 2)),
            launch(dtype, "gather", _gather, "k columns"),
        )
    ]
