"""The component that draws: versions, the step mark, clicks, and when it has settled."""

import json
import time

import numpy as np
import panel as pn
import plotly.graph_objects as go
from bokeh.document import Document

from workbench.live.views.card import Card
from workbench.live.views.plot import PATIENCE, Plot, Pulse
from workbench.live.views.readings import Nothing
from workbench.live.views.tokens import token_label


def line(*values: float) -> go.Figure:
    return go.Figure(go.Scatter(y=np.array(values)))


def test_every_figure_is_a_new_version_of_plain_json():
    plot = Plot(line(1, np.nan), step=4)
    first = json.loads(plot.figure)
    assert (first["version"], plot.step) == (1, 4)
    plot.show(line(2, 3))
    second = json.loads(plot.figure)
    assert (second["version"], plot.step) == (2, None)
    assert second["data"] != first["data"]


def test_it_has_settled_when_the_browser_says_so_or_is_gone(monkeypatch):
    plot = Plot(line(1))
    assert plot.settled  # nobody looks
    plot.server_doc(Document())
    assert not plot.settled
    plot.drawn = 1
    assert plot.settled
    plot.show(line(2))
    assert not plot.settled
    late = time.monotonic() + PATIENCE + 1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    assert plot.settled


def test_a_page_is_followed_while_a_browser_shows_it(monkeypatch):
    class Callback:
        def __init__(self, call, period):
            self.call, self.period, self.running = call, period, True
            callbacks.append(self)

        def stop(self):
            self.running = False

    callbacks: list[Callback] = []
    beaten = []
    monkeypatch.setattr(pn.state, "add_periodic_callback", Callback)
    pulse = Pulse((lambda: beaten.append("poll"), 400), (lambda: beaten.append("list"), 4000))
    document = Document()
    root = pulse.server_doc(document).roots[0]
    assert not callbacks
    for _ in range(2):  # two browsers
        pulse._handle_msg("shown")
    assert [callback.period for callback in callbacks] == [400, 4000]
    callbacks[0].call()
    assert beaten == ["poll"]
    pulse._cleanup(root)  # the page is gone
    callbacks[1].call()
    assert beaten == ["poll"]
    assert not any(callback.running for callback in callbacks)
    pulse.server_doc(Document())
    pulse._handle_msg("shown")  # shown again
    assert len(callbacks) == 4


def test_clicks_reach_the_card():
    clicked = []
    card = Card("Load", "text", span=6, height=200, on_click=clicked.append)
    card.show([line(1)])
    card._slots[0]._handle_msg({"x": 3, "y": 5})
    assert clicked == [{"x": 3, "y": 5}]


def test_a_card_keeps_its_panes_and_widens_for_two():
    card = Card("Load", "text", span=4, height=200)
    card.show([line(1)])
    pane = card._slots[0]
    card.show([line(2)])
    assert card._slots[0] is pane
    assert card.__panel__().styles == {"grid-column": "span 4"}
    card.show([line(2), Nothing("nothing <yet>")])
    assert card.__panel__().styles == {"grid-column": "span 12"}
    assert "nothing &lt;yet&gt;" in card._slots[1].object


def test_contents_are_built_only_for_a_new_key():
    card, built = Card("Load", "text", span=4, height=200), []

    def contents():
        built.append(1)
        return [line(1)]

    for key, step in ((1, None), (1, 5), (2, 5)):
        card.update(key, contents, step)
        assert card._slots[0].step == step
    assert len(built) == 2


def test_tokens_are_readable():
    labels = [token_label(token, "bytes") for token in (0x41, 0x20, 0x0A, 0x09, 0xC3, 0x3C, 0x00)]
    assert labels == ["A", "space", "\\n newline", "\\t tab", "0xC3", "<", "NUL"]
    assert token_label(1234, None) == "#1234"
