"""Figures of spectra: normalised, on a log axis, with the curve of a random matrix."""

import numpy as np
import pytest

from workbench.figures import spectra


def test_a_spectrum_is_drawn_relative_to_its_largest_value():
    values = {"weight": np.array([4.0, 2.0, 0.0]), "gradient": np.array([10.0, 1.0, 0.1])}
    figure = spectra.spectrum(values, null=np.array([2.0, 1.8, 1.0]), first=np.array([3.0, 3.0, 3.0]), floor=1e-3)
    lines = {line.name: line for line in figure.data}
    assert set(lines) == {"weight at first", "weight", "gradient", "Marchenko–Pastur"}
    np.testing.assert_allclose(lines["weight"].y, [1, 0.5, np.nan])  # zero has no place on a log axis
    np.testing.assert_allclose(lines["weight"].x, [1 / 3, 2 / 3, 1])
    assert lines["Marchenko–Pastur"].line.dash == "dash"
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range[0] == pytest.approx(-3)


def test_a_partial_spectrum_is_placed_on_the_whole_width():
    figure = spectra.spectrum({"weight": np.array([4.0, 2.0])}, n=8)
    np.testing.assert_allclose(figure.data[0].x, [1 / 8, 2 / 8])


def test_an_undefined_spectrum_draws_nothing():
    figure = spectra.spectrum({"update": np.full(3, np.nan)})
    assert np.isnan(figure.data[0].y).all()


def test_the_floor_fits_all_spectra_but_not_rounding():
    assert spectra.spectrum_floor(np.array([1.0, 0.5])) == pytest.approx(0.1)
    assert spectra.spectrum_floor(np.array([1.0, 0.01]), np.array([5.0, 5.0])) == pytest.approx(0.007)
    assert spectra.spectrum_floor(np.array([1.0, 1e-12])) == 1e-6
    assert spectra.spectrum_floor() == pytest.approx(0.07)
    assert spectra.spectrum_floor(np.full(3, np.nan)) == pytest.approx(0.07)


@pytest.mark.parametrize("measure", list(spectra.MEASURES))
def test_measures_over_time_have_unit_null_and_limits(measure):
    steps = np.array([0, 50, 100])
    lines = {"weight": (steps, np.array([0.9, 0.8, 0.7])), "update": (steps, np.array([0.2, 0.2, 0.2]))}
    figure = spectra.rank_lines(lines, measure=measure, null=0.5, band=(0.4, 0.6), limits=(0.1, 1.0), step=50)
    assert [line.name for line in figure.data] == ["weight", "update"]
    np.testing.assert_allclose(figure.data[0].y, [0.9, 0.8, 0.7], rtol=1e-6)
    assert figure.layout.yaxis.title.text == spectra.MEASURES[measure].unit
    assert any(shape.type == "rect" and (shape.y0, shape.y1) == (0.4, 0.6) for shape in figure.layout.shapes)
    assert any(shape.type == "line" and shape.y0 == shape.y1 == 0.5 for shape in figure.layout.shapes)
    low = -1 if spectra.MEASURES[measure].log else 0.1
    assert figure.layout.yaxis.range[0] == pytest.approx(low)


def test_gradients_of_parts_are_named_in_full_where_there_is_room_and_in_short_in_a_small_plot():
    values = {"gradient": np.ones(3), "gradient, image": np.ones(3)}
    assert [line.name for line in spectra.spectrum(values).data] == ["gradient", "gradient, image"]
    small = spectra.rank_lines({name: (np.arange(3), line) for name, line in values.items()}).data
    assert [line.name for line in small] == ["gradient", "· image"]
    assert small[1].hovertemplate.startswith("gradient, image")


@pytest.mark.parametrize("there", [("weight", "update", "gradient"), ("weight",)])
def test_no_two_lines_look_alike(there):
    values = {name: np.ones(3) for name in (*there, *(f"gradient, {i}" for i in range(10)))}
    series = {name: (np.arange(3), line) for name, line in values.items()}
    for figure in (spectra.spectrum(values), spectra.rank_lines(series)):
        looks = {(line.line.color, line.line.dash) for line in figure.data}
        assert len(looks) == len(values)
        own = {line.name: line.line.color for line in figure.data}
        assert not {own[name] for name in there} & {colour for name, colour in own.items() if name not in there}


def test_weight_update_and_gradient_keep_their_colours():
    one = spectra.spectrum({"gradient": np.ones(3)}).data[0].line.color
    both = spectra.rank_lines({"weight": (np.arange(2), np.ones(2)), "gradient": (np.arange(2), np.ones(2))}).data
    assert both[1].line.color == one != both[0].line.color
