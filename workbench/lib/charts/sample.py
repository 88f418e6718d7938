"""Charts of real data: group means, rows and shares of scikit-learn's iris, wine and diabetes tables."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from workbench.errors import InputError, unknown
from workbench.lib.charts.spec import COLOURS, KINDS, LEGENDS, PIE_TOTAL, TOP, ChartSpec, Series

PIE_ROWS, MEAN_ROWS = 24, 3
"""Rows of a table behind a pie, and behind one group mean: few, so that the same numbers rarely come twice."""


@cache
def tables() -> dict[str, tuple[np.ndarray, list[str], np.ndarray, list[str]]]:
    """name -> (values (rows, features), feature names, class of each row, class names; of diabetes quarters of bmi)."""
    from sklearn.datasets import load_diabetes, load_iris, load_wine

    iris, wine, diabetes = load_iris(), load_wine(), load_diabetes(scaled=False)
    values = np.column_stack([diabetes.data, diabetes.target])
    quarter = np.searchsorted(np.quantile(values[:, 2], [0.25, 0.5, 0.75]), values[:, 2])
    short = [name.removesuffix(" (cm)") for name in iris.feature_names]
    return {
        "iris": (iris.data, short, iris.target, iris.target_names.tolist()),
        "wine": (wine.data, list(wine.feature_names), wine.target, wine.target_names.tolist()),
        "diabetes": (values, [*diabetes.feature_names, "progression"], quarter, ["Q1", "Q2", "Q3", "Q4"]),
    }


def sample_specs(n: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[ChartSpec]:
    """n charts, no two the same, of real numbers brought to whole steps 0..10; chart i depends on seed and i alone."""
    if n < 1:
        raise InputError(f"n is {n} but must be at least 1")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
    found: dict[ChartSpec, None] = {}
    i = 0
    while len(found) < n:
        found.setdefault(_sample(np.random.default_rng((seed, i)), kinds))
        i += 1
        if i > 100 * n + 1000:
            raise InputError(f"n is {n} but there are no more than {len(found)} different charts of {list(kinds)} here")
    return list(found)


def _sample(rng: np.random.Generator, kinds: Sequence[str]) -> ChartSpec:
    kind = str(rng.choice(list(kinds)))
    table = str(rng.choice(list(tables())))
    values, features, classes, names = tables()[table]
    columns = rng.choice(len(features), 2, replace=False)
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    two = kind == "grouped" or (kind in ("line", "scatter") and rng.random() < 0.5)
    legend = str(rng.choice(LEGENDS)) if two or (kind != "pie" and rng.random() < 0.3) else ""
    grid = bool(kind != "pie" and rng.random() < 0.4)
    if kind == "pie":
        rows = rng.choice(len(values), PIE_ROWS, replace=False)
        counts = np.bincount(classes[rows], minlength=len(names))
        if counts.min() == 0:
            counts = np.bincount(classes, minlength=len(names))
        slices = zip(names, colours, _shares(counts), strict=False)
        return ChartSpec(kind, table, "", "", (), tuple(Series(n, c, (v,)) for n, c, v in slices))
    if kind == "scatter":
        count, named = int(rng.integers(3, 6)), (names if legend else [""])
        which = rng.choice(len(names), 2 if two else 1, replace=False)
        series = []
        for i, k in enumerate(which):
            rows = rng.choice(np.flatnonzero(classes == k) if legend else len(values), count, replace=False)
            x, y = (_steps(values[rows, column], values[:, column]) for column in columns)
            series.append(Series(named[k] if legend else "", colours[i], y, x))
        labels = [features[column] for column in columns]
        return ChartSpec(kind, table, labels[0], labels[1], (), tuple(series), legend, grid)
    used = columns if two else columns[:1]
    series = []
    for i, column in enumerate(used):
        groups = [values[rng.choice(np.flatnonzero(classes == k), MEAN_ROWS), column].mean() for k in range(len(names))]
        series.append(Series(features[column] if legend else "", colours[i], _steps(groups, values[:, column])))
    group = "class" if table != "diabetes" else "bmi"
    value = "mean" if two else features[columns[0]]
    labels = (value, group) if kind == "barh" else (group, value)
    return ChartSpec(kind, table, *labels, tuple(names), tuple(series), legend, grid)


def _steps(values: Sequence[float] | np.ndarray, column: np.ndarray) -> tuple[int, ...]:
    """Whole steps: 0 is the column's 2nd percentile, TOP its 98th."""
    low, high = np.quantile(column, [0.02, 0.98])
    scaled = np.rint(TOP * (np.asarray(values) - low) / (high - low))
    return tuple(int(v) for v in scaled.clip(0, TOP))


def _shares(counts: np.ndarray) -> list[int]:
    """Whole parts of PIE_TOTAL, each at least 1, by largest remainders."""
    exact = 1 + (PIE_TOTAL - len(counts)) * counts / counts.sum()
    parts = np.floor(exact).astype(int)
    for i in np.argsort(parts - exact, kind="stable")[: PIE_TOTAL - parts.sum()]:
        parts[i] += 1
    return parts.tolist()
