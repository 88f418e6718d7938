"""A small classifier and the task it is adapted to: digits in negative, with their pixels in another order.

A residual network has learned scikit-learn's 8 x 8 digits. Shown the same digits inverted, x -> 1 - x, and with their
64 pixels permuted, always alike, it says no more than chance. Everything of it is frozen but what is put on the twelve
linear layers of its blocks, so an adapter has to undo inside what has been done to the input. An image is in the same
split before and after, so no test image was ever trained on.

The data: scikit-learn's digits (CC-BY-4.0); nothing has to be fetched. Tensor letters: B batch, D width.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.beds.baseline import Measured, seeded
from workbench.beds.pretrained import pretrained
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.data.types import Arrays

NEEDS = ()
WIDTH, HIDDEN, BLOCKS = 64, 128, 6
TARGETS = "blocks.*"
BATCH = 64
LR = 1e-2
"""Of plain LoRA here, where a rate is not swept."""

SMOKE = {"base_steps": 60, "steps": 20}
SMALL = {"base_steps": 600, "steps": 300}
FULL = {"base_steps": 600, "steps": 1500}


class ResidualMLP(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 10): six residual blocks 64 -> 128 -> 64 with LayerNorm before each."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(
        self, images: Float[Tensor, "batch 1 8 8"], context: Context | None = None
    ) -> Float[Tensor, "batch 10"]:
        x = self.embedding(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def plain_task(fold: int = 0) -> Classification:
    """What the base has learned."""
    return Classification(data.load("digits", fold=fold))


def task(fold: int = 0, images: int | None = None) -> Classification:
    """What the base is adapted to.

    Args:
        images: how many of the training split there are; default all. Validation and test are always whole.
    """
    found = data.load("digits", task="permuted", fold=fold)
    splits = {split: (1 - x, y) for split, (x, y) in found.splits.items()}
    x, y = splits["train"]
    if images is not None and not 1 <= images <= len(x):
        raise InputError(f"images is {images} but must be between 1 and the {len(x)} of the training split")
    splits["train"] = x[:images], y[:images]
    sizes = {split: len(y) for split, (_, y) in splits.items()}
    row = found.manifest[found.name] | {"task": "inverted and permuted", "splits": sizes}
    return Classification(Arrays(found.name, splits, found.classes, {found.name: row}))


def base(settings: Mapping[str, Any] = SMALL, seed: int = 0) -> ResidualMLP:
    """The network that has learned plain digits (of fold `seed`)."""
    learned = plain_task(seed)

    def teach(model: nn.Module) -> None:
        train(model, learned, TrainConfig(settings["base_steps"], BATCH, lr=3e-3, seed=seed, eval_every=None))

    recipe = {"steps": settings["base_steps"], "seed": seed, "data": learned.manifest}
    code = [sys.modules[__name__]]
    return pretrained("shifted-digits-base", recipe, lambda: seeded(seed, ResidualMLP), teach, code)


def adapt_and_train(
    slug: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    lr: float = LR,
    learned: Classification | None = None,
    hooks: Iterable[Hook] = (),
    batch: int = BATCH,
) -> tuple[Adapted, State]:
    """Put a system on the block linears of the base and train it, for `settings["steps"]`; not yet evaluated.

    Args:
        learned: another task than `task(seed)`.
    """
    model = base(settings, seed)
    torch.manual_seed(seed)
    adapted = adapt(model, slug, TARGETS, **options)
    config = TrainConfig(settings["steps"], batch, lr=lr, weight_decay=0.0, seed=seed, eval_every=None)
    return adapted, train(model, learned or task(seed), config, hooks, optimizer=adapted.optimizer(lr))


def prepare(settings: Mapping[str, Any] = SMALL) -> ResidualMLP:
    return base(settings)


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """The base on both tasks, a LoRA of rank 8, and the base trained further as a whole, which is the scale's end."""
    before, after, rows = plain_task(), task(), []
    start = base(settings)
    score = before.evaluate(start, "test")["accuracy"]
    rows.append(Measured("plain digits", _size(before), "the base", "accuracy", 0.1, score, 1.0))
    untouched = after.evaluate(start, "test")["accuracy"]
    adapted, _ = adapt_and_train("lora", {"rank": 8}, settings, 0)
    reached = after.evaluate(adapted.model, "test")["accuracy"]
    whole = base(settings)
    train(whole, after, TrainConfig(settings["steps"], BATCH, lr=3e-3, eval_every=None))
    best = after.evaluate(whole, "test")["accuracy"]
    what = "LoRA of rank 8 (trivial: base, best: all weights trained)"
    rows.append(Measured("inverted, permuted", _size(after), what, "accuracy", untouched, reached, best))
    return rows


def _size(judged: Classification) -> str:
    return " / ".join(f"{size:,}" for size in next(iter(judged.manifest.values()))["splits"].values())
