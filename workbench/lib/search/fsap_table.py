"""What came of the programs, as a table: balanced and pooled means, successes, comparisons, diversity.

Data sets have unequal numbers of programs, and unequal difficulty, so a mean over all programs says how many were of
the easy set. The balanced mean of a setting n is

    B(n) = (1 / |D|) sum over data sets d of (mean accuracy of the valid programs of n on d)

over the data sets D on which every compared setting has a valid program. It is of survivors, so the share of requests
that gave a valid program stands beside it.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import InputError

OK = "ok"


@dataclass(frozen=True)
class Trial:
    """One request: for n examples, on one data set, and what came of it.

    Attributes:
        kind: "ok", or why there is no accuracy: "no code", "duplicate", or a kind of the sandbox or of the trial.
        accuracy: on images whose labels the program never saw; NaN unless ok.
        code: as it was extracted, "" where there was none.
        shown: the programs that the prompt had, the main one first.
    """

    n: int
    dataset: str
    main: str
    kind: str
    detail: str = ""
    accuracy: float = math.nan
    params: int = 0
    macs: int = 0
    code: str = ""
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        mean, low, high: the balanced mean and its 95% interval, infinite where a data set has a single program.
        pooled: the mean over programs.
        valid, requested: numbers, over all data sets.
        by_dataset: mean accuracy.
        kinds: how many requests ended as which kind.
    """

    n: int
    mean: float
    low: float
    high: float
    pooled: float
    valid: int
    requested: int
    by_dataset: dict[str, float]
    kinds: dict[str, int]

    @property
    def success(self) -> float:
        return self.valid / self.requested


@dataclass(frozen=True)
class Comparison:
    """n examples against one example on one data set.

    Attributes:
        difference: of mean accuracies, those of n minus those of 1.
        t, p, adjusted: Welch's statistic, its two-sided p, and p by Holm over all comparisons of the table.
        d: Cohen's d, the difference over the pooled deviation.
    """

    n: int
    dataset: str
    difference: float
    t: float
    p: float
    adjusted: float
    d: float


def balanced_mean(trials: Iterable[Trial]) -> dict[int, Setting]:
    """n -> its row.

    Raises:
        InputError: no data set has a valid program in every setting.
    """
    by_n: dict[int, list[Trial]] = {}
    for trial in trials:
        by_n.setdefault(trial.n, []).append(trial)
    values = {n: _accuracies(found) for n, found in by_n.items()}
    common = sorted(set.intersection(*(set(found) for found in values.values()))) if values else []
    if not common:
        raise InputError("trials have no data set with a valid program in every setting: there is no balanced mean")
    return {n: _setting(n, by_n[n], {name: values[n][name] for name in common}) for n in sorted(by_n)}


def compare(trials: Iterable[Trial], base: int = 1) -> list[Comparison]:
    """Every setting against n = `base`, where both have at least two valid programs of a data set."""
    from scipy.stats import ttest_ind

    from workbench.lib.measures.statistics import holm

    trials = [*trials]
    values = {n: _accuracies([trial for trial in trials if trial.n == n]) for n in sorted({t.n for t in trials})}
    found = []
    for n, mine in values.items():
        for name in sorted(mine.keys() & values.get(base, {}).keys()):
            a, b = mine[name], values[base][name]
            if n == base or min(len(a), len(b)) < 2 or statistics.pvariance(a) + statistics.pvariance(b) == 0:
                continue
            test = ttest_ind(a, b, equal_var=False)
            gap = statistics.fmean(a) - statistics.fmean(b)
            found.append((n, name, gap, float(test.statistic), float(test.pvalue), cohens_d(a, b)))
    adjusted = holm([one[4] for one in found]) if found else []
    return [Comparison(*one[:5], float(p), one[5]) for one, p in zip(found, adjusted, strict=True)]


def cohens_d(a: Sequence[float], b: Sequence[float]) -> float:
    """The difference of the means over the pooled standard deviation."""
    within = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    return (statistics.fmean(a) - statistics.fmean(b)) / math.sqrt(within / (len(a) + len(b) - 2))


def diversity(trials: Iterable[Trial]) -> dict[str, float]:
    """Of programs that have code: shares of different hashes and plans, mean overlap of tokens, share that was copied.

    "copied" are those whose hash is that of a program in their own prompt; "overlap" is the mean Jaccard index of the
    sets of words of two programs.
    """
    from workbench.lib.search.fsap_duplicates import ws_hash
    from workbench.lib.search.fsap_programs import read

    found = [trial for trial in trials if trial.code]
    if not found:
        return {"hashes": math.nan, "plans": math.nan, "overlap": math.nan, "copied": math.nan}
    hashes = [ws_hash(trial.code) for trial in found]
    plans: list[Any] = [read(trial.code) or hashed for trial, hashed in zip(found, hashes, strict=True)]
    words = [set(trial.code.replace("(", " ").replace(")", " ").replace(",", " ").split()) for trial in found]
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2)]
    copied = [hashed in map(ws_hash, trial.shown) for trial, hashed in zip(found, hashes, strict=True)]
    return {
        "hashes": len(set(hashes)) / len(found),
        "plans": len(set(plans)) / len(found),
        "overlap": statistics.fmean(overlaps) if overlaps else math.nan,
        "copied": statistics.fmean(copied),
    }


def _accuracies(trials: Iterable[Trial]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for trial in trials:
        if trial.kind == OK:
            found.setdefault(trial.dataset, []).append(trial.accuracy)
    return found


def _setting(n: int, trials: list[Trial], values: dict[str, list[float]]) -> Setting:
    means = {name: statistics.fmean(found) for name, found in values.items()}
    mean, half = statistics.fmean(means.values()), _half_width(list(values.values()))
    pooled = statistics.fmean(itertools.chain(*values.values()))
    kinds = dict(Counter(trial.kind for trial in trials))
    return Setting(n, mean, mean - half, mean + half, pooled, kinds.get(OK, 0), len(trials), means, kinds)


def _half_width(values: list[list[float]]) -> float:
    """Of the 95% interval of a mean of means, by Student with Satterthwaite's degrees of freedom."""
    from scipy.stats import t

    if any(len(found) < 2 for found in values):
        return math.inf
    parts = [(statistics.variance(found) / len(found), len(found) - 1) for found in values]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0
    df = total**2 / sum(part**2 / free for part, free in parts)
    return float(t.ppf(0.975, df)) * math.sqrt(total) / len(values)
