"""`topk_softmax` in Triton: a program takes whole rows and finds their K largest logits in K rounds.

A logit and its column make one int64 key: the bits of the float32, ordered as integers, above the column counted from
the end. Keys of a row differ, so their order is total and that of the operator: NaN first, then by falling logit, then
by rising column; -0 and 0 are equal.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

MAX_EXPERTS = 8192  # a row is held in registers


def tile(n_experts: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: 1,024 logits where a row is not longer, at least 16 columns."""
    width = max(triton.next_power_of_2(n_experts), 16)
    return max(1024 // width, 1), width, 4 if width <= 1024 else 8


@triton.jit
def _topk_softmax(
    logits, score, index, tokens, experts, k, stride,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e, j = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    mask = (row < tokens)[:, None] & (e < experts)[None, :]
    x = tl.load(logits + row.to(tl.int64)[:, None] * stride + e[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    # Past the end stands the least int64, which no logit has: that of -inf is larger.
    least = -0x8000000000000000
    key = tl.where((e < experts)[None, :], (bits.to(tl.int64) << 32) | (0x7FFFFFFF - e)[None, :].to(tl.int64), least)
    best = tl.full((ROWS, BLOCK_K), least, dtype=tl.int64)
    for i in range(k):
        top_key = tl.max(key, 1)
        best = tl.where((j == i)[None, :], top_key[:, None], best)
        key = tl.where(key == top_key[:, None], least, key)
    chosen = (best >> 32).to(tl.int32)
    value = tl.where(chosen < 0, chosen ^ 0x7FFFFFFF, chosen).to(tl.float32, bitcast=True)
    value = tl.where((j < k)[None, :], value, float("-inf"))
    # A NaN, which the maximum may skip, makes the total NaN, and with it the scores of the row.
    top = tl.max(tl.where((j == 0)[None, :], value, float("-inf")), 1)
    part = tl.where((j < k)[None, :], tl.exp(value - top[:, None]), 0.0)
    if RENORMALIZE:
        total = tl.sum(part, 1)
    else:
        total = tl.sum(tl.where((e < experts)[None, :], tl.exp(x - top[:, None]), 0.0), 1)
    at = row.to(tl.int64)[:, None] * k + j[None, :]
    there = (row < tokens)[:, None] & (j < k)[None, :]
    tl.store(score + at, part / total[:, None], mask=there)
    tl.store(index + at, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), mask=there)


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As `reference.topk_softmax`, with int32 indices.

    Raises:
        InputError: the logits are float64, or there are more than `MAX_EXPERTS` of them in a row.
    """
    n_tokens, n_experts = logits.shape
    if logits.dtype == torch.float64:
        raise InputError("logits is torch.float64 but the triton path must have float32, float16 or bfloat16")
    if n_experts > MAX_EXPERTS:
        raise InputError(f"logits has {n_experts} experts but the triton path must have at most {MAX_EXPERTS}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    score = torch.empty(n_tokens, k, dtype=torch.float32, device=logits.device)
    index = torch.empty(n_tokens, k, dtype=torch.int32, device=logits.device)
    if n_tokens == 0:
        return score, index
    rows, block_e, warps = tile(n_experts)
    _topk_softmax[(triton.cdiv(n_tokens, rows),)](
        logits,
        score,
        index,
        n_tokens,
        n_experts,
        k,
        logits.stride(0),
        ROWS=rows,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(k),
        RENORMALIZE=renormalize,
        num_warps=warps,
        num_stages=1,
    )
    return score, index


def launches() -> "list[Launch]":
    """What is compiled ahead of time: 64 and 256 experts with both kinds of scores, in bfloat16 and float16.

    The stride is 32-bit, as Triton passes it while it fits; offsets are 64-bit all the same.
    """
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, n_experts: int, k: int, renormalize: bool) -> "Launch":
        rows, block_e, warps = tile(n_experts)
        pointers = {"logits": f"*{dtype}", "score": "*fp32", "index": "*i32"}
        return Launch(
            kernel="topk_softmax/topk_softmax",
            function=_topk_softmax,
            signature=pointers | dict.fromkeys(("tokens", "experts", "k", "stride"), "i32"),
            constants={
                "ROWS": rows,
                "BLOCK_E": block_e,
                "BLOCK_K": triton.next_power_of_2(k),
                "RENORMALIZE": renormalize,
            },
            divisible=(*pointers, "experts", "stride"),
            num_warps=warps,
            num_stages=1,
            dtype=dtype,
            shape=f"E={n_experts} K={k}; softmax over {'K' if renormalize else 'E'}",
            gemm=False,
        )

    sizes = [(n_experts, 8, renormalize) for n_experts in (64, 256) for renormalize in (True, False)]
    return [launch(dtype, *size) for dtype in ("bf16", "fp16") for size in sizes]
