"""BossNAS, what its nets are shown: two views of every input, spoiled each by itself, and no label."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.task import Batch, Classification
from workbench.lib.data.types import Arrays

SHIFT, SPREAD, NOISE, CUT = 8, 0.2, 0.1, 6
SHORTEST = 6  # side
TURN, MOVE = 10, 0.25  # degrees; in halves of the side


def signal_views(x: Float[Tensor, "batch length"], generator: torch.Generator) -> Float[Tensor, "batch 2 length"]:
    """Two views of each: moved around by up to 8 places, scaled by 0.8 to 1.2, noise of 0.1, 6 places cut out."""
    found = []
    for _ in range(2):
        n, length = x.shape
        by = torch.randint(-SHIFT, SHIFT + 1, (n, 1), generator=generator)
        moved = x.gather(1, (torch.arange(length) - by) % length)
        scale = 1 + SPREAD * (2 * torch.rand(n, 1, generator=generator) - 1)
        noisy = moved * scale + NOISE * torch.randn(n, length, generator=generator)
        start = torch.randint(length - CUT + 1, (n, 1), generator=generator)
        places = torch.arange(length)
        found.append(noisy.masked_fill((places >= start) & (places < start + CUT), 0.0))
    return torch.stack(found, 1)


def image_views(x: Float[Tensor, "batch c h w"], generator: torch.Generator) -> Float[Tensor, "batch 2 c h w"]:
    """Two views of each: turned by up to 10 degrees and moved by up to an eighth of the side, then as signals are.

    What comes in from outside is 0; a quarter of the height and of the width is cut out. Nothing is mirrored.
    """
    n, _, height, width = x.shape
    found = []
    for _ in range(2):
        turn = math.radians(TURN) * (2 * torch.rand(n, generator=generator) - 1)
        by = MOVE * (2 * torch.rand(n, 2, 1, generator=generator) - 1)
        matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).reshape(n, 2, 2)
        grid = F.affine_grid(torch.cat([matrix, by], 2), list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, align_corners=False)
        scale = 1 + SPREAD * (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1)
        noisy = moved * scale + NOISE * torch.randn(x.shape, generator=generator)
        inside = torch.ones(n, 1, 1, 1, dtype=torch.bool)
        for axis, side in ((2, height), (3, width)):
            start = torch.randint(side - side // 4 + 1, (n, 1, 1, 1), generator=generator)
            places = torch.arange(side).reshape([1, 1, *([side, 1] if axis == 2 else [1, side])])
            inside = inside & (places >= start) & (places < start + side // 4)
        found.append(noisy.masked_fill(inside, 0.0))
    return torch.stack(found, 1)


VIEWS = {1: signal_views, 3: image_views}
"""By the axes of an input."""


class TwoViews(Classification):
    """Inputs without labels: two views of each signal (L,) or image (C, H, W); the loss is the mean over paths."""

    metric, unit, higher_is_better = "alignment", "of the loss", False

    def __init__(self, data: Arrays):
        super().__init__(data)
        shape = list(data.splits["train"][0].shape[1:])
        if len(shape) not in VIEWS or min(shape[len(shape) // 2 :]) < SHORTEST:
            raise InputError(
                f"data has inputs of shape {shape} but must have signals (L,) or images (C, H, W), no side below "
                f"{SHORTEST}"
            )
        self.views = VIEWS[len(shape)]

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        found = super().batch(split, size, generator, domain)
        return Batch(self.views(found.inputs, generator), torch.zeros_like(found.targets), found.domain)

    def batches(self, split: str, size: int):
        for number, found in enumerate(super().batches(split, size)):
            views = self.views(found.inputs, torch.Generator().manual_seed(number))
            yield Batch(views, torch.zeros_like(found.targets), found.domain)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()
