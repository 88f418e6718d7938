"""Figures of depth: shares that are stacked, a text in cells, and loss by what was spent."""

from html import unescape

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures import depth
from workbench.figures.theme import LIGHT

STEPS = np.array([0, 10, 20])
COUNTS = np.array([[0, 0, 0, 8], [0, 2, 2, 4], [0, 4, 2, 2]])


def test_shares_add_up_and_the_mean_is_read_on_the_right():
    figure = depth.depth_shares(STEPS, COUNTS, step=10)
    *bands, mean = figure.data
    assert [band.name for band in bands] == ["1", "2", "3"]  # nobody ever stopped at 0
    np.testing.assert_allclose(sum(band.y for band in bands), 100)
    assert list(bands[-1].y) == [100, 50, 25] and all(band.stackgroup == "depth" for band in bands)
    assert list(mean.y) == [3, 2.25, 1.75] and (mean.yaxis, tuple(figure.layout.yaxis2.range)) == ("y2", (0, 3))
    assert figure.layout.shapes[-1].x0 == 10


def test_a_record_without_tokens_has_no_mean():
    *_, mean = depth.depth_shares(STEPS, np.array([[0, 1], [0, 0], [1, 1]])).data
    np.testing.assert_array_equal(mean.y, [1, np.nan, 0.5])


def test_a_text_stands_in_lines_and_what_is_white_is_seen():
    figure = depth.text_by_depth(list("if a:\n <b>"), np.array([3, 2, 0, 1, 1, 3, 2, 0, 0, 0]), 3, columns=4)
    (heat,) = figure.data
    assert [[unescape(cell) for cell in row] for row in heat.text.tolist()] == [
        ["i", "f", "·", "a"],
        [":", "⏎", "·", "<"],
        ["b", ">", "", ""],
    ]
    np.testing.assert_array_equal(heat.z, [[3, 2, 0, 1], [1, 3, 2, 0], [0, 0, np.nan, np.nan]])
    assert (heat.zmin, heat.zmax) == (0, 3) and list(heat.colorbar.ticktext) == ["0", "1", "2", "3"]
    assert heat.colorscale[-1][1] == LIGHT.sequential[-1]
    assert tuple(figure.layout.yaxis.range) == (2.5, -0.5)  # the first line on top
    assert heat.text[1][3] == "&lt;"


@pytest.mark.parametrize(
    ("depths", "said"),
    [([1, 2], "depths has shape"), ([0, 1, 4], "depths are 0 to 4 but must be"), ([-1, 0, 0], "depths are -1 to 0")],
)
def test_depths_that_do_not_fit_the_text_are_refused(depths, said):
    with pytest.raises(InputError, match=said):
        depth.text_by_depth(list("abc"), np.array(depths), 3)


def test_loss_is_the_mean_of_the_seeds_at_what_they_spent():
    curves = {"a": [([1e9, 2e9], [4, 3]), ([1e9, 2e9], [5, 2])], "b": [([3e9], [1.0])]}
    figure = depth.loss_over_flops(curves)
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data] == [
        ("a", [1, 2], [4.5, 2.5]),
        ("b", [3], [1]),
    ]
    with pytest.raises(InputError, match=r"curves\['a'\] has seeds that were evaluated at different operations"):
        depth.loss_over_flops({"a": [([1, 2], [4, 3]), ([1, 3], [5, 2])]})
