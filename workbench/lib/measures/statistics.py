"""Statistics of comparisons over seeds, one place for all studies: intervals, equivalence, effect sizes, corrections.

Values are one number per seed. Differences are always mean(a) - mean(b). One seed has no spread: its interval is
(-inf, inf) and its tests are NaN and never "equivalent", because nothing was shown. A large p in a test for a
difference is not evidence of equality; that takes `tost` with a margin fixed before the runs.
"""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy  # its parts are imported when first used, and that of statistics is slow

from workbench.errors import InputError

Values = Sequence[float] | np.ndarray
SPEARMAN_AT_LEAST = 4  # pairs a confidence interval of a correlation needs


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        estimate: point estimate.
        low: lower end, -inf where the data leave it open.
        high: upper end, inf where the data leave it open.
        n: values behind the estimate: seeds, pairs of seeds, or the seeds of both arms together (`welch_interval`).
        level: coverage, 0.95 for 95 %.
        sd: standard deviation of the values whose mean is the estimate; NaN for one value, and where it is no mean.
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float
    sd: float = field(default=math.nan, compare=False)

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return value < self.low or value > self.high

    def __neg__(self) -> "Interval":
        """The interval of the difference taken the other way round."""
        return Interval(-self.estimate, -self.high, -self.low, self.n, self.level, self.sd)

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    def as_dict(self) -> dict[str, float | tuple[float, float]]:
        """{"mean": estimate, "ci95": (low, high)}, the number in the name being the coverage in percent."""
        return {"mean": self.estimate, f"ci{100 * self.level:g}": (self.low, self.high)}


@dataclass(frozen=True)
class TostResult:
    """Two one-sided t-tests of |mean(a) - mean(b)| < margin at 5 %.

    Attributes:
        diff: mean(a) - mean(b).
        se: its standard error; NaN for one seed.
        df: degrees of freedom.
        p_lower: p of "the difference is at most -margin".
        p_upper: p of "the difference is at least +margin".
        p: the larger of the two; equivalent iff below 0.05.
        ci90: 90 % confidence interval of the difference; equivalent iff it lies inside (-margin, margin).
        equivalent: the verdict.
        undefined_reason: why p is NaN, else None.
    """

    diff: float
    se: float
    df: float
    p_lower: float
    p_upper: float
    p: float
    ci90: tuple[float, float]
    equivalent: bool
    undefined_reason: str | None = None

    @property
    def sd(self) -> float:
        """Standard deviation of the differences of paired values."""
        return self.se * (self.df + 1) ** 0.5


def mean_interval(values: Values, level: float = 0.95) -> Interval:
    """Mean with its Student t interval."""
    x = checked("values", values)
    return _interval(*mean_error(x), len(x), level, _std(x))


def paired_interval(a: Values, b: Values, level: float = 0.95) -> Interval:
    """mean(a - b) with its t interval, for arms that share seeds and data order (a[i] belongs to b[i])."""
    x = differences(a, b)
    return _interval(*mean_error(x), len(x), level, _std(x))


def welch_interval(a: Values, b: Values, level: float = 0.95) -> Interval:
    """mean(a) - mean(b) with its t interval for independent arms of unequal variances (Welch 1947)."""
    x, y = checked("a", a), checked("b", b)
    return _interval(*_welch(x, y), len(x) + len(y), level)


def tost(a: Values, b: Values, margin: float, paired: bool = False) -> TostResult:
    """Equivalence of two means within +-margin (Schuirmann 1987), by Welch's t or, `paired`, by the t of differences.

    t_lower = (d + margin) / se and t_upper = (d - margin) / se; p = max(P(T > t_lower), P(T < t_upper)).

    Args:
        a: one value per seed.
        b: one value per seed; with `paired`, of the same seeds as `a`.
        margin: largest difference that does not matter, above 0; fix it before the runs.
        paired: arms share seeds and data order; has more power.

    Raises:
        InputError: `margin` not above 0, empty or not finite values, unequal lengths of paired arms.
    """
    check_margin(margin)
    diff, se, df = mean_error(differences(a, b)) if paired else _welch(checked("a", a), checked("b", b))
    if np.isnan(se):
        nan, reason = float("nan"), "undefined: one value per arm has no spread"
        return TostResult(diff, nan, nan, nan, nan, nan, (-np.inf, np.inf), False, reason)
    p_lower = float(scipy.stats.t.sf(ratio(diff + margin, se), df))
    p_upper = float(scipy.stats.t.cdf(ratio(diff - margin, se), df))
    half = float(scipy.stats.t.ppf(0.95, df)) * se
    p = max(p_lower, p_upper)
    return TostResult(diff, se, df, p_lower, p_upper, p, (diff - half, diff + half), p < 0.05)


