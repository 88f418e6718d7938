"""Fits of measured times: a line is found again, collectives take what their steps take, tables never fall."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel, RateTable, relative_errors

SIZES = [4e3, 4e4, 4e5, 4e6, 8e6]
positive = st.floats(1e-6, 1e3)


@given(st.floats(1e-6, 1e-2), st.floats(1e-10, 1e-7))
def test_a_line_is_found_again(alpha, beta):
    true = LinkModel(alpha, beta)
    found = LinkModel.fit(SIZES, [true.seconds(n) for n in SIZES])
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-5)


def test_small_sizes_count_as_much_as_large_ones():
    """By absolute errors 5 % of the largest would be worth a hundred times the latency."""
    true, noise = LinkModel(1e-4, 1e-8), [1, 1, 1, 1.05, 0.95]
    found = LinkModel.fit(SIZES, [true.seconds(n) * e for n, e in zip(SIZES, noise, strict=True)])
    assert found.alpha == pytest.approx(1e-4, rel=0.1) and found.beta == pytest.approx(1e-8, rel=0.05)


def test_neither_number_is_negative():
    found = LinkModel.fit([1, 2, 4], [1, 3, 8])
    assert found.alpha == 0 and found.beta > 0
    assert LinkModel.fit([1, 2, 4], [4, 3, 3]).beta == 0


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_collectives_take_the_time_of_their_steps(ranks):
    link, n = LinkModel(0.5, 2.0), 240.0
    step = 0.5 + 2 * n / ranks
    assert link.all_reduce(n, ranks) == pytest.approx(2 * (ranks - 1) * step)
    assert link.reduce_scatter(n, ranks) == link.all_gather(n, ranks) == link.all_to_all(n, ranks)
    assert link.all_to_all(n, ranks) == pytest.approx((ranks - 1) * step)
    # on one medium all bytes of all ranks follow one another: 2 (ranks - 1) n in all
    assert link.all_reduce(n, ranks, shared=True) == pytest.approx(2 * (ranks - 1) * (0.5 + 2 * n))


def test_nothing_sent_takes_no_time():
    assert LinkModel(1, 1).seconds(0) == 0 and LinkModel(1, 1).all_reduce(0, 4) == 0


tables = st.lists(st.tuples(st.integers(1, 1000), positive), min_size=1, max_size=8, unique_by=lambda pair: pair[0])


@given(tables, st.lists(st.floats(0.1, 3000), min_size=2, max_size=8))
def test_a_table_never_falls_and_is_its_own_inverse(pairs, at):
    table = RateTable(*map(tuple, zip(*pairs, strict=True)))
    found = [table.seconds(n) for n in sorted(at)]
    assert found == sorted(found) or np.diff(found).min() > -1e-9 * max(found)
    assert RateTable.from_dict(table.to_dict()) == table


def test_a_table_goes_through_what_was_measured_and_keeps_its_rate_above():
    table = RateTable((100, 1, 10), (10.0, 1.0, 2.0))
    assert [table.seconds(n) for n in (0, 0.5, 1, 10, 55, 100, 300)] == [0, 1, 1, 2, 6, 10, 30]
    assert table.rate(100) == 10
    assert RateTable((1, 2, 3), (1.0, 5.0, 3.0)).times == (1, 4, 4)  # the nearest that never falls


def test_a_table_measures_each_size_after_a_warm_up():
    calls: list[int] = []
    table = RateTable.measure(calls.append, [1, 2], repeats=5)
    assert calls == [1, 2] * 6 and table.sizes == (1, 2) and min(table.times) > 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LinkModel(-1, 0), "alpha is -1"),
        (lambda: LinkModel(0, float("nan")), "beta is nan"),
        (lambda: LinkModel.fit([1, 1], [1, 2]), "needs at least 2"),
        (lambda: LinkModel.fit([1, 2], [1]), "shapes"),
        (lambda: LinkModel.fit([1, 2], [1, 0]), "above 0"),
        (lambda: LinkModel(1, 1).all_reduce(1, 0), "ranks is 0"),
        (lambda: RateTable((), ()), "shapes"),
        (lambda: RateTable((1, 1), (1, 2)), "each size once"),
        (lambda: RateTable.measure(lambda n: None, [1], repeats=3), "repeats is 3"),
        (lambda: relative_errors([1], [0]), "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_errors_are_relative_to_what_was_measured():
    assert relative_errors([11, 9], [10, 10]) == pytest.approx([0.1, 0.1])
