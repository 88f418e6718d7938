"""Intervals, equivalence and effects: against statsmodels and scipy, by hand, and by their coverage."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from workbench.errors import InputError
from workbench.lib.measures.statistics import (
    bootstrap_interval,
    hedges_g,
    holm,
    mean_interval,
    paired_effect,
    paired_interval,
    paired_p,
    seeds_needed,
    spearman,
    tost,
    welch_interval,
)

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
A, B = [3.1, 2.9, 3.4, 3.0, 3.3], [3.0, 3.2, 3.1, 2.8, 3.5]
samples = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@pytest.mark.parametrize("margin", [0.05, 0.2, 0.5, 3.0])
def test_tost_against_statsmodels(margin):
    p, (_, p_lower, df), (_, p_upper, _) = ttost_ind(np.array(A), np.array(B[:4]), -margin, margin, usevar="unequal")
    ours = tost(A, B[:4], margin)
    assert (ours.p, ours.p_lower, ours.p_upper) == pytest.approx((p, p_lower, p_upper), abs=1e-10)
    assert ours.df == pytest.approx(df)
    expected = scipy.stats.ttest_ind(A, B[:4], equal_var=False).confidence_interval(0.9)
    assert ours.ci90 == pytest.approx(tuple(expected))
    p, (_, p_lower, df), (_, p_upper, _) = ttost_paired(np.array(A), np.array(B), -margin, margin)
    ours = tost(A, B, margin, paired=True)
    assert (ours.p, ours.p_lower, ours.p_upper) == pytest.approx((p, p_lower, p_upper), abs=1e-10)
    assert ours.df == df == 4


@PROPERTY
@given(samples, samples, st.floats(0.01, 20), st.booleans())
def test_tost_properties(a, b, margin, paired):
    if paired:
        a, b = a[: min(len(a), len(b))], b[: min(len(a), len(b))]
    one, two = tost(a, b, margin, paired), tost(b, a, margin, paired)
    assert one.p == pytest.approx(two.p, abs=1e-12) and one.diff == -two.diff
    assert (one.p_lower, one.p_upper) == pytest.approx((two.p_upper, two.p_lower), abs=1e-12)
    assert 0 <= one.p <= 1 and one.p == max(one.p_lower, one.p_upper)
    low, high = one.ci90
    assume(min(abs(low + margin), abs(high - margin)) > 1e-9)  # away from the boundary, where rounding decides
    assert one.equivalent == (one.p < 0.05) == (-margin < low and high < margin)
    if abs(one.diff) > margin:
        assert not one.equivalent
    wider = tost(a, b, 2 * margin, paired)
    assert wider.p <= one.p + 1e-12
    assert tost(a, b, 1e9, paired).p < 0.05


def test_no_significant_difference_is_not_equivalence():
    a, b = [1.0, 5.0, 3.0], [2.0, 6.5, 3.0]
    assert scipy.stats.ttest_ind(a, b, equal_var=False).pvalue > 0.5
    assert not tost(a, b, 0.5).equivalent


def test_tost_without_spread():
    single = tost([1.0], [1.0], 0.1)
    assert math.isnan(single.p) and not single.equivalent and single.ci90 == (-math.inf, math.inf)
    assert "one value" in single.undefined_reason
    same, far, on = tost([0.1] * 3, [0.1] * 3, 0.1), tost([1.0] * 3, [2.0] * 3, 0.1), tost([0.0] * 3, [1.0] * 3, 1.0)
    assert same.equivalent and same.p == 0 and same.undefined_reason is None
    assert not far.equivalent and far.p == 1
    assert not on.equivalent  # on the margin


def test_tost_error_rate_at_the_margin():
    """At a true difference equal to the margin, "equivalent" is said in 5 % of the cases."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (1500, 8)), rng.normal(1.5, 1, (1500, 8))
    rate = np.mean([tost(x, y, 1.5).equivalent for x, y in zip(a, b, strict=True)])
    assert rate == pytest.approx(0.05, abs=0.02)


def test_p_of_a_paired_difference():
    assert math.isnan(paired_p([1.0], [0.0]))
    assert paired_p([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired_p([1.5, 2.5], [1.0, 2.0]) == 0.0
    assert paired_p([1.0, 2.0, 4.0], [0.0, 1.5, 3.5]) == pytest.approx(0.0572, abs=1e-4)  # t = 4, 2 degrees of freedom
    assert paired_p(A, B) == pytest.approx(scipy.stats.ttest_rel(A, B).pvalue)


def test_intervals_against_scipy():
    x = mean_interval(A, 0.9)
    assert (x.low, x.high) == pytest.approx(scipy.stats.ttest_1samp(A, 0).confidence_interval(0.9))
    assert (x.n, x.level) == (5, 0.9) and x.estimate == pytest.approx(np.mean(A))
    x = paired_interval(A, B)
    assert (x.low, x.high) == pytest.approx(scipy.stats.ttest_rel(A, B).confidence_interval(0.95))
    assert -x == paired_interval(B, A)
    x = welch_interval(A, B[:3])
    expected = scipy.stats.ttest_ind(A, B[:3], equal_var=False).confidence_interval(0.95)
    assert (x.low, x.high) == pytest.approx(expected) and x.n == 8
    assert x.excludes(100) and not x.excludes(x.estimate)


def test_one_seed_gives_an_open_interval():
    for interval in (mean_interval([2.0]), paired_interval([2.0], [1.0]), welch_interval([2.0], A)):
        assert (interval.low, interval.high) == (-math.inf, math.inf)
        assert not interval.excludes(1e9)
    assert mean_interval([0.1] * 3).low == mean_interval([0.1] * 3).high == pytest.approx(0.1)


def test_coverage_of_the_welch_interval():
    rng = np.random.default_rng(0)
    covered = [
        not welch_interval(x, y).excludes(-1.0)
        for x, y in zip(rng.normal(0, 1, (1000, 4)), rng.normal(1, 3, (1000, 6)), strict=True)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("standardised", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("power", "level"), [(0.8, 0.95), (0.9, 0.9)])
def test_seeds_needed_against_statsmodels(standardised, power, level):
    exact = TTestPower().solve_power(standardised, None, 1 - level, power)
    assert seeds_needed(0.02, 0.02 * standardised, power, level) == math.ceil(exact)


def test_seeds_needed_are_enough_and_no_more():
    n = seeds_needed(1.0, 1.0)
    x = np.random.default_rng(3).normal(1.0, size=(4000, n))

    def found(n: int) -> float:
        return (scipy.stats.ttest_1samp(x[:, :n], 0.0, axis=1).confidence_interval().low > 0).mean()

    assert found(n) > 0.78 and found(n - 1) < 0.8
    assert seeds_needed(0.0, 1.0) == seeds_needed(1e-9, 1.0) == 2


def test_holm_by_hand_and_against_statsmodels():
    assert holm([0.03, 0.01, 0.5, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])
    p_values = np.random.default_rng(0).uniform(size=7) ** 3
    np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], atol=1e-12)


@PROPERTY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_properties(p_values):
    adjusted, p = holm(p_values), np.array(p_values)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1, len(p) * p.min()))


