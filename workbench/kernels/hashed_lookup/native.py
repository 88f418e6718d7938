"""The native path: `native.c` takes rows of ids; threads take some of them each, and on the way back rows of tables.

So no result depends on the number of threads, and nothing is added by two of them to the same row.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_int64, c_long, c_void_p
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import native, threads
from workbench.kernels.hashed_lookup import refuse, refuse_rows
from workbench.kernels.memory import fresh

if TYPE_CHECKING:
    from workbench.kernels.hashed_lookup import Plan

SOURCE = Path(__file__).with_name("native.c")
WORTH = 2**18
"""Numbers from which on a second thread gains more than it takes to start."""


def lookup(tables: Sequence[Tensor], ids: Tensor, plan: "Plan", mean: bool) -> tuple[Tensor, Tensor]:
    """As `reference.lookup`."""
    rows = torch.empty(len(ids), len(plan.lookups), dtype=torch.int64)
    out = _gathered(tables, ids, rows, plan, mean)
    return out, rows


def gather(tables: Sequence[Tensor], rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    """As `reference.gather`."""
    return _gathered(tables, None, rows, plan, mean)


def _gathered(tables: Sequence[Tensor], ids: Tensor | None, rows: Tensor, plan: "Plan", mean: bool) -> Tensor:
    (n, count), width = rows.shape, plan.slots * plan.dim
    out, function = fresh((n, width), tables[0].dtype), _library().gather
    lookups, offs = _packed(plan)
    places, wrong = (c_void_p * len(tables))(*(table.data_ptr() for table in tables)), []

    def work(_: int, part: range) -> None:
        given = None if ids is None else ids.data_ptr() + 8 * plan.fields * part.start
        to = rows.data_ptr() + 8 * count * part.start, out.data_ptr() + 4 * width * part.start
        sizes = len(part), plan.fields, count, plan.slots, plan.dim, mean
        wrong.append(function(*sizes, lookups, offs, places, given, *to))

    number = _threads(n, out.numel())
    _in_threads([range(n * i // number, n * (i + 1) // number) for i in range(number)], work)
    if max(wrong) >= 0:
        refuse(ids, plan) if ids is not None else refuse_rows(rows, plan)
        raise InputError("ids were changed while they were looked up, but must stay as they are")
    return out


def scatter(tables: Sequence[Tensor], grad: Tensor, rows: Tensor, plan: "Plan", mean: bool, scale: float) -> None:
    """As `reference.scatter`, but each term is added by itself to what a row has."""
    function, (lookups, offs) = _library().scatter, _packed(plan)
    places, wrong = (c_void_p * len(tables))(*(table.data_ptr() for table in tables)), []
    number = _threads(len(rows), grad.numel())

    def work(_: int, thread: int) -> None:
        sizes = len(rows), len(plan.lookups), plan.slots, plan.dim, mean, scale
        given = lookups, offs, places, rows.data_ptr(), grad.data_ptr()
        wrong.append(function(thread, number, *sizes, *given))

    _in_threads(range(number), work)
    if max(wrong) >= 0:
        refuse_rows(rows, plan)


def _threads(rows: int, numbers: int) -> int:
    return max(1, min(threads.available(), rows)) if numbers >= WORTH else 1


def _in_threads(parts: Sequence, work: Callable[[int, object], None]) -> None:
    if len(parts) > 1:
        threads.share(parts, work, len(parts))
    else:
        work(0, parts[0])


@lru_cache(maxsize=64)
def _packed(plan: "Plan") -> tuple:
    """Lookups and offsets as `native.c` takes them."""
    flat = [number for lookup in plan.lookups for number in lookup]
    return (c_int64 * len(flat))(*flat), (c_int64 * len(plan.offs))(*plan.offs)


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    sizes = (*(c_long,) * 5, c_int)
    library.gather.argtypes = (*sizes, *(c_void_p,) * 6)
    library.scatter.argtypes = (*(c_long,) * 6, c_int, c_float, *(c_void_p,) * 5)
    library.gather.restype = library.scatter.restype = c_long
    return library
