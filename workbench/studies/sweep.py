"""The matched sweep of the learning rate: every arm is trained at every rate and judged at its own best one.

At one shared rate an arm that needs another looks worse than it is, and what has been compared is the rate. So all arms
of a study get the same rates, at least two decades of them. The best is chosen on the validation split, for every arm
and seed alone, and the metric is what the model trained at that rate reaches on the test split: the noise of the choice
is in the differences over seeds, where it belongs. Where the best rate is the first or the last, a better one may lie
outside, and the arm may be undersold: `edges` says so of every arm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import InputError
from workbench.studies.rows import Rows

DECADES = 2

Scores = tuple[float, float]
"""Of one training: on validation and on test."""


@dataclass(frozen=True)
class Swept:
    """What an arm reached at each rate.

    Attributes:
        rates: ascending.
        validation, test: a score for each.
        lower_is_better: of the scores.
    """

    rates: tuple[float, ...]
    validation: tuple[float, ...]
    test: tuple[float, ...]
    lower_is_better: bool = False

    @property
    def best(self) -> int:
        """Which rate is best on validation; of several the smallest."""
        return self.validation.index((min if self.lower_is_better else max)(self.validation))

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


def sweep(
    learn: Callable[[float], Scores], rates: Sequence[float], worst: float = 0.0, lower_is_better: bool = False
) -> Swept:
    """`learn(rate)` at every rate. A training that diverges (`FloatingPointError`) scores `worst`.

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
            scores.append((worst, worst))
    validation, test = zip(*scores, strict=True)
    return Swept(rates, validation, test, lower_is_better)


def edges(rows: Rows) -> str:
    """One sentence that names the arms whose best rate is at an end of the sweep at some seed; "" where none is."""
    found = {arm: sum(rows.of(arm, "at_edge")) for arm in rows.arms if "at_edge" in rows.arm(arm)[0].extra}
    said = [f"{arm} ({count} of {len(rows.arm(arm))} seeds)" for arm, count in found.items() if count]
    return f"The best rate is at an end of the sweep for {', '.join(said)}: they may be undersold." if said else ""


def rate_range(rows: Rows, arm: str) -> list[float]:
    """For each seed the range over the rates of an arm's score on test."""
    return [max(test) - min(test) for test in rows.of(arm, "test")]
