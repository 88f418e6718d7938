"""The four verdicts, the ladder that leads to one, and the judgement that carries it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from workbench.errors import unknown
from workbench.lib.measures.statistics import Interval

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
    """

    verdict: str
    effect: float
    ci: tuple[float, float]
    reason: str
    details: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise unknown("verdict", self.verdict, VERDICTS)
        object.__setattr__(self, "details", _plain(self.details))

    @classmethod
    def on(cls, effect: Interval, verdict: str, reason: str, details: dict | None = None) -> "Judgement":
        """A judgement whose effect is an interval."""
        return cls(verdict, effect.estimate, (effect.low, effect.high), reason, details or {})


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
