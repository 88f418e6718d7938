"""Figures of searches: the front of what was tried, and the scores of operators."""

import math

import pytest

from workbench.errors import InputError
from workbench.figures.search import operator_map, search_front

RATED = [([1, 0], 10, 0.5), ([2, 0], 20, 0.4), ([3, 0], 30, 0.9)]


def test_the_front_is_a_stair_over_all_candidates():
    figure = search_front(
        RATED, title="t", x_title="macs", y_title="accuracy", groups=["split 0", "split 1", "split 0"]
    )
    assert [trace.name for trace in figure.data] == ["split 0", "split 1", "front"]
    assert list(figure.data[0].customdata) == ["1 0", "3 0"]
    assert list(figure.data[-1].x) == [10, 30, 30] and list(figure.data[-1].y) == [0.5, 0.9, 0.9]
    for bad in (([], None), (RATED, ["a"])):
        with pytest.raises(InputError):
            search_front(bad[0], title="t", x_title="x", y_title="y", groups=bad[1])


def test_dropped_operators_are_crossed_out():
    scores = {(0, -1): 1.0, (0, 0): -1.0, (1, 0): 0.5, (1, 1): math.nan}
    figure = operator_map(scores, ((-1,), (0, 1)), {-1: "skip", 0: "k3", 1: "k5"}, title="t")
    heat, gone = figure.data
    assert list(heat.y) == ["skip", "k3", "k5"] and heat.z[0][0] == 1 and math.isnan(heat.z[0][1])
    assert list(zip(gone.x, gone.y, strict=True)) == [("0", "k3")]
    with pytest.raises(InputError, match="names has none"):
        operator_map(scores, ((-1,), (0, 1)), {0: "k3"}, title="t")
