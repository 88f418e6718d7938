"""The native path: `native.c` goes through all models three times, to count scores, to count them finely, to merge.

Nothing as large as a model is stored beside the result. Ranks are found exactly, as in `trim_elect_merge.native`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_long, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.kernels import native
from workbench.kernels.memory import fresh
from workbench.kernels.pcb_merge.reference import require_spread
from workbench.kernels.trim_elect_merge import magnitudes
from workbench.kernels.trim_elect_merge.native import PIECE, Tables, in_threads, select

SOURCE = Path(__file__).with_name("native.c")


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
    n, (size,), dtype = len(experts), experts[0].shape, experts[0].dtype
    pairs = [magnitudes(x, lambda _: clip, base, "native") for x in experts]
    low, high = (np.array(values, np.float32) for values in zip(*pairs, strict=True))
    require_spread(low.tolist(), high.tolist())
    per, least, full = 1 / (high - low), np.zeros(n, np.float32), np.zeros(n, np.float32)
    numbers = low, high, per, least, full, np.array(scale, np.float32)
    library, out = _library(), fresh((size,), dtype)

    def run(function, first: int) -> None:
        """`function(job, first, end)` on the piece that begins there."""
        end = min(first + PIECE, size)
        places = [x for x in (*experts, base, out) if x is not None]
        begin, span = first, end - first
        if dtype != torch.float32:
            places = [x[first:end].float() for x in places]
            begin = 0
        at = [x.data_ptr() for x in places]
        rows = (c_void_p * n)(*at[:n])
        origin = None if base is None else at[n]
        job = Job(n, ctypes.addressof(rows), origin, *(x.ctypes.data for x in numbers), at[-1])
        function(job, begin, begin + span)
        if dtype != torch.float32:
            out[first:end] = places[-1]

    def counted(digits: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        tables, largest = Tables(n), {}

        def work(thread: int, first: int) -> None:
            table, most = tables[thread], largest.setdefault(thread, np.full(n, -np.inf, np.float32))
            where = None if digits is None else digits.ctypes.data
            run(lambda *at: library.count(*at, where, table, most.ctypes.data), first)

        in_threads(range(0, size, PIECE), work)
        return tables.total(), np.max(list(largest.values()), axis=0)

    coarse, largest = counted(None)
    digits = np.array([np.searchsorted(row.cumsum(), drop, side="right") for row in coarse], np.int64)
    fine, _ = counted(digits)
    keys = np.array([select(coarse[i], [drop], lambda _, i=i: fine[i])[0] for i in range(n)], np.uint32)
    least[:] = np.where(keys >> 31, keys ^ 0x80000000, ~keys).astype(np.uint32).view(np.float32)
    with np.errstate(divide="ignore"):
        full[:] = 1 / (largest - least)  # infinite where nothing is larger, and then not used
    in_threads(range(0, size, PIECE), lambda _, first: run(library.merge, first))
    return out


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.merge.argtypes, library.merge.restype = (ctypes.POINTER(Job), c_long, c_long), None
    library.count.argtypes = (ctypes.POINTER(Job), c_long, c_long, *(c_void_p,) * 3)
    library.count.restype = None
    return library
