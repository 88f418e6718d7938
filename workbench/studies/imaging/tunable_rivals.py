"""The ways of control beside tunable convolutions: one network conditioned by FiLM, or two that are mixed.

All are the network of the bed, residual convolutions of 3 x 3, and are called as net(images, w=knobs), with the middle
of the axis where no knobs are given.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.restoration import ResidualCNN
from workbench.lib.core.routing import Context

MIDDLE = (0.5, 0.5)


class Plain(nn.Module):
    """A network that has no knobs: it is the same at all of them."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.net = ResidualCNN(1, width, depth)

    def forward(
        self, x: Float[Tensor, "B 1 H W"], context: Context | None = None, w: Tensor | None = None
    ) -> Float[Tensor, "B 1 H W"]:
        return self.net(x)


class FiLM(nn.Module):
    """Every hidden channel is scaled and shifted by a linear function of the knobs, at first by 1 and 0."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.net = ResidualCNN(1, width, depth)
        self.films = nn.ModuleList(nn.Linear(2, 2 * width) for _ in range(depth - 1))
        for film in self.films:
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)

    def forward(
        self, x: Float[Tensor, "B 1 H W"], context: Context | None = None, w: Tensor | None = None
    ) -> Float[Tensor, "B 1 H W"]:
        w = torch.tensor(MIDDLE).to(x) if w is None else w
        *hidden, last = self.net.layers
        change = x
        for layer, film in zip(hidden, self.films, strict=True):
            scale, shift = film(w).expand(len(x), -1)[..., None, None].chunk(2, 1)
            change = F.relu(layer(change) * (1 + scale) + shift)
        return x + last(change)


class Blended(nn.Module):
    """The outputs of the two end networks, weighted by the knobs, which sum to 1."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.ends = nn.ModuleList([first, second])

    def forward(
        self, x: Float[Tensor, "B 1 H W"], context: Context | None = None, w: Tensor | None = None
    ) -> Float[Tensor, "B 1 H W"]:
        first, second = MIDDLE if w is None else w
        return first * self.ends[0](x) + second * self.ends[1](x)


def interpolated(first: nn.Module, second: nn.Module, w: tuple[float, float]) -> nn.Module:
    """Deep network interpolation: a network whose parameters are those of the two ends, weighted by the knobs."""
    net = copy.deepcopy(first)
    with torch.no_grad():
        for made, a, b in zip(net.parameters(), first.parameters(), second.parameters(), strict=True):
            made.copy_(w[0] * a + w[1] * b)
    return net
