"""The sweep: every arm at its own best rate, chosen on validation and scored on test."""

import pytest

from workbench.errors import InputError
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import edges, rate_range, sweep


def test_the_best_rate_is_that_of_validation_and_the_score_that_of_test():
    scores = {0.001: (0.2, 0.9), 0.01: (0.8, 0.5), 0.1: (0.8, 0.7)}
    swept = sweep(scores.__getitem__, (0.001, 0.01, 0.1))
    assert (swept.best, swept.metric) == (1, 0.5)  # not the best of test, and of two that tie the smaller
    assert swept.extra()["best_rate"] == 0.01 and swept.extra()["at_edge"] == 0


def test_a_rate_that_diverges_scores_nothing():
    def learn(rate):
        if rate == 0.1:
            raise FloatingPointError
        return rate, rate

    assert sweep(learn, (0.001, 0.01, 0.1)).test == (0.001, 0.01, 0.0)


@pytest.mark.parametrize("rates", [(0.01, 0.1), (0.1, 0.001), (0.001, 0.001, 0.1), (), (0.1,)])
def test_rates_must_ascend_over_two_decades(rates):
    with pytest.raises(InputError, match=r"rates are .* but must ascend, over at least 2 decades"):
        sweep(lambda rate: (0.0, 0.0), rates)


def test_an_end_of_the_sweep_is_said():
    def rows(*scores):
        swept = [sweep(dict(zip((0.1, 1.0, 10.0), s, strict=True)).__getitem__, (0.1, 1.0, 10.0)) for s in scores]
        return Rows(Row("arm", seed, 1, 1, 1, 1, s.metric, s.extra()) for seed, s in enumerate(swept))

    inside = [(0.1, 0.2), (0.5, 0.4), (0.2, 0.1)]
    assert edges(rows(inside)) == ""
    assert "arm (1 of 2 seeds)" in edges(rows(inside, [*inside[:2], (0.9, 0.9)]))
    assert rate_range(rows(inside), "arm") == [pytest.approx(0.3)]


def test_of_losses_the_lowest_is_best_and_a_rate_that_diverges_scores_the_worst():
    def learn(rate):
        if rate == 0.1:
            raise FloatingPointError
        return {0.001: (2.5, 2.0), 0.01: (2.25, 2.2)}[rate]

    swept = sweep(learn, (0.001, 0.01, 0.1), worst=8.0, lower_is_better=True)
    assert (swept.best, swept.metric, swept.test) == (1, 2.2, (2.0, 2.2, 8.0))
