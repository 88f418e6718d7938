"""Singular spectra of weights, updates and gradients, their ranks over time, and the form of layers that changes."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import panel as pn
import torch

from workbench.figures import spectra as figures
from workbench.lib.measures.power_law import RELIABLE_FROM, fit_power_law
from workbench.lib.measures.random_matrix import marchenko_pastur_spectrum, null_measures, outliers
from workbench.lib.measures.spectra import SpectrumResult, measures
from workbench.live.records import LEARNING_RATE, SPECTRUM, Division
from workbench.live.views.bar import division_select, widget
from workbench.live.views.card import Card
from workbench.live.views.form import FormCards
from workbench.live.views.markup import Markup, html, table
from workbench.live.views.readings import Nothing, Readings, counterpart, present, stamped
from workbench.live.views.view import View

HOW = {
    "spectrum": "Singular values from the largest to the smallest, each divided by the largest, so that the shape "
    "stands free of the scale. The dashed curve is a random matrix of the same shape (Marchenko–Pastur): a weight that "
    "follows it has learned little, values above its bulk are learned directions. A gradient that falls fast moves the "
    "weights in few directions; that of one domain, or modality, is the gradient of its own loss. The dotted line is "
    "the weight at its first record.",
    "effective_rank": "exp of the entropy of the singular values, as a share of all n: how many directions carry "
    "weight, with the bulk counted in. Compare with the dashed line, a random matrix of the same shape, not with 1. Of "
    "a product of two factors (LoRA) it is a share of their rank r; one step's change of it has up to 2 r directions.",
    "stable_rank": "Energy divided by the energy of the strongest direction, as a share of n: it sees the top of the "
    "spectrum, and falls when one direction grows out. The dashed line is a random matrix of the same shape. The rank "
    "of a gradient is capped by the number of tokens in the batch.",
    "rms_norm": "The largest factor by which the matrix scales the root mean square of its input. Ranks are blind to "
    "scale, this is not. For training that transfers across widths it should stay of order 1: the band is half to "
    "twice the weight at its first record. An update is the change that one step really made, decay included.",
    "update_norm": "The RMS operator norm of one step's change, decay included, divided by the learning rate of that "
    "step: what the optimiser makes of a gradient, whatever the schedule. Under the spectral condition (muP) it is of "
    "order 1 in every layer, at every width and all the time. Muon++ holds it between 0.68 and 1.2; that of AdamW "
    "grows with the width and falls as gradients come to disagree. The band is half to twice its first record.",
    "numbers": "Everything at the step on show, with the value of a random matrix of the same shape as the null. The "
    "heavy-tail exponent α is given only from n = 128 up: below that even exact power laws scatter over the whole "
    "range of interest. D is the distance between tail and fit (0 perfect), m the number of values in the tail. "
    "Spikes are energies above the Marchenko–Pastur edge.",
}
ROOM = 18  # letters of a matrix's name beside the title of the smallest plots
ROWS = {
    "effective_rank": ("effective rank ÷ n", True),
    "stable_rank": ("stable rank ÷ n", True),
    "participation_ratio": ("participation ratio ÷ n", True),
    "energy_rank_90": ("90 % of energy in ÷ n", True),
    "spectral_norm": ("spectral norm σ₁", False),
    "rms_operator_norm": ("RMS operator norm", False),
}


class History(NamedTuple):
    """Records of one matrix: for each of weight, update, gradient (steps (S,), values (S, k)), and the shape (o, i).

    Of a product of two factors the values are all there are, the others being 0 (``low_rank``).
    """

    name: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    shape: tuple[int, int]
    low_rank: bool

    @property
    def n(self) -> int:
        """The shorter side."""
        return min(self.shape)

    @property
    def most(self) -> int:
        """The largest rank there can be: n, or the rank r of two factors."""
        return self.series["weight"][1].shape[-1] if self.low_rank and "weight" in self.series else self.n

    @property
    def newest(self) -> int:
        """The last step any of them was recorded at."""
        return max(int(steps[-1]) for steps, _ in self.series.values())

    def rows(self, step: int | None) -> dict[str, int]:
        """For each object the number of its records at or before ``step`` (None: all of them)."""
        return {
            kind: len(steps) if step is None else int(np.searchsorted(steps, step, side="right"))
            for kind, (steps, _) in self.series.items()
        }

    def at(self, step: int | None) -> dict[str, np.ndarray]:
        """The newest spectrum of each object at or before ``step``; objects without one are left out."""
        return {kind: self.series[kind][1][row - 1] for kind, row in self.rows(step).items() if row}

    def measure(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """One measure over time of each object; ranks as shares of the largest there can be."""
        scale = 1 if name in ("rms_operator_norm", "spectral_norm") else self.most
        return {
            kind: (steps, measures(self.result(values), self.shape)[name].numpy() / scale)
            for kind, (steps, values) in self.series.items()
        }

    def result(self, values: np.ndarray) -> SpectrumResult:
        """Recorded values (..., k) as a spectrum; what was left out of a partial one is not known."""
        tensor = torch.as_tensor(values).double()
        whole = self.low_rank or tensor.shape[-1] == self.n
        tail = torch.full(tensor.shape[:-1], 0.0 if whole else torch.nan, dtype=torch.float64)
        return SpectrumResult(tensor, tail, whole, "qr" if self.low_rank else "gram" if whole else "rsvd")


class SpectraView(View):
    """Spectra of a chosen matrix against a random one of its shape, its ranks and norm over time, and layers' forms."""

    title = "Spectra"

    def make_cards(self) -> dict[str, Card]:
        self.matrix = widget(pn.widgets.Select, 330, label="Matrix", options=[])
        self.matrix.param.watch(lambda _: self.refresh(), "value")
        self.form = FormCards(self)
        self.controls = [self.matrix, division_select(self.selection), *self.form.controls]
        return {
            "spectrum": Card("Singular spectrum", HOW["spectrum"], span=7, height=300),
            "numbers": Card("Measures at this step", HOW["numbers"], span=5, height=300),
            "effective_rank": Card("Effective rank", HOW["effective_rank"], span=3, height=262),
            "stable_rank": Card("Stable rank", HOW["stable_rank"], span=3, height=262),
            "rms_norm": Card("RMS operator norm", HOW["rms_norm"], span=3, height=262),
            "update_norm": Card("Size of a step", HOW["update_norm"], span=3, height=262),
            **self.form.cards,
        }

    def draw(self, shown: list[Readings]) -> None:
        known = list(shown[0].model.get("matrices") or {})
        if known and self.matrix.options != known:
            kept = self.matrix.value if self.matrix.value in known else known[0]
            self.matrix.param.update(options=known, value=kept)
        by = self.selection.division
        found = self.read(lambda run: history(run, counterpart(self.matrix.value, run.model.get("matrices") or {}), by))
        stamps = stamped(found, lambda data: data.newest)
        for rank in ("effective_rank", "stable_rank"):
            self.put(rank, lambda rank=rank: rank_contents(self, found, rank), stamps, self.matrix.value)
        self.put("rms_norm", lambda: self._norms(found), stamps, self.matrix.value)
        self.put("update_norm", lambda: self._steps(shown, found), stamps, self.matrix.value)
        step = self.selection.step
        rows = stamped(found, lambda data: data.rows(step))
        self.put("spectrum", lambda: self._spectra(found), rows, self.matrix.value)
        self.put("numbers", lambda: self.each(found, self._numbers), rows, self.matrix.value)
        self.form.draw(shown)

    def _spectra(self, found: list) -> list:
        now = [data if isinstance(data, Nothing) else data.at(self.selection.step) for data in found]
        everything = [values for spectra in present(now) for values in spectra.values()]
        floor = figures.spectrum_floor(*everything, *(_null_curve(data.shape) for data in present(found)))

        def build(run: Readings, data: History):
            spectra = data.at(self.selection.step)
            if not spectra:
                raise Nothing("no spectrum at or before this step: scrub forward")
            return figures.spectrum(
                spectra,
                n=data.n,
                null=_null_curve(data.shape),
                first=data.series["weight"][1][0] if "weight" in data.series else None,
                title=f"Singular spectrum, {data.name} {data.shape[0]} × {data.shape[1]}{self.suffix(run)}",
                floor=floor,
                theme=self.selection.theme,
            )

        return self.each(found, build)

    def _norms(self, found: list) -> list:
        lines = [data if isinstance(data, Nothing) else data.measure("rms_operator_norm") for data in found]
        finite = [v[np.isfinite(v) & (v > 0)] for line in present(lines) for _, v in line.values()]
        values = np.concatenate(finite) if finite else np.ones(1)
        limits = (float(values.min() / 1.6), float(values.max() * 2.6)) if len(values) else None

        def build(run: Readings, line: dict):
            start = line["weight"][1][0] if "weight" in line else np.nan
            return figures.rank_lines(
                line,
                measure="rms_norm",
                band=(0.5 * start, 2 * start) if np.isfinite(start) else None,
                title=f"RMS operator norm{self.suffix(run)}",
                limits=limits,
                **self.look,
            )

        return self.each(lines, build)

    def _steps(self, shown: list[Readings], found: list) -> list:
        lines = [
            data if isinstance(data, Nothing) else step_sizes(run, data) for run, data in zip(shown, found, strict=True)
        ]
        values = [v[np.isfinite(v)] for line in present(lines) for _, v in line.values()]
        values = np.concatenate(values) if values else np.empty(0)
        limits = (float(values.min() / 2.6), float(values.max() * 2.6)) if len(values) else None

        def build(run: Readings, line: dict):
            first = line["update"][1]
            first = first[np.isfinite(first)][:1]
            return figures.rank_lines(
                line,
                measure="update_norm",
                band=(0.5 * first[0], 2 * first[0]) if len(first) else None,
                title=f"{figures.MEASURES['update_norm'].title}{self.suffix(run)}",
                limits=limits,
                **self.look,
            )

        return self.each(lines, build)

    def _numbers(self, run: Readings, data: History) -> Markup:
        spectra = {kind: sigma for kind, sigma in data.at(self.selection.step).items() if kind in figures.OBJECTS}
        values = {kind: measures(data.result(sigma), data.shape) for kind, sigma in spectra.items()}
        null = {} if data.low_rank else null_measures(data.shape)
        letter = "r" if data.low_rank else "n"
        rows = []
        for name, (label, share) in ROWS.items():
            label, scale = (label.replace("÷ n", f"÷ {letter}"), data.most) if share else (label, 1)
            cells = [_number(float(value[name]) / scale) for value in values.values()]
            rows.append((label, *cells, _number(null[name] / scale) if name in null else "–"))
        if not data.low_rank:  # what follows is of spectra with a bulk
            full = {kind: torch.as_tensor(sigma) for kind, sigma in spectra.items() if len(sigma) == data.n}
            spikes = [_number(float(outliers(full[kind], data.shape))) if kind in full else "–" for kind in spectra]
            rows.append(("spikes beyond the edge", *spikes, "0"))
            rows.append(("heavy-tail exponent α", *(self._alpha(sigma, kind) for kind, sigma in spectra.items()), "–"))
        title = f"Measures at this step{self.suffix(run)}"
        return table(title, f"{data.name}, {letter} = {data.most}", ("", *spectra, "random"), rows)

    def _alpha(self, sigma: np.ndarray, kind: str) -> Markup:
        """The exponent with its error, D and m, where it may be read: not for small matrices, nor for one update."""
        if kind == "update" or len(sigma) < RELIABLE_FROM:
            reason = "not meant for a single update" if kind == "update" else f"not reliable below n = {RELIABLE_FROM}"
            return html('<span class="muted" title="{why}">–</span>', why=reason)
        fit = fit_power_law(torch.as_tensor(sigma).double().square())
        if fit.undefined_reason:
            return html('<span class="muted" title="{why}">–</span>', why=fit.undefined_reason)
        quality, found = f"D = {fit.distance:.3f}, m = {fit.m}", f"{fit.alpha:.2f} ± {fit.stderr:.2f}"
        return html('<span title="{quality}">{found}</span>', quality=quality, found=found)