def paired_p(a: Values, b: Values) -> float:
    """Two-sided p of a paired t-test; NaN for one pair, 0 or 1 for differences without any spread."""
    mean, se, df = mean_error(differences(a, b))
    return float(2 * scipy.stats.t.sf(abs(ratio(mean, se)), df)) if df else float("nan")


def paired_tost(a: Values, b: Values, margin: float) -> TostResult:
    """`tost` for arms that share seeds and data order."""
    return tost(a, b, margin, paired=True)


def seeds_needed(deviation: float, effect: float, power: float = 0.8, level: float = 0.95) -> int:
    """Pairs of seeds with which the paired t interval leaves out 0 on the right side, with probability `power`.

    Args:
        deviation: standard deviation of the paired differences.
        effect: their true mean, above 0.
        level: of the interval. That a margin is kept where nothing differs (`tost` on one side) needs as many seeds as
            an effect of that size at a level of 0.9.
    """
    if not 0 <= deviation < np.inf:
        raise InputError(f"deviation is {deviation} but must be at least 0 and finite")
    if not 0 < effect < np.inf:
        raise InputError(f"effect is {effect} but must be above 0 and finite")
    if not 0 < power < 1:
        raise InputError(f"power is {power} but must be between 0 and 1, such as 0.8")
    check_level(level)

    def enough(n: int) -> bool:
        bound = scipy.stats.t.ppf((1 + level) / 2, n - 1)
        return deviation == 0 or bool(scipy.stats.nct.sf(bound, n - 1, effect / deviation * n**0.5) >= power)

    high = 2
    while not enough(high):
        high *= 2
    return bisect_left(range(high), True, lo=max(2, high // 2), key=enough)


def holm(p_values: Values) -> np.ndarray:
    """Step-down adjusted p-values (Holm 1979): reject those below alpha with family-wise error alpha. Order is kept."""
    p = checked("p_values", p_values)
    if (p < 0).any() or (p > 1).any():
        raise InputError(f"p_values holds {p[(p < 0) | (p > 1)][0]} but must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def hedges_g(a: Values, b: Values) -> float:
    """(mean(a) - mean(b)) / pooled std, times 1 - 3 / (4 df - 1) against its bias in small samples (Hedges 1981).

    In standard deviations of a seed; NaN without spread.
    """
    x, y = checked("a", a), checked("b", b)
    df = len(x) + len(y) - 2
    if min(len(x), len(y)) < 2:
        return float("nan")
    pooled = np.sqrt(((len(x) - 1) * _std(x) ** 2 + (len(y) - 1) * _std(y) ** 2) / df)
    return float((x.mean() - y.mean()) / pooled * (1 - 3 / (4 * df - 1))) if pooled > 0 else float("nan")


def paired_effect(a: Values, b: Values) -> float:
    """d_z = mean(a - b) / std(a - b) (Cohen 1988), in standard deviations of the difference; NaN without spread."""
    x = differences(a, b)
    std = _std(x)
    return float(x.mean() / std) if std > 0 else float("nan")


def bootstrap_interval(
    values: Values,
    statistic: Callable[..., np.ndarray | float] = np.mean,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of any statistic of a sample.

    `statistic` maps an array, along `axis`, to numbers (np.mean, np.median, ...). Where the acceleration is undefined
    (the median of many equal values) the interval is the percentile one. For a handful of seeds prefer the t
    intervals: resampling cannot find a spread that is not in the sample.
    """
    x = checked("values", values)
    check_level(level)
    estimate = float(statistic(x, axis=-1))
    if len(x) < 2:
        return Interval(estimate, -np.inf, np.inf, len(x), level)
    if np.ptp(x) == 0:  # every resample is the sample
        return Interval(estimate, estimate, estimate, len(x), level)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # answered by the percentiles below
        result = scipy.stats.bootstrap(
            (x,), statistic, confidence_level=level, n_resamples=samples, method="BCa", rng=np.random.default_rng(seed)
        )
    low, high = result.confidence_interval
    if np.isnan(low) or np.isnan(high):
        low, high = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), len(x), level)


def spearman(x: Values, y: Values, level: float = 0.95) -> Interval:
    """Rank correlation with the interval of Bonett and Wright (2000): Fisher z with variance (1 + rho^2 / 2) / (n - 3).

    The estimate is NaN where x or y is constant; the interval is (-1, 1) there and for fewer than 4 pairs. Fisher's z
    is infinite for a perfect correlation; the interval then starts from one exchange of neighbouring ranks.
    """
    a, b = checked("x", x), checked("y", y)
    _same_length("x", a, "y", b)
    check_level(level)
    n = len(a)
    varies = n > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
    rho = float(scipy.stats.spearmanr(a, b).statistic) if varies else float("nan")
    if n < SPEARMAN_AT_LEAST or not varies:
        return Interval(rho, -1.0, 1.0, n, level)
    half = scipy.stats.norm.ppf((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    nearest = 1 - 12 / (n * (n**2 - 1))  # rho with two neighbouring ranks exchanged
    z = np.arctanh(np.clip(rho, -nearest, nearest))
    return Interval(rho, min(rho, float(np.tanh(z - half))), max(rho, float(np.tanh(z + half))), n, level)


def checked(name: str, values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name} has shape {array.shape} but must be a list of at least one number")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds {array[~np.isfinite(array)][0]} but must be finite")
    return array


def _same_length(name: str, a: np.ndarray, other: str, b: np.ndarray) -> None:
    if len(a) != len(b):
        raise InputError(f"{name} has {len(a)} values but must have as many as {other}, {len(b)}, to be paired")


def differences(a: Values, b: Values) -> np.ndarray:
    x, y = checked("a", a), checked("b", b)
    _same_length("a", x, "b", y)
    return x - y


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level is {level} but must be between 0 and 1, such as 0.95")


def check_margin(margin: float) -> None:
    if not 0 < margin < np.inf:
        raise InputError(f"margin is {margin} but must be above 0 and finite")


def mean_error(x: np.ndarray) -> tuple[float, float, float]:
    """(mean, standard error, degrees of freedom); the error of one value is NaN."""
    return float(x.mean()), _std(x) / len(x) ** 0.5, float(len(x) - 1)


def _std(x: np.ndarray) -> float:
    """Sample standard deviation; NaN for one value, exactly 0 for equal ones (whose mean may be off by rounding)."""
    if len(x) < 2:
        return float("nan")
    return float(x.std(ddof=1)) if np.ptp(x) > 0 else 0.0


def _welch(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(difference of means, standard error, Welch-Satterthwaite degrees of freedom)."""
    (mean_x, error_x, df_x), (mean_y, error_y, df_y) = mean_error(x), mean_error(y)
    error = float(np.hypot(error_x, error_y))
    if not error > 0:
        return mean_x - mean_y, error, df_x + df_y
    share = (error_x / error) ** 2  # of the variance that is x's
    return mean_x - mean_y, error, 1 / (share**2 / df_x + (1 - share) ** 2 / df_y)


def ratio(value: float, se: float) -> float:
    """value / se where se may be 0: without any spread a value off the bound is infinitely far from it."""
    if se > 0:
        return value / se
    return float(np.copysign(np.inf, value)) if value else 0.0


def _interval(estimate: float, se: float, df: float, n: int, level: float, sd: float = math.nan) -> Interval:
    check_level(level)
    half = float(scipy.stats.t.ppf((1 + level) / 2, df)) * se if not np.isnan(se) else np.inf
    return Interval(estimate, estimate - half, estimate + half, n, level, sd)
