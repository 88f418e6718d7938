"""Figures of gradient conflict: undefined is grey, the null is drawn, conflict is orange."""

import numpy as np

from workbench.figures import conflict
from workbench.figures.theme import LIGHT

DOMAINS = ["python", "docs", "names"]
COSINE = np.array([[1.0, -0.5, 0.004], [-0.5, 1.0, np.nan], [0.004, np.nan, 1.0]])
STEPS = np.array([0, 100, 200])


def test_cosines_are_written_into_the_cells():
    figure = conflict.cosine_matrix(COSINE, DOMAINS, band=0.01)
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, COSINE, rtol=1e-6)
    assert list(heat.text[0]) == ["+1.00", "-0.50", "~0"]  # inside the noise band
    assert heat.text[1][2] == ""
    assert figure.layout.plot_bgcolor == LIGHT.undefined
    assert "null ± 0.01" in figure.layout.title.text
    assert list(heat.x) == DOMAINS


def test_a_corrected_cosine_beyond_one_keeps_its_number():
    (heat,) = conflict.cosine_matrix(np.array([[1, 1.3], [1.3, 1]]), DOMAINS[:2]).data
    assert heat.z[0][1] == 1
    assert heat.text[0][1] == "+1.30"


def test_conflict_is_orange_and_agreement_blue():
    (heat,) = conflict.cosine_matrix(COSINE, DOMAINS).data
    assert heat.colorscale[0][1] == LIGHT.diverging[-1]
    assert heat.colorscale[-1][1] == LIGHT.diverging[0]
    assert (heat.zmin, heat.zmax) == (-1, 1)


def test_groups_by_pairs():
    figure = conflict.group_cosines(
        np.array([[0.5, np.nan]]), ["trunk"], ["python – docs", "python – names"], selected=0
    )
    assert list(figure.data[0].x) == ["python<br>docs", "python<br>names"]
    assert list(figure.layout.yaxis.ticktext) == ["trunk"]
    assert figure.layout.shapes[0].type == "rect"


def test_names_of_many_pairs_give_way_to_their_number():
    figure = conflict.group_cosines(np.zeros((1, 66)), ["trunk"], [f"{i} – x" for i in range(66)])
    assert figure.layout.xaxis.showticklabels is False and "66 pairs" in figure.layout.xaxis.title.text


def test_the_null_of_the_rate_is_one_half():
    figure = conflict.conflict_lines(STEPS, {"trunk": np.array([0, 1 / 3, 1])}, selected="trunk")
    assert figure.layout.shapes[0].y0 == 0.5
    assert figure.layout.annotations[0].text == "random signs"
    np.testing.assert_allclose(figure.data[0].y, [0, 1 / 3, 1], rtol=1e-6)


def test_the_worst_conflict_has_the_noise_band():
    figure = conflict.conflict_lines(
        STEPS, {"trunk": np.array([0.1, -0.2, 0.0])}, measure="max_negative", band=0.05, limits=(-0.3, 0.3)
    )
    assert any(shape.type == "rect" and (shape.y0, shape.y1) == (-0.05, 0.05) for shape in figure.layout.shapes)
    assert figure.layout.yaxis.range == (-0.3, 0.3)


def test_of_many_groups_only_the_selected_one_is_named():
    figure = conflict.conflict_lines(STEPS, {f"group {i}": np.zeros(3) for i in range(12)}, selected="group 3")
    assert [line.name for line in figure.data if line.showlegend] == ["group 3"]


def test_self_cosines_show_noise():
    figure = conflict.self_cosines(np.array([0.9, np.nan, -0.2]), DOMAINS, band=0.02)
    assert figure.layout.yaxis.range[0] < -0.2
    assert figure.layout.annotations[0].text == "only noise"
