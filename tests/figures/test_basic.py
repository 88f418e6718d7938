"""The plain figures of the notebooks: what they are given is what they show, with titles, units and the null."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.basic import bars, intervals, lines, matrix


def texts(figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_lines_have_a_name_each_the_null_and_the_mark():
    figure = lines(
        [1, 2, 3],
        {"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0]},
        title="Loss",
        subtitle="lower is better",
        x_title="step",
        y_title="bits/byte",
        null=(8.0, "uniform"),
        mark=(2, "switch"),
    )
    assert [trace.name for trace in figure.data] == ["a", "b"] and list(figure.data[0].y) == [3.0, 2.0, 1.0]
    assert figure.layout.title.text.startswith("<b>Loss</b>") and "lower is better" in figure.layout.title.text
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("step", "bits/byte")
    assert texts(figure) == ["uniform", "switch"]
    null, mark = figure.layout.shapes
    assert null.y0 == 8.0 and mark.x0 == 2


def test_bars_name_their_series_only_if_there_are_several():
    one = bars(["x", "y"], {"n": [1, 2]}, title="T", x_title="", y_title="n")
    two = bars(["x", "y"], {"n": [1, 2], "m": [2, 1]}, title="T", x_title="", y_title="n", null=(1.0, "uniform"))
    assert one.layout.showlegend is False and two.layout.showlegend is True
    assert list(two.data[1].y) == [2, 1] and texts(two) == ["uniform"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_intervals_stand_in_rows_against_zero_and_the_margin(theme):
    figure = intervals(
        ["a", "b"], [0.1, -0.2], [(-0.1, 0.3), (-0.5, 0.0)], title="T", x_title="points", margin=0.25, theme=theme
    )
    points = figure.data[0]
    assert list(points.x) == [0.1, -0.2]
    assert np.allclose(points.error_x.array, [0.2, 0.2]) and np.allclose(points.error_x.arrayminus, [0.2, 0.3])
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(-0.25, 0.25), (0, 0)]
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]


def test_an_interval_without_limits_is_drawn_as_its_estimate():
    figure = intervals(["one seed"], [0.5], [(-np.inf, np.inf)], title="T", x_title="points")
    assert list(figure.data[0].x) == [0.5]


def test_a_matrix_shows_its_values_and_leaves_undefined_cells_empty():
    figure = matrix(
        np.array([[1.0, np.nan], [0.25, 2.0]]),
        ["r0", "r1"],
        ["c0", "c1"],
        title="T",
        x_title="",
        y_title="",
        unit="norm",
    )
    assert [list(row) for row in figure.data[0].text] == [["1", ""], ["0.25", "2"]]
    assert figure.data[0].colorbar.title.text == "norm" and figure.layout.yaxis.autorange == "reversed"


def test_what_would_be_drawn_in_one_place_is_refused():
    with pytest.raises(InputError, match=r"columns holds '1\.4' more than once"):
        matrix(np.ones((1, 2)), ["r"], ["1.4", "1.4"], title="T", x_title="", y_title="", unit="")
    with pytest.raises(InputError, match="labels holds 'a' more than once"):
        bars(["a", "b", "a"], {"s": [1, 2, 3]}, title="T", x_title="", y_title="")


def test_lines_of_one_colour_differ_in_their_dash():
    series = {f"s{i}": [i, i] for i in range(10)}
    figure = lines([0, 1], series, title="T", x_title="", y_title="")
    assert len({(line.line.color, line.line.dash) for line in figure.data}) == len(series)
    ordered = lines([0, 1], series, title="T", x_title="", y_title="", ordered=True)
    assert {line.line.dash for line in ordered.data} == {"solid"}
