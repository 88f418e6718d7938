"""Curves of one objective against another."""

import pytest

from workbench.errors import InputError
from workbench.figures.tradeoff import trade_off

CURVES = {"a": [(1, 3), (2, 2), (3, 1)], "fixed": [(2, 2.5)] * 3}
WORDS = {"title": "t", "x_title": "one", "y_title": "two"}


def test_a_curve_goes_through_its_points_and_its_ends_bear_the_knob():
    a, fixed, here = trade_off(CURVES, [0, 0.5, 1], here=(2.5, 1.5), knob="u", **WORDS).data
    assert list(a.x) == [1, 2, 3] and list(a.y) == [3, 2, 1] and list(a.text) == ["0", "", "1"]
    assert list(fixed.x) == [2] and fixed.mode == "markers" and a.line.color != fixed.line.color
    assert (here.x[0], here.y[0], here.name) == (2.5, 1.5, "here")
    assert "u %{customdata:g}" in a.hovertemplate and list(a.customdata) == [0, 0.5, 1]
    assert len(trade_off(CURVES, [0, 0.5, 1], theme="dark", **WORDS).data) == 2


@pytest.mark.parametrize("curves", [{}, {"a": [(1, 2)]}, {"a": CURVES["a"], "b": []}])
def test_curves_that_do_not_fit_are_refused(curves):
    with pytest.raises(InputError, match="curves have"):
        trade_off(curves, [0, 0.5, 1], **WORDS)
