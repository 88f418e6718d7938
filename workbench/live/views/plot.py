"""A plotly figure in a page, drawn by the browser at its own pace.

Panel's own plotly pane redraws a plot several times for one change, and again whenever anything on the page changes its
size: with six plots and several updates a second the browser does nothing else. This component draws once per figure,
only what is on the screen, and says when it has.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import param
import plotly.graph_objects as go
from bokeh.util.warnings import BokehUserWarning
from panel.custom import JSComponent
from plotly.io.json import to_json_plotly

# the first word of a component that was just added comes with the whole component, which bokeh knows already
warnings.filterwarnings("ignore", message="reference already known", category=BokehUserWarning)

PATIENCE = 10.0  # seconds to wait for a browser to draw; one that is gone or hidden never says so


class Plot(JSComponent):
    """Shows ``object``, a figure; ``on_click`` is called with {"x": ..., "y": ...} of the point that was clicked."""

    figure = param.String(default='{"version": 0}', doc="the figure and its version as JSON")
    step = param.Integer(default=None, allow_None=True, doc="where its step mark stands; None hides it")
    drawn = param.Integer(default=0, doc="the version the browser has drawn")

    _esm = Path(__file__).with_name("plot.js")

    def __init__(
        self, figure: go.Figure, step: int | None = None, on_click: Callable[[dict], None] | None = None, **more
    ):
        super().__init__(**more)
        self._on_click = on_click
        self._version, self._sent = 0, 0.0
        self.show(figure, step)

    def show(self, figure: go.Figure, step: int | None = None) -> None:
        """Draw another figure, with its step mark at ``step``; the reader's zoom is kept."""
        self.object = figure
        self._version += 1
        self._sent = time.monotonic()
        self.param.update(figure=to_json_plotly(figure.to_plotly_json() | {"version": self._version}), step=step)

    @property
    def settled(self) -> bool:
        """Whether the browser has drawn the newest figure, or there is none to wait for."""
        return self.drawn >= self._version or not self._models or time.monotonic() - self._sent > PATIENCE

    def _handle_msg(self, point: dict) -> None:
        if self._on_click is not None:
            self._on_click(point)


class Pulse(JSComponent):
    """Invisible; calls ``start`` once the browser shows it. Whatever is sent before may be lost, in a notebook with all
    that follows, because a part half built takes no changes."""

    shown = param.Boolean(default=False)

    _esm = """
    export function render({ model }) {
      setTimeout(() => { model.shown = true }, 0)
      return document.createElement("div")
    }
    """

    def __init__(self, start: Callable[[], None]):
        super().__init__(width=0, height=0, margin=0, styles={"position": "absolute"})
        self._start = start

    @param.depends("shown", watch=True)
    def _begin(self) -> None:
        if self._start is not None:
            start, self._start = self._start, None  # a second browser of the same notebook shows it again
            start()
