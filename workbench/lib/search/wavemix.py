"""WaveMix: images whose tokens are mixed by a wavelet transform (Jeevan, Viswanathan, Sethi 2022, arXiv:2205.14375).

    model = WaveMix(3, n_out=10, dim=16, depth=2, levels=2, stride=2, dropout=0.0)
    model(images)                                        # (B, 3, 32, 32) -> (B, 10)
    WaveMix(3, n_out=5, dim=16, depth=2, task="segment")(images)    # (B, 5, 32, 32)

A stem makes maps of `dim` channels, blocks with skips around them keep the shape of these (`WaveBlock`, in
workbench/lib/core/wavelets.py), and a head makes of them what the task asks for. Neither attention nor, between the
stem and the way up, a weight that reaches beyond a pixel.

Tensor letters: B batch, C channels, H height, W width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.routing import Context
from workbench.lib.core.wavelets import MIXERS, WaveBlock

METHOD = Method(
    slug="wavemix",
    title="WaveMix: A Resource-efficient Neural Network for Image Analysis",
    family="search",
    year=2022,
    paper="arXiv:2205.14375",
    claim="Mixing tokens by a fixed wavelet transform matches convolutional and attention networks with fewer "
    "parameters and less memory.",
    objects=("WaveMix", "WaveBlock", "MIXERS", "band_energy"),
    kind="images",
)

STEMS = ("patch", "strided")
TASKS = ("classify", "segment", "sr")


def example() -> nn.Module:
    """Two blocks of two levels between a stem of patches and a linear head."""
    return WaveMix(3, n_out=10, dim=16, depth=2, levels=2, stride=2, dropout=0.1)


class WaveMix(nn.Module):
    """Stem, blocks with skips, head: (B, in_ch, H, W) -> (B, n_out), or (B, n_out, H', W') for the other tasks.

    Args:
        in_ch: channels of an image.
        n_out: classes; of "sr" the channels of an image, which are `in_ch`.
        dim, depth, levels: channels of the maps, blocks, levels of the transform in each.
        stem: "patch" (two convolutions of 3 x 3, then one of `stride` x `stride` on patches) or "strided" (two
            convolutions of 3 x 3, each of that stride).
        task: "classify" (mean over the map, then linear), "segment" (transposed convolutions back to the size of the
            image, then 1 x 1), "sr" (the image at twice its size, bicubic, plus what the network adds to it).
        stride: of the stem. To come back to the size of the image it must be a power of two.
        ff, mult, up, mode, dropout, mixer: of every block, see `WaveBlock`.

    Raises:
        InputError: names the argument that does not fit; an image whose sides are no multiples of `multiple`.
    """

    def __init__(
        self,
        in_ch: int,
        n_out: int,
        dim: int,
        depth: int,
        levels: int = 1,
        stem: str = "patch",
        task: str = "classify",
        stride: int = 4,
        ff: int | None = None,
        mult: int = 2,
        up: str = "deconv",
        mode: str = "nested",
        dropout: float = 0.5,
        mixer: str = "haar",
    ):
        super().__init__()
        for name, value, known in (("stem", stem, STEMS), ("task", task, TASKS)):
            if value not in known:
                raise unknown(name, value, known)
        for name, value in (("in_ch", in_ch), ("n_out", n_out), ("depth", depth), ("stride", stride)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        reduction = stride if stem == "patch" else stride**2
        if task != "classify" and reduction & (reduction - 1):
            raise InputError(f"stride is {stride} but must be a power of two for task {task!r}")
        if task == "sr" and n_out != in_ch:
            raise InputError(f"n_out is {n_out} but must be in_ch, which is {in_ch}, for task 'sr'")
        blocks = [WaveBlock(dim, ff, mult, levels, up, mode, dropout, mixer) for _ in range(depth)]
        self.task, self.in_ch = task, in_ch
        self.multiple = reduction * 2**levels
        """What the sides of an image (of "sr": of the enlarged one) must be multiples of."""
        self.stem = _stem(in_ch, dim, stem, stride)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(dim, n_out) if task == "classify" else _decoder(dim, n_out, reduction)

    def forward(self, x: Float[Tensor, "B C H W"], context: Context | None = None) -> Float[Tensor, "B n_out ..."]:
        if self.task == "sr":
            x = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        z = self.features(x)[-1]
        if self.task == "classify":
            return self.head(z.mean((-2, -1)))
        return x + self.head(z) if self.task == "sr" else self.head(z)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B dim h w"]]:
        """The maps after the stem and after every block."""
        height, width = x.shape[-2:]
        if x.ndim != 4 or x.shape[1] != self.in_ch:
            raise InputError(f"x has shape {tuple(x.shape)} but must be (B, {self.in_ch}, H, W)")
        if min(height, width) < self.multiple or height % self.multiple or width % self.multiple:
            raise InputError(
                f"images are {height} x {width} but their height and width must be multiples of {self.multiple}, the "
                "stride of the stem times 2^levels"
            )
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]))
        return maps


def band_energy(block: WaveBlock, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "levels 4"]:
    """The share of a level's energy in each of its bands LL, LH, HL, HH, of what a block is given."""
    with torch.no_grad():
        energy = torch.stack(
            [torch.stack([band.square().sum() for band in bands.chunk(4, 1)]) for bands in block.bands(x)]
        )
    return energy / energy.sum(1, keepdim=True)


def _stem(in_ch: int, dim: int, stem: str, stride: int) -> nn.Sequential:
    if stem == "patch":
        convolutions = [
            nn.Conv2d(in_ch, dim // 4, 3, padding=1),
            nn.Conv2d(dim // 4, dim // 2, 3, padding=1),
            nn.Conv2d(dim // 2, dim, stride, stride),
        ]
    else:
        convolutions = [
            nn.Conv2d(in_ch, dim // 2, 3, stride, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride, padding=1),
        ]
    return nn.Sequential(*convolutions, nn.GELU(), nn.BatchNorm2d(dim))


def _decoder(dim: int, n_out: int, reduction: int) -> nn.Sequential:
    """Back to the size of the image, twice as large at a time."""
    steps = [nn.ConvTranspose2d(dim, dim, 4, 2, 1) for _ in range(reduction.bit_length() - 1)]
    return nn.Sequential(*steps, nn.Conv2d(dim, n_out, 1))


__all__ = ["METHOD", "MIXERS", "WaveBlock", "WaveMix", "band_energy", "example"]
