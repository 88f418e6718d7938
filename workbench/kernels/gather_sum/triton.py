"""`gather_sum` in Triton: a program takes a stretch of columns of one token and adds the rows of its pairs in order.

The rows are read where they lie and every output is written once, so nothing is added atomically and two runs agree bit
for bit. The operator moves bytes and computes next to nothing: P * H numbers in, T * H out.

Widths and strides are runtime arguments. Offsets of rows are int64.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.plan import RoutePlan

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

#: bytes a number -> columns and warps of a program: one 16-byte load a thread and row. 512 divides most model widths.
TILES = {2: (512, 2), 4: (512, 4), 8: (512, 8)}
STEP = 4  # pairs whose loads are in flight together


@triton.jit
def _gather_sum(
    y, weight, inv, tok_offs, out, dim, top_k, stride_y, stride_out,
    BLOCK_H: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr, WEIGHTED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    begin = tl.program_id(1) * BLOCK_H
    y += begin
    col = tl.arange(0, BLOCK_H)
    if RAGGED:
        first, last = tl.load(tok_offs + token), tl.load(tok_offs + token + 1)
    else:
        first = token * top_k
        last = first + top_k
    wide = tl.float64 if DOUBLE else tl.float32
    acc = tl.zeros((BLOCK_H,), dtype=wide)
    for step in range(tl.cdiv(last - first, STEP)):
        for i in tl.static_range(STEP):
            pair = first + step * STEP + i
            row = tl.load(inv + pair, mask=pair < last, other=0).to(tl.int64)
            width = tl.where(pair < last, dim - begin, 0)
            y_t = tl.load(y + row * stride_y + col, mask=col < width, other=0.0).to(wide)
            if WEIGHTED:
                y_t *= tl.load(weight + pair, mask=pair < last, other=0.0).to(wide)
            acc += y_t
    tl.store(out + token.to(tl.int64) * stride_out + begin + col, acc.to(out.dtype.element_ty), mask=col < dim - begin)


def gather_sum(y: Tensor, plan: RoutePlan, weight: Tensor | None) -> Tensor:
    """As `reference.gather_sum`. Rows of `y` may be spaced; each must be contiguous, and so must `weight`."""
    out = torch.empty(plan.n_tokens, y.shape[1], dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block_h, warps = TILES[y.element_size()]
    _gather_sum[plan.n_tokens, triton.cdiv(y.shape[1], block_h)](
        y,
        y if weight is None else weight,  # not read without weights
        plan.inv,
        plan.inv if plan.tok_offs is None else plan.tok_offs,  # not read where K is fixed
        out,
        y.shape[1],
        plan.top_k or 0,
        y.stride(0),
        out.stride(0),
        BLOCK_H=block_h,
        STEP=STEP,
        RAGGED=plan.tok_offs is not None,
        WEIGHTED=weight is not None,
        DOUBLE=y.dtype == torch.float64,
        num_warps=warps,
        num_stages=1,
    )
    return out


def launches() -> "list[Launch]":
    """What is compiled ahead of time: both numbers of pairs, with weights and without, in bfloat16 and float16.

    Strides are 32-bit, as Triton passes them while they fit; offsets are 64-bit all the same.
    """
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, ragged: bool, weighted: bool) -> "Launch":
        data = f"*{dtype}"
        block_h, warps = TILES[2]
        return Launch(
            kernel="gather_sum/gather_sum",
            function=_gather_sum,
            signature={
                "y": data,
                "weight": "*fp32" if weighted else data,
                "inv": "*i32",
                "tok_offs": "*i32",
                "out": data,
                "dim": "i32",
                "top_k": "i32",
                "stride_y": "i32",
                "stride_out": "i32",
            },
            constants={
                "BLOCK_H": block_h,
                "STEP": STEP,
                "RAGGED": ragged,
                "WEIGHTED": weighted,
                "DOUBLE": False,
            },
            divisible=("y", "weight", "inv", "tok_offs", "out", "dim", "stride_y", "stride_out"),
            num_warps=warps,
            num_stages=1,
            dtype=dtype,
            shape=f"H=768, 1536, 4096; {'variable' if ragged else 'fixed'} K{', weighted' if weighted else ''}",
            gemm=False,
        )

    kinds = [(ragged, weighted) for ragged in (False, True) for weighted in (False, True)]
    return [launch(dtype, *kind) for dtype in ("bf16", "fp16") for kind in kinds]
