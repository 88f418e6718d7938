"""The effects of many studies on one axis: what is divided by what, which way is for the claim, what has no place."""

import math

import pytest

from workbench.figures.forest import FARTHEST, SYMBOLS, forest_figure, standardised
from workbench.lib.measures.statistics import paired_effect, paired_interval
from workbench.studies.verdicts import VERDICTS, Judgement

BETTER = {
    "slug": "a",
    "verdict": "reproduced",
    "effect": 0.2,
    "ci": [0.1, 0.3],
    "level": 0.95,
    "sd": 0.1,
    "claimed": [0.0, "inf"],
    "seeds": [0, 1, 2],
}
LOWER = BETTER | {"slug": "b", "effect": -0.2, "ci": [-0.3, -0.1], "claimed": ["-inf", 0.0]}
NOT_WORSE = BETTER | {"slug": "c", "effect": 0.01, "ci": [-0.01, 0.03], "claimed": ["-inf", 0.02], "sd": 0.01}
EQUAL = BETTER | {"slug": "d", "effect": -0.1, "ci": [-0.3, 0.1], "claimed": [-0.2, 0.2]}


def traces(figure, slug):
    return [trace for trace in figure.data if trace.meta == slug]


def test_every_verdict_has_a_symbol_of_its_own():
    assert tuple(SYMBOLS) == VERDICTS
    assert len({symbol for symbol, _ in SYMBOLS.values()}) == len({mark for _, mark in SYMBOLS.values()}) == 4


def test_the_effect_is_cohens_d_of_the_differences_at_equal_seeds():
    a, b = [0.5, 0.7, 0.4, 0.8], [0.3, 0.4, 0.35, 0.6]
    judgement = Judgement.on(paired_interval(a, b), "reproduced", "")
    result = {"effect": judgement.effect, "ci": judgement.ci, "sd": judgement.sd, "claimed": (0, math.inf)}
    assert standardised(result).estimate == pytest.approx(paired_effect(a, b))


def test_what_is_lower_by_the_claim_is_turned_and_lies_as_what_is_higher():
    assert standardised(LOWER) == standardised(BETTER)
    assert standardised(BETTER).estimate == pytest.approx(2)
    assert standardised(BETTER).claimed == (0, math.inf)


def test_a_loss_that_may_be_no_more_than_a_margin_starts_on_the_left_of_zero():
    effect = standardised(NOT_WORSE)
    assert (effect.estimate, effect.low, effect.high) == pytest.approx((-1, -3, 1))
    assert effect.claimed == pytest.approx((-2, math.inf))  # the interval crosses it, as 0.03 does 0.02


def test_an_equivalence_is_not_turned_and_has_two_limits():
    effect = standardised(EQUAL)
    assert (effect.estimate, effect.low, effect.high) == pytest.approx((-1, -3, 1))
    assert effect.claimed == pytest.approx((-2, 2))


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seeds": [0], "sd": "nan", "ci": ["-inf", "inf"]}, "one seed"), ({"sd": 0.0}, "seeds all the same")],
)
def test_what_has_no_spread_has_no_place_and_says_why(change, told):
    (trace,) = traces(forest_figure([BETTER | change]), "a")
    assert told in trace.text[0] and trace.mode == "text"


def test_an_interval_without_end_is_an_arrow_at_the_edge():
    shade, interval, point = traces(forest_figure([BETTER | {"ci": ["-inf", 0.3]}]), "a")
    assert interval.marker.symbol == ("triangle-left", "line-ns")
    assert interval.x == pytest.approx((-math.asinh(3), math.asinh(3)))
    assert point.x == pytest.approx((math.asinh(2),))
    assert shade.x[0] == 0 and shade.x[1] > math.asinh(3)


def test_what_is_very_far_is_drawn_at_the_edge_and_told_in_full():
    figure = forest_figure([BETTER | {"sd": 1e-6}])
    _, interval, point = traces(figure, "a")
    assert interval.marker.symbol == ("triangle-right", "triangle-right")
    assert point.x == pytest.approx((math.asinh(FARTHEST),)) and "+2e+05" in point.hovertemplate
    assert figure.layout.xaxis.range[1] < 1.1 * math.asinh(FARTHEST)


def test_rows_keep_their_order_and_the_key_names_each_verdict_once():
    figure = forest_figure([BETTER, LOWER | {"verdict": "not reproduced"}, EQUAL], theme="dark")
    assert figure.layout.yaxis.categoryarray == ("a", "b", "d")
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["reproduced", "not reproduced"]
    assert "asinh" in figure.layout.xaxis.title.text and "standard deviation" in figure.layout.xaxis.title.text


def test_nothing_to_show_is_an_empty_figure():
    assert not forest_figure([]).data
