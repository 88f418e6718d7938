"""Mixtures of data domains: weights on the simplex, candidates, a sampler that trains by them, and what ranks them.

A mixture is float64 (K,), none negative, of sum 1: the probability of each of K domains for every example drawn.
Tensor letters: K domains, M mixtures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import scipy  # its parts are imported when first used, and that of statistics is slow
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.measures.statistics import Interval, check_level, checked

Numbers = Sequence[float] | np.ndarray | Tensor
Weights = Mapping[str, float] | Numbers
TOLERANCE = 1e-6  # of a sum of 1: weights may come from float32


def check_weights(weights: Weights, domains: Sequence[str]) -> Float64[Tensor, " domains"]:
    """A mixture as it is used: float64, in the order of `domains`, and no view of what was given.

    Args:
        weights: one for each domain, or name -> weight, where a domain that is not named has weight 0.

    Raises:
        InputError: a domain is unknown or there twice, a weight no number, negative or not finite, or their sum not 1.
    """
    if len(set(domains)) < len(domains):
        raise InputError(f"domains are {tuple(domains)} but must each be another")
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in domains:
                raise unknown("domain", name, domains)
        weights = [weights.get(name, 0.0) for name in domains]
    made = torch.from_numpy(as_numbers("weights", weights))
    if made.shape != (len(domains),):
        raise InputError(f"weights has shape {tuple(made.shape)} but must be one number for each of {len(domains)}")
    for name, value in zip(domains, made.tolist(), strict=True):
        if not 0 <= value < math.inf:
            raise InputError(f"weights has {value} for {name!r} but must be at least 0 and finite")
    if abs(float(made.sum()) - 1) > TOLERANCE:
        raise InputError(f"weights has a sum of {float(made.sum()):.6g} but must have one of 1")
    return made


def as_numbers(name: str, values: Any) -> np.ndarray:
    """A float64 copy of numbers, of any shape."""
    try:
        if isinstance(values, Tensor) and not values.is_complex():
            return values.detach().double().cpu().numpy().copy()
        if not np.iscomplexobj(values):
            return np.asarray(values, dtype=np.float64).copy()
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} is {values!r} but must be real numbers")


def simplex_grid(n_domains: int, step: float = 1 / 8, interior: bool = True) -> Float64[Tensor, "mixtures domains"]:
    """All mixtures whose weights are multiples of `step`, in lexical order.

    Args:
        step: of which 1 is a multiple.
        interior: only those in which every domain has a part. With m = 1 / step there are C(m - 1, K - 1) of them, and
            C(m + K - 1, K - 1) on the whole simplex.
    """
    check_domains(n_domains)
    parts = round(1 / step) if 0 < step <= 1 else 0
    if not parts or abs(parts * step - 1) > 1e-9:
        raise InputError(f"step is {step} but must be 1, or 1/2, 1/3 and so on")
    if interior and parts < n_domains:
        raise InputError(
            f"step is {step} but must be at most 1/{n_domains} for each of {n_domains} domains to have one"
        )
    # Where K - 1 bars stand between the parts; on the whole simplex each domain is given one part more, and it back.
    free = parts if interior else parts + n_domains
    rows = [np.diff((0, *bars, free)) for bars in combinations(range(1, free), n_domains - 1)]
    return torch.from_numpy((np.array(rows) - (not interior)) / parts)


def dirichlet_mixtures(
    n_domains: int, count: int, alpha: float | Numbers = 1.0, seed: int | np.random.Generator = 0
) -> Float64[Tensor, "mixtures domains"]:
    """`count` mixtures from a Dirichlet distribution; with alpha = 1 all mixtures are equally likely.

    Args:
        alpha: concentration above 0, of every domain or of each; below 1 most weight is on few domains.
        seed: or a generator, which goes on.
    """
    check_domains(n_domains)
    if count < 1:
        raise InputError(f"count is {count} but must be at least 1")
    concentration = as_numbers("alpha", alpha)
    if concentration.shape not in ((), (n_domains,)):
        raise InputError(f"alpha has shape {concentration.shape} but must be one number, or one for each domain")
    concentration = np.broadcast_to(concentration, n_domains)
    if not ((concentration > 0).all() and concentration.sum() < math.inf):
        raise InputError(f"alpha is {alpha} but must be above 0, and finite in sum")
    drawn = np.random.default_rng(seed).dirichlet(concentration, count)
    return torch.from_numpy(drawn)


class MixtureSampler:
    """Draws examples by a mixture: the domain of each at random by the weights, and exactly as many as are asked for.

    Of one seed, the k-th example that is taken from a domain is the same one whatever the weights, and so are the
    numbers that choose domains: close mixtures draw mostly the same examples, and what trains on them differs little by
    chance.

    Args:
        sizes: name -> number of examples of the domain.
        weights: see `check_weights`.
        seed: of the order.
        replacement: an example may be drawn again. Otherwise none is, not in a later call either.

    Raises:
        InputError: a domain with a weight has no example.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Weights, seed: int = 0, replacement: bool = False):
        self.domains, self.sizes, self.replacement = tuple(sizes), tuple(sizes.values()), replacement
        self.weights = check_weights(weights, self.domains)
        for name, size, weight in zip(self.domains, self.sizes, self.weights.tolist(), strict=True):
            if size < (weight > 0):
                raise InputError(
                    f"sizes has {size} for {name!r}, which has weight {weight:g}, but must be at least {weight > 0:d}"
                )
        self._bounds = self.weights.cumsum(0).numpy()
        self._bounds[int(self.weights.nonzero().max()) :] = 1.0  # where rounding has left a gap below 1
        choose, *inside = np.random.SeedSequence(seed).spawn(1 + len(self.domains))
        self._choose = np.random.default_rng(choose)
        self._inside = [np.random.default_rng(one) for one in inside]
        self._orders: dict[int, np.ndarray] = {}
        self._taken = [0] * len(self.domains)

    def draw(self, count: int) -> tuple[Int64[Tensor, " examples"], Int64[Tensor, " examples"]]:
        """The domain of each of `count` examples, and which one of that domain it is. The next call goes on from there.

        Raises:
            InputError: a domain has too few examples; nothing has been drawn then.
        """
        if count < 0:
            raise InputError(f"count is {count} but must be at least 0")
        state = self._choose.bit_generator.state
        domains = np.searchsorted(self._bounds, self._choose.random(count), side="right")
        wanted = np.bincount(domains, minlength=len(self.domains)).tolist()
        for index, size in enumerate(self.sizes):
            if self._taken[index] + wanted[index] > size and not self.replacement:
                self._choose.bit_generator.state = state
                raise InputError(
                    f"count is {count} but {self.domains[index]!r} would be asked for "
                    f"{self._taken[index] + wanted[index]} of its {size} examples; take fewer, a smaller "
                    "weight, or replacement=True"
                )
        examples = np.empty(count, dtype=np.int64)
        for index, part in enumerate(wanted):
            if part:
                examples[domains == index] = self._next(index, part)
        return torch.from_numpy(domains), torch.from_numpy(examples)

    def _next(self, domain: int, count: int) -> np.ndarray:
        if self.replacement:  # one number after the other, so that the k-th does not depend on how they are asked for
            return (self._inside[domain].random(count) * self.sizes[domain]).astype(np.int64)
        if domain not in self._orders:
            self._orders[domain] = self._inside[domain].permutation(self.sizes[domain])
        start = self._taken[domain]
        self._taken[domain] += count
        return self._orders[domain][start : start + count]


