"""Schedules of experts over depth: length, totals, symmetry."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.schedules import SCHEDULES, expert_schedule

kinds = st.sampled_from(SCHEDULES)
layers = st.integers(1, 12)
ranges = st.tuples(st.integers(2, 9), st.integers(0, 9)).map(lambda pair: (pair[0], sum(pair)))
extra = st.integers(0, 60)


@given(kinds, layers, ranges, st.none() | extra, st.sampled_from([1, 1.5, 2]))
def test_length_minimum_and_exact_total(kind, n_layers, span, more, cycles):
    total = None if more is None else 2 * n_layers + more
    schedule = expert_schedule(kind, n_layers, *span, total=total, cycles=cycles)
    assert len(schedule) == n_layers and min(schedule) >= 2
    assert all(isinstance(n, int) for n in schedule)
    if total is None:
        assert span[0] <= min(schedule) and max(schedule) <= span[1]
    else:
        assert sum(schedule) == total


@given(layers, ranges, st.none() | extra)
def test_ascending_is_descending_reversed_and_monotone(n_layers, span, more):
    total = None if more is None else 2 * n_layers + more
    descending = expert_schedule("descending", n_layers, *span, total)
    assert expert_schedule("ascending", n_layers, *span, total) == descending[::-1]
    assert descending == sorted(descending, reverse=True)


@given(st.sampled_from(["pyramid", "valley"]), layers, ranges, st.none() | extra)
def test_pyramid_and_valley_are_symmetric_wherever_the_total_allows_it(kind, n_layers, span, more):
    total = None if more is None else 2 * n_layers + more
    schedule = expert_schedule(kind, n_layers, *span, total)
    if total is None or n_layers % 2 or total % 2 == 0:
        assert schedule == schedule[::-1]
    else:
        assert sorted(abs(a - b) for a, b in zip(schedule, schedule[::-1], strict=True))[-3:-2] in ([], [0])


@given(layers, ranges, st.integers(2, 20))
def test_uniform_is_constant(n_layers, span, each):
    assert len(set(expert_schedule("uniform", n_layers, *span))) == 1
    assert expert_schedule("uniform", n_layers, *span, total=each * n_layers) == [each] * n_layers


def test_the_six_shapes_by_hand():
    expected = {
        "uniform": [5, 5, 5, 5, 5, 5],
        "descending": [8, 7, 6, 4, 3, 2],  # 8, 6.8, 5.6, 4.4, 3.2, 2
        "ascending": [2, 3, 4, 6, 7, 8],
        "pyramid": [2, 5, 8, 8, 5, 2],  # 2, 4.4, 6.8, 6.8, 4.4, 2 times 30 / 26.4
        "valley": [7, 5, 3, 3, 5, 7],  # 8, 5.6, 3.2, 3.2, 5.6, 8 times 30 / 33.6
        "wave": [5, 8, 7, 3, 2, 5],  # 5, 7.85, 6.76, 3.24, 2.15, 5
    }
    assert {kind: expert_schedule(kind, 6, 2, 8, total=30) for kind in SCHEDULES} == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("falling", 6, 2, 8), "kind 'falling' is unknown"),
        (("uniform", 0, 2, 8), "n_layers is 0"),
        (("uniform", 6, 1, 8), "n_min and n_max are 1 and 8"),
        (("uniform", 6, 8, 2), "n_min and n_max are 8 and 2"),
        (("uniform", 6, 2, 8, 11), "total is 11"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        expert_schedule(*arguments)
