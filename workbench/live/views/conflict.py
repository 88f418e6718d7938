"""Gradient conflict between domains or modalities, per parameter group, with its noise band; and between experts."""

from typing import NamedTuple

import numpy as np
import panel as pn
import torch

from workbench.figures import conflict as figures
from workbench.lib.measures.conflict import ConflictStats, conflict_stats
from workbench.live.records import DIVISIONS, Division
from workbench.live.views.bar import division_select, widget
from workbench.live.views.card import Card
from workbench.live.views.parting import PartingCards
from workbench.live.views.readings import Nothing, Readings, counterpart, present, stamped
from workbench.live.views.view import View

KINDS = {"raw cosine": "raw", "noise-corrected": "noise-corrected"}

HOW = {
    "groups": "One row per parameter group, one column per pair of domains, or of modalities: orange means that a step "
    "that helps one hurts the other. The loss of a modality is that of its own tokens, in batches of all. Grey is "
    "undefined: no gradient reached the group for one of the two, or (noise-corrected) the signal is below its noise. "
    "Click a row to choose the group.",
    "cosine": "The cosine between the mean gradients of two domains, or modalities, in the chosen group. Minibatch "
    "noise pulls raw cosines to 0; the corrected ones divide it out with two independent half batches, may leave "
    "−1 … 1, and are grey where the half batches do not agree. Cells marked ~0 lie inside ±1/√P, the size of a cosine "
    "between random directions in P dimensions: orthogonal, not in conflict.",
    "self": "The cosine between the gradients of two half batches of one domain, or modality. Near 1 the gradient is "
    "mostly signal, near 0 mostly noise: then read the raw cosines with care.",
    "rate": "Share of the pairs with a negative cosine. Half of all pairs is what random signs give: a rate "
    "of 0.5 with cosines inside the noise band means orthogonal, not half in conflict. The chosen group is thick.",
    "worst": "The largest negative cosine over all pairs (above 0: some pair conflicts). It grows with the "
    "number of domains, or modalities, so compare only runs with equally many. The grey band is ±1/√P of the chosen "
    "group.",
}


class Conflicts(NamedTuple):
    """Records of all groups: names of the parts, steps (S,), Gramians (S, 3, n, n), number of parameters by group."""

    parts: list[str]
    steps: np.ndarray
    gramians: dict[str, np.ndarray]
    sizes: dict[str, int | None]

    def stats(self, group: str) -> ConflictStats:
        """Conflict measures of one group over time."""
        return conflict_stats(torch.as_tensor(self.gramians[group]), self.sizes[group])

    def row(self, step: int | None) -> int:
        """The newest record at or before ``step``; ``Nothing`` before the first."""
        row = len(self.steps) if step is None else int(np.searchsorted(self.steps, step, side="right"))
        if not row:
            raise Nothing("no conflict record at or before this step: scrub forward")
        return row - 1


