"""Figures of a merge: what is drawn is what was given, beside what chance would give."""

import numpy as np
import pytest

from workbench.figures import merging

TASKS = ["turned", "mirrored", "<b>edges"]
COSINES = {
    "blocks.0.weight": np.array([[1, 0.2, -0.1], [0.2, 1, 0.3], [-0.1, 0.3, 1.0]]),
    "blocks.1.weight": np.array([[1, 0.5, np.nan], [0.5, 1, np.nan], [np.nan, np.nan, np.nan]]),
}


def test_cosines_are_those_of_the_pairs_that_have_one_and_their_mean():
    pairs, mean = merging.task_cosines(COSINES, TASKS).data
    np.testing.assert_allclose(pairs.y, [0.2, -0.1, 0.3, 0.5])
    edges = "&lt;b&gt;edges"
    assert list(pairs.customdata) == [f"turned – {x}" for x in ("mirrored", edges)] + [
        f"mirrored – {edges}",
        "turned – mirrored",
    ]
    assert [round(x) for x in pairs.x] == [0, 0, 0, 1]
    np.testing.assert_allclose(mean.y, [0.4 / 3, 0.5])
    assert (
        "3 pairs of tasks in each layer</span>" in merging.task_cosines(COSINES, TASKS, subtitle="").layout.title.text
    )


def test_a_layer_that_no_task_changed_has_no_cosine():
    pairs, mean = merging.task_cosines({"a": np.full((2, 2), np.nan)}, TASKS[:2]).data
    assert len(pairs.y) == 0 and np.isnan(mean.y).all()


@pytest.mark.parametrize(("n", "chance"), [(2, 0.5), (3, 0.75), (8, 127 / 128)])
def test_sign_conflict_is_beside_that_of_chance(n, chance):
    figure = merging.sign_conflict({"blocks.0": 0.4, "blocks.1": 0.7}, n)
    np.testing.assert_allclose(figure.data[0].y, [0.4, 0.7])
    assert list(figure.layout.xaxis.ticktext) == ["0", "1"]
    assert figure.layout.shapes[0].y0 == pytest.approx(chance)


def test_spectra_have_a_thin_line_a_task_and_a_thick_one_a_merge():
    before = {"turned": np.array([4.0, 2.0, 1.0]), "edges": np.array([8.0, 1.0, 0.0])}
    figure = merging.spectra(before, {"average": np.array([3.0, 1.0, 1e-9])})
    lines = figure.data
    assert [line.name for line in lines] == ["the tasks", "edges", "average"]
    assert [line.showlegend for line in lines[:2]] == [True, False] and "turned" in lines[0].hovertemplate
    np.testing.assert_allclose(lines[1].y, [8, 1, np.nan])  # zero has no place on a log axis
    assert lines[2].line.width > lines[0].line.width
    low, high = 10 ** np.array(figure.layout.yaxis.range)
    assert 0.5 < low < 1 and 8 < high < 16  # and rounding none that would press the others flat


def test_overlap_says_what_chance_has():
    figure = merging.subspace_overlap(np.eye(3), TASKS, rank=4, dim=16)
    assert "by chance 0.25" in figure.layout.title.text
    (heat,) = figure.data
    assert (heat.zmin, heat.zmax) == (0, 1) and list(heat.text[0][:2]) == ["1.00", "0.00"]
    assert 0.25 in heat.colorbar.tickvals


def test_the_best_scale_is_the_best_of_the_mean():
    kept = {"a": [0.5, 0.9, 0.2], "b": [0.5, 0.6, 0.8]}
    figure = merging.against_scale([0.0, 0.5, 1.0], kept, base=0.5)
    assert [line.name for line in figure.data] == ["a", "b", "mean"]
    np.testing.assert_allclose(figure.data[-1].y, [0.5, 0.75, 0.5])
    assert "0.750 at λ = 0.5" in figure.layout.title.text
    assert [shape.y0 for shape in figure.layout.shapes] == [1, 0.5]
    mark = merging.against_scale([0.0, 0.5, 1.0], kept, chosen=0.7).layout.shapes[-1]
    assert (mark.x0, mark.x1) == (0.7, 0.7)


def test_methods_by_tasks_have_their_mean_beside_them():
    figure = merging.method_by_task({"average": [0.4, 0.8, 0.6], "ties": [1.02, 0.9, 0.9]}, TASKS)
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z[0], [0.4, 0.8, 0.6, 0.6])
    assert list(heat.x) == ["turned", "mirrored", "&lt;b&gt;edges", "<b>mean</b>"]
    assert list(heat.y) == ["average", "ties"]
    assert heat.zmin == pytest.approx(0.4) and heat.zmax == pytest.approx(1.02)


def test_similar_experts_stand_together_in_the_frame_of_their_cluster():
    similarity = np.array([[1, -0.5, 0.9], [-0.5, 1, -0.4], [0.9, -0.4, 1]])
    figure = merging.expert_similarity(similarity, [0, 1, 0])
    (heat,) = figure.data
    assert list(heat.x) == ["0", "2", "1"]
    np.testing.assert_allclose(heat.z[0], [1, 0.9, -0.5])
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(-0.5, 1.5), (1.5, 2.5)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_has_a_title_and_the_theme_it_was_asked_for(theme):
    figures = [
        merging.task_cosines(COSINES, TASKS, theme=theme),
        merging.sign_conflict({"a": 0.5}, 2, theme=theme),
        merging.spectra({}, {}, theme=theme),
        merging.subspace_overlap(np.eye(2), TASKS[:2], rank=1, dim=4, theme=theme),
        merging.against_scale([0, 1], {"a": [0, 1]}, theme=theme),
        merging.method_by_task({"average": [0.5]}, TASKS[:1], theme=theme),
        merging.expert_similarity(np.eye(2), [0, 1], theme=theme),
    ]
    cards = {figure.layout.template.layout.paper_bgcolor for figure in figures}
    assert len(cards) == 1 and all(figure.layout.title.text.startswith("<b>") for figure in figures)
