"""What a chart says, in no language: the metadata every script is made from and every script is read back to."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass

from workbench.errors import InputError, unknown

LANGUAGES = ("python", "r", "latex")
KINDS = ("bar", "barh", "grouped", "line", "scatter", "pie")
COLOURS = {
    "blue": "#1f77b4",
    "orange": "#ff7f0e",
    "green": "#2ca02c",
    "red": "#d62728",
    "purple": "#9467bd",
    "brown": "#8c564b",
}
"""Name in a `ChartSpec` -> the colour itself, the same on paper in every language."""
LEGENDS = ("upper left", "upper right", "lower left", "lower right")
TOP = 10
"""Values are whole numbers 0..TOP, and so is every value axis."""
PIE_TOTAL = 20
"""The values of a pie sum to this: its picture shows nothing but shares."""

LABEL = re.compile(r"[A-Za-z0-9(][A-Za-z0-9 _%&#$()/.+\-]*")


@dataclass(frozen=True)
class Series:
    """One set of bars, one line, one cloud of points, or one slice of a pie.

    Attributes:
        name: in the legend, or beside the slice; "" where there is no legend.
        colour: of `COLOURS`.
        values: one for each category; of points the vertical coordinates; of a slice its one value.
        x: horizontal coordinates of points, else ().
    """

    name: str
    colour: str
    values: tuple[int, ...]
    x: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChartSpec:
    """One chart. Two specs are equal exactly if the charts are.

    Attributes:
        kind: of `KINDS`.
        title: above the chart.
        x_label, y_label: of the horizontal and the vertical axis; "" for a pie.
        categories: ticks of the bars or of the line's points; () for points and pies.
        series: one for bar and barh, two for grouped, one or two for line and scatter, the slices of a pie.
        legend: its corner, of `LEGENDS`, or "" for none. Two series have one; a pie has none.
        grid: whether grid lines are drawn; False for a pie.

    Raises:
        InputError: anything else, the attribute named.
    """

    kind: str
    title: str
    x_label: str
    y_label: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    legend: str = ""
    grid: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        if self.legend and self.legend not in LEGENDS:
            raise unknown("legend", self.legend, LEGENDS)
        for series in self.series:
            if series.colour not in COLOURS:
                raise unknown("colour", series.colour, COLOURS)
            if not all(isinstance(v, int) and 0 <= v <= TOP for v in (*series.values, *series.x)) and not self.pie:
                raise InputError(f"series values are {series.values} {series.x} but must be whole numbers 0..{TOP}")
        self._check_shape()
        self._check_labels()

    def _check_shape(self) -> None:
        allowed = {"bar": (1,), "barh": (1,), "grouped": (2,), "line": (1, 2), "scatter": (1, 2), "pie": range(2, 7)}
        if len(self.series) not in allowed[self.kind]:
            raise InputError(f"series has {len(self.series)} entries but a {self.kind} has {list(allowed[self.kind])}")
        points = self.kind == "scatter"
        for series in self.series:
            n = 1 if self.pie else len(series.values) if points else len(self.categories)
            if len(series.values) != n or not n or len(series.x) != (n if points else 0):
                raise InputError(
                    f"series has {len(series.values)} values and {len(series.x)} x but a {self.kind} has one value for "
                    f"each of the {len(self.categories)} categories, points have as many x, and a slice has one value"
                )
        if (points or self.pie) and self.categories:
            raise InputError(f"categories is {self.categories} but must be () for a {self.kind}")
        if self.pie:
            values = [series.values[0] for series in self.series]
            if not all(isinstance(v, int) and v > 0 for v in values) or sum(values) != PIE_TOTAL:
                raise InputError(f"values of a pie are {values} but must be above 0 and sum to {PIE_TOTAL}")
            if self.legend or self.grid or self.x_label or self.y_label:
                raise InputError("a pie has no legend, grid, x_label or y_label")
        elif len(self.series) > 1 and not self.legend:
            raise InputError("legend is '' but two series need one")
        if len({series.colour for series in self.series}) < len(self.series):
            raise InputError("series must have different colours")

    def _check_labels(self) -> None:
        labels = {"title": (self.title,), "categories": self.categories}
        labels["series"] = tuple(series.name for series in self.series if series.name or self.legend or self.pie)
        if not self.pie:
            labels |= {"x_label": (self.x_label,), "y_label": (self.y_label,)}
            if not self.legend and any(series.name for series in self.series):
                raise InputError("series has a name but no legend to show it in")
        for name, texts in labels.items():
            for text in texts:
                if not LABEL.fullmatch(text) or text != text.strip():
                    raise InputError(f"{name} holds {text!r} but must match {LABEL.pattern} without spaces around")
            if len(set(texts)) < len(texts):
                raise InputError(f"{name} holds {texts} but must differ from each other")

    @property
    def pie(self) -> bool:
        return self.kind == "pie"

    def to_json(self) -> str:
        """The metadata as one line, every key always there."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ChartSpec":
        found = json.loads(text)
        series = tuple(Series(s["name"], s["colour"], tuple(s["values"]), tuple(s["x"])) for s in found.pop("series"))
        return cls(**found | {"series": series, "categories": tuple(found["categories"])})

    def facts(self) -> Counter:
        """Everything the chart says, one by one: what `score` compares."""
        plain = ("kind", "title", "x_label", "y_label", "legend", "grid")
        found = [(name, getattr(self, name)) for name in plain if getattr(self, name) not in ("", False)]
        found += [("category", i, text) for i, text in enumerate(self.categories)]
        for i, series in enumerate(self.series):
            found += [("colour", i, series.colour)] + ([("name", i, series.name)] if series.name else [])
            found += [("value", i, j, *point) for j, point in enumerate(_points(series))]
        return Counter(found)


def _points(series: Series) -> list[tuple[int, ...]]:
    return list(zip(series.values, series.x, strict=True)) if series.x else [(value,) for value in series.values]


def score(truth: ChartSpec, found: ChartSpec | None, part: str = "") -> float:
    """F1 of the facts of two charts, 0 where none was found.

    Args:
        part: only facts of this name, such as "value" or "colour"; default all. A chart of another kind has none of
            the values right.
    """
    if found is None:
        return 0.0
    a, b = truth.facts(), found.facts()
    if part:
        a, b = (Counter({fact: n for fact, n in facts.items() if fact[0] == part}) for facts in (a, b))
    if truth.kind != found.kind:
        b = Counter({(*fact, "of another kind") if fact[0] == "value" else fact: n for fact, n in b.items()})
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
