"""The matched sweep of the learning rate on what `workbench.adapt` puts on a model, see `studies.sweep`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from workbench.beds import shifted_digits
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.train import State
from workbench.studies.core import Settings
from workbench.studies.rows import Row, training_budget
from workbench.studies.sweep import Scores, sweep

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Put(Protocol):
    """What was put on a model and trained; an `Adapted` is one."""

    model: nn.Module

    def report(self) -> dict[str, Any]: ...


def swept_row(
    arm: str,
    seed: int,
    train: Callable[[float], tuple[Put, State]],
    rates: Sequence[float] = RATES,
    **extra: Any,
) -> Row:
    """The row of an arm that `train(rate)` trains: its metric and size, `Swept.extra`, and how many are "trained".

    FLOPs and steps are those of all rates together.
    """
    made: list[tuple[Put, State]] = []

    def learn(rate: float) -> Scores:
        adapted, state = train(rate)
        made[:] = [(adapted, state)]
        task = state.task
        return task.evaluate(adapted.model)[task.metric], task.evaluate(adapted.model, "test")[task.metric]

    swept = sweep(learn, rates)
    if not made:
        raise FloatingPointError(f"{arm} diverges at every rate of {swept.rates}")
    adapted, state = made[0]
    budget, steps = training_budget(adapted.model, state.task, state.config.batch_size), state.step * len(swept.rates)
    found = swept.extra() | {"trained": adapted.report()["trained"]} | extra
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, swept.metric, found)


def adapted_row(arm: str, seed: int, settings: Settings, slug: str, options: Mapping[str, Any]) -> Row:
    """The row of a system, at its options, on the bed that adapter studies share; at the rates of the settings."""

    def train(rate: float) -> tuple[Adapted, State]:
        return shifted_digits.adapt_and_train(slug, options, settings, seed, rate)

    return swept_row(arm, seed, train, settings["rates"])
