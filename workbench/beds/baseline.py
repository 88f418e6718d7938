"""What every bed needs to say what a plain model reaches on it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lib.core.routing import Context

Built = TypeVar("Built")


@dataclass(frozen=True)
class Measured:
    """One line of `python -m workbench.beds`.

    Attributes:
        case: which part of the bed.
        size: of the data, in words.
        model: the plain model, in words.
        metric: its name and unit.
        trivial: what one reaches without learning.
        reached: what the plain model reaches on the test split.
        best: the end of the scale: a perfect score, or what a stronger model reaches; not a number where it is unknown.
    """

    case: str
    size: str
    model: str
    metric: str
    trivial: float
    reached: float
    best: float


class MLP(nn.Module):
    """Linear layers with ReLU between them, of these widths from the first to the last: (B, ...) -> (B, widths[-1])."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Float[Tensor, "batch ..."], context: Context | None = None) -> Float[Tensor, "batch outputs"]:
        return self.layers(x)


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """`build()` from this seed; torch's global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
