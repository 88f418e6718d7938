"""The rows of a study, one arm at one seed each, and what a rule reads off them: values, means, paired differences."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workbench.errors import unknown
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.budget import Budget, measure_budget
from workbench.lib.core.task import Task
from workbench.lib.core.train import State
from workbench.lib.measures import sequential
from workbench.lib.measures import statistics as once
from workbench.lib.measures.statistics import Interval, TostResult, Values


@dataclass(frozen=True)
class Row:
    """One arm at one seed.

    Attributes:
        params, active_params: of the model, see `workbench.lib.core.budget`.
        flops: floating-point operations of the whole training run.
        steps: optimizer steps.
        metric: the study's metric on held-out data.
        extra: further measures by name (numbers, strings or lists of them), for the rule and the figures.
        seconds: wall time of this run; the only entry that differs between two runs of the same seed.
    """

    arm: str
    seed: int
    params: int
    active_params: int
    flops: int
    steps: int
    metric: float
    extra: dict = field(default_factory=dict)
    seconds: float = 0.0


What = str | Callable[[Row], Any]
"""What is read off a row: "metric", a key of its `extra`, or a function of the row."""


class Rows(tuple[Row, ...]):
    """All rows of a study, seed by seed. Of every arm the rows are in the order of the seeds, so that arms pair up.

    Attributes:
        growing: whether seeds are added as long as they are wanted. All intervals and tests then hold at every look
            (`workbench.lib.measures.sequential`); otherwise they are Student's, for a number of seeds that was fixed.
            A rule asks for both here, so that it need not know.
    """

    growing: bool

    def __new__(cls, rows: Iterable[Row], growing: bool = False):
        self = super().__new__(cls, rows)
        self.growing = growing
        return self

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(row.arm for row in self))

    def arm(self, arm: str) -> "Rows":
        """The rows of one arm; an unknown one is an `InputError`."""
        found = Rows((row for row in self if row.arm == arm), self.growing)
        if not found:
            raise unknown("arm", arm, self.arms)
        return found

    def of(self, arm: str, what: What = "metric") -> list[Any]:
        """What the rows of one arm hold, a value a seed."""
        read = _reader(what)
        return [read(row) for row in self.arm(arm)]

    def mean(self, arm: str, what: What = "metric") -> float:
        """Mean over the seeds of one arm."""
        return statistics.fmean(self.of(arm, what))

    def means(self, what: What = "metric", arms: Iterable[str] | None = None) -> dict[str, float]:
        """Mean over the seeds of each arm, or of those named."""
        return {arm: self.mean(arm, what) for arm in (self.arms if arms is None else arms)}

    def minus(self, a: str, b: str, what: What = "metric", level: float = 0.95) -> Interval:
        """Arm `a` minus arm `b`: the mean of the differences at equal seeds, with its interval."""
        return self._measures.paired_interval(self.of(a, what), self.of(b, what), level)

    def interval(self, values: Values, level: float = 0.95) -> Interval:
        """The mean of values that were made of these rows, one a seed, with its interval."""
        return self._measures.mean_interval(values, level)

    def tost(self, a: str, b: str, margin: float, what: What = "metric") -> TostResult:
        """Whether two arms are equivalent: paired, at a margin that was fixed before the runs."""
        return self._measures.paired_tost(self.of(a, what), self.of(b, what), margin)

    def p_value(self, a: str, b: str, what: What = "metric") -> float:
        """Two-sided p of "two arms do not differ", paired; NaN for one seed."""
        return self._measures.paired_p(self.of(a, what), self.of(b, what))

    @property
    def _measures(self):
        return sequential if self.growing else once


def _reader(what: What) -> Callable[[Row], Any]:
    if callable(what):
        return what
    return (lambda row: row.metric) if what == "metric" else (lambda row: row.extra[what])


def training_budget(model: nn.Module, task: Task, rows: int, seed: int = 0) -> Budget:
    """What a training batch of `rows` rows costs; see `measure_budget`."""
    return measure_budget(model, task, task.batch("train", rows, torch.Generator().manual_seed(seed)))


def trained_row(arm: str, seed: int, budget: Budget, steps: int, metric: float, **extra: Any) -> Row:
    """The row of an arm that was trained for `steps` steps, each at the cost of `budget`."""
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, metric, extra)


def adapted_row(arm: str, seed: int, adapted: Adapted, state: State, **extra: Any) -> Row:
    """The row of an adapted model that was trained on several tasks, those of `state.task`, and evaluated.

    The metric is the mean over the tasks; beside it are all of them, "by_task", the "worst" of them, and how many
    parameters were "trained".
    """
    task = state.task
    by_task = [state.metrics[f"{task.metric}/{name}"] for name in task.domains]
    worst = (min if task.higher_is_better else max)(by_task)
    found = {"worst": worst, "by_task": by_task, "trained": adapted.report()["trained"]} | extra
    budget = training_budget(adapted.model, task, state.config.batch_size)
    return trained_row(arm, seed, budget, state.step, state.metrics[task.metric], **found)
