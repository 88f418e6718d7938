"""NAFNet: a U-shaped network for restoring images without activation functions (Chen et al. 2022, arXiv:2204.04676).

    net = NAFNet(3, width=16, encoders=(1, 1), middle=1, decoders=(1, 1))
    images + net(images)                    # (B, 3, H, W), of any height and width

Tensor letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, with a scale and a shift a channel."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


def simple_gate(x: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B half H W"]:
    """One half of the channels times the other."""
    first, second = x.chunk(2, 1)
    return first * second


class NAFBlock(nn.Module):
    """A depthwise convolution between gates and a channel attention, then a pointwise gate; at first the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))
        self.into = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        y = simple_gate(self.depthwise(self.into(self.norms[0](x))))
        y = y * self.attention(y.mean((-2, -1), keepdim=True))
        x = x + self.beta * self.out(y)
        return x + self.gamma * self.narrow(simple_gate(self.widen(self.norms[1](x))))


class NAFNet(nn.Module):
    """Encoders that halve the image, a middle, decoders that double it, with the encoders' maps added.

    Args:
        in_ch, out_ch: channels of what goes in and comes out; out_ch None: in_ch.
        width: channels at full size; twice as many after each encoder.
        encoders, decoders: blocks at each size, from the largest down, and from the smallest up.
        middle: blocks at the smallest size.

    Raises:
        InputError: a number that is none, as many decoders as encoders not, or images of other channels.
    """

    def __init__(
        self,
        in_ch: int,
        width: int,
        encoders: Sequence[int] = (1, 1),
        middle: int = 1,
        decoders: Sequence[int] = (1, 1),
        out_ch: int | None = None,
    ):
        super().__init__()
        numbers = {"in_ch": in_ch, "width": width, "middle": middle, "out_ch": in_ch if out_ch is None else out_ch}
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if len(encoders) != len(decoders) or min([*encoders, *decoders], default=0) < 1:
            raise InputError(
                f"encoders, decoders are {tuple(encoders)}, {tuple(decoders)} but must be as many, of at least 1 block"
            )
        self.in_ch, self.multiple = in_ch, 2 ** len(encoders)
        self.intro = nn.Conv2d(in_ch, width, 3, padding=1)
        self.encoders, self.downs, self.ups, self.decoders = (nn.ModuleList() for _ in range(4))
        for blocks in encoders:
            self.encoders.append(nn.Sequential(*(NAFBlock(width) for _ in range(blocks))))
            self.downs.append(nn.Conv2d(width, 2 * width, 2, 2))
            width *= 2
        self.middle = nn.Sequential(*(NAFBlock(width) for _ in range(middle)))
        for blocks in decoders:
            self.ups.append(nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2)))
            width //= 2
            self.decoders.append(nn.Sequential(*(NAFBlock(width) for _ in range(blocks))))
        self.ending = nn.Conv2d(width, numbers["out_ch"], 3, padding=1)

    def forward(self, x: Float[Tensor, "B in_ch H W"]) -> Float[Tensor, "B out_ch H W"]:
        if x.ndim != 4 or x.shape[1] != self.in_ch:
            raise InputError(f"x has shape {tuple(x.shape)} but must be (B, {self.in_ch}, H, W)")
        height, width = x.shape[-2:]
        h = self.intro(F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple)))
        skips = []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            h = blocks(h)
            skips.append(h)
            h = down(h)
        h = self.middle(h)
        for blocks, up, skip in zip(self.decoders, self.ups, reversed(skips), strict=True):
            h = blocks(up(h) + skip)
        return self.ending(h)[..., :height, :width]
