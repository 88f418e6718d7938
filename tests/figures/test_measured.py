"""Predicted against measured: points on equal axes, their errors, and the median."""

import pytest

from workbench.errors import InputError
from workbench.figures.measured import predicted_against_measured


def test_points_have_their_error_and_the_subtitle_the_median():
    found = {"unit": "tokens/s", "title": "Model and run"}
    figure = predicted_against_measured(["a", "b", "<c>"], [90, 220, 400], [100, 200, 400], groups="xyx", **found)
    _, _, diagonal, x, y = figure.data
    assert list(diagonal.x) == list(diagonal.y)
    assert (list(x.x), list(x.y), list(y.x), list(y.y)) == ([100, 400], [90, 400], [200], [220])
    assert "error 10.0%" in x.hovertext[0] and "&lt;c&gt;" in x.hovertext[1]
    assert "median error 10.0% over 3 configurations" in figure.layout.title.text
    assert figure.layout.xaxis.title.text == "measured (tokens/s)"


@pytest.mark.parametrize(("predicted", "measured"), [([1], [1, 2]), ([0, 1], [1, 1]), ([1, 1], [float("nan"), 1])])
def test_what_does_not_fit_together_is_refused(predicted, measured):
    with pytest.raises(InputError):
        predicted_against_measured(["a", "b"], predicted, measured, unit="s", title="Bad")
