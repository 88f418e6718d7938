"""Rows of a table by hashing: of integers by splitmix64's finaliser, of text by a digest first; the same everywhere.

Python's own `hash` is another in every process, and ids modulo a size do not collide until they wrap, which would
flatter a table. A salt makes another hash of the same ids: two features, or two lookups of one, are then independent.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.hashed_lookup.reference import hashed, signed
from workbench.lib.data.splits import digest


def hash_rows(values: Int64[Tensor, " *n"], salt: int, n_rows: int) -> Int64[Tensor, " *n"]:
    """Rows 0 to n_rows - 1 of integer values.

    Args:
        salt: of the feature and the lookup, at least 0.

    Raises:
        InputError: no row, or more than 2^31; a salt below 0.
    """
    if not 1 <= n_rows <= 1 << 31 or salt < 0:
        raise InputError(f"n_rows is {n_rows} and salt {salt}: from 1 to 2^31 rows, and a salt of at least 0")
    return hashed(values, salt, n_rows)


def ids_of(texts: Sequence[str]) -> Int64[Tensor, " n"]:
    """Integers of texts, by a digest that depends on nothing but the text."""
    return torch.tensor([signed(digest(text)) for text in texts], dtype=torch.int64)
