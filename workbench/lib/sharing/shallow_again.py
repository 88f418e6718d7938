"""Shallow again: a stack of residual layers, and the one broad layer that its first-order terms are.

Bermeitinger, Hrycej and Handschuh 2023, "Make Deep Networks Shallow Again". No code was published; layers as described
there, without normalisation inside them. A stack of n layers multiplies out, for linear layers F_i(z) = W_i z, to

    z_n = (I + W_n) ... (I + W_1) z_0 = z_0 + sum_i W_i z_0 + sum_{i<j} W_j W_i z_0 + ...     2^n terms

and for others to the same with derivatives: the terms of second order are F_j'(z_0) F_i(z_0). Cut after the first
order, all layers read the same input:

    sequential   z_i = z_{i-1} + F_i(z_{i-1})           parallel   z = z_0 + sum_i F_i(z_0)

The two have the same parameters and differ by O(eps^2) where the layers are of size eps. Between them lie sweeps over
the inputs of the layers (Picard), from u_i = z_0:  u_i <- z_0 + sum_{j<i} F_j(u_j);  one is the parallel net, n are the
sequential one, s are off by O(eps^(s+1)). Layers are not linear for a reason: in parallel, linear ones are one matrix.

Tensor letters: B batch, C channels, n layers.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context

METHOD = Method(
    slug="shallow-again",
    title="Make Deep Networks Shallow Again",
    family="sharing",
    year=2023,
    paper="arXiv, September 2023",
    claim="A residual stack cut to its first-order terms, one broad parallel layer, trains to about the same loss as "
    "the deep network with the same parameters.",
    objects=(
        "ResidualStack",
        "to_parallel",
        "fuse_parallel_convs",
        "equivalence_gap",
        "order_terms",
        "residual_network",
    ),
    kind="images",
)

MODES = ("sequential", "parallel", "picard")


def example() -> nn.Module:
    """Four convolutions side by side between a stem and a head."""
    return residual_network((3, 16, 16), channels=8, n=4, classes=10, mode="parallel")


class ResidualStack(nn.Module):
    """Layers of one shape with skips, one after the other or all on the same input: (B, ...) -> (B, ...).

    Args:
        layers: F_i; each gives what it takes in shape.
        mode: "sequential", "parallel", or "picard" for what lies between.
        sweeps: of "picard", 1 (parallel) to n (sequential, to the last bit).
        scale: factor on every F_i.
    """

    def __init__(self, layers: Iterable[nn.Module], mode: str = "sequential", sweeps: int = 1, scale: float = 1.0):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise InputError("layers is empty but must hold at least one")
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if not 1 <= sweeps <= len(self.layers):
            raise InputError(f"sweeps is {sweeps} but must be from 1 to the {len(self.layers)} layers")
        self.mode, self.sweeps, self.scale = mode, sweeps, scale

    def forward(self, z: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if self.mode == "sequential":
            for i in range(len(self.layers)):
                z = z + self._step(i, z)
            return z
        sweeps = self.sweeps if self.mode == "picard" else 1
        inputs, steps = [z] * len(self.layers), []
        for sweep in range(sweeps):
            # the first `sweep` layers had the input that they keep
            steps = steps[:sweep] + [self._step(i, inputs[i]) for i in range(sweep, len(self.layers))]
            inputs, total = [], z
            for step in steps:
                inputs.append(total)
                total = total + step
        return total

    def _step(self, i: int, z: Tensor) -> Tensor:
        step = self.layers[i](z)
        if step.shape != z.shape:
            raise InputError(f"layers[{i}] makes {tuple(step.shape)} of {tuple(z.shape)} but must keep the shape")
        return step if self.scale == 1.0 else self.scale * step

    def extra_repr(self) -> str:
        return self.mode + (f", sweeps={self.sweeps}" if self.mode == "picard" else "")


def to_parallel(stack: ResidualStack) -> ResidualStack:
    """The same layers, and their parameters, in parallel."""
    return ResidualStack(stack.layers, "parallel", scale=stack.scale)


def conv_layer(channels: int, kernel: int = 3, dims: int = 2) -> nn.Sequential:
    """F = ReLU(convolution), of as many channels in as out and the same size."""
    return nn.Sequential(_convolution(dims)(channels, channels, kernel, padding="same"), nn.ReLU())


def residual_network(
    shape: Sequence[int], channels: int, n: int, classes: int, kernel: int = 3, mode: str = "sequential"
) -> "ResidualNetwork":
    """The network of the paper, drawn alike for every mode: stem convolution, n layers, a dense head.

    Args:
        shape: of an input, (channels, length) or (channels, height, width).
        channels: filters of every layer.
    """
    if len(shape) not in (2, 3):
        raise InputError(f"shape is {tuple(shape)} but must be (channels, length) or (channels, height, width)")
    if min(*shape, channels, n, classes, kernel) < 1:
        raise InputError(f"shape, channels, n, classes, kernel are {(*shape, channels, n, classes, kernel)} below 1")
    dims = len(shape) - 1
    stem = _convolution(dims)(shape[0], channels, kernel, padding="same")
    stack = ResidualStack([conv_layer(channels, kernel, dims) for _ in range(n)], mode)
    return ResidualNetwork(stem, stack, nn.Linear(channels * torch.Size(shape[1:]).numel(), classes))


class ResidualNetwork(nn.Module):
    """Stem, stack and head: (B, C, ...) -> (B, classes)."""

    def __init__(self, stem: nn.Module, stack: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.stack, self.head = stem, stack, head

    def forward(self, x: Float[Tensor, "batch ..."], context: Context | None = None) -> Float[Tensor, "batch classes"]:
        return self.head(self.stack(self.stem(x)).flatten(1))


class WideConv(nn.Module):
    """z + the sum over n groups of activation(convolution C -> n C): n layers in parallel as one.

    Args:
        conv: with n C channels out.
        scale: factor on the sum.
    """

    def __init__(self, conv: nn.Module, activation: nn.Module, scale: float = 1.0):
        super().__init__()
        self.conv, self.activation, self.scale = conv, activation, scale

    def forward(self, z: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        wide = self.activation(self.conv(z))
        return z + self.scale * wide.unflatten(1, (-1, z.shape[1])).sum(1)


def fuse_parallel_convs(stack: ResidualStack) -> WideConv:
    """The parallel layers of a stack, each `nn.Sequential(convolution, activation)`, as one, with copied parameters.

    The activation is that of the first layer, and must work element by element.

    Raises:
        InputError: the stack is not parallel, or its layers are not so, or differ in more than their weights.
    """
    if stack.mode != "parallel":
        raise InputError(f"stack is {stack.mode} but must be parallel: to_parallel(stack) is another function")
    for i, layer in enumerate(stack.layers):
        if not (isinstance(layer, nn.Sequential) and len(layer) == 2 and isinstance(layer[0], nn.Conv1d | nn.Conv2d)):
            raise InputError(f"layers[{i}] is a {type(layer).__name__} but must be Sequential(convolution, activation)")
        if repr(layer) != repr(stack.layers[0]) or list(layer[1].parameters()):
            raise InputError(f"layers[{i}] has another form than layers[0], or an activation with parameters")
    first, activation = stack.layers[0]
    if first.groups != 1:
        raise InputError(f"layers have {first.groups} groups but must have 1")
    convs = [layer[0] for layer in stack.layers]
    like = first.weight
    wide = type(first)(
        first.in_channels,
        len(convs) * first.out_channels,
        first.kernel_size,
        padding=first.padding,
        dilation=first.dilation,
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
        device=like.device,
        dtype=like.dtype,
    )
    with torch.no_grad():
        wide.weight.copy_(torch.cat([conv.weight for conv in convs]))
        if first.bias is not None:
            wide.bias.copy_(torch.cat([conv.bias for conv in convs]))
    return WideConv(wide, activation, stack.scale)


def order_terms(layers: Sequence[nn.Module], z: Tensor, max_order: int) -> list[Tensor]:
    """The terms of orders 0 to `max_order` of a stack of linear layers at z. That of order k sums C(n, k) products.

    Args:
        layers: without biases.
    """
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) or layer.bias is not None:
            raise InputError(
                f"layers[{i}] is a {type(layer).__name__} but must be linear or a convolution, without a bias"
            )
    if not 0 <= max_order <= len(layers):
        raise InputError(f"max_order is {max_order} but must be from 0 to the {len(layers)} layers")
    terms = [z] + [torch.zeros_like(z) for _ in range(max_order)]
    for layer in layers:  # a product with this one or without it
        terms = [z] + [term + layer(below) for below, term in pairwise(terms)]
    return terms


def equivalence_gap(
    sequential: ResidualStack, parallel: ResidualStack, x: Float[Tensor, "batch ..."]
) -> dict[str, float]:
    """How far two layouts of a stack are from each other on a batch, in evaluation mode.

    Returns:
        norm_gap: root mean square of their difference. rel_gap: of that over what the sequential one adds to x: far
        below 1 it is in the regime where the expansion holds. order_estimate: log2 of the norm_gap over what it is with
        both scales halved; about 2 there.
    """
    scales = sequential.scale, parallel.scale
    with evaluating(sequential), evaluating(parallel):
        deep = sequential(x)
        gap, added = _rms(deep - parallel(x)), _rms(deep - x)
        try:
            sequential.scale, parallel.scale = scales[0] / 2, scales[1] / 2
            half = _rms(sequential(x) - parallel(x))
        finally:
            sequential.scale, parallel.scale = scales
    order = float(torch.log2(gap / half)) if gap > 0 and half > 0 else 0.0
    return {"norm_gap": float(gap), "rel_gap": float(gap / added) if added > 0 else 0.0, "order_estimate": order}


def _convolution(dims: int) -> type[nn.Conv1d] | type[nn.Conv2d]:
    return nn.Conv1d if dims == 1 else nn.Conv2d


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
