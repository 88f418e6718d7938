"""Splits by digest: the same for ever, with the shares that were asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.lib.data.splits import ARRAY_SHARES, SPLITS, TEXT_SHARES, digest, split_of


@pytest.mark.parametrize(
    ("item", "number", "text", "array"),
    [
        # numbers from `printf ITEM | b2sum -l 64`, percentiles 76, 33, 97, 90, 83 and 85
        ("", 0xE4A6A0577479B2B4, "train", "validation"),
        ("python/abc.py", 0x9A9A991CF3B2AF35, "train", "train"),
        ("digits/0/15", 0x9678A3A11FD63861, "test", "test"),
        ("digits/0/41", 0x6D5CF25554DCFC56, "validation", "test"),
        ("names/03b", 0xA6A64BA8CA31BA47, "train", "test"),
        ("digits/0/17", 0x73196A9BF3333B51, "train", "test"),
    ],
)
def test_digests_and_splits_never_move(item, number, text, array):
    assert digest(item) == number
    assert (split_of(number, TEXT_SHARES), split_of(number, ARRAY_SHARES)) == (text, array)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from([TEXT_SHARES, ARRAY_SHARES]))
def test_a_split_is_the_cumulative_share_that_the_percentile_falls_in(number, shares):
    percentile = number % 100
    position = SPLITS.index(split_of(number, shares))
    assert sum(shares[:position]) <= percentile < sum(shares[: position + 1])


@pytest.mark.parametrize("shares", [TEXT_SHARES, ARRAY_SHARES])
def test_many_ids_are_shared_out_as_promised(shares):
    assert sum(shares) == 100
    counts = Counter(split_of(digest(f"item/{i}"), shares) for i in range(20_000))
    for split, share in zip(SPLITS, shares, strict=True):
        assert counts[split] / 200 == pytest.approx(share, abs=0.6)  # 2 standard errors at 20 percent
