"""Image classification with room above: three sets of ten classes, each whole or with few images of a class.

For systems whose gain would drown at the ceiling (weight sharing, architecture search, low rank). Whole, a small
perceptron has 0.94 of scikit-learn's digits right and 0.92 of MNIST's, but 0.35 of MNIST-1D, on which what a model
knows of shifted curves is all; with five images a class it has 0.84, 0.66 and 0.20.

    digits     1,797 of 8 x 8          CC-BY-4.0 (UCI)
    mnist-5k   5,000 of 28 x 28        CC-BY-SA-3.0, `workbench data get mnist-5k`
    mnist-1d   5,000 signals of 40     made here

Splits 70 / 10 / 20 by digest, another one for each fold; a regime thins the training split alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from workbench.beds.baseline import MLP, Measured, seeded
from workbench.errors import unknown
from workbench.lib import data
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.splits import digest
from workbench.lib.data.types import Arrays

NEEDS = ("mnist-5k",)
SETS = ("digits", "mnist-5k", "mnist-1d")
REGIMES = {"few": 5, "small": 25, "whole": None}
"""Training images of each class."""

SMOKE = {"steps": 20, "folds": 1}
SMALL = {"steps": 300, "folds": 2}
FULL = {"steps": 2000, "folds": 5}


def make(name: str, regime: str = "small", fold: int = 0) -> Classification:
    """The classes of a set, of which training sees 5 ("few"), 25 ("small") or all ("whole") of each.

    The images of a regime are the first by digest; those of "few" are among those of "small".

    Raises:
        InputError: the set or the regime is unknown, or the set is not on this machine.
    """
    if name not in SETS:
        raise unknown("image set", name, SETS)
    if regime not in REGIMES:
        raise unknown("regime", regime, REGIMES)
    found = data.load(name, fold=fold)
    x, y = found.splits["train"]
    order = sorted(range(len(y)), key=lambda row: digest(f"{name}/{fold}/shot/{row}"))
    ranked = torch.tensor(order)
    chosen = torch.cat([ranked[y[ranked] == label][: REGIMES[regime]] for label in range(len(found.classes))])
    sizes = found.manifest[name]["splits"] | {"train": len(chosen)}
    manifest = {name: found.manifest[name] | {"regime": regime, "splits": sizes}}
    return Classification(Arrays(name, found.splits | {"train": (x[chosen], y[chosen])}, found.classes, manifest))


def prepare(settings: Mapping[str, Any] = SMALL) -> list[Classification]:
    return [make(name, regime, fold) for fold in range(settings["folds"]) for name in SETS for regime in REGIMES]


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """A perceptron of one hidden layer of 64, on every set and regime."""
    rows = []
    for name in SETS:
        for regime in REGIMES:
            reached = []
            for fold in range(settings["folds"]):
                task = make(name, regime, fold)
                pixels = task.data.splits["train"][0][0].numel()
                model = seeded(fold, lambda width=pixels: MLP((width, 64, 10)))
                train(model, task, TrainConfig(settings["steps"], 64, seed=fold))
                reached.append(task.evaluate(model, "test")["accuracy"])
            sizes = task.manifest[name]["splits"]
            size = " / ".join(f"{sizes[split]:,}" for split in sizes)
            mean = sum(reached) / len(reached)
            rows.append(Measured(f"{name}, {regime}", size, "perceptron 64", "accuracy", 0.1, mean, 1.0))
    return rows
