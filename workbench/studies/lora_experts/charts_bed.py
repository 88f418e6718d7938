"""A small chart-to-code model and its data; the bed of CharLuMA.

A picture of 64 x 64 pixels becomes 16 tokens (a small convolutional encoder), the projector brings them to the width of
a decoder, and that writes the script in the language its first token names. The base has learned two things apart: to
write a chart's metadata as one line of JSON, which is none of the three languages, and, as any model of code has, what
scripts look like, beside a blank picture. Its encoder stays frozen from then on.

Tensor letters: B batch, T time, D width.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block
from workbench.lib.core.pretrained import pretrained
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of
from workbench.lib.core.train import State, TrainConfig, train

WIDTH, PREFIX, LONGEST = 64, 16, 144
VALIDATION = 40
"""Held-out charts: the last ones."""
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


class ChartToCode(nn.Module):
    """Encoder, projector, decoder.

    Attributes:
        tell: a context for the projector's forward, given the language of each row (B,).
    """

    tell: Callable[[Tensor], AbstractContextManager] | None = None

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 48, 3, 2, 1), nn.GELU(), nn.Conv2d(48, WIDTH, 3, 2, 1)
        )
        self.projector = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.decoder = nn.ModuleDict(
            {
                "embedding": nn.Embedding(len(vocabulary()) + UNKNOWN + 1, WIDTH),
                "position": nn.Embedding(PREFIX + LONGEST, WIDTH),
                "blocks": nn.ModuleList(
                    Block(WIDTH, GLU(WIDTH, 2 * WIDTH), Attention(WIDTH, 4, causal=True)) for _ in range(2)
                ),
                "norm": nn.RMSNorm(WIDTH),
            }
        )
        for name in ("embedding", "position"):
            nn.init.normal_(self.decoder[name].weight, std=WIDTH**-0.5)

    def image_tokens(self, images: Tensor, language: Tensor) -> Tensor:
        """(B, 16, D) of pictures (B, 3, 64, 64) in 0..255."""
        h = self.encoder(images.float() / 127.5 - 1).flatten(2).transpose(1, 2)
        with self.tell(language) if self.tell else nullcontext():
            return self.projector(h)

    def forward(self, images: Tensor, tokens: Tensor, language: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, V) logits of what follows each of the tokens (B, T)."""
        parts = self.decoder
        x = torch.cat([self.image_tokens(images, language), parts["embedding"](tokens)], 1)
        x = x + parts["position"].weight[: x.shape[1]]
        for block in parts["blocks"]:
            x = block(x, context or Context())
        return self._logits(x[:, PREFIX:])

    @torch.no_grad()
    def generate(self, images: Tensor, start: Tensor, language: Tensor) -> Tensor:
        """(B, at most LONGEST) the likeliest token each time, after the first ones start (B,)."""
        parts, kept = self.decoder, [None] * 2
        x = torch.cat([self.image_tokens(images, language), parts["embedding"](start)[:, None]], 1)
        at, found = 0, []
        done = torch.zeros_like(start, dtype=torch.bool)
        while at + x.shape[1] <= PREFIX + LONGEST and not done.all():
            x = x + parts["position"].weight[at : at + x.shape[1]]
            at += x.shape[1]
            for i, block in enumerate(parts["blocks"]):
                q, k, v = block.attention.heads(block.attention_norm(x))
                if kept[i] is not None:
                    k, v = torch.cat([kept[i][0], k], 2), torch.cat([kept[i][1], v], 2)
                kept[i] = k, v
                y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
                x = x + block.attention.out(y.transpose(1, 2).flatten(2))
                x = x + block.ffn(block.ffn_norm(x), Context())
            token = self._logits(x[:, -1]).argmax(-1).masked_fill(done, PAD)
            found.append(token)
            done |= token == END
            x = parts["embedding"](token)[:, None]
        return torch.stack(found, 1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.decoder["norm"](x) @ self.decoder["embedding"].weight.T


@dataclass(frozen=True)
class Pictured(Batch):
    """inputs: pictures (B, 3, 64, 64); targets: tokens (B, T + 1) with START; domain: language (B,); chart (B,)."""

    chart: Tensor

    def to(self, device: torch.device) -> "Pictured":
        return Pictured(*(part.to(device) for part in (self.inputs, self.targets, self.domain, self.chart)))


class ChartScripts:
    """Scripts of pictures; metric: nats per token (what is written freely is judged by `write`).

    Args:
        charts: how many are drawn; the last `VALIDATION` are held out.
        views: languages, or ("json",).
        aligned: whether each chart comes in every language. Otherwise chart i comes in language i modulo their number.
        train_charts: how many of the charts to train on; default all.
    """

    metric, unit, higher_is_better = "loss", "nats", False
    name = "chart-scripts"

    def __init__(
        self, charts: int, views: Sequence[str] = LANGUAGES, aligned: bool = True, train_charts: int | None = None
    ):
        for view in views:
            if view not in VIEWS:
                raise unknown("view", view, VIEWS)
        n = charts - VALIDATION
        train_charts = n if train_charts is None else train_charts
        if not 1 <= train_charts <= n:
            raise InputError(f"train_charts is {train_charts} but must be between 1 and charts - {VALIDATION} = {n}")
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

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        training, values = model.training, {}
        model.eval()
        for batch in self.batches(split, VALIDATION):
            values[f"loss/{self.domains[int(batch.domain[0])]}"] = self.loss(model, batch)[0].item()
        model.train(training)
        return {"loss": fmean(values.values())} | values

    def write(self, model: nn.Module, split: str = "validation") -> dict[str, list[tuple[ChartSpec, ChartSpec | None]]]:
        """Language -> (the chart, the chart that the written script draws or None) for each chart of the split."""
        low, high = self._split(split)
        truth, found = self.data.specs[low:high], {}
        training = model.training
        model.eval()
        for i, view in enumerate(self.domains):
            start = torch.full((high - low,), START[view])
            ids = model.generate(self.data.images[low:high], start, torch.full((high - low,), i))
            found[view] = list(zip(truth, read([decode(row) for row in ids.tolist()], view), strict=True))
        model.train(training)
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


def base(settings: Mapping[str, Any]) -> ChartToCode:
    """The model that reads pictures and knows the languages, not both at once: trained once, then from the cache."""
    task = Apart(settings["charts"])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return ChartToCode()

    def teach(model: nn.Module) -> State:
        return train(model, task, TrainConfig(settings["base_steps"], settings["base_batch"], weight_decay=0.01))

    recipe = {
        "steps": settings["base_steps"],
        "batch": settings["base_batch"],
        "data": task.manifest,
        "task": task.name,
    }
    return pretrained("charts-base", recipe, build, teach, [sys.modules[__name__]])
