"""Text in cells: lines that differ in length, holes, and what does not fit."""

from html import unescape

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.text import text_cells, text_with_holes


def test_each_way_to_hide_has_its_line_and_what_is_missing_stays_empty():
    figure = text_with_holes({"R 3": list("a <b"), "S": list("a\nc")}, {"R 3": [0, 1, 1, 0], "S": np.array([0, 0, 1])})
    (heat,) = figure.data
    assert [[unescape(cell) for cell in row] for row in heat.text.tolist()] == [
        ["a", "·", "<", "b"],
        ["a", "⏎", "c", ""],
    ]
    np.testing.assert_array_equal(heat.z, [[0, 1, 1, 0], [0, 0, 1, np.nan]])
    assert heat.customdata.tolist() == [["given", "hidden", "hidden", "given"], ["given", "given", "hidden", ""]]
    assert (list(figure.layout.yaxis.ticktext), tuple(figure.layout.yaxis.range)) == (["R 3", "S"], (1.5, -0.5))
    assert list(heat.colorbar.ticktext) == ["given", "hidden"] and heat.zmax == 1


def test_what_does_not_fit_is_refused():
    options = {"what": "depth", "x": "", "y": "", "title": ""}
    with pytest.raises(InputError, match="values has 2 numbers in line 1 but must have one for each of 1"):
        text_cells(["ab", "c"], [[0, 1], [0, 0]], {0: "no", 1: "yes"}, **options)
    with pytest.raises(InputError, match=r"values hold \[2\] but must be among \[0, 1\]"):
        text_cells(["ab"], [[0, 2]], {0: "no", 1: "yes"}, **options)
