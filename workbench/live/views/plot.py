"""A plotly figure in a page, drawn by the browser at its own pace.

Panel's own plotly pane redraws a plot several times for one change, and again whenever anything on the page changes its
size: with six plots and several updates a second the browser does nothing else. This component draws once per figure,
only what is on the screen, and says when it has.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import panel as pn
import param
import plotly.graph_objects as go
from bokeh.util.warnings import BokehUserWarning
from panel.custom import JSComponent
from panel.io.resources import component_resource_path
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
    # What a page loads: the part of plotly.js that draws scatter, bar and heatmap, unchanged from npm's
    # plotly.js-cartesian-dist-min 3.1.0. The whole of it is 3.5 times as large, a second of a browser's start.
    _js: ClassVar[list[str]] = ["plotly-cartesian.min.js"]

    def __init__(
        self, figure: go.Figure, step: int | None = None, on_click: Callable[[dict], None] | None = None, **more
    ):
        super().__init__(**more)
        self._on_click = on_click
        self._version, self._sent = 0, 0.0
        self.show(figure, step)

    @classmethod
    def script(cls) -> str:
        """Where a page that a server sends finds plotly.js."""
        return component_resource_path(cls, "_js", cls._js[0])

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
    """Invisible: the heartbeat of a page. It calls its ``beats``, each every so many milliseconds, from when a browser
    shows the page until none does.

    Not before, because a page half built takes no changes: what is sent too early is lost, and in a notebook all that
    follows is. And not after, or every cell that was run again would leave a page behind that reads on.
    """

    _esm = """
    export function render({ model }) {
      setTimeout(() => model.send_msg("shown"), 0)
      return document.createElement("div")
    }
    """

    def __init__(self, *beats: tuple[Callable[[], None], int]):
        super().__init__(width=0, height=0, margin=0, styles={"position": "absolute"})
        self._beats = beats
        self._running: list = []

    def _handle_msg(self, _: str) -> None:
        if not self._running:
            self._running = [
                pn.state.add_periodic_callback(partial(self._beat, call), period) for call, period in self._beats
            ]

    def _beat(self, call: Callable[[], None]) -> None:
        if self._models:
            call()
            return
        for callback in self._running:
            callback.stop()
        self._running = []
