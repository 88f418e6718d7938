"""The loss of a run, its validation by domain or modality, and the numbers that drive it."""

from math import log
from typing import NamedTuple

import numpy as np

from workbench.figures import loss as figures
from workbench.live.records import AUX, BY_DOMAIN, GRAD_NORM, LEARNING_RATE, LOSS, VALIDATION
from workbench.live.views.bar import division_select
from workbench.live.views.card import Card
from workbench.live.views.readings import Nothing, Readings, present
from workbench.live.views.view import View

HOW = {
    "loss": "The thin line is the loss of every training batch, the thick one its running mean, the dark dots the "
    "validation loss on text the model does not train on. The dashed line is a model that has learned nothing and "
    "gives every byte the same probability. Triangles are commands that reached the trainer.",
    "valid": "The validation metric of every domain, or modality. They differ in how predictable they are, so compare "
    "one with itself over time or in another run, not with the others.",
    "lr": "The learning rate each step was made with: the schedule of the recipe, or what you set above. Too high and "
    "the loss jumps, too low and it crawls.",
    "grad_norm": "Length of the gradient over all parameters, before clipping. Spikes often come before a jump of the "
    "loss.",
    "aux": "The weighted balance losses that are added to the task loss. Large against the loss, they steer the router "
    "more than the task does.",
}
SCALARS = {
    "lr": (LEARNING_RATE, "Learning rate", "step size of the optimiser", "learning rate"),
    "grad_norm": (GRAD_NORM, "Gradient norm", "all parameters, before clipping", "norm"),
    "aux": (AUX, "Balance loss", "weighted sum over layers · 0 = none", None),
}
UNITS = {"bits_per_byte": "bits/byte", "accuracy": "share correct"}
UNIFORM = {"bits/byte": 8.0}  # the loss of a uniform guess


class Losses(NamedTuple):
    """Training loss, validation loss and commands of a run, in ``unit``; ``null`` is that of a uniform guess."""

    steps: np.ndarray
    train: np.ndarray
    valid: dict[str, tuple[np.ndarray, np.ndarray]]
    events: list[tuple[int, str]]
    unit: str
    null: float | None


class Validation(NamedTuple):
    """A validation metric: curves by domain, modality and "all", each (steps (V,), values (V,)), and their unit."""

    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    unit: str
    by: str = "domain"


class LossView(View):
    """Training and validation loss, validation by domain or modality, learning rate, gradient norm and balance loss."""

    title = "Loss"

    def make_cards(self) -> dict[str, Card]:
        self.controls = [division_select(self.selection)]
        return {
            "loss": Card("Loss", HOW["loss"], span=7, height=330),
            "valid": Card("Validation", HOW["valid"], span=5, height=330),
        } | {name: Card(SCALARS[name][1], HOW[name], span=4, height=232) for name in SCALARS}

    def draw(self, shown: list[Readings]) -> None:
        steps = self.stamps(lambda run: (run.last_step, run.status))
        self.put("loss", lambda: loss_contents(self), steps)
        self.put("valid", self._valid, self.stamps(self._evaluated), [run.status for run in shown])
        for name in SCALARS:
            self.put(name, lambda name=name: self._scalar(name), steps)

    def _evaluated(self, run: Readings) -> int:
        """The step of the newest evaluation, -1 before the first."""
        return max((int(steps[-1]) for steps, _ in validation(run).curves.values() if len(steps)), default=-1)

    def _valid(self) -> list:
        def read(run: Readings) -> Validation:
            curves, unit, _ = validation(run)
            if not curves:
                raise Nothing("no evaluation yet" if run.status.live else "this run was never evaluated")
            for by in (self.selection.division, BY_DOMAIN):
                if parts := {name: curves[name] for name in by.names(run.model) if name in curves}:
                    return Validation(parts, unit, by.name)
            return Validation({name: curve for name, curve in curves.items() if name != "all"} or curves, unit)

        found = self.read(read)
        units = {data.unit for data in present(found)}
        null = UNIFORM.get(units.pop()) if len(units) == 1 else None
        limits = figures.loss_limits(
            *(values for data in present(found) for _, values in data.curves.values()), null=null
        )
        return self.each(
            found,
            lambda run, data: figures.validation_curves(
                data.curves,
                unit=data.unit,
                null=null,
                title=f"Validation by {data.by}{self.suffix(run)}",
                limits=limits,
                **self.look,
            ),
        )

    def _scalar(self, name: str) -> list:
        record, title, subtitle, unit = SCALARS[name]

        def read(run: Readings) -> tuple[np.ndarray, np.ndarray]:
            steps, values = run.scalars(record.name())
            if not len(steps):
                raise Nothing(f"{title.lower()} is not recorded" if run.last_step >= 0 else "no step yet")
            return steps, values

        found = self.read(read)
        top = max([0.0, *(np.nanpercentile(values, 99.5) for _, values in present(found))]) or 1.0
        return self.each(
            found,
            lambda run, data: figures.scalar_line(
                *data,
                title=f"{title}{self.suffix(run)}",
                subtitle=subtitle,
                unit=unit or named(run, name, "balance loss"),
                limits=(0.0, 1.08 * float(top)),
                **self.look,
            ),
        )


