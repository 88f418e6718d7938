"""`e3m0_pack` and `e3m0_unpack` in Triton: a program takes `HELD` numbers, whole blocks of them.

Magnitudes are compared as integers, which are ordered as they are; doubling adds 2^23. Offsets are int64.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.e3m0 import SMALLEST, sizes

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

HELD = 2048  # numbers of a program
WARPS = 4


@triton.jit
def _e3m0_pack(x, codes, scales, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, SMALLEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    bits = tl.load(x + at, mask=at < n, other=0.0).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    scale = tl.max(size, 1).to(tl.float32, bitcast=True) * 0.0625
    scale = tl.where(scale < SMALLEST, 0.0, scale)
    tl.store(scales + row, scale, mask=row * BLOCK < n)
    low = tl.where(scale > 0, (scale * 0.125).to(tl.int32, bitcast=True), 0x7FFFFFFF)
    between = (scale * 0.375).to(tl.int32, bitcast=True)
    code = tl.maximum(((size - between[:, None] - 1) >> 23) + 2, 1) + tl.where(bits < 0, 8, 0)
    code = tl.where(size > low[:, None], code, 0)
    first, second = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    half = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + half, (first | (second << 4)).to(tl.uint8), mask=half * 2 < n)


@triton.jit
def _e3m0_unpack(codes, scales, out, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(codes + half, mask=half * 2 < n, other=0).to(tl.int32)
    code = tl.reshape(tl.join(byte & 15, byte >> 4), (ROWS, BLOCK))
    level = tl.where((code & 7) > 0, ((code & 7) + 124) << 23, 0) | ((code >> 3) << 31)
    scale = tl.load(scales + row, mask=row * BLOCK < n, other=0.0)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, level.to(tl.float32, bitcast=True) * scale[:, None], mask=at < n)


def e3m0_pack(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """As `reference.e3m0_pack`."""
    n_bytes, n_scales = sizes(len(x), block)
    codes = torch.empty(n_bytes, dtype=torch.uint8, device=x.device)
    scales = torch.empty(n_scales, dtype=torch.float32, device=x.device)
    if n_bytes:
        _e3m0_pack[triton.cdiv(len(x), HELD),](
            x, codes, scales, len(x), BLOCK=block, ROWS=HELD // block, SMALLEST=SMALLEST, num_warps=WARPS, num_stages=1
        )
    return codes, scales


def e3m0_unpack(codes: Tensor, scales: Tensor, n: int, block: int) -> Tensor:
    """As `reference.e3m0_unpack`."""
    out = torch.empty(n, dtype=torch.float32, device=codes.device)
    if n:
        _e3m0_unpack[triton.cdiv(n, HELD),](
            codes, scales, out, n, BLOCK=block, ROWS=HELD // block, num_warps=WARPS, num_stages=1
        )
    return out


def launches() -> "list[Launch]":
    """What is compiled ahead of time: both directions for blocks of 64, 128 and 256 numbers."""
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(name: str, function, pointers: dict[str, str], block: int, constants: dict) -> "Launch":
        return Launch(
            kernel=f"e3m0/{name}",
            function=function,
            signature=pointers | {"n": "i32"},
            constants={"BLOCK": block, "ROWS": HELD // block} | constants,
            divisible=tuple(pointers),
            num_warps=WARPS,
            num_stages=1,
            dtype="fp32",
            shape=f"blocks of {block}",
            gemm=False,
        )

    pack = {"x": "*fp32", "codes": "*u8", "scales": "*fp32"}
    unpack = {"codes": "*u8", "scales": "*fp32", "out": "*fp32"}
    return [
        made
        for block in (64, 128, 256)
        for made in (
            launch("pack", _e3m0_pack, pack, block, {"SMALLEST": SMALLEST}),
            launch("unpack", _e3m0_unpack, unpack, block, {}),
        )
    ]
