"""`haar_dwt2` and `haar_idwt2` in Triton: a program has some cells of 2 x 2, and all four numbers of each.

Both directions are one kernel. Cells are numbered as the numbers of a sub-band are, image by image and channel by
channel. The rows of a cell are read or written as pairs of neighbours.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

CELLS = 512  # of a program


@triton.jit
def _four(a, b, c, d):
    """The transform of a cell, which is its own inverse."""
    return ((a + b) + (c + d)) * 0.5, ((a + b) - (c + d)) * 0.5, ((a - b) + (c - d)) * 0.5, ((a - b) - (c - d)) * 0.5


@triton.jit
def _haar(
    x, out, cells, channels, height, width, INVERSE: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    mask = cell < cells
    size = height.to(tl.int64) * width
    plane, place = cell // size, cell % size
    band = (plane // channels * 4 * channels + plane % channels) * size + place  # of the first sub-band
    apart = channels * size
    pairs = (plane * size + place // width * width) * 4 + place % width * 2  # of the upper row
    upper = pairs[:, None] + tl.arange(0, 2)[None, :]
    if INVERSE:
        a = tl.load(x + band, mask=mask, other=0.0).to(WIDE)
        b = tl.load(x + band + apart, mask=mask, other=0.0).to(WIDE)
        c = tl.load(x + band + 2 * apart, mask=mask, other=0.0).to(WIDE)
        d = tl.load(x + band + 3 * apart, mask=mask, other=0.0).to(WIDE)
        a, b, c, d = _four(a, b, c, d)
        tl.store(out + upper, tl.join(a, b), mask=mask[:, None])
        tl.store(out + upper + 2 * width, tl.join(c, d), mask=mask[:, None])
    else:
        a, b = tl.split(tl.load(x + upper, mask=mask[:, None], other=0.0).to(WIDE))
        c, d = tl.split(tl.load(x + upper + 2 * width, mask=mask[:, None], other=0.0).to(WIDE))
        a, b, c, d = _four(a, b, c, d)
        tl.store(out + band, a, mask=mask)
        tl.store(out + band + apart, b, mask=mask)
        tl.store(out + band + 2 * apart, c, mask=mask)
        tl.store(out + band + 3 * apart, d, mask=mask)


def haar_dwt2(x: Tensor) -> Tensor:
    """As `reference.haar_dwt2`."""
    n, channels, height, width = x.shape
    return _run(x, x.new_empty(n, 4 * channels, height // 2, width // 2), channels, height // 2, width // 2, False)


def haar_idwt2(y: Tensor) -> Tensor:
    """As `reference.haar_idwt2`."""
    n, bands, height, width = y.shape
    return _run(y, y.new_empty(n, bands // 4, 2 * height, 2 * width), bands // 4, height, width, True)


def _run(x: Tensor, out: Tensor, channels: int, height: int, width: int, inverse: bool) -> Tensor:
    cells = x.numel() // 4
    _haar[(triton.cdiv(cells, CELLS),)](
        x,
        out,
        cells,
        channels,
        height,
        width,
        INVERSE=inverse,
        CELLS=CELLS,
        WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        num_warps=4,
        num_stages=1,
    )
    return out


def launches() -> "list[Launch]":
    """What is compiled ahead of time: both directions. Sizes are run-time arguments, and offsets are 64-bit."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, inverse: bool) -> "Launch":
        pointers = {"x": f"*{dtype}", "out": f"*{dtype}"}
        return Launch(
            kernel="haar/haar",
            function=_haar,
            signature=pointers | {"cells": "i64", "channels": "i32", "height": "i32", "width": "i32"},
            constants={"INVERSE": inverse, "CELLS": CELLS, "WIDE": tl.float32},
            divisible=(*pointers, "width"),
            num_warps=4,
            num_stages=1,
            dtype=dtype,
            shape="inverse" if inverse else "forward",
            gemm=False,
        )

    return [launch(dtype, inverse) for dtype in ("bf16", "fp16", "fp32") for inverse in (False, True)]
