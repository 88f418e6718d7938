"""Radar images: decibels in their places, Doppler 0 in the middle, and wrong input."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.range_doppler import range_doppler_map


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_cells_are_decibels_and_doppler_zero_is_in_the_middle(theme):
    power = np.full((4, 6), 1e-4)
    power[0, 2], power[3, 1] = 1.0, 0.0
    figure = range_doppler_map(power, title="<b>t", doppler_hz=500.0, floor_db=-60.0, columns=5, theme=theme)
    trace = figure.data[0]
    assert np.asarray(trace.z).shape == (4, 5) and list(trace.y) == [-1.0, -0.5, 0.0, 0.5]
    assert trace.z[2][2] == 0.0 and trace.z[1][1] == -60.0 and trace.z[0][0] == pytest.approx(-40.0)
    assert trace.customdata[1][1] == pytest.approx(-300.0)
    assert (trace.zmin, trace.zmax) == (-60.0, 0.0)
    assert range_doppler_map(power * 100, title="t").data[0].zmax == pytest.approx(20.0)


@pytest.mark.parametrize("power", [np.ones(3), np.ones((0, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_wrong_powers_are_named(power):
    with pytest.raises(InputError, match="power has shape"):
        range_doppler_map(power, title="t")
