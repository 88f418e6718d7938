"""The picture of a timeline: bars where and when things ran, and what kind of numbers they are."""

import pytest

from workbench.errors import InputError
from workbench.figures.timeline import gantt
from workbench.lib.core.simulation.timeline import Event, Timeline

EVENTS = (Event("load <1>", "link", 0, 0.002, "stream"), Event("use", "device", 0.002, 0.004, "experts"))
TIMELINE = Timeline(EVENTS, "simulated, calibrated by a test", ("device", "link", "cpu"))


def test_bars_are_where_and_when_things_ran():
    figure = gantt(TIMELINE, title="A run")
    stream, experts = figure.data
    assert (list(stream.y), list(stream.base), list(stream.x)) == (["link  50%"], [0], [2])
    assert (list(experts.y), list(experts.base), list(experts.x)) == (["device  50%"], [2], [2])
    assert list(figure.layout.yaxis.categoryarray) == ["cpu  0%", "link  50%", "device  50%"]
    assert (
        "simulated, calibrated by a test" in figure.layout.title.text and figure.layout.xaxis.title.text == "time (ms)"
    )
    assert "load &lt;1&gt;" in stream.hovertext[0]


def test_a_part_of_a_run_has_the_shares_of_that_part():
    figure = gantt(TIMELINE.between(0.002, 0.004), title="A part", unit="us", subtitle="the second half")
    assert list(figure.data[0].y) == ["device  100%"] and list(figure.data[0].base) == [2000]
    assert gantt(Timeline((), "a test"), title="Nothing").data == ()


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(InputError, match="unit is 'h'"):
        gantt(TIMELINE, title="A run", unit="h")
    with pytest.raises(InputError, match="4001 events"):
        gantt(Timeline(EVENTS[:1] * 4001, "a test"), title="A run")
