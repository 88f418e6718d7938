"""Figures of the load: what is drawn is what was given, on scales whose middle is the uniform share."""

import numpy as np
import pytest

from workbench.figures import balance, routing
from workbench.figures.theme import LIGHT, STEP_MARK

STEPS = np.array([0, 10, 20])
LOADS = np.array([[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0]])
LAYERS = ["blocks.0.ffn", "blocks.1.ffn"]


def test_load_heatmap_shows_multiples_of_uniform():
    figure = routing.load_heatmap(STEPS, LOADS, ceiling=4.0, step=10, selected=3)
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, (LOADS / LOADS.mean(axis=1, keepdims=True)).T)
    assert list(heat.x) == [0, 10, 20]
    assert (heat.zmin, heat.zmax) == (0, 4)
    assert heat.colorscale[2] == (0.25, LIGHT.diverging[2])  # 1 of 4 is neutral
    assert "1 uniform" in heat.colorbar.ticktext
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("step", "expert")
    mark = next(shape for shape in figure.layout.shapes if shape.name == STEP_MARK)
    assert mark.x0 == 10
    assert any(shape.type == "rect" and (shape.y0, shape.y1) == (2.5, 3.5) for shape in figure.layout.shapes)


def test_a_record_without_tokens_is_undefined_not_zero():
    assert np.isnan(routing.as_multiple_of_uniform(np.zeros((2, 4)))).all()


def test_the_ceiling_fits_all_loads_within_two_and_four():
    assert routing.load_ceiling(np.ones((5, 4))) == 2
    assert routing.load_ceiling(np.ones((5, 4)), np.array([[3, 1, 0, 0]])) == pytest.approx(3, rel=0.02)
    assert routing.load_ceiling(np.ones((5, 4)), np.eye(8)[:1] * 16) == 4
    assert routing.load_ceiling() == 2
    assert routing.load_ceiling(np.zeros((1, 4))) == 2


def test_load_by_layer_leaves_missing_experts_empty():
    figure = routing.load_by_layer([np.array([1, 3]), np.array([1, 1, 1, 1])], LAYERS)
    np.testing.assert_allclose(figure.data[0].z, [[0.5, 1.5, np.nan, np.nan], [1, 1, 1, 1]])
    assert list(figure.layout.yaxis.ticktext) == ["0", "1"]
    assert figure.layout.yaxis.range == (1.5, -0.5)  # the first layer on top


def test_balance_lines_have_a_panel_a_measure_a_band_and_the_ideal():
    values = {"max_vio": np.array([[0, 1, 3], [0, 0.5, 1]]), "dead": np.array([[0, 1, 3], [0, 0, 0]])}
    figure = balance.balance_lines(STEPS, values, LAYERS, nulls={"max_vio": (0.1, 0.4)}, selected=1)
    lines = {(line.yaxis, line.name): list(line.y) for line in figure.data}
    assert lines == {("y", "0"): [0, 1, 3], ("y", "1"): [0, 0.5, 1], ("y2", "0"): [0, 1, 3], ("y2", "1"): [0, 0, 0]}
    bands = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [(band.y0, band.y1, band.yref) for band in bands] == [(0.1, 0.4, "y")]
    ideals = [shape for shape in figure.layout.shapes if shape.type == "line" and shape.name != STEP_MARK]
    assert [(ideal.y0, ideal.yref) for ideal in ideals] == [(0, "y"), (0, "y2")]
    text = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert all(part in text for part in ("MaxVio", "max/mean − 1", "Dead", "balanced"))
    assert [line.showlegend for line in figure.data] == [True, True, False, False]
    assert figure.data[1].line.width > figure.data[0].line.width  # the selected layer


def test_one_measure_fills_the_figure():
    figure = balance.balance_lines(STEPS, {"cv": np.zeros((1, 3))}, ["only"], ranges={"cv": (0, 2)})
    assert figure.layout.xaxis.domain == (0, 1)
    assert figure.layout.yaxis.title.text == "CV (std/mean)"
    assert figure.layout.yaxis.range == (0, 2)


def test_four_measures_do_not_overlap():
    figure = balance.balance_lines(STEPS, {name: np.zeros((1, 3)) for name in balance.BALANCE}, ["only"])
    boxes = [(figure.layout[f"xaxis{n}"].domain, figure.layout[f"yaxis{n}"].domain) for n in ("", "2", "3", "4")]
    for i, (x, y) in enumerate(boxes):
        for other_x, other_y in boxes[:i]:
            assert x[1] <= other_x[0] or other_x[1] <= x[0] or y[1] <= other_y[0] or other_y[1] <= y[0]


def test_load_and_probability_share_one_scale_with_the_uniform_line():
    figure = routing.load_and_probability(np.array([6, 2]), np.array([0.5, 0.5]), selected=0, ceiling=3)
    load, probability = figure.data
    assert (list(load.y), list(probability.y)) == ([1.5, 0.5], [1, 1])
    assert list(load.marker.line.width) == [2, 0]
    assert figure.layout.shapes[0].y0 == 1
    assert figure.layout.yaxis.range == (0, 3)
    assert len(routing.load_and_probability(np.array([6, 2]), None).data) == 1


def test_dropped_rates_are_percent():
    figure = routing.dropped_rates(STEPS, np.array([[0.5, 0.1]] * 3))
    assert [line.y[0] for line in figure.data] == pytest.approx([50, 10])
    assert "%" in figure.layout.yaxis.title.text


def test_routing_information_draws_the_shuffled_baseline_of_the_selected_layer():
    figure = balance.routing_information(
        STEPS, np.full((2, 3), 0.2), np.array([[0.01] * 3, [0.03] * 3]), LAYERS, selected=1
    )
    assert [line.name for line in figure.data] == ["0", "1", "shuffled"]
    assert figure.data[-1].y[0] == pytest.approx(3)
    assert figure.data[-1].line.dash == "dash"


def test_support_sizes_have_equal_weights_as_their_null_line():
    probabilities = (STEPS, np.array([4.0, 3.0, 2.0]))
    figure = balance.support_sizes(
        STEPS, np.array([[1.8] * 3, [1.2] * 3]), LAYERS, of_probabilities=probabilities, chosen=2
    )
    assert [line.name for line in figure.data] == ["0", "1", "of p"]
    assert "equal weights" in " ".join(note.text for note in figure.layout.annotations)
    assert any(shape.y0 == shape.y1 == 2 for shape in figure.layout.shapes)


def test_composition_sets_shares_beside_those_of_all_experts():
    figure = routing.composition(["e", "space"], [0.75, 0.25], [0.5, 0.5], title="Tokens", of="of the expert's tokens")
    mine, everyone = figure.data
    assert (list(mine.x), list(everyone.x)) == ([75, 25], [50, 50])
    assert list(figure.layout.yaxis.ticktext) == ["e", "space"]
