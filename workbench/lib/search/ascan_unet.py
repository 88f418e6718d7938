"""A U-Net of C and T cells for images that are made: stages down, a bottleneck, and the same stages mirrored up.

A C is a residual block whose norm is scaled and shifted by the time; a T attends to itself and across to what the image
is to be of. Down ("CC", "CT"), up in reverse: ("TC", "CC").
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError

GROUPS, HEAD, TIME = 4, 8, 64


class TimedConv(nn.Module):
    """norm, SiLU, conv 3 x 3, norm scaled and shifted by the time, SiLU, conv 3 x 3, and a residual."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(GROUPS, d_in), nn.SiLU(), nn.Conv2d(d_in, d_out, 3, 1, 1))
        self.norm, self.second = nn.GroupNorm(GROUPS, d_out), nn.Conv2d(d_out, d_out, 3, 1, 1)
        self.time = nn.Linear(TIME, 2 * d_out)
        self.shortcut = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        return self.shortcut(x) + self.second(F.silu(self.norm(self.first(x)) * (1 + scale) + shift))


class CrossCell(nn.Module):
    """Self-attention, cross-attention to the condition and an MLP, each with a norm before and a residual."""

    def __init__(self, d_in: int, d_out: int, cond_dim: int):
        super().__init__()
        if d_out % HEAD:
            raise InputError(f"dims has {d_out} but a stage with a T must be a multiple of {HEAD} wide")
        heads = d_out // HEAD
        self.lead = nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(d_out) for _ in range(3))
        self.own = nn.MultiheadAttention(d_out, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(d_out, heads, kdim=cond_dim, vdim=cond_dim, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_out, 4 * d_out), nn.GELU(), nn.Linear(4 * d_out, d_out))

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        x = self.lead(x)
        tokens = x.flatten(2).mT
        seen = self.norms[0](tokens)
        tokens = tokens + self.own(seen, seen, seen, need_weights=False)[0]
        tokens = tokens + self.cross(self.norms[1](tokens), condition, condition, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norms[2](tokens))
        return tokens.mT.unflatten(2, x.shape[2:]).contiguous()


class HybridUNet(nn.Module):
    """What is predicted of a noisy image, at a time and under a condition; of the image's shape.

    Args:
        stages: down, a string of C and T each; the bottleneck is the last cell of the last stage once more.
        dims: widths of the stages, multiples of 8.
        cond_dim: width of the condition's tokens.
        channels: of an image.
    """

    def __init__(self, stages: Sequence[str], dims: Sequence[int], cond_dim: int, channels: int = 1):
        super().__init__()
        for stage in stages:
            if not stage or set(stage) - {"C", "T"}:
                raise InputError(f"stages has {stage!r} but a stage must be a string of C and T, at least one")
        if not stages or len(dims) != len(stages) or any(dim % HEAD for dim in dims):
            raise InputError(f"dims is {tuple(dims)} but must be {len(stages)} multiples of {HEAD}")
        self.strings = tuple(stages)
        self.times = nn.Sequential(nn.Linear(TIME, TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        self.stem = nn.Conv2d(channels, dims[0], 3, 1, 1)

        def cell(letter: str, d_in: int, d_out: int) -> nn.Module:
            return TimedConv(d_in, d_out) if letter == "C" else CrossCell(d_in, d_out, cond_dim)

        def stage(letters: str, d_in: int, d_out: int) -> nn.ModuleList:
            return nn.ModuleList(cell(letter, d_out if i else d_in, d_out) for i, letter in enumerate(letters))

        widths = [dims[0], *dims]
        self.down = nn.ModuleList(
            stage(letters, widths[i], dim) for i, (letters, dim) in enumerate(zip(stages, dims, strict=True))
        )
        self.middle = cell(stages[-1][-1], dims[-1], dims[-1])
        self.up, below = nn.ModuleList(), dims[-1]
        for letters, dim in zip(reversed(stages), reversed(dims), strict=True):
            self.up.append(stage(letters[::-1], below + dim, dim))
            below = dim
        self.end = nn.Sequential(nn.GroupNorm(GROUPS, dims[0]), nn.SiLU(), nn.Conv2d(dims[0], channels, 3, 1, 1))

    def forward(
        self,
        x: Float[Tensor, "batch channels h w"],
        time: Float[Tensor, " batch"],
        condition: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch channels h w"]:
        least = 2 ** len(self.down)
        if any(side < least or side % least for side in x.shape[2:]):
            raise InputError(f"images are {tuple(x.shape[2:])} but both sides must be multiples of {least}")
        rates = torch.exp(-math.log(1000.0) * torch.arange(TIME // 2, device=x.device) / (TIME // 2))
        angles = time[:, None].float() * rates
        told = self.times(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        x, skipped = self.stem(x), []
        for stage in self.down:
            for cell in stage:
                x = cell(x, told, condition)
            skipped.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x, told, condition)
        for stage in self.up:
            x = torch.cat([F.interpolate(x, scale_factor=2.0), skipped.pop()], 1)
            for cell in stage:
                x = cell(x, told, condition)
        return self.end(x)