class ConflictView(View):
    """Cosines of the gradients of domains or modalities in every parameter group, and of experts that share any."""

    title = "Conflict"

    def make_cards(self) -> dict[str, Card]:
        self.group = widget(pn.widgets.Select, 260, label="Group", options=[])
        self.kind = widget(pn.widgets.RadioButtonGroup, 250, options=KINDS)
        for control in (self.group, self.kind):
            control.param.watch(lambda _: self.refresh(), "value")
        self.parting = PartingCards(self)
        self.controls = [self.group, self.kind, division_select(self.selection), self.parting.layer]
        return {
            "groups": Card("Conflict by group", HOW["groups"], span=5, height=290, on_click=self._row_clicked),
            "cosine": Card("Gradient cosine", HOW["cosine"], span=4, height=290),
            "self": Card("Signal and noise", HOW["self"], span=3, height=290),
            "rate": Card("Conflict rate", HOW["rate"], span=6, height=270),
            "worst": Card("Worst conflict", HOW["worst"], span=6, height=270),
            **self.parting.cards,
        }

    def _row_clicked(self, point: dict) -> None:
        self.group.value = self.group.options[round(point["y"])]

    def draw(self, shown: list[Readings]) -> None:
        known = list(shown[0].model.get("groups") or {})
        if known and self.group.options != known:
            kept = self.group.value if self.group.value in known else known[0]
            self.group.param.update(options=known, value=kept)
        by = self.selection.division
        found = self.read(lambda run: conflicts(run, by))
        group, kind = self.group.value, self.kind.value
        newest = stamped(found, lambda data: int(data.steps[-1]))
        here = rows(found, self.selection.step)
        self.put("rate", lambda: self._lines(found, "rate"), newest, group)
        self.put("worst", lambda: self._lines(found, "max_negative"), newest, group)
        self.put("groups", lambda: group_contents(self, found, kind, group), here, kind, group)
        self.put("cosine", lambda: self.each(found, self._cosine), here, kind, group)
        self.put("self", lambda: self.each(found, self._self), here, group)
        self.parting.draw()

    def _cosine(self, run: Readings, data: Conflicts):
        group = counterpart(self.group.value, data.gramians)
        stats = data.stats(group)
        matrix = stats.cosine if self.kind.value == "raw" else stats.corrected
        return figures.cosine_matrix(
            matrix[data.row(self.selection.step)].numpy(),
            data.parts,
            band=stats.band,
            title=f"Gradient cosine, {group}{self.suffix(run)}",
            kind=self.kind.value,
            theme=self.selection.theme,
        )

    def _self(self, run: Readings, data: Conflicts):
        group = counterpart(self.group.value, data.gramians)
        stats = data.stats(group)
        return figures.self_cosines(
            stats.self_cosine[data.row(self.selection.step)].numpy(),
            data.parts,
            band=stats.band,
            title=f"Is there a signal in {group}?{self.suffix(run)}",
            theme=self.selection.theme,
        )

    def _lines(self, found: list, measure: str) -> list:
        field, title = {"rate": ("rate", "Conflict rate"), "max_negative": ("max_neg", "Worst conflict")}[measure]

        def lines(data: Conflicts) -> dict[str, np.ndarray]:
            return {group: getattr(data.stats(group), field).numpy() for group in data.gramians}

        values = np.concatenate([[-0.05, 0.05], *(line for data in present(found) for line in lines(data).values())])
        return self.each(
            found,
            lambda run, data: figures.conflict_lines(
                data.steps,
                lines(data),
                measure=measure,
                band=data.stats(counterpart(self.group.value, data.gramians)).band,
                selected=counterpart(self.group.value, data.gramians),
                limits=(float(np.nanmin(values)) - 0.05, float(np.nanmax(values)) + 0.05),
                title=f"{title}{self.suffix(run)}",
                **self.look,
            ),
        )


def conflicts(run: Readings, by: Division) -> Conflicts:
    """All conflict records of a run between its domains or modalities; ``Nothing`` where there are none."""
    sizes, parts = run.model.get("groups") or {}, list(by.names(run.model))
    if len(parts) < 2:
        raise Nothing(f"conflict needs at least two {by.parts}; this run has " + ("one" if parts else "none"))
    if not sizes:
        raise Nothing("this run names no parameter groups")
    if not any(run.has(by.conflict.name(group)) for group in sizes):
        others = (other for other in DIVISIONS.values() if other is not by)
        if any(run.has(other.conflict.name(group)) for other in others for group in sizes):
            raise Nothing(f"the task of this run tells no loss of each {by.name}, so there are no gradients to compare")
    recorded = [group for group in sizes if run.has(by.conflict.name(group))] or list(sizes)
    series = {group: run.tensors(by.conflict.name(group)) for group in recorded}
    rows = min(len(steps) for steps, _ in series.values())
    steps = next(iter(series.values()))[0][-rows:]
    return Conflicts(parts, steps, {group: values[-rows:] for group, (_, values) in series.items()}, dict(sizes))


def rows(found: list, step: int | None) -> tuple:
    """Which record of each run is the one on show, or why there is none."""
    last = np.inf if step is None else step
    return stamped(found, lambda data: int((data.steps <= last).sum()))


def group_contents(view: View, found: list, kind: str, selected: str | None) -> list:
    """Cosines of all groups at the step on show, for every run."""

    def build(run: Readings, data: Conflicts):
        row, n = data.row(view.selection.step), len(data.parts)
        upper = np.triu_indices(n, 1)
        groups = list(data.gramians)
        stats = [conflict_stats(torch.as_tensor(data.gramians[group][row])) for group in groups]
        matrices = [s.cosine if kind == "raw" else s.corrected for s in stats]
        return figures.group_cosines(
            np.stack([matrix.numpy()[upper] for matrix in matrices]),
            groups,
            [f"{data.parts[i]} – {data.parts[j]}" for i, j in zip(*upper, strict=True)],
            title=f"Gradient conflict by group{view.suffix(run)}",
            kind=kind,
            selected=None if selected is None else groups.index(counterpart(selected, groups)),
            theme=view.selection.theme,
        )

    return view.each(found, build)