def history(run: Readings, matrix: str | None, by: Division | None = None) -> History:
    """All spectra recorded of a matrix, of each domain's or modality's gradient too; ``Nothing`` without any."""
    shapes = run.model.get("matrices") or {}
    if matrix not in shapes:
        raise Nothing("this run records no spectra" if matrix is None else f"this run has no matrix {matrix}")
    series = {}
    for kind in figures.OBJECTS:
        if run.has(SPECTRUM.name(kind, matrix)):
            series[kind] = run.tensors(SPECTRUM.name(kind, matrix))
    if by is not None and run.has(by.gradients.name(matrix)):
        steps, values = run.tensors(by.gradients.name(matrix))
        series |= {f"gradient, {name}": (steps, values[:, i]) for i, name in enumerate(run.parts(by))}
    if not series:
        run.tensors(SPECTRUM.name("weight", matrix))  # raises the Nothing that says when one is due
    return History(matrix, series, tuple(shapes[matrix]), matrix in (run.model.get("low_rank") or ()))


def step_sizes(run: Readings, data: History) -> dict[str, tuple[np.ndarray, np.ndarray]] | Nothing:
    """RMS operator norm of the updates of a matrix over the learning rate of their steps; NaN where that is 0.

    The rate is the run's: a group of parameters with a rate of its own is off by a factor that stays.
    """
    if "update" not in data.series:
        return Nothing("this run records no updates of this matrix")
    at, rates = run.scalars(LEARNING_RATE.name())
    if not len(at):
        return Nothing("this run does not say its learning rate: hand it over, step(loss=..., lr=...)")
    steps, norms = data.measure("rms_operator_norm")["update"]
    rate = np.interp(steps, at, rates)  # of a long run not every step is read
    sizes = np.divide(norms, rate, out=np.full(len(steps), np.nan), where=rate > 0)
    return {"update": (steps, np.where(sizes > 0, sizes, np.nan))}


