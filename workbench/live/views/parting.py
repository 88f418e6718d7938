"""Experts that share parameters: where their gradients conflict, what they share, and whether one follows the other.

For layers that tell, as their form, the tables "cosine" and "overlap" of their experts, such as CDSP-MoE's.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from workbench.figures import conflict as figures
from workbench.live.records import FORM, FORM_TABLE
from workbench.live.views.bar import layer_select
from workbench.live.views.card import Card
from workbench.live.views.readings import Nothing, Readings, stamped

if TYPE_CHECKING:
    from workbench.live.views.view import View

TABLES = ("cosine", "overlap")
LINES = ("overlap in conflict", "overlap in agreement", "link in conflict", "link in agreement")

HOW = {
    "experts": "The cosine between the gradients of two experts on the parameters that both have, of the step before. "
    "Orange: they pull what they share in opposite directions, and their link is penalised. Grey: they share nothing, "
    "or one of them had no token.",
    "shared": "The share of an expert's parameters that another one has as well, at the same step. If conflict parts "
    "experts, what is orange on the left grows pale here as training goes on: scrub to see it, or not.",
    "parted": "Means over the pairs of experts in conflict (orange) and those that agree (blue) at each record: what "
    "they share (solid), and the strength of their links (dotted). If the conflict decides, the orange lines come to "
    "lie below the blue ones. Pairs that share nothing have no cosine and are in neither.",
}


class Pairs(NamedTuple):
    """Records of one layer: steps (S,) and tables (S, E, E) by name, and lines by name."""

    layer: str
    steps: np.ndarray
    tables: dict[str, np.ndarray]
    lines: dict[str, tuple[np.ndarray, np.ndarray]]

    def row(self, step: int | None) -> int:
        """The newest record at or before ``step``."""
        row = len(self.steps) if step is None else int(np.searchsorted(self.steps, step, side="right"))
        if not row:
            raise Nothing("nothing was recorded up to this step: scrub forward")
        return row - 1


class PartingCards:
    """Three cards; hidden where no run on show has such a layer."""

    def __init__(self, view: "View"):
        self.view = view
        self.layer = layer_select(view.selection)
        self.cards = {
            "experts": Card("Experts in conflict", HOW["experts"], span=4, height=300),
            "shared": Card("What experts share", HOW["shared"], span=3, height=300),
            "parted": Card("Is what conflicts parted?", HOW["parted"], span=5, height=300),
        }

    def draw(self) -> None:
        """Fill the cards for the runs on show."""
        view = self.view
        found = view.read(self._pairs)
        self.layer.visible = any(not isinstance(data, Nothing) for data in found)
        for card in self.cards.values():
            card.visible = self.layer.visible
        step = view.selection.step
        here = stamped(found, lambda data: int((data.steps <= (np.inf if step is None else step)).sum()))
        newest = stamped(found, lambda data: int(data.steps[-1]))
        view.put("experts", lambda: view.each(found, self._cosines), here)
        view.put("shared", lambda: view.each(found, self._overlaps), here)
        view.put("parted", lambda: view.each(found, self._lines), newest)

    def _pairs(self, run: Readings) -> Pairs:
        forms = run.model.get("forms") or {}
        if not run.layers or not set(TABLES) <= set(forms.get(layer := run.layer(self.view.selection.layer).name, {})):
            raise Nothing("no experts of this layer share parameters")
        found = {what: run.tensors(FORM_TABLE.name(layer, what)) for what in TABLES}
        lines = {what: run.scalars(FORM.name(layer, what), needed=True) for what in LINES if what in forms[layer]}
        return Pairs(layer, found["cosine"][0], {what: values for what, (_, values) in found.items()}, lines)

    def _cosines(self, run: Readings, data: Pairs):
        matrix = data.tables["cosine"][data.row(self.view.selection.step)]
        if np.isnan(matrix[~np.eye(len(matrix), dtype=bool)]).all():
            raise Nothing("at this step no two experts that had tokens share a parameter")
        title = f"Gradient cosine, {data.layer}{self.view.suffix(run)}"
        return figures.expert_cosines(matrix, theme=self.view.selection.theme, title=title)

    def _overlaps(self, run: Readings, data: Pairs):
        matrix = data.tables["overlap"][data.row(self.view.selection.step)]
        title = f"Overlap, {data.layer}{self.view.suffix(run)}"
        return figures.expert_overlaps(matrix, theme=self.view.selection.theme, title=title)

    def _lines(self, run: Readings, data: Pairs):
        if all(np.isnan(values).all() for _, values in data.lines.values()):
            raise Nothing("so far no two experts that had tokens share a parameter: none conflict, none agree")
        title = f"Parted or not, {data.layer}{self.view.suffix(run)}"
        return figures.parting_lines(data.lines, title=title, **self.view.look)
