"""How many seeds a preset needs, found from arms that say nothing of the claim, before its verdict is looked at.

    workbench study rmoe --power          # runs the baselines, and prints the deviation and the seeds

What is found is written into the study, `Power(..., deviation={"small": (0.004, 12)})`, and printed beside its rule. A
test holds every preset to the seeds that its deviation asks for, and to no fewer than the baselines were run with: the
differences of the paper's method may deviate more than theirs.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import scipy

from workbench.lib.measures.statistics import seeds_needed
from workbench.studies.rows import Rows

if TYPE_CHECKING:
    from workbench.studies.core import Study

SEEDS = 12  # of the baselines; a deviation of so many differences is known to about 20 %


@dataclass(frozen=True)
class Power:
    """What the number of seeds has to be enough for.

    Attributes:
        baselines: at least two arms, the paper's method not among them, that a preset trains alike.
        effect: the smallest difference of the metric that must not be missed, above 0.
        level: of the interval that the rule asks for; 0.9 where it is one side at 5 % or an equivalence.
        power: the probability of not missing it.
        deviation: preset -> (standard deviation of the paired differences of the baselines, seeds it was found with).
    """

    baselines: tuple[str, ...]
    effect: float
    level: float = 0.95
    power: float = 0.8
    deviation: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def seeds(self, deviation: float) -> int:
        """Seeds that a deviation asks for."""
        return seeds_needed(deviation, self.effect, self.power, self.level)

    def note(self, study: "Study", preset: str) -> str | None:
        """One sentence on the seeds of a preset; None where its deviation was not found."""
        if preset not in self.deviation:
            return None
        deviation, seeds = self.deviation[preset]
        return (
            f"Seeds: {self.seeds(deviation)} are needed to see {self.effect:g} {study.unit} with {self.power:.0%} "
            f"power, by the deviation of {deviation:.3g} between {' and '.join(self.baselines)} over {seeds} seeds; "
            f"{preset} has {study.presets[preset]['seeds']}."
        )


@dataclass(frozen=True)
class Measured:
    """The deviation that the baselines of a preset have.

    Attributes:
        deviation: standard deviation of the paired differences of the metric, pooled over the pairs of baselines.
        low, high: its 90 % interval, for normally distributed differences of one pair.
        seeds: of the baselines.
        needed: seeds the preset needs by the deviation.
        at_most: seeds it needs if the deviation is `high`.
        has: seeds it has.
    """

    slug: str
    preset: str
    power: Power
    unit: str
    deviation: float
    low: float
    high: float
    seeds: int
    needed: int
    at_most: int
    has: int

    def to_dict(self) -> dict:
        names = ("slug", "preset", "deviation", "low", "high", "seeds", "needed", "at_most", "has")
        power = {name: getattr(self.power, name) for name in ("effect", "level", "power")}
        return {name: getattr(self, name) for name in names} | power | {"baselines": list(self.power.baselines)}

    def __str__(self) -> str:
        return (
            f"{self.slug}, {self.preset}: paired differences of {' and '.join(self.power.baselines)} over {self.seeds} "
            f"seeds deviate by {self.deviation:.4g} {self.unit} (90% interval {self.low:.4g} to {self.high:.4g}).\n"
            f"To see {self.power.effect:g} {self.unit} with {self.power.power:.0%} power takes {self.needed} seeds "
            f"({self.at_most} at the upper end); {self.preset} has {self.has}."
        )


def measured(study: "Study", preset: str, rows: Rows) -> Measured:
    """What rows of the baselines alone say."""
    power = study.power
    pairs = [
        statistics.stdev(a - b for a, b in zip(rows.of(one), rows.of(other), strict=True))
        for one, other in combinations(power.baselines, 2)
    ]
    deviation, seeds = math.sqrt(statistics.fmean(d * d for d in pairs)), len(rows.arm(power.baselines[0]))
    low, high = (deviation * math.sqrt((seeds - 1) / float(scipy.stats.chi2.ppf(p, seeds - 1))) for p in (0.95, 0.05))
    counts = (power.seeds(deviation), power.seeds(high), int(study.presets[preset]["seeds"]))
    return Measured(study.slug, preset, power, study.unit, deviation, low, high, seeds, *counts)
