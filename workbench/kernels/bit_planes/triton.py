"""The bit planes in Triton: a program takes a stretch of bytes of one row, and eight codes of each are its columns.

Packing reads a code once and writes each plane's byte; the other two read a byte of each plane once. All of them move
bytes and compute next to nothing. Offsets are 64-bit.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kernels.static import Launch

BYTES = 128  # of a row of planes, of a program


@triton.jit
def _pack(codes, planes, rows, cols, width, BITS: tl.constexpr, BYTES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    place = tl.arange(0, 8)
    column = byte[:, None] * 8 + place[None, :]
    code = tl.load(codes + line * cols + column, mask=column < cols, other=0).to(tl.int32)
    at = (line // rows * BITS * rows + line % rows) * width + byte
    for p in tl.static_range(BITS):
        packed = tl.sum(((code >> (BITS - 1 - p)) & 1) << place[None, :], axis=1)
        tl.store(planes + at + p * rows.to(tl.int64) * width, packed.to(tl.uint8), mask=byte < width)


@triton.jit
def _codes(planes, line, rows, width, byte, BITS: tl.constexpr, BYTES: tl.constexpr):
    """(BYTES, 8) codes of some bytes of a row."""
    place = tl.arange(0, 8)
    at = (line // rows * BITS * rows + line % rows) * width + byte
    code = tl.zeros((BYTES, 8), dtype=tl.int32)
    for p in tl.static_range(BITS):
        plane = tl.load(planes + at + p * rows.to(tl.int64) * width, mask=byte < width, other=0).to(tl.int32)
        code = code * 2 + ((plane[:, None] >> place[None, :]) & 1)
    return code


@triton.jit
def _unpack(planes, codes, rows, cols, width, BITS: tl.constexpr, BYTES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = _codes(planes, line, rows, width, byte, BITS, BYTES)
    tl.store(codes + line * cols + column, code.to(tl.uint8), mask=column < cols)


@triton.jit
def _dequantise(
    planes, scale, offset, out, rows, cols, width, group, groups, BITS: tl.constexpr, BYTES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    column = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    mask = column < cols
    code = _codes(planes, line, rows, width, byte, BITS, BYTES).to(WIDE)
    at = line * groups + column // group
    step = tl.load(scale + at, mask=mask, other=0.0).to(WIDE)
    low = tl.load(offset + at, mask=mask, other=0.0).to(WIDE)
    tl.store(out + line * cols + column, (low + step * code).to(out.dtype.element_ty), mask=mask)


def pack(codes: Tensor, bits: int) -> Tensor:
    """As `reference.pack`."""
    batch, rows, cols = codes.shape
    width = triton.cdiv(cols, 8)
    planes = codes.new_empty(batch, bits, rows, width)
    _pack[_grid(batch * rows, width)](codes, planes, rows, cols, width, BITS=bits, BYTES=BYTES, num_warps=4)
    return planes


def unpack(planes: Tensor, cols: int) -> Tensor:
    """As `reference.unpack`."""
    batch, bits, rows, width = planes.shape
    codes = planes.new_empty(batch, rows, cols)
    _unpack[_grid(batch * rows, width)](planes, codes, rows, cols, width, BITS=bits, BYTES=BYTES, num_warps=4)
    return codes


def dequantise(planes: Tensor, scale: Tensor, offset: Tensor, cols: int, group: int) -> Tensor:
    """As `reference.dequantise`; a GPU may join the product with the sum, and round once."""
    batch, bits, rows, width = planes.shape
    out = scale.new_empty(batch, rows, cols)
    wide = tl.float64 if scale.dtype == torch.float64 else tl.float32
    _dequantise[_grid(batch * rows, width)](
        planes, scale, offset, out, rows, cols, width, group, scale.shape[-1], BITS=bits, BYTES=BYTES, WIDE=wide,
        num_warps=4,
    )  # fmt: skip
    return out


def _grid(lines: int, width: int) -> tuple[int, int]:
    return lines, triton.cdiv(width, BYTES)


def launches() -> "list[Launch]":
    """What is compiled ahead of time: packing of 8 bits, and unpacking and weights of 2, 4 and 8.

    Rows, columns and bytes are multiples of 16.
    """
    from workbench.kernels.static import Launch  # only wanted to compile ahead of time

    def launch(kernel: str, function, bits: int, dtype: str = "u8") -> "Launch":
        constants = {"BITS": bits, "BYTES": BYTES} | ({"WIDE": tl.float32} if kernel == "dequantise" else {})
        names = [name for name in function.arg_names if name not in constants]
        types = {"codes": "*u8", "planes": "*u8"} | {name: f"*{dtype}" for name in ("scale", "offset", "out")}
        return Launch(
            kernel=f"bit_planes/{kernel}",
            function=function,
            signature={name: types.get(name, "i32") for name in names},
            constants=constants,
            divisible=tuple(name for name in names if name != "groups"),
            num_warps=4,
            num_stages=3,
            dtype=dtype,
            shape=f"{bits} bits",
            gemm=False,
        )

    return [
        launch("pack", _pack, 8),
        *(launch("unpack", _unpack, bits) for bits in (2, 4, 8)),
        *(launch("dequantise", _dequantise, bits, dtype) for dtype in ("bf16", "fp16") for bits in (2, 4, 8)),
    ]
