"""The figures of a learning rate over widths: marks at the best rates, panels that compare, norms with their bounds."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.theme import THEMES
from workbench.figures.transfer import norm_traces, rate_curves

RATES = (0.01, 0.02, 0.04)
LOSSES = np.array([[[3.0, 1.0, 2.0], [2.0, 1.0, 0.5]], [[5.0, 1.0, 2.0], [2.0, 1.0, 0.7]]])  # seeds, widths, rates


@pytest.mark.parametrize("theme", THEMES)
def test_the_mean_over_seeds_is_drawn_and_the_best_rate_of_each_width_marked(theme):
    figure = rate_curves({"a<b>": (RATES, LOSSES), "c": ((0.1, 0.2, 0.4), LOSSES[0])}, (32, 64), theme=theme)
    assert [trace.name for trace in figure.data] == ["width 32", "width 64"] * 2
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert np.allclose(figure.data[0].y, [4, 1, 2]) and np.allclose(figure.data[3].y, [2, 1, 0.5])
    assert [list(trace.marker.symbol).index("diamond") for trace in figure.data] == [1, 2, 1, 2]
    assert [trace.xaxis for trace in figure.data] == ["x", "x", "x2", "x2"]
    assert [(shape.x0, shape.xref) for shape in figure.layout.shapes] == [(0.02, "x"), (0.2, "x2")]
    assert [note.text for note in figure.layout.annotations] == ["<b>a&lt;b&gt;</b>", "<b>c</b>"]
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range  # on one scale
    low, high = 10 ** np.array(figure.layout.yaxis.range)
    assert low < 0.5 and high > 4
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("learning rate", "loss (nats)")
    assert "best rate at width 32" in figure.layout.title.text


def test_norms_have_a_line_a_width_the_band_and_the_ceiling():
    weights, updates = np.array([[1.0, 2.0], [1.0, 2.1]]), np.array([[1.1, 1.0], [1.15, np.nan]])
    figure = norm_traces((0, 10), weights, updates, (32, 64), ceiling=1.2025)
    assert [trace.name for trace in figure.data] == ["width 32", "width 64"] * 2
    assert [trace.yaxis for trace in figure.data] == ["y", "y", "y2", "y2"]
    assert np.allclose(figure.data[1].y, [1, 2.1])
    band, ceiling = figure.layout.shapes
    assert (band.y0, band.y1, band.yref) == (0.5, 2, "y") and (ceiling.y0, ceiling.yref) == (1.2025, "y2")
    assert figure.layout.annotations[-1].text == "ceiling 1.202"
    assert len(norm_traces((0, 10), weights, updates, (32, 64)).layout.shapes) == 1


@pytest.mark.parametrize("updates", [[1.187, 1.203], [0.05, 3.0], [1.0, np.nan], [np.nan, 0.0]], ids=str)
@pytest.mark.parametrize("start", [1.0, 2.01, 4.9])  # bands that lie apart from the ticks in every way
def test_both_panels_of_norms_span_one_factor_with_ticks_in_it(updates, start):
    figure = norm_traces((0, 10), np.full((1, 2), start), np.array([updates]), (32,), ceiling=1.2025)
    ends = np.array([figure.layout.yaxis.range, figure.layout.yaxis2.range])
    assert np.allclose(*np.diff(ends))
    for (low, high), shown in zip(10**ends, ([start / 2, 2 * start], [*updates, 1.2025]), strict=True):
        shown = np.array(shown)[np.nan_to_num(shown) > 0]
        assert low < shown.min() and shown.max() < high
        assert sum(low <= n * 10.0**e <= high for e in range(-4, 4) for n in (1, 2, 5)) >= 2
    assert figure.layout.yaxis.dtick == figure.layout.yaxis2.dtick == "D2" and figure.layout.yaxis2.showticklabels
    flat = norm_traces((0, 10), np.full((1, 2), start), np.array([[np.nan, np.nan]]), (32,))
    assert np.isfinite(flat.layout.yaxis2.range).all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"shape \(2, 2, 3\) for 'a' but they must be \(..., 3 widths, 3 rates\)"):
        rate_curves({"a": (RATES, LOSSES)}, (1, 2, 3))
    with pytest.raises(InputError, match=r"must be \(2, 3\)"):
        norm_traces((0, 1, 2), np.ones((2, 2)), np.ones((2, 3)), (32, 64))
