"""The shared test-bed: a small decoder that has learned six symbol maps, frozen, and twelve new ones that conflict.

A plain LoRA of rank 16 on all feed-forward layers does not reach the end of this task in the steps of the small preset,
so that arms of equal total rank can be told apart as well as arms of equal active rank.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from workbench.lib.core import symbol_maps
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.pretrained import pretrained
from workbench.lib.core.symbol_maps import SymbolMaps
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.studies.core import Row

OLD, NEW = 6, 12
LENGTH = 6
BATCH = 64

SMOKE = {"base_steps": 30, "steps": 8, "seeds": 1}
SMALL = {"base_steps": 600, "steps": 400, "seeds": 3}
FULL = {"base_steps": 2000, "steps": 1500, "seeds": 5}
"""Settings every study on this bed shares; a study adds its own, and may change the number of seeds for its time."""

TARGETS = "*.ffn.*"


def make_model() -> DecoderLM:
    return DecoderLM(11 + OLD + NEW, 48, 2, 4, lambda layer: GLU(48, 96), 2 * LENGTH + 1)


def base(settings: Mapping[str, Any]) -> DecoderLM:
    """The decoder that knows the old maps: trained once, then from the cache."""
    task = SymbolMaps(range(OLD), OLD + NEW, LENGTH)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_model()

    def teach(model: nn.Module) -> State:
        return train(model, task, TrainConfig(settings["base_steps"], BATCH))

    recipe = {"steps": settings["base_steps"], "batch": BATCH, "data": task.manifest}
    return pretrained("symbol-maps-base", recipe, build, teach, [symbol_maps, sys.modules[__name__]])


def new_maps(count: int = NEW) -> SymbolMaps:
    """The first `count` of the new maps."""
    return SymbolMaps(range(OLD, OLD + count), OLD + NEW, LENGTH)


def adapt_and_train(
    slug: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    *,
    task: SymbolMaps | None = None,
    targets: str | Iterable[str] = TARGETS,
    lr: float = 3e-3,
    hooks: Callable[[Adapted], Iterable[Hook]] = lambda adapted: (),
) -> tuple[Adapted, State]:
    """Put a system on the base and train it on the new maps."""
    task = task or new_maps()
    model = base(settings)
    torch.manual_seed(seed)
    adapted = adapt(model, slug, targets, **options)
    config = TrainConfig(settings["steps"], BATCH, lr=lr, weight_decay=0.0, seed=seed)
    return adapted, train(model, task, config, hooks(adapted), optimizer=adapted.optimizer(lr))


def row(arm: str, seed: int, adapted: Adapted, state: State, **extra: Any) -> Row:
    """The row of an arm: the mean accuracy as its metric, the worst task's and all tasks' beside it."""
    task = state.task
    budget = measure_budget(adapted.model, task, task.batch("train", BATCH, torch.Generator().manual_seed(0)))
    by_task = [state.metrics[f"{task.metric}/{name}"] for name in task.domains]
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * state.step,
        steps=state.step,
        metric=state.metrics[task.metric],
        extra={"worst": min(by_task), "by_task": by_task, "trained": adapted.report()["trained"], **extra},
    )
