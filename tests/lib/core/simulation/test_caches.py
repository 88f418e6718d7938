"""Caches of experts: what each rule forgets, what none may do, and the bound of all of them."""

import math
from functools import cache as once
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.simulation.caches import LFU, LRU, MRS, Belady, Cache, replay

E = 6


@st.composite
def traces(draw: st.DrawFn) -> tuple[int, list[set[int]], list[list[float]]]:
    """A capacity, the experts of some steps, and scores."""
    capacity = draw(st.integers(1, E))
    steps = draw(st.lists(st.sets(st.integers(0, E - 1), max_size=capacity, min_size=1), min_size=1, max_size=12))
    row = st.lists(st.sampled_from((0.0, 0.1, 0.25, 0.5)), min_size=E, max_size=E)
    return capacity, steps, draw(st.lists(row, min_size=len(steps), max_size=len(steps)))


def rules(capacity: int, steps: list[set[int]]) -> list[Cache]:
    return [LRU(capacity), LFU(capacity), MRS(capacity, E, top=2), Belady(capacity, steps)]


@once
def fewest_misses(capacity: int, steps: tuple[frozenset[int], ...], held: frozenset[int] = frozenset()) -> int:
    """By trying everything that may be kept after each step."""
    if not steps:
        return 0
    now, rest = steps[0], steps[1:]
    others, room = held - now, capacity - len(now)
    ways = combinations(sorted(others), min(room, len(others)))
    return len(now - held) + min(fewest_misses(capacity, rest, now | {*kept}) for kept in ways)


@given(traces())
def test_no_rule_beats_belady_and_no_plan_either(trace):
    capacity, steps, scores = trace
    *others, bound = (replay(cache, steps, scores) for cache in rules(capacity, steps))
    assert bound.requests - bound.hits == fewest_misses(capacity, tuple(map(frozenset, steps)))
    for found in others:
        assert found.requests == bound.requests == sum(map(len, steps)) and found.hits <= bound.hits


@given(traces())
def test_capacity_is_never_exceeded_and_what_is_protected_stays(trace):
    capacity, steps, scores = trace
    for cache in rules(capacity, steps):
        for needed, row in zip(steps, scores, strict=True):
            cache.observe(row)
            cache.use(needed)
            for expert in sorted(needed):
                here = {*cache.resident}
                gone = cache.admit(expert, needed)
                assert gone not in needed and len(cache) <= capacity
                assert {*cache.resident} == (here | {expert}) - {gone}
                assert gone is None or len(here) == capacity
            assert needed <= {*cache.resident}


@given(traces())
def test_a_cache_for_all_misses_each_expert_once(trace):
    _, steps, scores = trace
    for cache in rules(E, steps):
        found = replay(cache, steps, scores)
        assert found.requests - found.hits == len(set().union(*steps)) and found.evictions == 0


def test_what_each_rule_forgets():
    steps = [{0}, {0}, {1}, {2}, {0}, {2}]
    scores = [[0.5, 0.3, 0.2, 0], [0.5, 0.3, 0.2, 0], [0, 0.9, 0.1, 0]]
    for cache, first in ((LRU(2), 0), (LFU(2), 1), (MRS(2, 4, top=2), 0), (Belady(2, steps), 1)):
        for needed, row in zip(steps[:3], scores, strict=True):
            cache.observe(row)
            cache.use(needed)
            cache.admit(*needed)
        cache.use({2})
        assert cache.admit(2) == first, cache


def test_scores_are_an_average_that_forgets():
    draws = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]
    cache = MRS(1, 4, top=2, alpha=0.3)
    for row in draws:
        cache.observe(row)
    kept = [[0.4, 0.3, 0, 0], [0, 0, 0.3, 0.4], [0.7, 0.1, 0, 0]]  # of equals the first
    closed = [sum(0.3 * 0.7**age * row[expert] for age, row in enumerate(reversed(kept))) for expert in range(4)]
    assert cache.scores == pytest.approx(closed, abs=1e-15)
    last = MRS(1, 4, top=2, alpha=1.0)
    for row in draws:
        last.observe(row)
    assert last.scores == kept[-1]


def test_one_that_is_here_stays_and_one_used_while_away_counts():
    cache = LFU(1)
    cache.admit(3)
    assert cache.admit(3) is None
    cache.use({5})
    cache.use({5})
    cache.use({3})
    assert cache.admit(5) == 3 and cache.worth(5) == (2, 1)


def test_what_is_refused(unchecked):
    for capacity in (0, 1.5, math.nan, math.inf):
        with pytest.raises(
            InputError, match=rf"capacity is {capacity} but must be a whole number of at least 1 expert"
        ):
            LRU(capacity)
    with pytest.raises(InputError, match=r"top is 5 but must be from 1 to n_experts = 4"):
        MRS(1, 4, top=5)
    with pytest.raises(InputError, match=r"alpha is 0.0 but must be above 0 and at most 1"):
        MRS(1, 4, top=2, alpha=0.0)
    with pytest.raises(InputError, match=r"scores has 3 values but must have one for each of 4"):
        MRS(1, 4, top=2).observe([1, 2, 3])
    with pytest.raises(InputError, match=r"scores is \[1, nan, 3, 4\] but must hold finite numbers"):
        MRS(1, 4, top=2).observe([1, math.nan, 3, 4])
    for steps in ([], [[], []]):
        with pytest.raises(InputError, match=r"steps is empty"):
            replay(LRU(2), steps)
    with pytest.raises(InputError, match=r"scores has 1 steps but must have 2, as steps has"):
        replay(MRS(1, 2, top=1), [[0], [1]], [[0.5, 0.5]])
    with pytest.raises(InputError, match=r"step 1 needs 3 experts but capacity is 2"):
        replay(LRU(2), [{0}, {0, 1, 2}])
    full = LRU(1)
    full.admit(0)
    with pytest.raises(InputError, match=r"protected holds all 1 experts of the cache but must leave one"):
        full.admit(1, protected={0, 1})
    assert {*full.resident} == {0}
