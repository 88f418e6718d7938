"""Figures of a form that changes: lines in steps, a vector over time, a matrix at one step."""

import numpy as np

from workbench.figures import conflict, form
from workbench.figures.theme import LIGHT

STEPS = np.array([0, 10, 20])


def test_a_number_holds_from_one_record_to_the_next():
    series = {"blocks.0.up": (STEPS, np.array([8, 8, 3])), "blocks.1.up": (STEPS, np.array([8, 5, 5]))}
    figure = form.form_lines(series, what="rank", step=10, limits=(0, 9))
    assert [line.name for line in figure.data] == ["0", "1"]
    assert all(line.line.shape == "hv" for line in figure.data)
    assert list(figure.data[0].y) == [8, 8, 3] and tuple(figure.layout.yaxis.range) == (0, 9)
    assert figure.layout.shapes[-1].x0 == 10


def test_of_many_layers_one_is_named():
    series = {f"{i}.up": (STEPS, np.zeros(3)) for i in range(20)}
    figure = form.form_lines(series, what="rank", selected="7.up")
    assert [line.name for line in figure.data if line.showlegend] == ["7"]


def test_the_history_of_a_vector_has_its_first_entry_at_the_top():
    values = np.array([[3.0, 1, 0], [3, 0, 0], [2, 0, np.nan]])
    (heat,) = form.form_history(STEPS, values, what="importance", limits=(0, 4)).data
    np.testing.assert_array_equal(heat.z, values.T)
    assert list(heat.x) == [0, 10, 20] and (heat.zmin, heat.zmax) == (0, 4)
    assert form.form_history(STEPS, values, what="importance").layout.yaxis.autorange == "reversed"


def test_a_history_over_decades_has_colours_in_logarithms_and_what_was_cut_is_grey():
    (heat,) = form.form_history(
        STEPS, np.array([[10.0, 1, 1e-3], [10, 0.1, 0], [10, 1e-5, 0]]), what="x", limits=(1e-4, 10)
    ).data
    np.testing.assert_allclose(heat.z, [[1, 1, 1], [0, -1, -4], [-3, np.nan, np.nan]], atol=1e-6)
    assert heat.customdata[1][2] == np.float32(1e-5) and (heat.zmin, heat.zmax) == (-4, 1)
    assert list(heat.colorbar.ticktext) == ["0.0001", "0.001", "0.01", "0.1", "1", "10"]


def test_the_cells_of_a_small_matrix_are_written_in_and_undefined_ones_are_grey():
    figure = form.form_table(np.array([[1, 0.25], [np.nan, 1]]), what="overlap", names=["a", "b"])
    (heat,) = figure.data
    assert [list(row) for row in heat.text] == [["1", "0.25"], ["", "1"]]
    assert list(heat.x) == list(heat.y) == ["a", "b"]
    assert figure.layout.plot_bgcolor == LIGHT.undefined


def test_what_goes_below_zero_has_zero_in_the_middle_of_its_scale():
    (heat,) = form.form_table(np.array([[-1.0, 3.0]]), what="x").data
    assert [stop for stop, _ in heat.colorscale][2] == 0.25
    assert (heat.zmin, heat.zmax) == (-1, 3)


def test_a_form_that_has_not_begun_to_grow_is_on_a_scale_to_1():
    (heat,) = form.form_history(STEPS, np.zeros((3, 2)), what="scales").data
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_a_cosine_has_the_colours_of_conflict():
    (heat,) = form.form_table(np.array([[1, -0.5], [-0.5, 1]]), what="cosine", limits=(-0.5, 1)).data
    (among,) = conflict.expert_cosines(np.array([[1, -0.5], [-0.5, 1]])).data
    assert (heat.zmin, heat.zmax, heat.colorscale) == (-1, 1, among.colorscale)


def test_the_colours_of_many_layers_are_explained():
    series = {f"{i}.up": (STEPS, np.zeros(3)) for i in range(20)}
    assert "20 layers: violet the first, green the last" in form.form_lines(series, what="rank").layout.title.text
