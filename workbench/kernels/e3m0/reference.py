"""The meaning of `e3m0_pack` and `e3m0_unpack`: how many of seven thresholds a magnitude passes, and back."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kernels.e3m0 import SMALLEST

LEVELS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def e3m0_pack(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes (ceil(n / 2),) uint8, scales (ceil(n / block),) float32) of x (n,)."""
    rows = pad(x, (0, -len(x) % block)).view(-1, block)
    scales = rows.abs().amax(1) / 16
    scales = torch.where(scales < SMALLEST, 0.0, scales)
    between = scales[:, None] * 0.375  # of 1/4 and 1/2; the others are powers of two of it
    passed = (rows.abs() > scales[:, None] * 0.125).to(torch.uint8)
    for j in range(6):
        passed += rows.abs() > between * 2**j
    passed *= scales[:, None] > 0
    codes = torch.where((rows < 0) & (passed > 0), passed + 8, passed).flatten()[: len(x) + len(x) % 2]
    return codes[::2] | (codes[1::2] << 4), scales


def e3m0_unpack(codes: Tensor, scales: Tensor, n: int, block: int) -> Tensor:
    """x (n,) float32 of codes and scales."""
    halves = torch.stack([codes & 15, codes >> 4], 1).flatten()[:n].int()
    levels = torch.tensor(LEVELS, device=codes.device)[halves & 7]
    return torch.where(halves > 7, -levels, levels) * scales.repeat_interleave(block)[:n]
