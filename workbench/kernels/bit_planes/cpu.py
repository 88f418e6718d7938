"""The CPU path of the bit planes: eight codes are the bytes of one 64-bit integer, of a little-endian machine.

A byte of a plane is spread over eight bytes by a table and added to twice what the planes before it gave, which carries
nothing from one byte to the next: a code has eight bits at most. A product gathers the eight bits again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ONES = 0x0101010101010101
GATHER = 0x0102040810204080
"""Its product with bits 0, 8, ..., 56 has bit 8 j at 56 + j; below that no two products meet, so nothing is carried."""

SPREAD = sum((torch.arange(256) >> j & 1) << 8 * j for j in range(8))
"""(256,) int64: bit j of a byte as byte j."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """As `reference.pack`."""
    padded = F.pad(codes, (0, -codes.shape[-1] % 8))
    eights = (padded.clone() if padded.storage_offset() % 8 else padded).view(torch.int64)
    planes = [((eights >> (bits - 1 - p) & ONES) * GATHER >> 56).to(torch.uint8) for p in range(bits)]
    return torch.stack(planes, 1)


def unpack(planes: Tensor, cols: int) -> Tensor:
    """As `reference.unpack`."""
    whole = _spread(planes)
    return whole if whole.shape[-1] == cols else whole[..., :cols].contiguous()


def dequantise(planes: Tensor, scale: Tensor, offset: Tensor, cols: int, group: int) -> Tensor:
    """As `reference.dequantise`."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    codes = F.pad(unpack(planes, cols), (0, -cols % group)).unflatten(-1, (-1, group)).to(wide)
    made = codes.mul_(scale.to(wide)[..., None]).add_(offset.to(wide)[..., None]).flatten(-2)
    return (made if made.shape[-1] == cols else made[..., :cols].contiguous()).to(scale.dtype)


def _spread(planes: Tensor) -> Tensor:
    """(B, R, 8 ceil(C / 8)) uint8 codes."""
    code = None
    for plane in planes.unbind(1):
        bits = SPREAD.index_select(0, plane.flatten().int()).view(plane.shape)
        code = bits if code is None else code.mul_(2).add_(bits)
    return code.view(torch.uint8)
