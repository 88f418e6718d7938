"""`e3m0_pack` and `e3m0_unpack` on a processor, in torch: by the bits of float32, and by a table of bytes.

The bits of a positive number are ordered as the number, and doubling adds 2^23 to them: how many of t, 2t, 4t, ... a
magnitude passes is a difference of bits, shifted.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.e3m0 import SMALLEST, reference, sizes


def e3m0_pack(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """As `reference.e3m0_pack`."""
    n_bytes, n_scales = sizes(len(x), block)
    rows = pad(x, (0, n_scales * block - len(x))).view(-1, block)
    bits = rows.view(torch.int32)
    size = bits & 0x7FFFFFFF
    scales = size.amax(1).view(torch.float32) / 16
    scales.masked_fill_(scales < SMALLEST, 0.0)
    low = torch.where(scales > 0, (scales * 0.125).view(torch.int32), 0x7FFFFFFF)[:, None]
    code = size.sub((scales * 0.375).view(torch.int32)[:, None]).sub_(1).bitwise_right_shift_(23).add_(2).clamp_(min=1)
    code.add_((bits < 0).int(), alpha=8).mul_(size > low)
    pairs = code.view(-1, 2)
    return pairs[:, 1].bitwise_left_shift(4).bitwise_or_(pairs[:, 0]).to(torch.uint8)[:n_bytes], scales


def e3m0_unpack(codes: Tensor, scales: Tensor, n: int, block: int) -> Tensor:
    """As `reference.e3m0_unpack`."""
    numbers = _table().index_select(0, codes.int()).view(-1)
    return (pad(numbers, (0, len(scales) * block - len(numbers))).view(-1, block) * scales[:, None]).view(-1)[:n]


@cache
def _table() -> Tensor:
    """The two numbers (256, 2) of every byte."""
    with torch.inference_mode(False):
        return reference.e3m0_unpack(torch.arange(256).to(torch.uint8), torch.ones(32), 512, 16).view(256, 2)
