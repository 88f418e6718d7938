"""The cell that mixes tokens by a fixed wavelet transform."""

from jaxtyping import Float
from torch import Tensor, nn

from workbench.lib.core.cells.convolution import check
from workbench.lib.core.wavelets import WaveBlock

HIDDEN = 2


class WaveletCell(nn.Module):
    """x + a `WaveBlock` of one level, whose way up is interpolation; for maps of even height and width.

    Where it comes from a map of another size or width, a 1 x 1 convolution of that stride and a norm lead to it.

    Args:
        d_in, d_out: channels; d_out is a multiple of 4.
        stride: 1 or 2, of the convolution that leads to it.
    """

    def __init__(self, d_in: int, d_out: int, stride: int = 1):
        super().__init__()
        check(d_in, d_out, stride)
        lead = (nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))
        self.lead = nn.Identity() if stride == 1 and d_in == d_out else nn.Sequential(*lead)
        self.block = WaveBlock(d_out, mult=HIDDEN, up="upsample", dropout=0.0)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch d_out h2 w2"]:
        x = self.lead(x)
        return x + self.block(x)


def wavelet_macs(d_in: int, d_out: int, height: int, width: int) -> int:
    """The transform's sums are no products; of its perceptron a quarter of the places pay."""
    places = height * width
    lead = places * d_in * d_out if d_in != d_out else 0
    return lead + places * d_out * (d_out // 4) + places // 4 * 2 * HIDDEN * d_out**2