def test_effect_sizes_by_hand():
    # means 2 and 4, both variances 1: d = -2, correction 1 - 3/(4*4 - 1)
    assert hedges_g([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]) == pytest.approx(-2 * (1 - 3 / 15))
    assert paired_effect([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]) == pytest.approx(2.0)  # differences 1, 2, 3
    assert math.isnan(hedges_g([1.0], [1.0, 2.0])) and math.isnan(hedges_g([1.0, 1.0], [2.0, 2.0]))
    assert math.isnan(paired_effect([1.0], [2.0])) and math.isnan(paired_effect([0.5, 1.5], [0.0, 1.0]))


def test_hedges_g_is_unbiased():
    rng = np.random.default_rng(0)
    g = [hedges_g(x, y) for x, y in zip(rng.normal(1, 1, (4000, 5)), rng.normal(0, 1, (4000, 5)), strict=True)]
    assert np.mean(g) == pytest.approx(1.0, abs=0.04)


def test_bootstrap():
    values = np.random.default_rng(0).exponential(size=60)
    interval = bootstrap_interval(values, np.median, seed=1)
    assert interval.low < np.median(values) == interval.estimate < interval.high
    assert interval == bootstrap_interval(values, np.median, seed=1)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=5000, rng=np.random.default_rng(3))
    ours = bootstrap_interval(values)
    assert (ours.low, ours.high) == pytest.approx(tuple(expected.confidence_interval), rel=0.05)
    assert bootstrap_interval([3.0]).high == math.inf
    assert bootstrap_interval([3.0, 3.0]).low == bootstrap_interval([3.0, 3.0]).high == 3
    skewed = bootstrap_interval([1.0, 1.0, 1.0, 1.0, 2.0], np.median)  # no acceleration: percentiles
    assert 1 <= skewed.low <= skewed.high <= 2


def test_spearman():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    interval = spearman(x, y)
    assert interval.estimate == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    half = 1.959964 * math.sqrt((1 + interval.estimate**2 / 2) / 37)
    z = math.atanh(interval.estimate)
    assert (interval.low, interval.high) == pytest.approx((math.tanh(z - half), math.tanh(z + half)))
    assert spearman(x, -y).estimate == pytest.approx(-interval.estimate)
    perfect = spearman([1, 2, 3, 4, 5], [1, 4, 9, 16, 25])
    assert perfect.estimate == perfect.high == pytest.approx(1) and perfect.low < 0.7  # five points are no certainty
    few, constant = spearman([1, 2, 3], [3, 1, 2]), spearman([1, 1, 1, 1], [1, 2, 3, 4])
    assert (few.low, few.high) == (constant.low, constant.high) == (-1, 1)
    assert not math.isnan(few.estimate) and math.isnan(constant.estimate)


def test_coverage_of_the_spearman_interval():
    rng = np.random.default_rng(1)
    rho = 0.6
    true = 6 / math.pi * math.asin(rho / 2)  # of a bivariate normal
    z = rng.normal(size=(600, 2, 30))
    covered = [spearman(u, rho * u + math.sqrt(1 - rho**2) * v) for u, v in z]
    assert np.mean([not i.excludes(true) for i in covered]) == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: tost(A, B, 0), "margin is 0"),
        (lambda: tost(A, B, -1.0), "margin is -1"),
        (lambda: tost(A, [], 1), "b has shape"),
        (lambda: tost([1.0, math.nan], B, 1), "a holds nan"),
        (lambda: paired_interval(A, B[:3]), "a has 5 values"),
        (lambda: mean_interval(A, 95), "level is 95"),
        (lambda: seeds_needed(-1.0, 1.0), "deviation is -1"),
        (lambda: seeds_needed(1.0, 0.0), "effect is 0"),
        (lambda: seeds_needed(1.0, 1.0, power=1.0), "power is 1"),
        (lambda: holm([0.5, 1.5]), "p_values holds 1.5"),
        (lambda: spearman(A, B[:2]), "x has 5 values"),
        (lambda: mean_interval(np.ones((2, 2))), "values has shape"),
    ],
)
def test_bad_input(call, part):
    with pytest.raises(InputError, match=part):
        call()
