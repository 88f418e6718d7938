"""Phase portraits: lines with gaps between trajectories, dots at their starts, strokes of one length."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.dynamics import phase_portrait

STATES = np.arange(12.0).reshape(2, 3, 2)


def test_trajectories_are_lines_with_gaps_and_dots_at_their_starts():
    line, starts, other, _ = phase_portrait({"a": STATES, "b": STATES[:1]}, title="t").data
    np.testing.assert_array_equal(line.x, [0, 2, 4, np.nan, 6, 8, 10, np.nan])
    assert list(starts.x) == [0, 6] and list(starts.y) == [1, 7] and starts.marker.color == line.line.color
    assert other.line.color != line.line.color and (line.name, other.name) == ("a", "b")


def test_strokes_have_one_length_whatever_the_rate():
    points = np.array([[0.0, 0.0], [4.0, 4.0]])
    field, *_ = phase_portrait({"a": STATES}, (points, np.array([[3.0, 0.0], [0.0, 1e-3]])), title="t").data
    np.testing.assert_allclose(field.x, [0, 0.1, np.nan, 4, 4, np.nan], atol=1e-6)
    np.testing.assert_allclose(field.y, [0, 0, np.nan, 4, 4.1, np.nan], atol=1e-6)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="trajectories is empty"):
        phase_portrait({}, title="t")
    with pytest.raises(InputError, match=r"trajectories has \(2, 3\) of 'a' but it must be \(starts, points, 2\)"):
        phase_portrait({"a": np.zeros((2, 3))}, title="t")
    with pytest.raises(InputError, match=r"rates has \(1, 2\) and \(2, 2\) but both must be"):
        phase_portrait({"a": STATES}, (np.zeros((1, 2)), np.zeros((2, 2))), title="t")
