"""Cells that mix neighbouring places by a 3 x 3 convolution."""

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError

EXPANSION = 4


def check(d_in: int, d_out: int, stride: int) -> None:
    """Raise `InputError` where there is no such cell."""
    if min(d_in, d_out) < 1:
        raise InputError(f"channels are {d_in} in and {d_out} out but must be at least 1")
    if stride not in (1, 2):
        raise InputError(f"stride is {stride} but must be 1 or 2")


class SqueezeExcite(nn.Module):
    """Each channel times a gate that sees the means of all (Hu et al. 2018, 1709.01507)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        return x * self.gate(x)


class FusedMBConv(nn.Module):
    """conv 3 x 3 (d -> 4 d), norm, GELU, [gate], conv 1 x 1 (4 d -> d'), norm; a residual where shapes allow it.

    Gupta and Tan 2019; without the gate and at d' = d it has 36 d^2 + 4 d^2 weights.

    Args:
        d_in, d_out: channels.
        stride: 1 or 2, of the 3 x 3 convolution.
        squeeze: of d_in, the hidden width of a squeeze-excite gate; 0 has none.
        still: the last norm starts at 0, so that the cell starts as the identity where it has a residual.
        circular: pad by the other side of the map: the cell then commutes with shifts.
    """

    def __init__(
        self, d_in: int, d_out: int, stride: int = 1, squeeze: float = 0.0, still: bool = False, circular: bool = False
    ):
        super().__init__()
        check(d_in, d_out, stride)
        wide = EXPANSION * d_in
        mode = "circular" if circular else "zeros"
        gate = [SqueezeExcite(wide, max(1, round(squeeze * d_in)))] if squeeze else []
        self.body = nn.Sequential(
            nn.Conv2d(d_in, wide, 3, stride, 1, bias=False, padding_mode=mode), nn.BatchNorm2d(wide), nn.GELU(),
            *gate, nn.Conv2d(wide, d_out, 1, bias=False), nn.BatchNorm2d(d_out),
        )  # fmt: skip
        self.residual = stride == 1 and d_in == d_out
        if still:
            nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch d_out h2 w2"]:
        return x + self.body(x) if self.residual else self.body(x)


def fused_mb_macs(d_in: int, d_out: int, height: int, width: int) -> int:
    return height * width * EXPANSION * d_in * (9 * d_in + d_out)


class ResidualConv(nn.Module):
    """Two convolutions 3 x 3 with norms and ReLU around a residual (He et al. 2016, 1512.03385); 1 x 1 where shapes
    differ.

    Args:
        d_in, d_out: channels.
        stride: 1 or 2, of the first convolution.
    """

    def __init__(self, d_in: int, d_out: int, stride: int = 1):
        super().__init__()
        check(d_in, d_out, stride)
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out),
        )  # fmt: skip
        same = stride == 1 and d_in == d_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(d_in, d_out, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch d_out h2 w2"]:
        return (self.shortcut(x) + self.body(x)).relu()


def residual_macs(d_in: int, d_out: int, height: int, width: int) -> int:
    """At stride 1; a shortcut that projects is counted where widths differ."""
    shortcut = d_in * d_out if d_in != d_out else 0
    return height * width * (9 * d_in * d_out + 9 * d_out * d_out + shortcut)
