"""The native path: `native.c` reads every model once and writes the merged one, threads take pieces of all of them.

The magnitude at a rank is found in two passes, exactly and without storing anything: the bits of a positive float32
rise with it, so they are counted by their first 15, and then, of the entries that begin as the wanted one does, by the
other 16.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_float, c_long, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import native, threads
from workbench.kernels.trim_elect_merge import reference
from workbench.kernels.trim_elect_merge.reference import rank_of

SOURCE = Path(__file__).with_name("native.c")
PIECE = 2**18  # entries that a thread takes at a time
DIGITS = 2**16
INFINITY = 0x7F800000
SMALL = 2**17  # entries of which a sort of torch's has the ranks before tables are added up


class Job(ctypes.Structure):
    """`job` of native.c."""

    _fields_ = (
        ("n", c_long),
        *((name, c_void_p) for name in ("expert", "base", "weight", "threshold", "vote", "share")),
        *((name, c_float) for name in ("divisor", "scale")),
        ("out", c_void_p),
    )


def trim_elect_merge(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    thresholds: Sequence[float],
    elect: str | None,
    divide: str | None,
    scale: float,
    out: Tensor,
) -> None:
    """As `reference.trim_elect_merge`."""
    n, (size,), dtype = len(experts), experts[0].shape, experts[0].dtype
    ones = [1.0] * n
    trims = any(threshold > 0 for threshold in thresholds)
    shares = {None: None, "count": ones, "weights": weights}[divide]
    divisor = 1.0
    if shares is not None and elect is None and not trims:  # everything survives
        divisor, shares = float(sum(map(np.float32, shares), np.float32(0))) or 1.0, None
    lists = (
        weights,
        thresholds if trims else None,
        {None: None, "values": ones, "weighted": weights}[elect],
        shares,
    )
    kept = [None if numbers is None else (c_float * n)(*numbers) for numbers in lists]
    library = _library()

    def work(_: int, first: int) -> None:
        end = min(first + PIECE, size)
        places = [*experts, base, out] if base is not None else [*experts, out]
        begin, span = first, end - first
        if dtype != torch.float32:
            places = [x[first:end].float() for x in places[:-1]] + [torch.empty(span)]
            begin = 0
        at = [x.data_ptr() for x in places]
        rows = (c_void_p * n)(*at[:n])
        origin = None if base is None else at[n]
        numbers = [None if x is None else ctypes.addressof(x) for x in kept]
        library.merge(Job(n, ctypes.addressof(rows), origin, *numbers, divisor, scale, at[-1]), begin, begin + span)
        if dtype != torch.float32:
            out[first:end] = places[-1]

    in_threads(range(0, size, PIECE), work)


def magnitudes(pieces: Iterable[tuple[Tensor, Tensor | None]], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    """As `reference.magnitudes`, which is as exact, and quicker for a small tensor."""
    pieces = _small(pieces)
    if isinstance(pieces, list):
        return reference.magnitudes(pieces, ranks)
    library = _library()

    def counted(digit: int) -> tuple[np.ndarray, int]:
        tables, largest = Tables(), [0]

        def work(thread: int, first: int) -> None:
            parts = [part[first : first + PIECE].float() for part in (x, base) if part is not None]
            places = [part.data_ptr() for part in parts] + [None] * (2 - len(parts))
            largest.append(library.count(len(parts[0]), *places, digit, tables[thread]))

        for x, base in pieces:  # noqa: B007  work reads them
            in_threads(range(0, len(x), PIECE), work)
        return tables.total(), max(largest)

    return by_counts(counted, ranks)


def by_counts(counted: Callable[[int], tuple[np.ndarray, int]], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    """Those of `magnitudes` from `counted(digit)`: how often each first half of their bits stands, for -1, or beside a
    first half each of the others; and the largest bits.
    """
    coarse, most = counted(-1)
    if most > INFINITY:
        raise InputError("experts - base has NaN but must have none")
    size = int(coarse.sum())
    asked = [rank_of(size, rank) for rank in ranks(size)]
    keys = select(coarse, [rank for rank in asked if rank < size], lambda digit: counted(digit)[0])
    values = iter(np.array(keys, dtype=np.uint32).view(np.float32).tolist())
    return [float("inf") if rank == size else next(values) for rank in asked]


def _small(pieces: Iterable[tuple[Tensor, Tensor | None]]) -> Iterable[tuple[Tensor, Tensor | None]]:
    """A list of the pieces where they have less than `SMALL` entries, else as they are."""
    found, size = [], 0
    for piece in pieces:
        found.append(piece)
        size += len(piece[0])
        if size >= SMALL:
            return pieces
    return found


def select(coarse: np.ndarray, ranks: Sequence[int], fine: Callable[[int], np.ndarray]) -> list[int]:
    """The keys at these ranks, from how often each upper half stands, and each lower half beside a given upper one."""
    below, tables, keys = coarse.cumsum(), {}, []
    for rank in ranks:
        digit = int(np.searchsorted(below, rank, side="right"))
        if digit not in tables:
            tables[digit] = fine(digit).cumsum()
        within = rank - (int(below[digit - 1]) if digit else 0)
        keys.append(digit << 16 | int(np.searchsorted(tables[digit], within, side="right")))
    return keys


class Tables:
    """Counts of each thread; `total` is that of all."""

    def __init__(self, *shape: int):
        self.shape, self.tables = (*shape, DIGITS), {}

    def __getitem__(self, thread: int) -> int:
        if thread not in self.tables:
            self.tables[thread] = np.zeros(self.shape, np.int64)
        return self.tables[thread].ctypes.data

    def total(self) -> np.ndarray:
        return sum(self.tables.values(), np.zeros(self.shape, np.int64))


def in_threads(firsts: range, work: Callable[[int, int], None]) -> None:
    """`work(thread, first)` for all, in as many threads as there are pieces for."""
    count = min(threads.available(), len(firsts))
    if count > 1:
        threads.share(firsts, work, count)
        return
    for first in firsts:
        work(0, first)


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.merge.argtypes, library.merge.restype = (ctypes.POINTER(Job), c_long, c_long), None
    library.count.argtypes, library.count.restype = (c_long, c_void_p, c_void_p, c_long, c_void_p), c_long
    return library
