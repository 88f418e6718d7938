"""Cells of image networks: one registry that all searches and hand-made layouts draw from.

A cell maps maps, (B, C, H, W) to (B, C', H', W'), where H' = ceil(H / stride). Its products are counted by formula:

    CELLS["fused_mb"].build(16, 32, 2)      # a module
    CELLS["fused_mb"].macs(16, 32, 8, 8)    # multiply-accumulates for an output of 8 x 8, an image

Norms, activations, biases and pooled gates are left out of the count, as papers do.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from workbench.lib.core.cells.attention import TransformerCell, transformer_macs
from workbench.lib.core.cells.convolution import FusedMBConv, ResidualConv, fused_mb_macs, residual_macs
from workbench.lib.core.cells.inverted_residual import InvertedResidual, mobile, mobile_macs
from workbench.lib.core.cells.wavelet import WaveletCell, wavelet_macs


@dataclass(frozen=True)
class Kind:
    """How a cell is built and what it costs.

    Attributes:
        build: (channels in, channels out, stride) -> the module.
        macs: (channels in, channels out, output height, output width) -> multiply-accumulates an image.
    """

    build: Callable[[int, int, int], nn.Module]
    macs: Callable[[int, int, int, int], int]


CELLS: dict[str, Kind] = {
    "fused_mb": Kind(FusedMBConv, fused_mb_macs),
    "inverted_residual": Kind(mobile, mobile_macs),
    "residual": Kind(ResidualConv, residual_macs),
    "transformer": Kind(TransformerCell, transformer_macs),
    "wavelet": Kind(WaveletCell, wavelet_macs),
}

__all__ = ["CELLS", "FusedMBConv", "InvertedResidual", "Kind", "ResidualConv", "TransformerCell", "WaveletCell"]
