"""`route_metadata` in Triton: a counting sort in two passes over blocks of pairs.

The first counts the pairs of each expert in every block. The running sum of the counts, over the blocks of expert 0,
then those of expert 1 and so on, is where the pairs of an expert in a block begin; it is torch's own. The second puts
each pair there, behind those of its expert that come before it in the block. So the order is stable, nothing is added
atomically, and two runs agree.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

BLOCK = 128  # pairs of a program, which compares each with each
WARPS = 4


@triton.jit
def _count(expert, counts, pairs, experts, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts (E, blocks): pairs of each expert in this block."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(expert + pair, mask=pair < pairs, other=0).to(tl.int32)
    found = tl.histogram(mine, BLOCK_E, mask=pair < pairs)
    e = tl.arange(0, BLOCK_E)
    tl.store(counts + e.to(tl.int64) * blocks + tl.program_id(0), found, mask=e < experts)


@triton.jit
def _place(
    expert, starts, tok_offs, order, inv, tok, pairs, tokens, top_k, blocks, steps,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = pair < pairs
    mine = tl.load(expert + pair, mask=there, other=0).to(tl.int32)
    earlier = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    # The others of the block, once more: a row of what is a column above.
    others = tl.load(expert + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), mask=there, other=0)
    same = (mine[:, None] == others.to(tl.int32)[None, :]) & earlier
    rank = tl.sum(same.to(tl.int32), 1)
    row = tl.load(starts + mine.to(tl.int64) * blocks + tl.program_id(0), mask=there, other=0) + rank
    if RAGGED:  # the last token whose first pair is not after this one
        low = tl.zeros((BLOCK,), dtype=tl.int32)
        high = tl.zeros((BLOCK,), dtype=tl.int32) + (tokens - 1)
        for _ in range(steps):
            middle = (low + high + 1) // 2
            before = tl.load(tok_offs + middle, mask=there, other=0) <= pair
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        token = low
    else:
        token = (pair // top_k).to(tl.int32)
    tl.store(order + row, pair.to(tl.int32), mask=there)
    tl.store(inv + pair, row, mask=there)
    tl.store(tok + row, token, mask=there)


def route_metadata(
    expert: Tensor, n_experts: int, top_k: int | None, tok_offs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inv and tok (P,) and offs (E + 1,) of a `RoutePlan`, int32."""
    expert = expert.contiguous()
    pairs, blocks = expert.shape[0], triton.cdiv(expert.shape[0], BLOCK)
    order, inv, tok = (torch.empty_like(expert, dtype=torch.int32) for _ in range(3))
    if pairs == 0:
        return order, inv, tok, expert.new_zeros(n_experts + 1, dtype=torch.int32)
    counts = expert.new_empty(n_experts, blocks, dtype=torch.int32)
    _count[(blocks,)](expert, counts, pairs, n_experts, blocks, BLOCK=BLOCK, BLOCK_E=width(n_experts), num_warps=WARPS)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    starts = ends - counts.flatten()
    tokens = 0 if tok_offs is None else tok_offs.shape[0] - 1
    _place[(blocks,)](
        expert, starts, expert if tok_offs is None else tok_offs.contiguous(), order, inv, tok,
        pairs, tokens, top_k or 1, blocks, tokens.bit_length(),
        RAGGED=tok_offs is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return order, inv, tok, torch.cat([starts[::blocks], ends[-1:]])


def width(n_experts: int) -> int:
    """Bins of the histogram, of which there must be a power of two."""
    return max(triton.next_power_of_2(n_experts), 16)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: the count for 64 and 256 experts, the placing with fixed K and without.

    It knows no floating-point numbers; it is listed as bf16 and fp16 since every operator is.
    """
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype, kernel, function, shape, **constants):
        constants["BLOCK"] = BLOCK
        names = [name for name in function.arg_names if name not in constants]
        numbers = ("pairs", "experts", "tokens", "top_k", "blocks", "steps")
        pointers = [name for name in names if name not in numbers]
        signature = {name: "i32" if name in numbers else "*i64" if name == "expert" else "*i32" for name in names}
        return Launch(
            f"route_metadata/{kernel}", function, signature, constants, tuple(pointers), WARPS, 1, dtype, shape, False
        )

    return [
        each
        for dtype in ("bf16", "fp16")
        for each in (
            launch(dtype, "count", _count, "E=64", BLOCK_E=64),
            launch(dtype, "count", _count, "E=256", BLOCK_E=256),
            launch(dtype, "place", _place, "fixed K", RAGGED=False),
            launch(dtype, "place", _place, "varying K", RAGGED=True),
        )
    ]
