"""The native path: `native.c` transforms a row while parts of it are in the first level of cache; threads take rows."""

import ctypes
from ctypes import c_long, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor

from workbench.kernels import native, threads
from workbench.kernels.memory import fresh

SOURCE = Path(__file__).with_name("native.c")
WORTH = 2**18
"""Numbers from which on a second thread gains more than it takes to start."""


def walsh_hadamard(x: Tensor) -> Tensor:
    """As `reference.walsh_hadamard`."""
    (rows, length), out = x.shape, fresh(x.shape, x.dtype)
    transform = _library().transform

    def work(_: int, part: range) -> None:
        start = 4 * length * part.start
        transform(x.data_ptr() + start, out.data_ptr() + start, len(part), length)

    count = min(threads.available(), rows) if x.numel() >= WORTH else 1
    if count > 1:
        threads.share([range(rows * i // count, rows * (i + 1) // count) for i in range(count)], work, count)
    else:
        work(0, range(rows))
    return out


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.transform.argtypes, library.transform.restype = (c_void_p, c_void_p, c_long, c_long), None
    return library
