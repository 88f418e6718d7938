"""How well scores rank what they were made for: correlations with intervals, and what a control would give as well.

Intervals are of the bootstrap over the items that are ranked (percentiles; a resample in which something is constant
counts as 0), so they speak of other items of the same kind. They say nothing of another training of the scorer.
"""

from dataclasses import dataclass

import numpy as np
import scipy

from workbench.errors import InputError
from workbench.lib.measures.statistics import Interval, Values, check_level, checked

LEAST = 4
"""Items that a report needs."""


@dataclass(frozen=True)
class RankReport:
    """Correlations of scores and truth, each with its interval.

    Attributes:
        partial: Spearman's correlation of what is left of both ranks when those of the controls are taken out; None
            without controls.
    """

    spearman: Interval
    kendall: Interval
    pearson: Interval
    partial: Interval | None = None

    def __str__(self) -> str:
        said = [f"Spearman {self.spearman}", f"Kendall {self.kendall}", f"Pearson {self.pearson}"]
        return "\n".join(said + ([f"partial Spearman {self.partial}"] if self.partial is not None else []))


def rank_report(
    scores: Values, truth: Values, given: Values | None = None, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> RankReport:
    """How scores, where more is better, agree with the truth.

    Args:
        scores, truth: one number an item.
        given: a control, such as the number of parameters of each item; it gives the partial correlation.
        samples: resamples of the bootstrap.

    Raises:
        InputError: fewer than 4 items, not one number of each an item, or not finite ones.
    """
    columns = [checked("scores", scores), checked("truth", truth)]
    columns += [] if given is None else [checked("given", given)]
    for name, column in zip(("truth", "given"), columns[1:], strict=False):
        if len(column) != len(columns[0]):
            raise InputError(f"{name} has {len(column)} numbers but scores has {len(columns[0])}: one each an item")
    if len(columns[0]) < LEAST:
        raise InputError(f"scores has {len(columns[0])} items but must have at least {LEAST} to be ranked")
    check_level(level)
    random = np.random.default_rng(seed)
    drawn = random.integers(len(columns[0]), size=(samples, len(columns[0])))

    def with_interval(measure, *of: np.ndarray) -> Interval:
        found = [_or_zero(measure(*(column[rows] for column in of))) for rows in drawn]
        low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(measure(*of)), float(low), float(high), len(of[0]), level)

    a, b = columns[:2]
    partial = None if given is None else with_interval(partial_spearman, *columns)
    return RankReport(
        with_interval(spearman, a, b), with_interval(kendall, a, b), with_interval(pearson, a, b), partial
    )


def pearson(x: Values, y: Values) -> float:
    """The linear correlation; NaN where one is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(x: Values, y: Values) -> float:
    """The linear correlation of ranks, ties in the middle; NaN where one is constant."""
    return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))


def kendall(x: Values, y: Values) -> float:
    """Tau-b: pairs in the same order minus pairs in the other, by the pairs without ties; NaN where one is constant."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    one, other = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    pairs = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / pairs) if pairs else float("nan")


def partial_spearman(x: Values, y: Values, given: Values) -> float:
    """Spearman's correlation of x and y with a control taken out of both; NaN where nothing is left of one.

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)), which is the correlation of the residuals of the ranks. A
    control that is constant takes nothing out.
    """
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    xz, yz = (0.0 if np.ptp(np.asarray(given)) == 0 else r for r in (xz, yz))
    left = (1 - xz**2) * (1 - yz**2)
    return float(np.clip((xy - xz * yz) / np.sqrt(left), -1, 1)) if left > 1e-12 else float("nan")


def _or_zero(value: float) -> float:
    return value if np.isfinite(value) else 0.0
