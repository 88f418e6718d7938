"""The matched sweep of the learning rate: every arm is trained at every rate and judged at its own best one.

At one shared rate an arm that needs another looks worse than it is, and what has been compared is the rate. So all arms
of a study get the same rates, at least two decades of them. The best is chosen on the validation split, for every arm
and seed alone, and the metric is what the model trained at that rate reaches on the test split: the noise of the choice
is in the differences over seeds, where it belongs. Where the best rate is the first or the last, a better one may lie
outside, and the arm may be undersold: `edges` says so of every arm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from workbench.beds import shifted_digits
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.train import State
from workbench.studies.core import Settings
from workbench.studies.rows import Row, Rows, training_budget

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECADES = 2

Scores = tuple[float, float]
"""Of one training: on validation and on test, higher is better, 0 the worst."""


class Put(Protocol):
    """What was put on a model and trained; an `Adapted` is one."""

    model: nn.Module

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Swept:
    """What an arm reached at each rate.

    Attributes:
        rates: ascending.
        validation, test: a score for each.
    """

    rates: tuple[float, ...]
    validation: tuple[float, ...]
    test: tuple[float, ...]

    @property
    def best(self) -> int:
        """Which rate is best on validation; of several the smallest."""
        return self.validation.index(max(self.validation))

    @property
    def metric(self) -> float:
        return self.test[self.best]

    def extra(self) -> dict[str, Any]:
        """For `Row.extra`: best_rate, at_edge (1 where it is the first or the last), and all rates and scores."""
        return {
            "best_rate": self.rates[self.best],
            "at_edge": int(self.best in (0, len(self.rates) - 1)),
            "rates": list(self.rates),
            "validation": list(self.validation),
            "test": list(self.test),
        }


def sweep(learn: Callable[[float], Scores], rates: Sequence[float] = RATES) -> Swept:
    """`learn(rate)` at every rate. A training that diverges (`FloatingPointError`) scores 0.

    Raises:
        InputError: the rates do not ascend, or span less than two decades.
    """
    rates = tuple(rates)
    if len(rates) < 2 or list(rates) != sorted(set(rates)) or rates[-1] < 10**DECADES * rates[0] * (1 - 1e-9):
        raise InputError(f"rates are {rates} but must ascend, over at least {DECADES} decades")
    scores = []
    for rate in rates:
        try:
            scores.append(learn(rate))
        except FloatingPointError:
            scores.append((0.0, 0.0))
    validation, test = zip(*scores, strict=True)
    return Swept(rates, validation, test)


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


def edges(rows: Rows) -> str:
    """One sentence that names the arms whose best rate is at an end of the sweep at some seed; "" where none is."""
    found = {arm: sum(rows.of(arm, "at_edge")) for arm in rows.arms if "at_edge" in rows.arm(arm)[0].extra}
    said = [f"{arm} ({count} of {len(rows.arm(arm))} seeds)" for arm, count in found.items() if count]
    return f"The best rate is at an end of the sweep for {', '.join(said)}: they may be undersold." if said else ""


def rate_range(rows: Rows, arm: str) -> list[float]:
    """For each seed the range over the rates of an arm's score on test."""
    return [max(test) - min(test) for test in rows.of(arm, "test")]
