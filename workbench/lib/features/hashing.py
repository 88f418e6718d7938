"""Rows of a table by hashing: of integers by splitmix64's finaliser, of text by a digest first; the same everywhere.

Python's own `hash` is another in every process, and ids modulo a size do not collide until they wrap, which would
flatter a table. A salt makes another hash of the same ids: two features, or two lookups of one, are then independent.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.data.splits import digest

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Int64[Tensor, " *n"], bits: int) -> Int64[Tensor, " *n"]:
    """To the right, zeros from the left: torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(values: Int64[Tensor, " *n"], salt: int = 0) -> Int64[Tensor, " *n"]:
    """64 bits of which each depends on all of a value and of the salt (Steele, Lea and Flood 2014, splitmix64)."""
    x = values + _signed(GOLDEN * (salt + 1))
    x = (x ^ _shift(x, 30)) * _signed(FIRST)
    x = (x ^ _shift(x, 27)) * _signed(SECOND)
    return x ^ _shift(x, 31)


def hash_rows(values: Int64[Tensor, " *n"], salt: int, n_rows: int) -> Int64[Tensor, " *n"]:
    """Rows 0 to n_rows - 1 of integer values.

    Args:
        salt: of the feature and the lookup, at least 0.

    Raises:
        InputError: no row, or more than 2^31; a salt below 0.
    """
    if not 1 <= n_rows <= 1 << 31 or salt < 0:
        raise InputError(f"n_rows is {n_rows} and salt {salt}: from 1 to 2^31 rows, and a salt of at least 0")
    return _shift(mixed(values, salt), 1) % n_rows


def ids_of(texts: Sequence[str]) -> Int64[Tensor, " n"]:
    """Integers of texts, by a digest that depends on nothing but the text."""
    return torch.tensor([_signed(digest(text)) for text in texts], dtype=torch.int64)
