"""The native path: `native.c` goes through all models three times, to count scores, to count them finely, to merge.

Nothing as large as a model is stored beside the result. Ranks are found exactly, as in `trim_elect_merge.native`.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_long, c_void_p
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.kernels import native
from workbench.kernels.memory import fresh
from workbench.kernels.pcb_merge.reference import checked_ends
from workbench.kernels.trim_elect_merge import magnitudes
from workbench.kernels.trim_elect_merge.native import Tables, in_threads, select

SOURCE = Path(__file__).with_name("native.c")
PIECE = 2**15  # parameters that a thread takes at a time

Models = tuple[Sequence[Tensor], Tensor | None]
"""n flat tensors and their base."""


class Job(ctypes.Structure):
    """`job` of native.c."""

    _fields_ = (
        ("n", c_long),
        *((name, c_void_p) for name in ("expert", "base", "low", "high", "per", "least", "full", "scale", "out")),
    )


def pcb_merge(
    experts: Sequence[Tensor], base: Tensor | None, clip: tuple[int, int], drop: int, scale: Sequence[float]
) -> Tensor:
    """As `reference.pcb_merge`."""
    found = (magnitudes(x, lambda size: [0, *clip, size - 1], base, "native") for x in experts)
    low, high = zip(*(checked_ends(i, four) for i, four in enumerate(found)), strict=True)
    least, most = _bounds([(experts, base)], low, high, drop)
    return _merged((experts, base), low, high, least, most, scale)


def bounds(
    pieces: Iterable[Float[Tensor, "models piece"]], low: Sequence[float], high: Sequence[float], drop: int
) -> tuple[list[float], list[float]]:
    """As `reference.bounds`, with nothing in memory but a piece at a time; they are gone through twice."""
    return _bounds(Unbased(pieces), low, high, drop)


def piece(tau: Float[Tensor, "models piece"], *numbers: Sequence[float]) -> Float[Tensor, " piece"]:
    """As `reference.piece`."""
    return _merged((list(tau.contiguous()), None), *numbers)


class Unbased:
    """Differences (n, p) as `Models`, each time that they are gone through."""

    def __init__(self, pieces: Iterable[Tensor]):
        self.pieces = pieces

    def __iter__(self):
        return ((list(tau.contiguous()), None) for tau in self.pieces)


def _bounds(models: Iterable[Models], low, high, drop: int) -> tuple[list[float], list[float]]:
    n, count = len(low), _library().count

    def counted(digits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        tables, largest = Tables(n), {}
        where = None if digits is None else digits.ctypes.data

        def work(run: Callable, thread: int, first: int) -> None:
            table, most = tables[thread], largest.setdefault(thread, np.full(n, -np.inf, np.float32))
            run(lambda *at: count(*at, where, table, most.ctypes.data), first)

        for experts, base in models:
            run = partial(_run, experts, base, None, constants(low, high))
            in_threads(range(0, len(experts[0]), PIECE), partial(work, run))
        return tables.total(), np.max(list(largest.values()), axis=0)

    return by_counts(counted, drop)


def by_counts(
    counted: Callable[[np.ndarray | None], tuple[np.ndarray, np.ndarray]], drop: int
) -> tuple[list[float], list[float]]:
    """Those of `bounds` from `counted(digits)`: how often each upper half of a score's key stands in each model, for
    None, or beside the upper half `digits` (n,) each lower half; and the largest scores.
    """
    coarse, most = counted(None)
    digits = np.array([np.searchsorted(row.cumsum(), drop, side="right") for row in coarse], np.int64)
    fine, _ = counted(digits)
    keys = np.array([select(coarse[i], [drop], lambda _, i=i: fine[i])[0] for i in range(len(fine))], np.uint32)
    least = np.where(keys >> 31, keys ^ 0x80000000, ~keys).astype(np.uint32).view(np.float32)
    return least.tolist(), most.tolist()


def _merged(models: Models, low, high, least, most, scale) -> Tensor:
    experts, base = models
    (size,), numbers = experts[0].shape, constants(low, high, least, most, scale)
    out, merge = fresh((size,), experts[0].dtype), _library().merge
    in_threads(range(0, size, PIECE), lambda _, first: _run(experts, base, out, numbers, merge, first))
    return out


def constants(low, high, least=None, most=None, scale=None) -> list[np.ndarray | None]:
    """`Job`'s, in its order; what divides nothing is 0, and so are the places of a row of one magnitude."""
    low, high = np.array(low, np.float32), np.array(high, np.float32)
    per = np.divide(1, high - low, out=np.zeros_like(low), where=high > low)
    if least is None:
        return [low, high, per, None, None, None]
    least, most = np.array(least, np.float32), np.array(most, np.float32)
    full = np.divide(1, most - least, out=np.zeros_like(low), where=most > least)
    return [low, high, per, least, full, np.array(scale, np.float32)]


def _run(experts, base, out, numbers, function: Callable, first: int) -> None:
    """`function(job, first, end)` on the piece that begins there."""
    size, dtype = len(experts[0]), experts[0].dtype
    end = min(first + PIECE, size)
    rows = [*experts, *(x for x in (base, out) if x is not None)]
    begin, span = first, end - first
    if dtype != torch.float32:
        rows, begin = [x[first:end].float() for x in rows], 0
    at = iter([x.data_ptr() for x in rows])
    pointers = (c_void_p * len(experts))(*(next(at) for _ in experts))
    origin, to = (None if x is None else next(at) for x in (base, out))
    given = (None if x is None else x.ctypes.data for x in numbers)
    function(Job(len(experts), ctypes.addressof(pointers), origin, *given, to), begin, begin + span)
    if dtype != torch.float32 and out is not None:
        out[first:end] = rows[-1]


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.merge.argtypes, library.merge.restype = (ctypes.POINTER(Job), c_long, c_long), None
    library.count.argtypes = (ctypes.POINTER(Job), c_long, c_long, *(c_void_p,) * 3)
    library.count.restype = None
    return library
