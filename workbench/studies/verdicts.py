"""The four verdicts, the ladder that leads to one, and the judgement that carries it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from workbench.errors import InputError, unknown
from workbench.lib.measures.statistics import Interval, TostResult

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_RESOLVED = "not resolved at this scale"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE)


def decide(*ladder: tuple[str, bool]) -> str:
    """The first verdict whose condition holds; `NOT_RESOLVED` where none does.

        decide((REPRODUCED, gain.low > 0), (NOT_REPRODUCED, gain.high < 0))

    A rule with several parts can succeed in one and fail in another: which of the two is asked first is written there.
    """
    return next((verdict for verdict, holds in ladder if holds), NOT_RESOLVED)


@dataclass(frozen=True)
class Judgement:
    """What the rule says of the rows.

    Attributes:
        verdict: one of `VERDICTS`.
        effect: the effect the claim is about, in the unit named in `reason`.
        ci: confidence interval of the effect (low, high); infinite where the seeds are too few to give one.
        reason: one or two sentences: what was compared, what decided.
        details: further results by name (numbers, strings, lists, dicts of them; an `Interval` becomes its `as_dict`).
        level: coverage of `ci`.
        sd: standard deviation of the effect over the seeds; NaN where a single seed has none.
        claimed: (low, high), between which the effect lies if the claim holds: (-margin, margin) where two arms are to
            be equivalent, (-inf, margin) where a loss may be no more than that. None where the effect is one of the
            study's metric and the claim is that it is better: above 0, or below where lower is better.
    """

    verdict: str
    effect: float
    ci: tuple[float, float]
    reason: str
    details: dict = field(default_factory=dict)
    level: float = 0.95
    sd: float = math.nan
    claimed: tuple[float, float] | None = None

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise unknown("verdict", self.verdict, VERDICTS)
        if self.claimed is not None and not (
            self.claimed[0] < self.claimed[1] and any(map(math.isfinite, self.claimed))
        ):
            raise InputError(
                f"claimed is {self.claimed} but must be (low, high), low below high and one of them finite"
            )
        object.__setattr__(self, "details", _plain(self.details))

    @classmethod
    def on(
        cls,
        effect: Interval | TostResult,
        verdict: str,
        reason: str,
        details: dict | None = None,
        claimed: tuple[float, float] | None = None,
    ) -> "Judgement":
        """A judgement whose effect is an interval, or the paired difference of a test of equivalence."""
        if isinstance(effect, TostResult):
            estimate, ci, level = effect.diff, effect.ci90, 0.9
        else:
            estimate, ci, level = effect.estimate, (effect.low, effect.high), effect.level
        return cls(verdict, estimate, ci, reason, details or {}, level, effect.sd, claimed)


def all_above(intervals: Iterable[Interval], value: float = 0.0) -> bool:
    """Whether every interval lies above `value`."""
    return all(interval.low > value for interval in intervals)


def any_below(intervals: Iterable[Interval], value: float = 0.0) -> bool:
    """Whether one of the intervals lies below `value`."""
    return any(interval.high < value for interval in intervals)


def _plain(value):
    if isinstance(value, Interval):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
