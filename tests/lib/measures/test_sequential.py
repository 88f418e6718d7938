"""Intervals that hold at every look: against the integral they come from, by their errors over all looks, by hand."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from workbench.errors import InputError
from workbench.lib.measures import sequential, statistics

A, B = [3.1, 2.9, 3.4, 3.0, 3.3, 3.2], [3.0, 3.2, 3.1, 2.8, 3.5, 2.7]
REPETITIONS, LOOKS = 4000, range(2, 41)


@pytest.mark.parametrize(("t", "n"), [(0.0, 5), (1.3, 2), (2.5, 5), (-3.0, 12), (6.0, 8)])
def test_the_evidence_is_the_mixed_likelihood_over_that_of_the_tested_mean(t, n):
    """By integration of the noncentral t, which is what is left of the values when no scale is given."""

    def mixed(low: float) -> float:
        def density(d: float) -> float:
            return stats.nct.pdf(t, n - 1, d * n**0.5) * stats.norm.pdf(d, scale=sequential.G**0.5)

        return integrate.quad(density, low, 8, limit=400)[0] / stats.t.pdf(t, n - 1)

    assert math.exp(sequential.log_evidence(t, n)) == pytest.approx(mixed(-8), rel=1e-8)
    assert math.exp(sequential._log_evidence_above(t, n)) == pytest.approx(2 * mixed(0), rel=1e-8)


def test_the_interval_holds_the_means_with_less_evidence_than_its_level_asks_for():
    for level in (0.9, 0.95, 0.99):
        found = sequential.mean_interval(A, level)
        se = np.std(A, ddof=1) / len(A) ** 0.5
        for end in (found.low, found.high):
            assert sequential.log_evidence((found.estimate - end) / se, len(A)) == pytest.approx(-math.log1p(-level))
        assert (found.estimate, found.n, found.level) == (pytest.approx(np.mean(A)), 6, level)
    assert sequential.paired_interval(A, B) == sequential.mean_interval(np.subtract(A, B))
    assert sequential.mean_interval(A).high > statistics.mean_interval(A).high


def test_few_values_leave_it_open_and_equal_ones_close_it():
    for n in (1, 2, 3):
        found = sequential.mean_interval(A[:n])
        assert (found.low, found.high, found.n) == (-math.inf, math.inf, n)
        equal = sequential.paired_tost(A[:n], B[:n], 9.0)
        assert equal.ci90 == (-math.inf, math.inf) and not equal.equivalent
    assert math.isfinite(sequential.mean_interval(A[:4]).high) and sequential.paired_tost(A[:4], B[:4], 9.0).equivalent
    same = sequential.mean_interval([0.5] * 4)
    assert (same.low, same.high) == (0.5, 0.5)
    assert sequential.mean_interval([0.5] * 3).low == -math.inf
    assert math.isnan(sequential.paired_p(A[:1], B[:1])) and math.isnan(statistics.paired_p(A[:1], B[:1]))


def test_equivalence_is_an_interval_within_the_margin_and_p_says_the_same():
    base = np.random.default_rng(0).normal(size=20)
    close = base + np.random.default_rng(1).normal(0.1, 0.3, size=20)
    found = sequential.paired_tost(close, base, 1.0)
    assert found.equivalent and found.p < 0.05
    width = max(abs(end) for end in found.ci90)
    assert sequential.paired_tost(close, base, width * 1.001).equivalent
    assert sequential.paired_tost(close, base, width).p == pytest.approx(0.05, rel=1e-6)
    assert not sequential.paired_tost(close, base, width * 0.999).equivalent
    assert width > max(abs(end) for end in statistics.paired_tost(close, base, 1.0).ci90)


def test_p_of_a_difference_is_the_inverse_evidence():
    t = stats.ttest_rel(A, B).statistic
    evidence = math.exp(sequential.log_evidence(t, 6))
    assert evidence < 1 and sequential.paired_p(A, B) == 1.0
    t = stats.ttest_1samp(A, 2.9).statistic
    assert sequential.paired_p(A, [2.9] * 6) == pytest.approx(1 / math.exp(sequential.log_evidence(t, 6)))
    assert sequential.paired_p([5.0, 6.1, 7.0, 8.0, 9.2], [0.0, 1.0, 2.1, 3.0, 4.0]) < 0.05
    assert sequential.paired_p([1.0] * 9, [0.0] * 9) == pytest.approx((1 + 9 * sequential.G) ** -4.0)
    assert statistics.paired_p(A, B) == pytest.approx(stats.ttest_rel(A, B).pvalue)
    assert (statistics.paired_p([1.0, 2.0], [0.0, 1.0]), statistics.paired_p(A, A)) == (0.0, 1.0)


def over_all_looks(mean: float = 0.0) -> np.ndarray:
    """t of the first n values, (repetitions, looks): standard normal ones, against a mean of 0."""
    values = np.random.default_rng(7).normal(mean, size=(REPETITIONS, LOOKS[-1]))
    n = np.arange(1, LOOKS[-1] + 1)
    means = values.cumsum(1) / n
    squares = (values**2).cumsum(1) - n * means**2
    return (means[:, 1:] / np.sqrt(squares[:, 1:] / (n[1:] - 1) / n[1:]))[:, : len(LOOKS)]


def most(errors: float) -> float:
    """An observed rate that a true rate of `errors` stays below in all but 1 of 1,000 simulations."""
    return stats.binom.ppf(0.999, REPETITIONS, errors) / REPETITIONS


def test_no_other_spread_of_means_is_narrower_by_much(monkeypatch: pytest.MonkeyPatch):
    def widths(g: float) -> np.ndarray:
        monkeypatch.setattr(sequential, "G", g)
        return np.array([sequential._critical(n, 0.05) for n in range(6, 17)])

    here = widths(sequential.G)
    assert all((widths(g) > here / 1.03).all() for g in (0.3, 0.5, 1.0, 1.5, 3.0, 4.0, 6.0, 10.0))


def test_coverage_over_all_looks_and_that_of_the_usual_interval_is_lost():
    t = np.abs(over_all_looks())
    ever = (t > [sequential._critical(n, 0.05) for n in LOOKS]).any(1).mean()
    usual = (t > [stats.t.ppf(0.975, n - 1) for n in LOOKS]).any(1).mean()
    assert 0.01 < ever <= most(0.05)  # no wider than needed either
    assert usual > 0.25  # what this test is there to see
    one_sided = (over_all_looks() > [sequential._critical_above(n, 0.05) for n in LOOKS]).any(1).mean()
    assert 0.01 < one_sided <= most(0.05)


def test_the_simulation_speaks_of_the_intervals_themselves():
    values = np.random.default_rng(7).normal(size=(REPETITIONS, LOOKS[-1]))[:40]
    t = over_all_looks()[:40]
    for n in (5, 12, 40):
        out = [sequential.mean_interval(row[:n]).excludes(0.0) for row in values]
        assert out == (np.abs(t[:, n - 2]) > sequential._critical(n, 0.05)).tolist()


def test_a_true_difference_is_found():
    t = over_all_looks(mean=1.0)
    assert (t > [sequential._critical(n, 0.05) for n in LOOKS])[:, : 20 - 1].any(1).mean() > 0.8


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: sequential.mean_interval([]), "values has shape"),
        (lambda: sequential.mean_interval(A, 1.0), "level is 1.0"),
        (lambda: sequential.paired_interval(A, B[:3]), "a has 6 values"),
        (lambda: sequential.paired_tost(A, B, 0.0), "margin is 0.0"),
        (lambda: sequential.paired_p(A, [math.nan] * 6), "b holds nan"),
    ],
)
def test_bad_input(call, part):
    with pytest.raises(InputError, match=part):
        call()
