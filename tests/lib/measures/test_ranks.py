"""Correlations of ranks: as scipy has them, and what a control takes out."""

import math

import numpy as np
import pytest
from scipy import stats

from workbench.errors import InputError
from workbench.lib.measures.ranks import kendall, partial_spearman, pearson, rank_report, spearman


def drawn(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x, z = random.normal(size=30), random.normal(size=30)
    y = x + z + random.normal(size=30)
    return tuple(np.round(one) if ties else one for one in (x, y, z))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_as_scipy_has_them(seed: int, ties: bool):
    x, y, z = drawn(seed, ties)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    ranks = [stats.rankdata(one) for one in (x, y, z)]
    fit = np.stack([ranks[2], np.ones(30)], 1)
    left = [one - fit @ np.linalg.lstsq(fit, one, rcond=None)[0] for one in ranks[:2]]
    assert partial_spearman(x, y, z) == pytest.approx(stats.pearsonr(*left).statistic)


def test_a_report_has_estimates_within_their_intervals():
    x, y, z = drawn(0, False)
    report = rank_report(x, y, z, samples=200)
    for one in (report.spearman, report.kendall, report.pearson, report.partial):
        assert -1 <= one.low <= one.estimate <= one.high <= 1 and one.n == 30
    assert report == rank_report(x, y, z, samples=200) and "partial" in str(report)
    assert rank_report(x, y, samples=10).partial is None
    turned = rank_report(-x, y, samples=10).spearman
    assert turned.estimate == pytest.approx(-report.spearman.estimate)


def test_a_control_that_says_it_all_leaves_nothing():
    x, y, _ = drawn(1, False)
    assert math.isnan(partial_spearman(x, y, x)) and math.isnan(spearman(x, np.ones(30)))
    assert partial_spearman(x, y, np.ones(30)) == pytest.approx(spearman(x, y))


@pytest.mark.parametrize(
    ("scores", "truth", "given", "said"),
    [
        ([1, 2, 3], [1, 2, 3], None, "scores has 3 items but must have at least 4"),
        ([1, 2, 3, 4], [1, 2, 3], None, "truth has 3 numbers but scores has 4"),
        ([1, 2, 3, 4], [1, 2, 3, 4], [1], "given has 1 numbers but scores has 4"),
        ([1, 2, 3, math.nan], [1, 2, 3, 4], None, "scores holds nan"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores, truth, given, said: str):
    with pytest.raises(InputError, match=said):
        rank_report(scores, truth, given)
