"""The meaning of the bit planes: bits by shifts, eight neighbours to a byte, the least significant the first."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """(B, bits, R, ceil(C / 8)) of codes (B, R, C)."""
    eights = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8)).int()
    place = torch.arange(8, dtype=torch.int32, device=codes.device)
    planes = [((eights >> (bits - 1 - p) & 1) << place).sum(-1) for p in range(bits)]
    return torch.stack(planes, 1).to(torch.uint8)


def unpack(planes: Tensor, cols: int) -> Tensor:
    """(B, R, cols) of planes (B, b, R, ceil(cols / 8))."""
    place = torch.arange(8, dtype=torch.int32, device=planes.device)
    code = torch.zeros((), dtype=torch.int32, device=planes.device)
    for plane in planes.unbind(1):
        code = 2 * code + (plane.int()[..., None] >> place & 1)
    return code.flatten(-2)[..., :cols].to(torch.uint8)


def dequantise(planes: Tensor, scale: Tensor, offset: Tensor, cols: int, group: int) -> Tensor:
    """(B, R, cols) of scale and offset (B, R, ceil(cols / group)), in their type."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    spread = [part.to(wide).repeat_interleave(group, -1)[..., :cols] for part in (scale, offset)]
    return (spread[1] + spread[0] * unpack(planes, cols)).to(scale.dtype)
