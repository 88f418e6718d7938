"""A tunable convolution beside a plain one of the same shape, with one setting of the knobs and with one an image.

The bound is the plain convolution: what torch makes of one kernel for all images. "one setting" mixes the kernels of P
knobs first; "a setting an image" makes a kernel for each image and is one grouped convolution. Its rivals compute the
same: "torch/loop" one convolution after the other, "torch/all kernels" convolves with every kernel and mixes outputs,
as an implementation without mixed kernels does, and "torch/fused" is the layer after `fuse`, plain again.

`ratio_to_limit` is what knobs cost, the median over the rounds of the time over that of the plain convolution. With an
objective's gradient ("forward+backward") come the gradients of images, of all kernels and of all biases.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.bench.core import BOTH, LIMIT, OURS, Case, Contestants
from workbench.lib.core.tunable import TunableConv2d

REPEATS = 31
FUSED, LOOP, KERNELS = "torch/fused", "torch/loop", "torch/all kernels"
QUICK = ((3, 4, 8, 2),)
SHAPES = ((16, 16, 32, 2), (16, 24, 32, 2), (16, 32, 64, 3), (8, 64, 64, 4))
"""B images, C channels in and out, pixels a side, P knobs; kernels of 3 x 3."""
ONE, EACH = "one setting", "a setting an image"


def cases(quick: bool = False) -> list[Case]:
    return [
        Case(f"B={b} C={c} {side}x{side} P={p}, {setting}", partial(_contestants, (b, c, side, p), setting))
        for b, c, side, p in (QUICK if quick else SHAPES)
        for setting in (ONE, EACH)
    ]


class Problem:
    """Images, a layer with knobs, and what computes the same or, for the bound, as much."""

    def __init__(self, b: int, c: int, side: int, p: int):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(b, c, side, side, generator=generator)
        self.grad = torch.randn(b, c, side, side, generator=generator)
        self.w = torch.rand(b, p, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = TunableConv2d(c, c, 3, p, "identity", padding=1)
            self.plain = nn.Conv2d(c, c, 3, padding=1)

    def loop(self, x: Tensor) -> Tensor:
        weights, biases = self.layer.mixed(self.w)
        return torch.cat([F.conv2d(x[i : i + 1], weights[i], biases[i], padding=1) for i in range(len(x))])

    def all_kernels(self, x: Tensor, w: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        each = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=1).unflatten(1, weight.shape[:2])
        return (each * w.view(-1, len(weight), 1, 1, 1)).sum(1)

    def implementations(self, setting: str) -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]:
        """Name -> (function of the images, the module whose parameters it learns)."""
        w = self.w[0] if setting == ONE else self.w
        found = {
            OURS: (lambda x: self.layer(x, w), self.layer),
            KERNELS: (lambda x: self.all_kernels(x, w), self.layer),
        }
        if setting == ONE:
            fused = self.layer.fuse(w)
            found[FUSED] = (fused, fused)
        else:
            found[LOOP] = (self.loop, self.layer)
        return found | {LIMIT: (self.plain, self.plain)}

    def call(self, function: Callable[[Tensor], Tensor], module: nn.Module, direction: str) -> list[Tensor]:
        """The output and, in both directions, the gradients of the images and of the parameters."""
        if direction != BOTH:
            with torch.no_grad():
                return [function(self.x)]
        x = self.x.detach().requires_grad_()
        y = function(x)
        return [y, *torch.autograd.grad(y, (x, *module.parameters()), self.grad)]


def _contestants(shape: tuple[int, int, int, int], setting: str, direction: str) -> Contestants:
    problem = Problem(*shape)
    return {name: partial(problem.call, *pair, direction) for name, pair in problem.implementations(setting).items()}
