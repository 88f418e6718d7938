"""`walsh_hadamard` in Triton: passes of up to `NEAR` rounds, each of which has its butterflies in registers.

A row of 2^n numbers is a cube of side 2, and a pass transforms along some of its axes: the first along those of the
nearest neighbours, the others along `FAR` at most, for `LINES` neighbouring lines at a time. Between passes the numbers
are kept as wide as they are added.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

NEAR = 12  # rounds of the first pass
FAR = 7  # of each other
HELD = 4096  # numbers of a program


def passes(length: int) -> list[tuple[int, int, int]]:
    """(apart, along, lines) of each pass: how far apart and how many the numbers of a line are, lines of a program."""
    found, apart, most = [], 1, 2**NEAR
    while apart < length or not found:
        along = min(length // apart, most)
        found.append((apart, along, min(max(HELD // along, 1), apart if apart > 1 else HELD)))
        apart, most = apart * along, 2**FAR
    return found


@triton.jit
def _walsh_hadamard(
    x, out, lines, APART: tl.constexpr, ALONG: tl.constexpr, ROUNDS: tl.constexpr, LINES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    first = line // APART * (APART * ALONG) + line % APART
    at = first[:, None] + tl.arange(0, ALONG)[None, :] * APART
    mask = (line < lines)[:, None]
    y = tl.load(x + at, mask=mask, other=0.0).to(WIDE)
    # Neighbours are added, and all sums go before all differences: after as many rounds as there are axes every axis
    # has been the last, and each is where it was.
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.reshape(y, (LINES, ALONG // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (LINES, ALONG))
    tl.store(out + at, y, mask=mask)


def walsh_hadamard(x: Tensor) -> Tensor:
    """As `reference.walsh_hadamard`."""
    rows, length = x.shape
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    plan = passes(length)
    for i, (apart, along, lines) in enumerate(plan):
        out = torch.empty_like(x, dtype=dtype if i + 1 == len(plan) else wide)
        total = rows * length // along
        if total:
            _walsh_hadamard[(triton.cdiv(total, lines),)](
                x,
                out,
                total,
                APART=apart,
                ALONG=along,
                ROUNDS=along.bit_length() - 1,
                LINES=lines,
                WIDE=tl.float64 if wide == torch.float64 else tl.float32,
                num_warps=8 if lines * along >= HELD else 4,
                num_stages=1,
            )
        x = out
    return x


def launches() -> "list[Launch]":
    """What is compiled ahead of time: the one pass of 256 and of 4,096 numbers, and the second one of 131,072.

    Offsets are 64-bit.
    """
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(dtype: str, length: int, which: int) -> "Launch":
        plan = passes(length)
        apart, along, lines = plan[which]
        pointers = {"x": "*fp32" if which else f"*{dtype}", "out": f"*{dtype}" if which + 1 == len(plan) else "*fp32"}
        return Launch(
            kernel="walsh_hadamard/walsh_hadamard",
            function=_walsh_hadamard,
            signature=pointers | {"lines": "i32"},
            constants={
                "APART": apart,
                "ALONG": along,
                "ROUNDS": along.bit_length() - 1,
                "LINES": lines,
                "WIDE": tl.float32,
            },
            divisible=tuple(pointers),
            num_warps=8 if lines * along >= HELD else 4,
            num_stages=1,
            dtype=dtype,
            shape=f"L={length}, pass {which + 1} of {len(plan)}",
            gemm=False,
        )

    wanted = [(256, 0), (4096, 0), (131_072, 0), (131_072, 1)]
    return [launch(dtype, *which) for dtype in ("bf16", "fp16", "fp32") for which in wanted]