def rank_contents(view: View, found: list, measure: str) -> list:
    """A rank over time of every run on show, on shared axes, with the null of a random matrix."""
    lines = [
        data
        if isinstance(data, Nothing)
        else (data.measure(measure), None if data.low_rank else null_measures(data.shape)[measure] / data.n, data)
        for data in found
    ]
    tops = [
        np.nanmax([null or 0.0, *(np.nanmax(values, initial=0.0) for _, values in line.values())])
        for line, null, _ in present(lines)
    ]
    top = 1.08 * float(max([0.05, *tops]))
    return view.each(
        lines,
        lambda run, data: figures.rank_lines(
            data[0],
            measure=measure,
            null=data[1],
            of="r" if data[2].low_rank else "n",
            title=f"{figures.MEASURES[measure].title}{_of(data[2].name)}{view.suffix(run)}",
            limits=(0.0, top),
            **view.look,
        ),
    )


def _of(name: str) -> str:
    """What names a matrix in the title of a small plot: its end, where there is no room for the whole."""
    return f", {name}" if len(name) <= ROOM else f", …{name[-ROOM:].partition('.')[2] or name[-ROOM:]}"


@lru_cache(maxsize=64)
def _null_curve(shape: tuple[int, int]) -> np.ndarray:
    return marchenko_pastur_spectrum(shape).numpy()


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3g}"
