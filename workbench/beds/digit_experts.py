"""Experts to merge: one small network that reads MNIST's digits, fine-tuned for eight ways of showing them.

For methods that make one model of several fine-tuned ones. All tasks have the ten classes and the base's head, which
stays as it is, so a merged trunk is all that a method has to give. An image is in the same split in every task, so no
test image was ever trained on, in the base or in an expert.

    turned left, turned right    by 30 degrees
    mirrored, flipped            left and right, top and bottom exchanged
    shifted                      four pixels down and left, around the edge
    bright                       (1 + sqrt(x)) / 2
    edges                        size of the gradient
    scanned                      other digits: scikit-learn's 8 x 8, enlarged

The experts have 0.95 of their images right, the base 0.49; the plain average of the experts has 0.55, and what lies
between is the room in which merging methods can be told apart. Data: `workbench data get mnist-5k`
(CC-BY-SA-3.0), scikit-learn (CC-BY-4.0).

Tensor letters: B batch, D width.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.baseline import Measured, seeded
from workbench.beds.pretrained import pretrained
from workbench.errors import unknown
from workbench.lib import data
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays

NEEDS = ("mnist-5k",)
ANGLE = 30
NOISE = 0.1  # of the pixels in training: without it so few images are learned by heart

SMOKE = {"width": 32, "base_steps": 60, "expert_steps": 60, "expert_lr": 2e-3}
SMALL = {"width": 192, "base_steps": 400, "expert_steps": 200, "expert_lr": 5e-4}
FULL = {"width": 384, "base_steps": 1000, "expert_steps": 400, "expert_lr": 2e-4}
BATCH = 64
CODE = [sys.modules[__name__]]


class DigitNet(nn.Module):
    """Images (B, 1, 28, 28) -> logits (B, 10): three residual blocks D -> D -> D with LayerNorm before each."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Linear(28 * 28, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(
        self, images: Float[Tensor, "batch 1 28 28"], context: Context | None = None
    ) -> Float[Tensor, "batch 10"]:
        x = images.flatten(1)
        x = self.embedding(x + NOISE * torch.randn_like(x) if self.training else x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def turned(images: Tensor, degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(turn, list(images.shape), align_corners=False), align_corners=False)


def edges(images: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1))
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    return (across.square() + down.square()).sqrt().clamp(max=1)


def enlarged(images: Tensor) -> Tensor:
    return F.pad(F.interpolate(images, 20, mode="bilinear"), (4, 4, 4, 4))


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned left": lambda x: turned(x, ANGLE),
    "turned right": lambda x: turned(x, -ANGLE),
    "mirrored": lambda x: x.flip(3),
    "flipped": lambda x: x.flip(2),
    "shifted": lambda x: x.roll((4, -4), (2, 3)),
    "bright": lambda x: (1 + x.sqrt()) / 2,
    "edges": edges,
    "scanned": enlarged,
}
"""What each makes of the images (B, 1, height, width) of its set."""
PLAIN = "plain"
"""The task of the base."""


def task(name: str, fold: int = 0) -> Classification:
    """One of `TASKS`, or `PLAIN`.

    Raises:
        InputError: the name is unknown, or MNIST is not on this machine.
    """
    if name not in TASKS and name != PLAIN:
        raise unknown("task", name, (*TASKS, PLAIN))
    found = data.load("digits" if name == "scanned" else "mnist-5k", fold=fold)
    splits = {split: (TASKS[name](x) if name in TASKS else x, y) for split, (x, y) in found.splits.items()}
    manifest = {found.name: found.manifest[found.name] | {"shown": name}}
    return Classification(Arrays(name, splits, found.classes, manifest))


def base(settings: Mapping[str, Any] = SMALL, seed: int = 0) -> DigitNet:
    """The network that has learned plain digits (of fold `seed`)."""
    learned = task(PLAIN, seed)

    def teach(model: nn.Module) -> None:
        train(model, learned, TrainConfig(settings["base_steps"], BATCH, lr=1e-3, seed=seed))

    recipe = {"width": settings["width"], "steps": settings["base_steps"], "seed": seed, "data": learned.manifest}
    return pretrained("digit-base", recipe, lambda: seeded(seed, lambda: DigitNet(settings["width"])), teach, CODE)


def expert(name: str, settings: Mapping[str, Any] = SMALL, seed: int = 0) -> DigitNet:
    """The base fine-tuned for a task, all but its head; every expert sees its rows in the same order."""
    learned = task(name, seed)

    def teach(model: nn.Module) -> None:
        model.head.requires_grad_(False)
        train(model, learned, TrainConfig(settings["expert_steps"], BATCH, lr=settings["expert_lr"], seed=seed))
        model.head.requires_grad_(True)

    recipe = {"base": dict(settings), "seed": seed, "task": name, "data": learned.manifest}
    return pretrained("digit-expert", recipe, lambda: base(settings, seed), teach, CODE)


def average(models: Sequence[nn.Module]) -> nn.Module:
    """A model whose every weight is the mean of theirs: the merge that all others are compared with."""
    merged = deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merged.load_state_dict({key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]})
    return merged


def prepare(settings: Mapping[str, Any] = SMALL) -> tuple[DigitNet, dict[str, DigitNet]]:
    return base(settings), {name: expert(name, settings) for name in TASKS}


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """On each task the base, the average of all experts, and the task's own expert, which is the end of the scale."""
    start, experts = prepare(settings)
    merged = average(list(experts.values()))
    rows = []
    for name, own in experts.items():
        judged = task(name)
        scores = [judged.evaluate(model, "test")["accuracy"] for model in (start, merged, own)]
        size = " / ".join(f"{size:,}" for size in next(iter(judged.manifest.values()))["splits"].values())
        rows.append(Measured(name, size, "average of the experts (trivial: base, best: expert)", "accuracy", *scores))
    return rows
