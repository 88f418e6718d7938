"""The inverted residual cell (Sandler et al. 2018, "MobileNetV2", 1801.04381), for signals and for images.

A 1 x 1 convolution to expansion times the width, a convolution of each channel by itself with the stride, and a 1 x 1
convolution back without an activation; a batch norm behind each, SiLU behind the first two. What came in is added where
the shape is the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project: (B, D, ...) -> (B, D', ...).

    Args:
        d_in, d_out: D and D'.
        kernel: side of the middle convolution; odd.
        expansion: channels of the middle convolution, in D.
        stride: of the middle convolution.
        dims: 1 for signals, 2 for images.
    """

    def __init__(self, d_in: int, d_out: int, kernel: int, expansion: int, stride: int = 1, dims: int = 2):
        super().__init__()
        check_dims(dims)
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel is {kernel} but must be odd and at least 1")
        hidden = expansion * d_in
        self.body = nn.Sequential(
            *convolution(d_in, hidden, 1, dims=dims),
            nn.SiLU(),
            *convolution(hidden, hidden, kernel, stride, dims, groups=hidden),
            nn.SiLU(),
            *convolution(hidden, d_out, 1, dims=dims),
        )
        self.residual = stride == 1 and d_in == d_out

    def forward(self, x: Float[Tensor, "batch dim *size"]) -> Float[Tensor, "batch out *smaller"]:
        return x + self.body(x) if self.residual else self.body(x)


def inverted_residual_macs(
    d_in: int, d_out: int, kernel: int, expansion: int, size: int, stride: int = 1, dims: int = 2
) -> int:
    """Multiplications of the convolutions for one signal or image of side `size`."""
    hidden, inside, outside = expansion * d_in, size**dims, smaller(size, stride) ** dims
    return d_in * hidden * inside + hidden * kernel**dims * outside + hidden * d_out * outside


def convolution(
    d_in: int, d_out: int, kernel: int, stride: int = 1, dims: int = 2, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the side but for the stride, and its batch norm."""
    made = CONVOLUTIONS[dims](d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return made, NORMS[dims](d_out)


def smaller(size: int, stride: int) -> int:
    """The side behind a convolution with a stride."""
    return -(-size // stride)


def check_dims(dims: int) -> None:
    """Raise `InputError` unless it is 1 or 2."""
    if dims not in CONVOLUTIONS:
        raise InputError(f"dims is {dims} but must be 1, signals, or 2, images")


def pooled(x: Float[Tensor, "batch dim *size"]) -> Float[Tensor, "batch dim"]:
    """The mean over all places."""
    return x.flatten(2).mean(2)


def recalibrate(model: nn.Module, *inputs: object) -> None:
    """Set the statistics of the batch norms to those of one forward pass in training mode; nothing else changes.

    A norm that the pass goes through several times has the mean of its statistics; one that it does not go through
    keeps its own.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    modes, momenta = {module: module.training for module in model.modules()}, [norm.momentum for norm in norms]
    kept = [(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()) for norm in norms]
    model.train()
    try:
        for norm in norms:
            norm.momentum = None  # the mean over the calls
            norm.reset_running_stats()
        with torch.no_grad():
            model(*inputs)
    finally:
        for norm, momentum, (mean, var, tracked) in zip(norms, momenta, kept, strict=True):
            if norm.num_batches_tracked == 0:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(tracked)
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training


def mobile(d_in: int, d_out: int, stride: int = 1) -> InvertedResidual:
    """The cell of the registry: of images, 3 x 3 and four times as wide inside."""
    return InvertedResidual(d_in, d_out, 3, 4, stride)


def mobile_macs(d_in: int, d_out: int, height: int, width: int) -> int:
    """At stride 1."""
    return height * width * 4 * d_in * (d_in + 9 + d_out)
