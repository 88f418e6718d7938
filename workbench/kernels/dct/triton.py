"""`dct2_rows` and `dct3_rows` in Triton: the product of rows with the basis, or with its transpose.

The basis is float32, and so are the products: cosines of 16 bits would be the largest error of the whole.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.dct import dct_basis

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

SIDE, STEP = 64, 32  # of a tile of the result, and of what is added at a time


@triton.jit
def _dct_rows(x, basis, out, rows, m, INVERSE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    col = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    line = row.to(tl.int64)[:, None] * m
    acc = tl.zeros((SIDE, SIDE), dtype=WIDE)
    for start in range(0, m, STEP):
        inner = start + tl.arange(0, STEP)
        left = tl.load(x + line + inner[None, :], mask=(row < rows)[:, None] & (inner < m)[None, :], other=0.0)
        if INVERSE:
            at = col.to(tl.int64)[None, :] * m + inner[:, None]
        else:
            at = inner.to(tl.int64)[:, None] * m + col[None, :]
        right = tl.load(basis + at, mask=(inner < m)[:, None] & (col < m)[None, :], other=0.0)
        acc = tl.dot(left.to(WIDE), right, acc, input_precision="ieee", out_dtype=WIDE)
    tl.store(out + line + col[None, :], acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (col < m)[None, :])


def dct_rows(x: Tensor, inverse: bool) -> Tensor:
    """As `reference.dct_rows`."""
    rows, m = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty_like(x)
    if rows:
        _dct_rows[(triton.cdiv(rows, SIDE), triton.cdiv(m, SIDE))](
            x, dct_basis(m, wide, x.device), out, rows, m, INVERSE=inverse, SIDE=SIDE, STEP=STEP,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def launches() -> "list[Launch]":
    """What is compiled ahead of time: both directions, for widths that are multiples of 16."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, inverse: bool) -> "Launch":
        names = ("x", "basis", "out", "rows", "m")
        return Launch(
            kernel="dct/dct_rows",
            function=_dct_rows,
            signature={"x": f"*{dtype}", "basis": "*fp32", "out": f"*{dtype}", "rows": "i32", "m": "i32"},
            constants={"INVERSE": inverse, "SIDE": SIDE, "STEP": STEP, "WIDE": tl.float32},
            divisible=names,
            num_warps=8,
            num_stages=3,
            dtype=dtype,
            shape="x C^T" if inverse else "x C",
            gemm=False,
        )

    return [launch(dtype, inverse) for dtype in ("bf16", "fp16", "fp32") for inverse in (False, True)]
