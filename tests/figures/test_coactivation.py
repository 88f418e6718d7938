"""Co-activation matrices: order, scale centred at the null, undefined cells."""

import numpy as np
import pytest

from workbench.figures import coactivation
from workbench.figures.theme import LIGHT

LIFT = np.array([[np.nan, 3.0, 0.0], [3.0, np.nan, 1.0], [0.0, 1.0, np.nan]])


def test_rows_and_columns_follow_the_order():
    (heat,) = coactivation.coactivation_matrix(LIFT, order=[2, 0, 1]).data
    np.testing.assert_allclose(heat.z, LIFT[np.ix_([2, 0, 1], [2, 0, 1])])
    assert heat.customdata[0][1].tolist() == ["2", "0"]  # what the reader sees on hovering


def test_the_diagonal_is_undefined_whatever_it_holds():
    (heat,) = coactivation.coactivation_matrix(np.ones((3, 3)), kind="conditional", null=0.5).data
    assert np.isnan(np.diag(heat.z)).all()


@pytest.mark.parametrize(("kind", "null", "low", "high"), [("lift_corrected", 1, 0, 6), ("npmi", 0.2, -1, 1)])
def test_the_scale_is_neutral_at_the_null(kind, null, low, high):
    figure = coactivation.coactivation_matrix(LIFT / 3, kind=kind, null=null, ceiling=high)
    (heat,) = figure.data
    assert (heat.zmin, heat.zmax) == (low, high)
    neutral = next(stop for stop, colour in heat.colorscale if colour == LIGHT.diverging[2])
    assert neutral == pytest.approx((null - low) / (high - low))
    assert any("null" in label for label in heat.colorbar.ticktext)


def test_the_ceiling_is_shared_and_holds_twice_the_null():
    assert coactivation.pair_ceiling("conditional", 0.4, np.zeros((3, 3))) == 0.8
    assert coactivation.pair_ceiling("lift_corrected", 1.0, LIFT, 5 * LIFT) > 10
    assert coactivation.pair_ceiling("npmi", 0.1, LIFT) == 1


def test_transitions_name_both_layers_and_centre_at_independence():
    figure = coactivation.transition_matrix(np.array([[2.0, 0.0, 1.0], [0.5, 1.5, 1.0]]), ("0", "1"))
    assert figure.layout.yaxis.title.text == "expert in layer 0"
    assert figure.layout.xaxis.title.text == "expert in layer 1"
    assert figure.data[0].z.shape == (2, 3)
    assert "1 null" in figure.data[0].colorbar.ticktext
    assert coactivation.transition_matrix(np.full((2, 2), np.nan), ("0", "1")).data[0].zmax == 2


def test_a_transition_of_a_rare_expert_does_not_take_all_the_colours():
    """Lift is over the share of the expert there: of one with a hundredth of a percent it is 10,000."""
    assert coactivation.transition_ceiling(np.ones((2, 2))) == 2
    assert coactivation.transition_ceiling(np.full((2, 2), 4.0)) == 4
    assert coactivation.transition_ceiling(np.full((2, 2), 150.0)) == 10


def test_many_experts_get_few_labels():
    figure = coactivation.coactivation_matrix(np.ones((64, 64)))
    assert len(figure.layout.xaxis.tickvals) <= 16


def test_agreement_is_drawn_above_chance():
    share = np.array([[1.0, 0.5, 0.2], [0.5, 1, 1], [0.2, 1, 1]])
    chance = np.array([[0.3, 0.25, 0.4], [0.25, 0.4, 1], [0.4, 1, 1]])
    figure = coactivation.agreement_matrix(share, chance, ["0", "1", "2"], title="Agreement")
    (cells,) = figure.data
    expected = np.array([[np.nan, 1 / 3, -1 / 3], [1 / 3, np.nan, np.nan], [-1 / 3, np.nan, np.nan]])
    np.testing.assert_allclose(cells.z, expected, rtol=1e-6)
    assert cells.zmin == pytest.approx(-1 / 3) and cells.zmax == 1
    assert list(cells.text[0]) == ["", "0.33", "-0.33"]
    assert list(cells.customdata[0][1]) == ["0", "1", 0.5, 0.25]
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"]
