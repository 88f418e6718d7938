"""The networks beside WaveMix: residual, depthwise-separable, ConvMixer and a vision transformer, for small images.

Each is the smallest that has what its kind is known for, by one or two widths, so that its parameters can be matched.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lib.core.routing import Context


class Network(nn.Module):
    """Layers from images to maps, the mean over the map, a linear head: (B, C, H, W) -> (B, classes)."""

    def __init__(self, layers: nn.Module, channels: int, classes: int):
        super().__init__()
        self.layers, self.head = layers, nn.Linear(channels, classes)

    def forward(self, x: Float[Tensor, "B C H W"], context: Context | None = None) -> Float[Tensor, "B classes"]:
        return self.head(self.layers(x).mean((-2, -1)))


class Skip(nn.Module):
    """shortcut(x) + layers(x), then what comes after."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.layers, self.shortcut, self.after = layers, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.after(self.shortcut(x) + self.layers(x))


def _norm(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


def _convolution(c: int, d: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return _norm(nn.Conv2d(c, d, kernel, stride, kernel // 2, groups=groups, bias=False), channels=d)


def resnet(classes: int, c: int, d: int, in_ch: int = 1) -> Network:
    """A convolution of stride 2, a residual block of c channels, one of d at half the size."""

    def block(c: int, d: int, stride: int) -> Skip:
        layers = nn.Sequential(_convolution(c, d, 3, stride), nn.ReLU(), _convolution(d, d, 3))
        return Skip(layers, None if stride == 1 else _convolution(c, d, 1, stride), nn.ReLU())

    stem = nn.Sequential(_convolution(in_ch, c, 3, 2), nn.ReLU())
    return Network(nn.Sequential(stem, block(c, c, 1), block(c, d, 2)), d, classes)


def separable(classes: int, c: int, d: int, in_ch: int = 1) -> Network:
    """A convolution of stride 2, then three pairs of depthwise 3 x 3 and 1 x 1, the second of stride 2."""

    def pair(c: int, d: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(_convolution(c, c, 3, stride, c), nn.ReLU(), _convolution(c, d, 1), nn.ReLU())

    stem = nn.Sequential(_convolution(in_ch, c, 3, 2), nn.ReLU())
    return Network(nn.Sequential(stem, pair(c, c), pair(c, d, 2), pair(d, d)), d, classes)


def convmixer(classes: int, c: int, depth: int, in_ch: int = 1) -> Network:
    """Patches of 2 x 2, then `depth` times a depthwise 5 x 5 with a skip, and 1 x 1."""
    layers: list[nn.Module] = [nn.Conv2d(in_ch, c, 2, 2), nn.GELU(), nn.BatchNorm2d(c)]
    for _ in range(depth):
        mixed = _norm(nn.Conv2d(c, c, 5, padding=2, groups=c), nn.GELU(), channels=c)
        layers += [Skip(mixed), _norm(nn.Conv2d(c, c, 1), nn.GELU(), channels=c)]
    return Network(nn.Sequential(*layers), c, classes)


class Tokens(nn.Module):
    """Patches of 2 x 2 with a place each, and layers of a transformer: (B, C, side, side) -> (B, c, tokens, 1)."""

    def __init__(self, in_ch: int, c: int, hidden: int, depth: int, side: int):
        super().__init__()
        self.patches = nn.Conv2d(in_ch, c, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(side * side // 4, c))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(c, 4, hidden, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            ),
            nn.LayerNorm(c),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c tokens 1"]:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.layers(tokens).transpose(1, 2)[..., None]


def vit(classes: int, c: int, hidden: int, in_ch: int = 1, side: int = 16) -> Network:
    """Patches of 2 x 2, two layers of four heads, the mean over the tokens."""
    return Network(Tokens(in_ch, c, hidden, 2, side), c, classes)
