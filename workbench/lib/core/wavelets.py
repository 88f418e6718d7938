"""The wavelet block of WaveMix (Jeevan et al. 2022): tokens mixed by a fixed transform of cells of 2 x 2.

A block reduces c channels to c / 4, and a transform without parameters brings these to half the size and back to c
channels: the Haar wavelet's sub-bands LL, LH, HL, HH, C channels each (`workbench.kernels.haar_dwt2`). Of the sub-band
LL comes the next level. Perceptrons of 1 x 1 mix channels where maps are small, and their results return to full size,
so that a block keeps the shape of what it is given and can be stacked.

Beside Haar are other transforms of the same sizes, to see what the wavelet itself is worth. A 1 x 1 convolution that
follows takes up any invertible 4 x 4 matrix of the bands: at one level Haar, "unshuffle" and "orthogonal" can be the
same functions and differ in where training starts. From the second level on they are others, as each goes on with its
own first band: the mean of a cell, one pixel of it, or a random mixture.

Tensor letters: B batch, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.kernels import haar_dwt2

UPS = ("deconv", "upsample", "pixelshuffle")
MODES = ("nested", "parallel")

Mixer = Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B bands half_height half_width"]]


def _cells(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]


def _unshuffle(x: Tensor) -> Tensor:
    return torch.cat(_cells(x), 1)


def _orthogonal(x: Tensor) -> Tensor:
    cells = torch.stack(_cells(x), 1)
    return torch.einsum("ij,bjchw->bichw", random_orthogonal(x), cells).flatten(1, 2)


def _average(x: Tensor) -> Tensor:
    return (2 * F.avg_pool2d(x, 2)).repeat(1, 4, 1, 1)


def random_orthogonal(like: Tensor) -> Float[Tensor, "4 4"]:
    """One orthogonal matrix, drawn once and for all: a transform that is as fixed as a wavelet."""
    drawn = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return torch.linalg.qr(drawn).Q.to(like)


#: Name -> what brings C channels to 4 C at half the size. "average" has LL in the place of every band.
MIXERS: dict[str, Mixer] = {
    "haar": haar_dwt2,
    "unshuffle": _unshuffle,
    "orthogonal": _orthogonal,
    "average": _average,
}


class WaveBlock(nn.Module):
    """One block, without the skip around it: (B, dim, H, W) -> (B, dim, H, W), H and W multiples of 2^levels.

    "nested" begins at the deepest level; each level's perceptron gets all four sub-bands and what came from below.
    "parallel", of the first version of the paper, has one perceptron for the sub-bands of every level, brings each
    straight to full size, and joins them by a depthwise convolution.

    Args:
        dim: channels, a multiple of 4.
        ff: channels that a perceptron hands to the way up, `dim` by default; not of "upsample", which has no weights.
        mult: hidden channels of a perceptron, as a multiple of `dim`.
        levels: of the transform.
        up: how a level returns to twice its size: "deconv" (a transposed convolution of 4 x 4), "upsample" (bilinear),
            or "pixelshuffle" (then a convolution of 3 x 3). In "parallel" mode "deconv" alone.
        mode: "nested" or "parallel".
        dropout: of the hidden channels.
        mixer: one of `MIXERS`.

    Raises:
        InputError: names the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        ff: int | None = None,
        mult: int = 2,
        levels: int = 1,
        up: str = "deconv",
        mode: str = "nested",
        dropout: float = 0.5,
        mixer: str = "haar",
    ):
        super().__init__()
        for name, value, known in (("up", up, UPS), ("mode", mode, MODES), ("mixer", mixer, MIXERS)):
            if value not in known:
                raise unknown(name, value, known)
        if dim < 4 or dim % 4:
            raise InputError(f"dim is {dim} but must be a multiple of 4, the sub-bands of a channel")
        for name, value in (("ff", dim if ff is None else ff), ("mult", mult), ("levels", levels)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout} but must be at least 0 and below 1")
        if up == "upsample" and ff is not None:
            raise InputError(f"ff is {ff} but up is 'upsample', which has no weights and takes no ff")
        if mode == "parallel" and up != "deconv":
            raise InputError(f"up is {up!r} but must be 'deconv' where mode is 'parallel'")
        if mode == "parallel" and dim % levels:
            raise InputError(f"levels is {levels} but must divide dim, which is {dim}, where mode is 'parallel'")
        self.levels, self.mode, self.mixer = levels, mode, mixer
        ff, hidden = dim if ff is None else ff, mult * dim
        self.reduce = nn.Conv2d(dim, dim // 4, 1)
        if mode == "parallel":
            self.mlp = _perceptron(dim, hidden, ff, dropout)
            part, strides = dim // levels, [2 ** (level + 1) for level in range(levels)]
            self.ups = nn.ModuleList(nn.ConvTranspose2d(ff, part, s + 2, s, 1) for s in strides)
            self.join = nn.Sequential(nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.GELU(), nn.BatchNorm2d(dim))
        else:
            deepest = levels - 1
            self.ups = nn.ModuleList(
                _level(dim if level == deepest else dim + dim // 2, hidden, ff, dim // 2 if level else dim, up, dropout)
                for level in range(levels)
            )

    def bands(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B C h w"]]:
        """All four bands of every level, of the reduced channels; those of one level have C channels together."""
        step = 2**self.levels
        if min(x.shape[-2:]) < step or x.shape[-2] % step or x.shape[-1] % step:
            raise InputError(
                f"x is {x.shape[-2]} x {x.shape[-1]} but its height and width must be multiples of {step}, as it is "
                f"halved {self.levels} times"
            )
        low, found = self.reduce(x), []
        for _ in range(self.levels):
            found.append(MIXERS[self.mixer](low))
            low = found[-1].chunk(4, 1)[0]
        return found

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        bands = self.bands(x)
        if self.mode == "parallel":
            parts = [up(self.mlp(band)) for up, band in zip(self.ups, bands, strict=True)]
            return self.join(torch.cat(parts, 1))
        y = self.ups[-1](bands[-1])
        for up, band in zip(reversed(self.ups[:-1]), reversed(bands[:-1]), strict=True):
            y = up(torch.cat([band, y], 1))
        return y

    def extra_repr(self) -> str:
        return f"{self.mixer}, levels={self.levels}, {self.mode}"


def _perceptron(dim_in: int, hidden: int, dim_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim_in, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, dim_out, 1))


def _level(dim_in: int, hidden: int, ff: int, dim_out: int, up: str, dropout: float) -> nn.Sequential:
    """A perceptron of a level, and its way to twice the size."""
    if up == "deconv":
        tail = [_perceptron(dim_in, hidden, ff, dropout), nn.ConvTranspose2d(ff, dim_out, 4, 2, 1)]
    elif up == "upsample":
        mlp = _perceptron(dim_in, hidden, dim_out, dropout)
        tail = [mlp, nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
    else:
        mlp = _perceptron(dim_in, hidden, 4 * ff, dropout)
        tail = [mlp, nn.PixelShuffle(2), nn.Conv2d(ff, dim_out, 3, padding=1)]
    return nn.Sequential(*tail, nn.BatchNorm2d(dim_out))
