"""The figure of a study: every seed, means with intervals, the verdict."""

import numpy as np
import pytest
from scipy import stats

from workbench.figures.study import study_figure

RESULT = {
    "slug": "equifinality",
    "title": "Learned against fixed routing",
    "metric": "bits_per_byte",
    "unit": "bits/byte",
    "higher_is_better": False,
    "arms": [
        {"arm": arm, "seed": seed, "metric": value + 0.01 * seed}
        for arm, value in (("learned", 2.1), ("fixed", 2.2))
        for seed in range(3)
    ],
    "effect": 0.1,
    "ci": [0.08, 0.12],
    "verdict": "reproduced",
    "rule": "the interval excludes 0",
}


def test_seeds_mean_and_interval_of_every_arm():
    figure = study_figure(RESULT)
    seeds, mean = figure.data[:2]
    assert list(seeds.x) == pytest.approx([2.1, 2.11, 2.12])
    assert list(mean.x) == pytest.approx([2.11])
    half = stats.t.ppf(0.975, 2) * stats.sem([2.1, 2.11, 2.12])
    assert mean.error_x.array[0] == pytest.approx(half)
    assert list(figure.layout.yaxis.ticktext) == ["learned", "fixed"]


def test_where_seeds_were_added_the_intervals_hold_at_every_look():
    arms = [{"arm": "one", "seed": seed, "metric": value} for seed, value in enumerate([2.1, 2.3, 2.2, 2.0, 2.4, 2.1])]
    once, growing = (study_figure(RESULT | {"arms": arms, "growing": growing}).data[1] for growing in (False, True))
    assert growing.error_x.array[0] > once.error_x.array[0] and growing.x == once.x
    few = study_figure(RESULT | {"growing": True}).data[1]  # three seeds leave it open
    assert np.isnan(few.error_x.array[0])


def test_the_verdict_and_the_effect_are_said():
    text = study_figure(RESULT).layout.title.text
    assert "reproduced" in text and "effect +0.1 [+0.08, +0.12]" in text
    assert "lower is better" in study_figure(RESULT).layout.xaxis.title.text


def test_what_looks_like_a_tag_is_shown_as_it_is():
    arms = [row | {"arm": "<b>&"} for row in RESULT["arms"][:1]]
    figure = study_figure(RESULT | {"title": '<b>&"', "arms": arms})
    assert '<b>&lt;b&gt;&amp;"</b>' in figure.layout.title.text  # plotly knows no entity for a quote
    assert figure.layout.yaxis.ticktext == ("&lt;b&gt;&amp;",)


def test_a_single_seed_has_no_interval_and_an_undefined_effect_is_left_out():
    result = RESULT | {"arms": RESULT["arms"][:1], "effect": float("nan"), "ci": [float("nan")] * 2}
    figure = study_figure(result, theme="dark")
    assert np.isnan(figure.data[1].error_x.array[0])
    assert "effect" not in figure.layout.title.text