def loss_contents(view: View) -> list:
    """Loss curves of every run on show, on one axis where the units agree."""
    found = view.read(losses)
    limits = {}
    for unit in {data.unit for data in present(found)}:
        same = [data for data in present(found) if data.unit == unit]
        curves = [curve for data in same for curve in (data.train, *(values for _, values in data.valid.values()))]
        limits[unit] = figures.loss_limits(*curves, null=next((data.null for data in same if data.null), None))
    return view.each(
        found,
        lambda run, data: figures.loss_curve(
            data.steps,
            data.train,
            valid=data.valid,
            events=data.events,
            unit=data.unit,
            null=data.null,
            title=f"Loss{view.suffix(run)}",
            limits=limits[data.unit],
            **view.look,
        ),
    )


def losses(run: Readings) -> Losses:
    """Training and overall validation loss of a run, in bits per byte where its tokens are bytes."""
    steps, train = run.scalars(LOSS.name())
    if not len(steps):
        raise Nothing("no training step yet" if run.status.live or run.last_step < 0 else "this run records no loss")
    unit, per_nat = _unit(run)
    found = validation(run)
    valid = {"all": found.curves["all"]} if found.unit == unit and "all" in found.curves else {}
    events = [(event.step, event.text) for kind in ("control", "phase") for event in run.events(kind)]
    return Losses(steps, train * per_nat, valid, events, unit, UNIFORM.get(unit))


def validation(run: Readings) -> Validation:
    """The validation metric of a run, overall ("all") and by domain or modality; a loss in the unit of training's."""
    names = [name for (name,) in run.series(VALIDATION)]
    if not names:
        return Validation({}, "")
    metric = names[0].split("/")[0]
    unit, per_nat = _unit(run) if metric == "loss" else (UNITS.get(metric, metric.replace("_", " ")), 1.0)
    curves = {}
    for name in names:
        kind, _, domain = name.partition("/")
        if kind == metric:
            steps, values = run.scalars(VALIDATION.name(name))
            curves[domain or "all"] = (steps, values * per_nat)
    return Validation(curves, unit)


def _unit(run: Readings) -> tuple[str, float]:
    """The unit a loss is shown in, and how many of it make a nat."""
    if run.model.get("vocabulary") == "bytes" and "loss" not in (run.meta.get("units") or {}):
        return "bits/byte", 1 / log(2)
    return named(run, "loss"), 1.0


def named(run: Readings, value: str, other: str | None = None) -> str:
    """The unit of a loss as it is recorded: what the script named, or where that is not known the kind of loss."""
    if (unit := (run.meta.get("units") or {}).get(value)) is not None:
        return str(unit)
    own = run.meta.get("kind") == "train"
    if own and run.arm is None:
        return "nats/token"
    return other or ("task loss" if own else "loss")  # studies have tasks of many kinds
