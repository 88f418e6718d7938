"""`newton_schulz` in Triton: two kernels, of which the one of symmetric results computes half of them.

`_symmetric` makes y = x x^T and b y + c y y^T, tile by tile on and below the diagonal, and writes each tile to its
mirror image as well; `_apply` makes factor x + a x. Accumulators are float32 and products of float32 are not cut to
tf32. Widths are run-time arguments, offsets int64, and what a mask leaves out is read as 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch


class Tile(NamedTuple):
    """Rows and columns of a program's output, how much it contracts at a time, the launch's warps and stages."""

    side: int
    step: int
    warps: int
    stages: int


TILES = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 8, 2)}
"""By bytes a number; the same for both kernels. No spills on the targets."""


@triton.jit
def _symmetric(x, out, n, m, scale, keep, KEEP: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr):
    """out (B, n, n) = scale x x^T for x (B, n, m); plus keep x where KEEP says so, for which x is symmetric."""
    tiles = tl.cdiv(n, SIDE)
    tile_row = tl.program_id(0) // tiles
    tile_col = tl.program_id(0) - tile_row * tiles
    if tile_col > tile_row:
        return
    x += tl.program_id(1).to(tl.int64) * n * m
    out += tl.program_id(1).to(tl.int64) * n * n
    row = tile_row * SIDE + tl.arange(0, SIDE)
    col = tile_col * SIDE + tl.arange(0, SIDE)
    k = tl.arange(0, STEP)
    left_p = x + row.to(tl.int64)[:, None] * m + k[None, :]
    right_p = x + col.to(tl.int64)[None, :] * m + k[:, None]
    acc = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for step in range(tl.cdiv(m, STEP)):
        more = k < m - step * STEP
        left = tl.load(left_p, mask=(row < n)[:, None] & more[None, :], other=0.0)
        right = tl.load(right_p, mask=more[:, None] & (col < n)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_p += STEP
        right_p += STEP
    acc *= scale
    inside = (row < n)[:, None] & (col < n)[None, :]
    if KEEP:
        old = tl.load(x + row.to(tl.int64)[:, None] * m + col[None, :], mask=inside, other=0.0)
        acc += keep * old.to(tl.float32)
    done = acc.to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * n + col[None, :], done, mask=inside)
    if tile_col < tile_row:
        mirrored = (col < n)[:, None] & (row < n)[None, :]
        tl.store(out + col.to(tl.int64)[:, None] * n + row[None, :], tl.trans(done), mask=mirrored)


@triton.jit
def _apply(factor, x, out, n, m, keep, SIDE: tl.constexpr, STEP: tl.constexpr):
    """out (B, n, m) = factor (B, n, n) times x (B, n, m), plus keep x."""
    tiles = tl.cdiv(m, SIDE)
    tile_row = tl.program_id(0) // tiles
    factor += tl.program_id(1).to(tl.int64) * n * n
    x += tl.program_id(1).to(tl.int64) * n * m
    out += tl.program_id(1).to(tl.int64) * n * m
    row = tile_row * SIDE + tl.arange(0, SIDE)
    col = (tl.program_id(0) - tile_row * tiles) * SIDE + tl.arange(0, SIDE)
    k = tl.arange(0, STEP)
    left_p = factor + row.to(tl.int64)[:, None] * n + k[None, :]
    right_p = x + k.to(tl.int64)[:, None] * m + col[None, :]
    acc = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for step in range(tl.cdiv(n, STEP)):
        more = k < n - step * STEP
        left = tl.load(left_p, mask=(row < n)[:, None] & more[None, :], other=0.0)
        right = tl.load(right_p, mask=more[:, None] & (col < m)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        left_p += STEP
        right_p += STEP * m
    inside = (row < n)[:, None] & (col < m)[None, :]
    at = row.to(tl.int64)[:, None] * m + col[None, :]
    acc += keep * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """As `reference.newton_schulz`; x is not float64."""
    a, b, c = coefficients
    batch, n, m = x.shape
    tile = TILES[x.element_size()]
    stages = tile.stages if torch.version.hip is None else min(tile.stages, 2)  # 64 KiB of shared memory there
    sizes = {"SIDE": tile.side, "STEP": tile.step, "num_warps": tile.warps, "num_stages": stages}
    rows, columns = triton.cdiv(n, tile.side), triton.cdiv(m, tile.side)
    gram, factor = (x.new_empty(batch, n, n) for _ in range(2))
    buffers = torch.empty_like(x), torch.empty_like(x)
    for step in range(steps):
        out = buffers[step % 2]
        _symmetric[(rows * rows, batch)](x, gram, n, m, 1.0, 0.0, KEEP=False, **sizes)
        _symmetric[(rows * rows, batch)](gram, factor, n, n, c, b, KEEP=True, **sizes)
        _apply[(rows * columns, batch)](factor, x, out, n, m, a, **sizes)
        x = out
    return x


def launches() -> "list[Launch]":
    """What is compiled ahead of time: the three launches of a step, for all sides that are multiples of 16."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, kernel: str, function, note: str, **constants) -> "Launch":
        tile = TILES[4 if dtype == "fp32" else 2]
        constants |= {"SIDE": tile.side, "STEP": tile.step}
        names = [name for name in function.arg_names if name not in constants]
        types = {"n": "i32", "m": "i32", "scale": "fp32", "keep": "fp32"}
        return Launch(
            kernel=f"newton_schulz/{kernel}",
            function=function,
            signature={name: types.get(name, f"*{dtype}") for name in names},
            constants=constants,
            divisible=tuple(name for name in names if name not in ("scale", "keep")),
            num_warps=tile.warps,
            num_stages=tile.stages,
            dtype=dtype,
            shape=note,
            gemm=dtype != "fp32",
        )

    return [
        made
        for dtype in ("bf16", "fp16", "fp32")
        for made in (
            launch(dtype, "symmetric", _symmetric, "x x^T", KEEP=False),
            launch(dtype, "symmetric", _symmetric, "b y + c y y^T", KEEP=True),
            launch(dtype, "apply", _apply, "factor x + a x"),
        )
    ]
