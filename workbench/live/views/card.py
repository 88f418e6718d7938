"""A card: one plot of a view, for one run or for two side by side, with a text on how to read it."""

from collections.abc import Callable, Sequence

import panel as pn
import plotly.graph_objects as go

from workbench.live.views import style
from workbench.live.views.markup import html
from workbench.live.views.plot import Plot
from workbench.live.views.readings import Nothing

NARROW = 260  # pixels, of what says why there is nothing beside another run's plot
EMPTY = 120  # pixels, the height of a row in which no run has anything


class Card(pn.viewable.Viewer):
    """One plot with its explanation. ``show`` fills it: a figure, HTML, or ``Nothing`` for each run on show.

    ``span`` is its width in twelfths of the grid, ``height`` that of the plot in pixels. ``on_click`` is called with
    the x and y of the point of a figure that was clicked.
    """

    def __init__(self, title: str, how: str, *, span: int, height: int, on_click: Callable[[dict], None] | None = None):
        super().__init__()
        self.title, self.span, self.height, self.on_click = title, span, height, on_click
        self.contents: list[go.Figure | str | Nothing] = []
        self._key: object = None
        self._height = height
        self._slot_kinds: list[type] = []
        self._slots = pn.Row(sizing_mode="stretch_width", height=height, margin=0)
        text = f"<details><summary>How to read this</summary><p>{how}</p></details>"
        self._how = pn.pane.HTML(text, stylesheets=[style.TEXT], sizing_mode="stretch_width", margin=0)
        self._column = pn.Column(
            self._slots, self._how, stylesheets=[style.CARD], styles={"grid-column": f"span {span}"}, margin=0
        )

    @property
    def visible(self) -> bool:
        """Whether it has a place on the page."""
        return self._column.visible

    @visible.setter
    def visible(self, visible: bool) -> None:
        self._column.visible = visible

    @property
    def figures(self) -> list[go.Figure]:
        """The figures on show, at most one for each run."""
        return [content for content in self.contents if isinstance(content, go.Figure)]

    def show(self, contents: Sequence[go.Figure | str | Nothing], step: int | None = None) -> None:
        """Show one content for each run, side by side; panes are kept, so that a reader's zoom survives."""
        self.contents, self._key = list(contents), None
        wide = len(contents) > 1
        span = {"grid-column": f"span {12 if wide else self.span}"}
        if self._column.styles != span:
            self._column.param.update(styles=span, css_classes=["wide"] if wide else [])
        kinds = [type(content) for content in contents]
        if kinds != self._slot_kinds:
            self._slot_kinds = kinds
            beside = wide and any(not isinstance(content, Nothing) for content in contents)
            self._slots.height = self._height = EMPTY if wide and not beside else self.height
            self._slots.objects = [self._pane(content, step, beside) for content in contents]
            return
        for pane, content in zip(self._slots, contents, strict=True):
            if isinstance(content, go.Figure):
                pane.show(content, step)
            else:
                pane.object = self._html(content)

    def update(
        self, key: object, contents: Callable[[], Sequence[go.Figure | str | Nothing]], step: int | None
    ) -> None:
        """Show new contents if ``key`` is another than before; else only move the mark of ``step`` in the figures."""
        if key != self._key:
            self.show(contents(), step)
            self._key = key
            return
        for pane in self._slots:
            if isinstance(pane, Plot):
                pane.step = step

    @property
    def settled(self) -> bool:
        """Whether the browser has drawn what was shown last."""
        return all(pane.settled for pane in self._slots if isinstance(pane, Plot))

    def _pane(self, content: go.Figure | str | Nothing, step: int | None, beside: bool) -> pn.viewable.Viewable:
        size = {"sizing_mode": "stretch_width", "height": self._height, "margin": 0}
        if beside and isinstance(content, Nothing):
            size |= {"max_width": NARROW}
        if isinstance(content, go.Figure):
            return Plot(content, step, self.on_click, **size)
        return pn.pane.HTML(self._html(content), stylesheets=[style.TEXT], **size)

    def _html(self, content: str | Nothing) -> str:
        if isinstance(content, Nothing):
            return html('<div class="empty"><b>{title}</b><span>{why}</span></div>', title=self.title, why=content)
        return html('<div class="scroll">{content}</div>', content=content)

    def __panel__(self):
        return self._column


def grid(cards: Sequence[Card]) -> pn.Column:
    """Cards in a grid of twelve columns."""
    return pn.Column(*cards, stylesheets=[style.GRID], sizing_mode="stretch_width", margin=0)
