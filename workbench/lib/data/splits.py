"""Which split an item belongs to: decided by a digest of its name, so that no library version ever moves it."""

from hashlib import blake2b

SPLITS = ("train", "validation", "test")
TEXT_SHARES = (90, 5, 5)
"""Percent of the documents of a text domain in each split."""
ARRAY_SHARES = (70, 10, 20)
"""Percent of the rows of an array set in each split: small sets need a test split that can tell two methods apart."""
TABLE_SHARES = (80, 10, 10)
"""Percent of the rows of a table, and of the characters of a set of glyphs, in each split."""


def digest(item: str) -> int:
    """A 64-bit number that depends on nothing but the text of `item`: blake2b with 8 bytes, big-endian."""
    return int.from_bytes(blake2b(item.encode(), digest_size=8).digest(), "big")


def split_of(number: int, shares: tuple[int, int, int]) -> str:
    """The split of an item with this digest: `digest modulo 100` against the cumulative `shares` (percent, sum 100).

    >>> split_of(digest("python/abc.py"), TEXT_SHARES)
    'train'
    """
    percentile = number % 100
    return SPLITS[(percentile >= shares[0]) + (percentile >= shares[0] + shares[1])]
