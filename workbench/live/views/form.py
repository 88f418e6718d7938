"""What layers tell of their form, over time: cards for the views that show a model which grows or shrinks."""

from typing import TYPE_CHECKING

import numpy as np
import panel as pn

from workbench.figures import form as figures
from workbench.figures.theme import short_names
from workbench.live.records import FORM, FORM_TABLE
from workbench.live.views.bar import widget
from workbench.live.views.card import Card
from workbench.live.views.readings import Nothing, Readings, counterpart, present, stamped

if TYPE_CHECKING:
    from workbench.live.views.view import View

HOW = {
    "form": "A number that the layers tell of themselves and that training changes, such as the rank that is left of a "
    "layer or the stage it has reached: one line a layer, colours in the order of the model. It is read at the "
    "cadence of the routing and holds until the next record, so a fall is drawn at the first record after it.",
    "table": "Of a vector, such as the importance of each component, its history: a column is a record, the first "
    "entry is at the top, and what was cut is 0. Of a matrix, such as the overlap of the masks of two tasks, the "
    "record at the step on show. The scale begins at 0, or has 0 in its neutral middle where there are values below. "
    "A history that spans decades has colours in logarithms, so that the edge of what was cut is seen; grey is 0 then, "
    "and undefined elsewhere.",
}


class FormCards:
    """The two cards and their choices; hidden where no run on show has a layer that tells its form.

    Attributes:
        cards: "form", numbers of all layers over time, and "table", a vector over time or a matrix at the step on show.
        controls: what is drawn in them.
    """

    def __init__(self, view: "View"):
        self.view = view
        self.number = widget(pn.widgets.Select, 150, label="Form", options=[])
        self.table = widget(pn.widgets.Select, 260, label="Table", options={})
        self.controls = [self.number, self.table]
        for control in self.controls:
            control.visible = False
            control.param.watch(lambda _: view.refresh(), "value")
        self.cards = {
            "form": Card("Form of the layers", HOW["form"], span=6, height=270),
            "table": Card("Form of one layer", HOW["table"], span=6, height=270),
        }

    def draw(self, shown: list[Readings]) -> None:
        """Fill both cards for the runs on show."""
        told = [(layer, what, shape) for layer, form in _forms(shown[0]).items() for what, shape in form.items()]
        numbers = list(dict.fromkeys(what for _, what, shape in told if not shape))
        layers = list(dict.fromkeys(layer for layer, _, shape in told if shape))
        short = dict(zip(layers, short_names(layers), strict=True))  # or the list would end before what they tell
        tables = {f"{short[layer] or 'model'} · {what}": (layer, what) for layer, what, shape in told if shape}
        for control, options, card in ((self.number, numbers, "form"), (self.table, tables, "table")):
            values = list(options.values()) if isinstance(options, dict) else options
            if control.options != options:
                kept = control.value if control.value in values else next(iter(values), None)
                control.param.update(options=options, value=kept)
            control.visible = len(values) > 1
            self.cards[card].visible = bool(values)
        step, put = self.view.selection.step, self.view.put
        lines = self.view.read(self._lines)
        newest = stamped(lines, lambda series: [int(steps[-1]) for steps, _ in series.values()])
        put("form", lambda: self._line_figures(lines), newest, self.number.value)
        tables = self.view.read(self._history)
        stamps = stamped(tables, lambda data: int((data[1] <= (np.inf if step is None else step)).sum()))
        ends = stamped(tables, lambda data: int(data[1][-1]))
        put("table", lambda: self.view.each(tables, self._table_figure(tables)), stamps, ends, self.table.value)

    def _lines(self, run: Readings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The chosen number of every layer that tells it."""
        what = self.number.value
        layers = [layer for layer, form in _forms(run).items() if what in form]
        if not layers:
            raise Nothing(NONE if what is None else f"no layer of this run tells {what}")
        return {layer or "model": run.scalars(FORM.name(layer, what), needed=True) for layer in layers}

    def _line_figures(self, found: list) -> list:
        values = [line for series in present(found) for _, line in series.values()]
        top = max([0.0, *(float(np.nanmax(line, initial=0.0)) for line in values)])
        low = min([0.0, *(float(np.nanmin(line, initial=0.0)) for line in values)])
        top = top if top > low else 1.0  # nothing has begun to grow
        what = self.number.value

        def build(run: Readings, series: dict):
            if all(np.isnan(line).all() for _, line in series.values()):
                raise Nothing(f"{what} is undefined in every record so far")
            title = f"{what.capitalize()} of the layers{self.view.suffix(run)}"
            return figures.form_lines(series, what=what, title=title, limits=(1.06 * low, 1.06 * top), **self.view.look)

        return self.view.each(found, build)

    def _history(self, run: Readings) -> tuple[str, np.ndarray, np.ndarray]:
        """The layer, and (steps (S,), values (S, m, k)) of the chosen table, or of the like of another layer."""
        if self.table.value is None:
            raise Nothing(NONE)
        layer, what = self.table.value
        like = [name for name, form in _forms(run).items() if form.get(what)]
        if not like:
            raise Nothing(f"no layer of this run tells {what}")
        layer = counterpart(layer, like)
        return (layer or "model", *run.tensors(FORM_TABLE.name(layer, what)))

    def _table_figure(self, found: list):
        """What draws one of them, all on one scale."""
        values = np.concatenate([np.zeros(1), *(values.ravel() for _, _, values in present(found))])
        limits = _limits(values[np.isfinite(values)])

        def build(run: Readings, data: tuple[str, np.ndarray, np.ndarray]):
            layer, steps, values = data
            what = self.table.value[1]
            look = {
                "what": what,
                "title": f"{what.capitalize()}, {layer}{self.view.suffix(run)}",
            }
            if values.shape[1] == 1:
                return figures.form_history(steps, values[:, 0], limits=limits, **look, **self.view.look)
            step = self.view.selection.step
            row = len(steps) if step is None else int(np.searchsorted(steps, step, side="right"))
            if not row:
                raise Nothing("nothing was recorded up to this step: scrub forward")
            names = run.domains if values.shape[1:] == (len(run.domains),) * 2 else None
            ends = (min(0.0, limits[0]), limits[1])
            return figures.form_table(
                values[row - 1], names=names, limits=ends, theme=self.view.selection.theme, **look
            )

        return build


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Of the scale of all values: from 0 or below, or from above 0 for one in logarithms, where they span decades."""
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1
    least = float(values[values > 0].min(initial=high))
    return (max(least, DECADES * high), high) if low >= 0 and least < high / 100 else (low, high)


DECADES = 1e-6  # of the largest value; below that colours end
NONE = "no layer of this model tells a form that changes"


def _forms(run: Readings) -> dict[str, dict[str, list[int]]]:
    return run.model.get("forms") or {}
