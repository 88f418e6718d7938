"""Loss curves: smoothing, limits that leave spikes out, the null, commands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from workbench.figures import loss


@given(nps.arrays(np.float64, st.integers(1, 60), elements=st.floats(-5, 5)), st.integers(1, 70))
def test_the_running_mean_is_that_of_the_last_values(values, window):
    expected = [values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))]
    np.testing.assert_allclose(loss.running_mean(values, window), expected, atol=1e-9)


def test_the_running_mean_leaves_nan_out():
    np.testing.assert_allclose(loss.running_mean(np.array([np.nan, 2.0, 4.0]), 2), [np.nan, 2, 3])


def test_limits_leave_a_spike_out_and_take_the_null_only_when_near():
    curve = np.concatenate([[50.0], np.linspace(7.5, 2, 500)])
    low, high = loss.loss_limits(curve, null=8.0)
    assert low < 2 and 8 < high < 10
    assert loss.loss_limits(np.linspace(3, 2, 500), null=8.0)[1] < 4
    assert np.isfinite(loss.loss_limits(np.array([]))).all()


def test_training_validation_and_commands():
    steps = np.arange(0, 100)
    figure = loss.loss_curve(
        steps,
        np.linspace(8, 3, 100),
        valid={"all": (np.array([0, 50]), np.array([8.0, 5.5]))},
        events=[(40, "pause")],
        null=8.0,
        step=30,
    )
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert names == ["train", "validation", "commands"]
    assert figure.layout.yaxis.title.text == "bits/byte"
    assert [annotation.text for annotation in figure.layout.annotations] == ["uniform guess 8"]
    assert list(figure.data[-1].x) == [40] and list(figure.data[-1].text) == ["pause"]


def test_a_null_out_of_sight_is_not_drawn():
    figure = loss.loss_curve(np.arange(10), np.linspace(2.2, 2, 10), null=8.0)
    assert not figure.layout.annotations


def test_validation_by_domain():
    figure = loss.validation_curves(
        {"python": (np.array([0]), np.array([5.0]))}, unit="bits/byte", limits=(1, 9), null=8
    )
    assert figure.data[0].name == "python"
    assert figure.layout.yaxis.range == (1, 9)
    assert figure.layout.annotations[0].text == "uniform guess 8"


def test_a_scalar_over_time():
    figure = loss.scalar_line(np.arange(3), np.ones(3), title="Norm", subtitle="all", unit="norm", limits=(0, 2))
    assert list(figure.data[0].y) == pytest.approx([1, 1, 1])
    assert figure.layout.yaxis.range == (0, 2)
