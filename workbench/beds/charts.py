"""Pictures of charts of real data, and the scripts in three languages that draw them, written as tokens.

A picture has 64 x 64 pixels. A script is cut into parts that joined are the script again; its first token names the
language. Beside the languages there is a chart's metadata as one line of JSON, which is none of them. `chart_to_code`
has a model.

Tensor letters: B batch, T time.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.charts import LANGUAGES, ChartSpec, parse, render, run_python, sample_specs, score
from workbench.lib.charts.dataset import build_aligned_dataset
from workbench.lib.charts.grammar import ScriptError
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of

PAD, END = 0, 1
START = {"python": 2, "r": 3, "latex": 4, "json": 5}
UNKNOWN = 6
VIEWS = (*LANGUAGES, "json")
PIECES = re.compile(
    r"^(?:import [^\n]*|fig, [^\n]*|png\([^\n]*|dev\.[^\n]*|\\usepackage[^\n]*|\\documentclass[^\n]*"
    r"|\\(?:begin|end)\{(?:document|tikzpicture)\})\n|\"[^\"\n]*\"|\\definecolor\{|\}\{RGB\}|\{\d+,\d+,\d+\}"
    r"|\{[^{}\n]*[A-Za-z][^{}\n]*\}|-?\d+(?:\.\d+)?|, |\n|[^\"{},\d\n]+|.",
    re.M,
)
"""Splits a script so that the parts joined are the script again; lines that never change are one part."""


def written(spec: ChartSpec, view: str) -> str:
    """The script, or the metadata as a list in JSON."""
    if view != "json":
        return render(spec, view)
    series = [[s.name, s.colour, s.values, s.x] for s in spec.series]
    return json.dumps(
        [spec.kind, spec.title, spec.x_label, spec.y_label, spec.legend, spec.grid, spec.categories, series]
    )


@cache
def vocabulary() -> dict[str, int]:
    """Part -> id, of 3000 charts of which none is drawn."""
    parts = {
        part for spec in sample_specs(3000, 10**6) for view in VIEWS for part in PIECES.findall(written(spec, view))
    }
    return {part: i + UNKNOWN + 1 for i, part in enumerate(sorted(parts))}


def encode(text: str, view: str) -> list[int]:
    known = vocabulary()
    return [START[view], *(known.get(part, UNKNOWN) for part in PIECES.findall(text)), END]


def decode(ids: Sequence[int]) -> str:
    """The script of the ids up to END; specials stand for nothing."""
    names = {i: part for part, i in vocabulary().items()}
    ids = list(ids)
    return "".join(names.get(i, "") for i in (ids[: ids.index(END)] if END in ids else ids))


@dataclass(frozen=True)
class Pictured(Batch):
    """inputs: pictures (B, 3, 64, 64); targets: tokens (B, T + 1) with START; domain: language (B,); chart (B,)."""

    chart: Tensor

    def to(self, device: torch.device) -> "Pictured":
        return Pictured(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.chart)))


class ChartScripts:
    """Scripts of pictures; metric: nats per token (what is written freely is judged by `write`).

    Args:
        charts: how many are drawn; the last `held_out` are kept for the validation split.
        views: languages, or ("json",).
        aligned: whether each chart comes in every language. Otherwise chart i comes in language i modulo their number.
        train_charts: how many of the charts to train on; default all.
    """

    metric, unit, higher_is_better = "loss", "nats", False
    name = "chart-scripts"

    def __init__(
        self,
        charts: int,
        views: Sequence[str] = LANGUAGES,
        aligned: bool = True,
        train_charts: int | None = None,
        held_out: int = 40,
    ):
        for view in views:
            if view not in VIEWS:
                raise unknown("view", view, VIEWS)
        n = charts - held_out
        train_charts = n if train_charts is None else train_charts
        if not 1 <= train_charts <= n:
            raise InputError(f"train_charts is {train_charts} but must be between 1 and charts - {held_out} = {n}")
        self.data, self.domains, self.aligned = build_aligned_dataset(charts), tuple(views), aligned
        self.rows = {"train": (0, train_charts), "validation": (n, charts)}
        self.manifest = {"charts": charts, "views": list(views), "aligned": aligned, "train": train_charts}
        self.tokens = [[encode(written(spec, view), view) for spec in self.data.specs] for view in views]

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Pictured:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        low, high = self._split(split)
        chart = torch.randint(low, high, (size,), generator=generator)
        view = torch.arange(size) % len(self.domains) if domain is None else torch.full((size,), domain)
        if not self.aligned and domain is None:
            view = chart % len(self.domains)
        return self._collate(chart, view)

    def batches(self, split: str, size: int) -> Iterator[Pictured]:
        low, high = self._split(split)
        for view in range(len(self.domains)):
            for chart in torch.arange(low, high).split(size):
                yield self._collate(chart, torch.full_like(chart, view))

    def loss(self, model: nn.Module, batch: Pictured) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        logits = model(batch.inputs, batch.targets[:, :-1], batch.domain, context)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten(), ignore_index=PAD), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        values = {}
        with evaluating(model):
            for batch in self.batches(split, len(self.data.specs)):
                values[f"loss/{self.domains[int(batch.domain[0])]}"] = self.loss(model, batch)[0].item()
        return {"loss": fmean(values.values())} | values

    def write(self, model: nn.Module, split: str = "validation") -> dict[str, list[tuple[ChartSpec, ChartSpec | None]]]:
        """Language -> (the chart, the chart that the written script draws or None) for each chart of the split."""
        low, high = self._split(split)
        truth, found = self.data.specs[low:high], {}
        with evaluating(model):
            for i, view in enumerate(self.domains):
                start = torch.full((high - low,), START[view])
                ids = model.generate(self.data.images[low:high], start, torch.full((high - low,), i))
                found[view] = list(zip(truth, read([decode(row) for row in ids.tolist()], view), strict=True))
        return found

    def _split(self, split: str) -> tuple[int, int]:
        if split not in self.rows:
            raise unknown("split", split, self.rows)
        return self.rows[split]

    def _collate(self, chart: Tensor, view: Tensor, blank: bool = False) -> Pictured:
        rows = [self.tokens[v][c] for v, c in zip(view.tolist(), chart.tolist(), strict=True)]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        images = self.data.images[chart]
        return Pictured(images.new_zeros(images.shape) if blank else images, padded, view, chart)


class Apart(ChartScripts):
    """What the base learns from: batches of metadata with their pictures, and of scripts with a blank one, in turns."""

    name = "charts-apart"

    def __init__(self, charts: int):
        super().__init__(charts, VIEWS)

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Pictured:
        last = VIEWS.index("json")
        if domain is None and torch.rand((), generator=generator) < 0.5:
            domain = last
        batch = super().batch(split, size, generator, domain)
        if domain == last:
            return batch
        return self._collate(batch.chart, batch.domain % last, blank=True)


def read(scripts: Sequence[str], language: str) -> list[ChartSpec | None]:
    """What scripts draw: Python is run and its figure read, R and LaTeX are parsed strictly; None where that fails."""
    if language == "python":
        return [None if drawing.error else drawing.spec for drawing in run_python(scripts, timeout=10.0)]
    found: list[ChartSpec | None] = []
    for script in scripts:
        try:
            found.append(parse(script, language))
        except ScriptError:
            found.append(None)
    return found


def measures(written_charts: Mapping[str, Sequence[tuple[ChartSpec, ChartSpec | None]]]) -> dict[str, Any]:
    """Per language: share that draws a chart, F1 of all facts, of the values, of the colours; and the mean F1."""
    by = {
        name: {language: fmean(value(*pair) for pair in pairs) for language, pairs in written_charts.items()}
        for name, value in {
            "executes": lambda truth, found: float(found is not None),
            "f1": score,
            "value_f1": lambda truth, found: score(truth, found, "value"),
            "colour_f1": lambda truth, found: score(truth, found, "colour"),
        }.items()
    }
    return {"mean_f1": fmean(by["f1"].values())} | by
