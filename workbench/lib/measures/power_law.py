"""The tail exponent of a spectrum, by the method of Clauset, Shalizi and Newman (2009, 0706.1062).

Above x_min the density of the energies l is taken as proportional to l^-alpha. Reading after Martin and Mahoney (2021):
below 2 over-trained, 2 to 6 typical of trained layers, above 6 under-trained or random. Always show `distance` and `m`
beside alpha: the fit finds an exponent in anything, also in a Gaussian matrix.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from workbench.errors import InputError

RELIABLE_FROM = 128  # values; below, even exact Pareto samples scatter over the whole range of interest


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted tail.

    Attributes:
        alpha: exponent; NaN if no fit is possible.
        x_min: start of the tail.
        distance: Kolmogorov-Smirnov distance D between tail and fit; 0 .. 1.
        m: number of values in the tail, x_min included.
        stderr: (alpha - 1) / sqrt(m).
        alpha_hat: alpha * log10 of the largest value.
        undefined_reason: why alpha should not be read (too few values, no spread), else None. Where alpha is a number
            it is the fit all the same, to be shown greyed out.
    """

    alpha: float
    x_min: float
    distance: float
    m: int
    stderr: float
    alpha_hat: float
    undefined_reason: str | None


def fit_power_law(values: Num[Tensor, " n"], x_min: float | None = None) -> PowerLawFit:
    """Maximum-likelihood exponent alpha = 1 + m / sum ln(l_j / x_min) over the m values l_j >= x_min.

    x_min, if not given, is the value that minimises D = max_j |1 - (l_j / x_min)^(1 - alpha) - j / m|, j = 0 .. m - 1
    (eq. 3.9 with the empirical distribution to the left of each value). Values that are not above 0 are left out.

    Args:
        values: energies (squared singular values), in any order.
        x_min: fixed start of the tail, above 0.
    """
    if x_min is not None and not x_min > 0:
        raise InputError(f"x_min is {x_min} but must be above 0")
    array = np.sort(values.detach().double().cpu().numpy())
    array = array[np.isfinite(array) & (array > 0)]
    n = len(array)
    best = _search(array) if x_min is None else _fit(array[array >= x_min], x_min)
    if best is None:
        nan = math.nan
        return PowerLawFit(nan, nan, nan, 0, nan, nan, f"undefined: no tail of distinct values among {n} above 0")
    alpha, start, distance, m = best
    few = f"not reliable: {n} values, and an exponent means little below {RELIABLE_FROM}" if n < RELIABLE_FROM else None
    return PowerLawFit(alpha, start, distance, m, (alpha - 1) / math.sqrt(m), alpha * math.log10(array[-1]), few)


def bootstrap_alpha(
    values: Num[Tensor, " n"], samples: int = 100, level: float = 0.95, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Percentile band of alpha over resampled values, x_min chosen anew each time; NaN where no fit exists."""
    if samples < 2 or not 0 < level < 1:
        raise InputError(f"samples is {samples} and level is {level} but must be at least 2, and between 0 and 1")
    draws = torch.randint(len(values), (samples, len(values)), generator=generator)
    alphas = np.array([fit_power_law(values.cpu()[draw]).alpha for draw in draws])
    if np.isnan(alphas).all():
        return math.nan, math.nan
    low, high = np.nanquantile(alphas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _fit(tail: np.ndarray, x_min: float) -> tuple[float, float, float, int] | None:
    """(alpha, x_min, D, m) of one tail, ascending; None if it has no spread."""
    logs = np.log(tail / x_min)
    total = logs.sum()
    if not total > 0:
        return None
    m = len(tail)
    alpha = 1 + m / total
    distance = np.abs(-np.expm1((1 - alpha) * logs) - np.arange(m) / m).max()
    return float(alpha), float(x_min), float(distance), m


def _search(array: np.ndarray) -> tuple[float, float, float, int] | None:
    """The start of smallest distance among the distinct values; the first (longest tail) of equals."""
    starts = np.flatnonzero(np.diff(array, prepend=-np.inf))
    fits = (_fit(array[start:], array[start]) for start in starts)
    return min((fit for fit in fits if fit is not None), key=lambda fit: fit[2], default=None)
