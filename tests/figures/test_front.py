"""The front of what is dominated by nothing, and how it is drawn."""

import pytest

from workbench.errors import InputError
from workbench.figures.front import front, on_front

POINTS = {"a": (1.0, 0.5, 0.4, 0.6), "b": (2.0, 0.4, 0.3, 0.5), "c": (3.0, 0.9, 0.8, 1.0), "d": (3.0, 0.7, 0.6, 0.8)}


def test_the_front_has_what_nothing_dominates():
    assert on_front(POINTS) == ["a", "c"]
    assert on_front({"x": (1.0, 1.0, 1.0, 1.0), "y": (2.0, 1.0, 1.0, 1.0)}) == ["x"]
    assert on_front({"x": (1.0, 0.2, 0, 1), "y": (1.0, 0.3, 0, 1)}) == ["y"]


def test_a_figure_has_a_stair_and_the_points_by_group():
    figure = front(POINTS, title="t", x_title="cost", y_title="value", groups=dict(a="one", b="one", c="two", d="two"))
    stair, one, two = figure.data
    assert list(stair.x) == [1, 3, 3] and list(stair.y) == [0.5, 0.9, 0.9] and stair.line.shape == "hv"
    assert list(one.text) == ["a", ""] and list(two.text) == ["c", ""] and one.marker.color != two.marker.color
    assert list(one.hovertext) == ["a", "b"] and list(one.textposition) == ["bottom right"] * 2
    (_, alone) = front(POINTS, title="t", x_title="cost", y_title="value").data
    assert list(alone.text) == ["a", "b", "c", "d"] and alone.textposition[3] == "bottom left"
    assert list(one.error_y.array) == pytest.approx([0.1, 0.1]) and one.name == "one"
    assert front(POINTS, title="t", x_title="cost", y_title="value", log_x=True).layout.xaxis.type == "log"


@pytest.mark.parametrize(("points", "log"), [({}, False), ({"a": (0.0, 1, 1, 1)}, True)])
def test_what_cannot_be_drawn_is_refused(points, log):
    with pytest.raises(InputError, match="points"):
        front(points, title="t", x_title="x", y_title="y", log_x=log)
