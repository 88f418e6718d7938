"""Integer codes kept as bit planes, the most significant first: the first b planes are the code's first b bits.

    planes = pack_planes(codes, 8)                      # (8, R, ceil(C / 8))
    unpack_planes(planes[:3], C)                        # codes >> 5
    dequantise_planes(planes[:3], scale, offset, C, 64) # offset + scale * (codes >> 5), of groups of 64 columns

So one stored code serves every width, and one more bit is one more plane to load. Bit j of byte i of a row is that of
column 8 i + j.

Paths: "reference", "cpu" and "triton", each a module with

    pack(codes, bits), unpack(planes, cols), dequantise(planes, scale, offset, cols, group)

codes (B, R, C) uint8, planes (B, b, R, ceil(C / 8)) uint8, scale and offset (B, R, ceil(C / group)), all contiguous.
"""

import sys
from importlib import import_module

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "cpu", "triton") if sys.byteorder == "little" else ("reference", "triton")
MOST = 8  # bits of a code


def plane_bytes(rows: int, cols: int, bits: int) -> int:
    """Bytes of the first `bits` planes of a matrix."""
    return bits * rows * -(-cols // 8)


def pack_planes(
    codes: UInt8[Tensor, "*batch rows cols"], bits: int = MOST, *, backend: str | None = None
) -> UInt8[Tensor, "*batch bits rows bytes"]:
    """The planes of codes below 2^bits, which are looked at: on a GPU this waits.

    Args:
        bits: 1 to 8, of every code.
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check_codes(codes, bits)
    return _pack(codes, bits, dispatch.choose("pack_planes", backend, codes.device, BACKENDS))


def unpack_planes(
    planes: UInt8[Tensor, "*batch bits rows bytes"], cols: int, *, backend: str | None = None
) -> UInt8[Tensor, "*batch rows cols"]:
    """The codes of as many bits as there are planes: of the first b of B, the whole code >> (B - b).

    Args:
        planes: from 1 to 8 of them.
        cols: columns of the matrix, of which the last byte may have fewer than eight.
        backend: as in `pack_planes`.

    Raises:
        InputError: as `pack_planes`.
    """
    _check_planes(planes, cols)
    return _unpack(planes, cols, dispatch.choose("unpack_planes", backend, planes.device, BACKENDS))


def dequantise_planes(
    planes: UInt8[Tensor, "*batch bits rows bytes"],
    scale: Float[Tensor, "*batch rows groups"],
    offset: Float[Tensor, "*batch rows groups"],
    cols: int,
    group: int,
    *,
    backend: str | None = None,
) -> Float[Tensor, "*batch rows cols"]:
    """offset + scale * code, in float32 or wider and then in the type of the scales. Not differentiable.

    Args:
        planes, cols, backend: as in `unpack_planes`.
        scale, offset: of each row and group of columns.
        group: columns that have a scale in common; the last group may have fewer.

    Raises:
        InputError: as `pack_planes`.
    """
    _check_scales(planes, scale, offset, cols, group)
    chosen = dispatch.choose("dequantise_planes", backend, planes.device, BACKENDS)
    return _dequantise(planes, scale.detach(), offset.detach(), cols, group, chosen)


@torch.library.custom_op("workbench::pack_planes", mutates_args=())
def _pack(codes: Tensor, bits: int, backend: str) -> Tensor:
    _check_codes(codes, bits)
    if codes.numel() and (most := int(codes.amax())) >= 2**bits:
        raise InputError(f"codes hold {most} but must be below {2**bits}, of {bits} bits")
    path = _path("pack_planes", backend, codes)
    *batch, rows, cols = codes.shape
    return path.pack(codes.contiguous().view(-1, rows, cols), bits).view(*batch, bits, rows, -(-cols // 8))


@_pack.register_fake
def _(codes, bits, backend):
    *batch, rows, cols = codes.shape
    return codes.new_empty((*batch, bits, rows, (cols + 7) // 8))


@torch.library.custom_op("workbench::unpack_planes", mutates_args=())
def _unpack(planes: Tensor, cols: int, backend: str) -> Tensor:
    _check_planes(planes, cols)
    path = _path("unpack_planes", backend, planes)
    *batch, bits, rows, width = planes.shape
    return path.unpack(planes.contiguous().view(-1, bits, rows, width), cols).view(*batch, rows, cols)


@_unpack.register_fake
def _(planes, cols, backend):
    *batch, _, rows, _ = planes.shape
    return planes.new_empty((*batch, rows, cols))


@torch.library.custom_op("workbench::dequantise_planes", mutates_args=())
def _dequantise(planes: Tensor, scale: Tensor, offset: Tensor, cols: int, group: int, backend: str) -> Tensor:
    _check_scales(planes, scale, offset, cols, group)
    path = _path("dequantise_planes", backend, planes)
    *batch, bits, rows, width = planes.shape
    scale, offset = (part.contiguous().view(-1, rows, part.shape[-1]) for part in (scale, offset))
    return path.dequantise(planes.contiguous().view(-1, bits, rows, width), scale, offset, cols, group).view(
        *batch, rows, cols
    )


@_dequantise.register_fake
def _(planes, scale, offset, cols, group, backend):
    *batch, _, rows, _ = planes.shape
    return scale.new_empty((*batch, rows, cols))


def _path(op: str, backend: str, x: Tensor):
    dispatch.admit(op, backend, x.device, BACKENDS)
    return import_module(f"{__name__}.{dispatch.begin(op, backend)}")


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.dtype != torch.uint8 or codes.ndim < 2 or 0 in codes.shape:
        raise InputError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)} but must be uint8 matrices of a row and a column "
            "at least"
        )
    if not 1 <= bits <= MOST:
        raise InputError(f"bits is {bits} but must be from 1 to {MOST}")


def _check_planes(planes: Tensor, cols: int) -> None:
    if planes.dtype != torch.uint8 or planes.ndim < 3 or 0 in planes.shape or planes.shape[-3] > MOST:
        raise InputError(
            f"planes are {planes.dtype} of shape {tuple(planes.shape)} but must be uint8 (*batch, bits, rows, bytes) "
            f"of 1 to {MOST} bits"
        )
    if not 0 <= 8 * planes.shape[-1] - cols < 8:
        raise InputError(f"cols is {cols} but must fill the {planes.shape[-1]} bytes of a row of planes")


def _check_scales(planes: Tensor, scale: Tensor, offset: Tensor, cols: int, group: int) -> None:
    _check_planes(planes, cols)
    if group < 1:
        raise InputError(f"group is {group} but must be at least 1")
    shape = (*planes.shape[:-3], planes.shape[-2], -(-cols // group))
    if scale.shape != shape or offset.shape != shape:
        raise InputError(
            f"scale and offset have shapes {tuple(scale.shape)} and {tuple(offset.shape)} but must have {shape}: one "
            "for each row and group"
        )
    if scale.dtype != offset.dtype or not scale.is_floating_point() or scale.dtype.itemsize == 1:
        raise InputError(
            f"scale and offset are {scale.dtype} and {offset.dtype} but must be of one floating type of two bytes at "
            "least"
        )
    if not planes.device == scale.device == offset.device:
        raise InputError(f"planes are on {planes.device} but scale on {scale.device} and offset on {offset.device}")
