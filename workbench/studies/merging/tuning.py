"""What the studies of merging share: the experts of a seed, grids tuned on validation, and normalised accuracy.

    suite = load(settings, seed)                            # once a seed: base, experts, what they reach
    update, chosen = tuned(suite, TaskArithmetic, GRIDS["task-arithmetic"])
    row = merged_row("task-arithmetic", seed, suite, update, chosen=chosen)

A merge is judged by what it keeps of the experts: its accuracy on a task divided by that of the task's own expert, the
mean and the smallest over tasks. Every method chooses its options on the validation splits, by the same mean, from a
grid of `POINTS` points, so that none has more tries than another; test images are seen once, by the chosen point.

The update of a merge is one vector (P,) over the base's trunk: every weight but the head's, which is not merged.

Tensor letters: n tasks, P weights of the trunk.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.beds import digit_experts as bed
from workbench.lib.core.task import Classification
from workbench.studies.core import Settings
from workbench.studies.rows import Row, Rows, trained_row, training_budget

LEAST_EXPERT = 0.85
"""Below this accuracy an expert is no measure of its task: what is divided by it may be above 1 and says nothing."""

RATIOS = (0.05, 0.1, 0.2, 0.4)
MEAN_LAMBDAS = (0.5, 0.8, 1.1, 1.5, 2.0, 2.6)  # of methods whose update is a mean over tasks
SUM_LAMBDAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of methods whose update is a sum over tasks
POINTS = len(RATIOS) * len(MEAN_LAMBDAS)

Options = Mapping[str, Any]
Update = Float[Tensor, " weights"]


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values: grid(ratio=(0.1, 0.2), lam=(1.0,)) has two points."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def spread(low: float, high: float, points: int = POINTS) -> list[float]:
    """Values of equal steps from low to high, for a method of one option that is to have as many points."""
    return [low + (high - low) * i / (points - 1) for i in range(points)]


@dataclass(frozen=True)
class Suite:
    """Base and experts of one seed.

    Attributes:
        model: the base.
        names: of its weights that are merged, in the order of the vectors.
        start: (P,) those weights.
        deltas: (n, P) experts minus base.
        tasks: n of them.
        base, own: accuracy on each task's test split, of the base and of the task's own expert.
        own_validation: that of the expert on the validation split.
    """

    model: bed.DigitNet
    names: tuple[str, ...]
    start: Float[Tensor, " weights"]
    deltas: Float[Tensor, "tasks weights"]
    tasks: tuple[Classification, ...]
    base: tuple[float, ...]
    own: tuple[float, ...]
    own_validation: tuple[float, ...]

    def model_of(self, update: Update) -> bed.DigitNet:
        """The base plus an update."""
        return self.filled(self.start + update)

    def filled(self, weights: Float[Tensor, " weights"]) -> bed.DigitNet:
        """A copy of the base with these weights in its trunk."""
        model, state = deepcopy(self.model), self.model.state_dict()
        model.load_state_dict(state | self.split(weights))
        return model

    def split(self, vector: Float[Tensor, " weights"]) -> dict[str, Tensor]:
        """A vector over the trunk as tensors by name."""
        state = self.model.state_dict()
        parts = vector.split([state[name].numel() for name in self.names])
        return {name: part.view(state[name].shape) for name, part in zip(self.names, parts, strict=True)}

    def kept(self, model: bed.DigitNet, split: str) -> list[float]:
        """Normalised accuracy on each task."""
        own = self.own if split == "test" else self.own_validation
        return [a / b for a, b in zip(accuracies(model, self.tasks, split), own, strict=True)]


def load(settings: Settings, seed: int) -> Suite:
    """The suite of a seed; one is held for the arms of the same seed, so nothing of it may be written to."""
    return _load(tuple((key, settings[key]) for key in bed.SMALL), seed)


@lru_cache(maxsize=1)
def _load(recipe: tuple[tuple[str, Any], ...], seed: int) -> Suite:
    settings = dict(recipe)
    model = bed.base(settings, seed)
    experts = [bed.expert(name, settings, seed) for name in bed.TASKS]
    tasks = tuple(bed.task(name, seed) for name in bed.TASKS)
    names = tuple(name for name in model.state_dict() if not name.startswith("head."))
    start, *trained = (_flat(each.state_dict(), names) for each in (model, *experts))
    pairs = list(zip(experts, tasks, strict=True))
    return Suite(
        model,
        names,
        start,
        torch.stack(trained) - start,
        tasks,
        tuple(accuracies(model, tasks, "test")),
        *(tuple(accuracies(own, [task], split)[0] for own, task in pairs) for split in ("test", "validation")),
    )


def _flat(state: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([state[name].flatten() for name in names])


def accuracies(model: bed.DigitNet, tasks: Sequence[Classification], split: str) -> list[float]:
    return [task.evaluate(model, split)["accuracy"] for task in tasks]


def tuned(
    suite: Suite, merge: Callable[..., Update], points: Sequence[Options], scores: list[float] | None = None
) -> tuple[Update, dict[str, Any]]:
    """The update of the point with the best mean normalised accuracy on validation, and that point.

    The first of equals. `merge(deltas, **point)` makes an update; it is handed the suite's own deltas, not to be
    written to. `scores` takes the accuracy of every point.
    """
    best, update, chosen = -math.inf, None, {}
    for point in points:
        made = merge(suite.deltas, **point)
        score = fmean(suite.kept(suite.model_of(made), "validation"))
        if scores is not None:
            scores.append(score)
        if score > best:
            best, update, chosen = score, made, dict(point)
    return update, chosen | {"validation": best}


def merged_row(arm: str, seed: int, suite: Suite, update: Update, steps: int = 0, **extra: Any) -> Row:
    """The row of a merge; see `judged_row`."""
    return judged_row(arm, seed, suite, suite.model_of(update), steps, **extra)


def judged_row(arm: str, seed: int, suite: Suite, model: bed.DigitNet, steps: int = 0, **extra: Any) -> Row:
    """The row of one model for all tasks; see `kept_row`."""
    return kept_row(arm, seed, suite, model, suite.kept(model, "test"), steps, **extra)


def kept_row(
    arm: str, seed: int, suite: Suite, model: bed.DigitNet, by_task: list[float], steps: int = 0, **extra: Any
) -> Row:
    """The row of a model, or of several of its size, by normalised accuracy on test, of which the mean is the metric.

    Beside it the "worst" task's, "by_task", the plain "accuracy", the mean share of the way from base to expert that
    is "recovered", what the base has ("base_kept", "base_accuracy"), the experts' "own_accuracy" and "weakest_expert".
    """
    accuracy = [kept * own for kept, own in zip(by_task, suite.own, strict=True)]
    way = [(a - b) / (o - b) for a, b, o in zip(accuracy, suite.base, suite.own, strict=True) if o > b]
    found = {
        "worst": min(by_task),
        "by_task": by_task,
        "accuracy": fmean(accuracy),
        "recovered": fmean(way) if way else math.nan,
        "base_kept": fmean(b / o for b, o in zip(suite.base, suite.own, strict=True)),
        "base_accuracy": fmean(suite.base),
        "own_accuracy": fmean(suite.own),
        "weakest_expert": min(suite.own),
    }
    budget = training_budget(model, suite.tasks[0], bed.BATCH)
    return trained_row(arm, seed, budget, steps, fmean(by_task), **found | extra)


def weak_experts(rows: Rows) -> bool:
    """Whether some seed has an expert below `LEAST_EXPERT`, so that the study says nothing."""
    return min(row.extra["weakest_expert"] for row in rows) < LEAST_EXPERT
