"""What the views have in common: a selection, cards, and when to redraw."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import panel as pn
import plotly.graph_objects as go

from workbench.figures.theme import short_names
from workbench.live.store import Run
from workbench.live.views import style
from workbench.live.views.bar import SelectionBar
from workbench.live.views.card import Card, grid
from workbench.live.views.plot import Pulse
from workbench.live.views.readings import Nothing, Readings, attempt, stamped
from workbench.live.views.selection import Selection

T = TypeVar("T")
POLL_MS = 400  # a committed step is on the screen within a second


class View(pn.viewable.Viewer):
    """One live view of a run: displaying it in a notebook shows it, with its controls; pages share one selection.

    Args:
        run: a run, its name or its path; None shows an empty view.
        compare: a second run, shown beside it on the same colour scale.
        theme: "light" or "dark".
        selection: the selection of a page; then the page has the controls, and ``run`` to ``theme`` are ignored.

    A subclass makes its ``cards`` and may have ``controls`` of its own (Panel widgets); ``draw`` puts contents into the
    cards.
    """

    title = ""

    def __init__(
        self,
        run: Run | Path | str | None = None,
        compare: Run | Path | str | None = None,
        *,
        theme: str = "light",
        selection: Selection | None = None,
    ):
        super().__init__()
        self.alone = selection is None
        self.selection = selection or Selection(theme=theme)
        if self.alone:
            self.selection.settled = lambda: self.settled
            self.selection.choose(run, compare)
        self.controls: list[pn.viewable.Viewable] = []
        self.cards: dict[str, Card] = self.make_cards()
        self._visible, self._stale = self.alone, True
        self._layout: pn.Column | None = None
        self._root: pn.Column | None = None
        self.selection.param.watch(lambda *_: self.refresh(), list(Selection.CHOICES))
        self.refresh()

    def make_cards(self) -> dict[str, Card]:
        """The cards of this view by name, in reading order; sets ``controls`` too."""
        raise NotImplementedError

    def draw(self, shown: list[Readings]) -> None:
        """Fill every card for the runs on show, at the selected layer and step."""
        raise NotImplementedError

    @property
    def visible(self) -> bool:
        """Whether the view is on screen; a hidden one does not redraw, and catches up when it is shown."""
        return self._visible

    @visible.setter
    def visible(self, visible: bool) -> None:
        self._visible = visible
        if visible and self._stale:
            self.refresh()

    @property
    def settled(self) -> bool:
        """Whether the browser has drawn what was shown last."""
        return all(card.settled for card in self.cards.values())

    def refresh(self) -> None:
        """Redraw, or remember to, if the view is hidden."""
        self._stale = not self._visible
        if not self._visible:
            return
        shown = self.selection.shown
        if shown:
            self.draw(shown)
        else:
            for card in self.cards.values():
                card.show([Nothing("no run is chosen yet")])

    # -- for subclasses

    def put(self, name: str, contents: Callable[[], Sequence[go.Figure | str | Nothing]], *depends: object) -> None:
        """Fill a card, if anything it depends on has changed since: the runs, layer, division, theme, and ``depends``.

        ``depends`` names what else its contents are made from: the steps of the newest records (see ``stamps``), and
        choices. The step on show is not among them for a plot over time, where only its mark moves.
        """
        chosen = self.selection
        key = (*chosen.shown, chosen.layer, chosen.by, chosen.theme, *depends)
        self.cards[name].update(key, contents, chosen.step)

    def stamps(self, read: Callable[[Readings], object]) -> tuple:
        """``read`` for every run on show, or why it has nothing: what ``put`` compares."""
        return stamped(self.read(read), lambda stamp: stamp)

    def each(self, found: Sequence[T | Nothing], build: Callable[[Readings, T], go.Figure | str]) -> list:
        """``build(run, data)`` for every run on show that has data; where it raises ``Nothing``, that."""
        contents: list[go.Figure | str | Nothing] = []
        for run, data in zip(self.selection.shown, found, strict=True):
            try:
                contents.append(data if isinstance(data, Nothing) else build(run, data))
            except Nothing as nothing:
                contents.append(nothing)
        return contents

    def suffix(self, run: Readings) -> str:
        """What names the run in a title where two are shown: its arm where that tells them apart, or its name."""
        return f" · {self.selection.short_name(run)}" if self.selection.compare is not None else ""

    def read(self, read: Callable[[Readings], T]) -> list[T | Nothing]:
        """``read`` for every run on show; see ``attempt``."""
        return attempt(read, self.selection.shown)

    @property
    def look(self) -> dict:
        """The arguments every figure over time takes: theme and the step the reader has scrubbed to."""
        return {"theme": self.selection.theme, "step": self.selection.step}

    def selected_layer(self, run: Readings) -> int:
        """The number of the selected layer in a run, which may have fewer."""
        return run.layers.index(run.layer(self.selection.layer))

    def layer_label(self, run: Readings) -> str:
        """ "layer 3" for the selected layer of a run."""
        return f"layer {short_names([layer.name for layer in run.layers])[self.selected_layer(run)]}"

    # -- display

    def body(self) -> pn.Column:
        """The view's own controls and its cards, without the controls a page shares."""
        if self._layout is None:
            bar = [pn.Row(*self.controls, stylesheets=[style.CLEAR_BAR], margin=0)] if self.controls else []
            self._layout = pn.Column(*bar, grid(list(self.cards.values())), sizing_mode="stretch_width", margin=0)
            self._layout.stylesheets = [":host { gap: 7px; }"]
        return self._layout

    def __panel__(self):
        if not self.alone:
            return self.body()
        if self._root is None:
            self._root = pn.Column(
                SelectionBar(self.selection),
                self.body(),
                Pulse((self.selection.poll, POLL_MS)),
                css_classes=["wb", f"wb-{self.selection.theme}"],
                stylesheets=[style.ROOT],
                sizing_mode="stretch_width",
                margin=0,
            )
        return self._root