@dataclass(frozen=True)
class RankReport:
    """How well one score of mixtures, a proxy, ranks them by another, the true one.

    Attributes:
        spearman: rank correlation.
        kendall: tau-b.
        top1_regret: how much better the best mixture is than the one the proxy says is best, at least 0; where the
            proxy says it of several, the mean over these.
        top1_vs_uniform: how much better the proxy's best mixture is than the uniform one; NaN where that was not named.
        degenerate: why nothing can be said (all numbers are NaN then), else None.
    """

    spearman: Interval
    kendall: Interval
    top1_regret: float
    top1_vs_uniform: float
    degenerate: str | None = None


def rank_report(
    proxy: Numbers,
    true: Numbers,
    *,
    lower_is_better: bool = False,
    uniform: int | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> RankReport:
    """Rank correlations of two scores of the same mixtures, and what choosing by the first costs in the second.

    Intervals are percentiles over resampled mixtures; a resample in which a score is constant says nothing and is left
    out; where all do, there is no interval. Of scores that agree in every pair all resamples do too, and the interval
    is a point, however few they are.

    Args:
        proxy, true: (M,) scores.
        lower_is_better: of both.
        uniform: which of the mixtures is the uniform one.
        samples: resamples.
    """
    x, y = (checked(name, as_numbers(name, score)) for name, score in (("proxy", proxy), ("true", true)))
    if len(x) != len(y):
        raise InputError(f"proxy has {len(x)} scores but must have as many as true, {len(y)}")
    if uniform is not None and uniform not in range(len(x)):
        raise InputError(f"uniform is {uniform} but must be a row from 0 to {len(x) - 1}")
    if samples < 1:
        raise InputError(f"samples is {samples} but must be at least 1")
    check_level(level)
    for name, score in (("proxy", x), ("true", y)):
        if np.ptp(score) == 0:
            nothing = Interval(math.nan, math.nan, math.nan, len(x), level)
            reason = f"degenerate: {name} has the same score for all {len(x)} mixtures"
            return RankReport(nothing, nothing, math.nan, math.nan, reason)
    if lower_is_better:
        x, y = -x, -y
    rows = np.random.default_rng(seed).integers(len(x), size=(samples, len(x)))
    said = float(y[x == x.max()].mean())
    return RankReport(
        _resampled(_spearman, x, y, rows, level),
        _resampled(_kendall, x, y, rows, level),
        float(y.max()) - said,
        math.nan if uniform is None else said - float(y[uniform]),
    )


Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _resampled(of: Correlation, x: np.ndarray, y: np.ndarray, rows: np.ndarray, level: float) -> Interval:
    found = np.concatenate([of(x[part], y[part]) for part in np.array_split(rows, max(1, rows.size * len(x) // 10**6))])
    estimate, said = float(of(x[None], y[None])[0]), found[~np.isnan(found)]
    if not len(said):
        return Interval(estimate, math.nan, math.nan, len(x), level)
    low, high = np.quantile(said, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, min(estimate, float(low)), max(estimate, float(high)), len(x), level)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each pair of rows (resamples, M); NaN where one is constant."""
    a, b = (scipy.stats.rankdata(part, axis=1) for part in (x, y))
    return _cosine(a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True))


def _kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Tau-b is the cosine of the signs of all differences."""
    a, b = (np.sign(part[:, :, None] - part[:, None, :]).reshape(len(part), -1) for part in (x, y))
    return _cosine(a, b)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    with np.errstate(invalid="ignore"):
        return np.where(norm > 0, (a * b).sum(1) / norm, np.nan)


def check_domains(n_domains: int) -> None:
    if n_domains < 1:
        raise InputError(f"n_domains is {n_domains} but must be at least 1")
