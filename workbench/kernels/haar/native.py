"""The native path: `native.c` takes a channel of an image at a time; threads take some of the channels each."""

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


def haar_dwt2(x: Tensor) -> Tensor:
    """As `reference.haar_dwt2`."""
    n, channels, height, width = x.shape
    out = fresh((n, 4 * channels, height // 2, width // 2), x.dtype)
    return _run(_library().forward, x, out, n * channels, channels, height // 2, width // 2)


def haar_idwt2(y: Tensor) -> Tensor:
    """As `reference.haar_idwt2`."""
    n, bands, height, width = y.shape
    out = fresh((n, bands // 4, 2 * height, 2 * width), y.dtype)
    return _run(_library().inverse, y, out, n * bands // 4, bands // 4, height, width)


def _run(function, x: Tensor, out: Tensor, planes: int, *sizes: int) -> Tensor:
    def work(_: int, part: range) -> None:
        function(x.data_ptr(), out.data_ptr(), part.start, part.stop, *sizes)

    count = min(threads.available(), planes) if x.numel() >= WORTH else 1
    if count > 1:
        threads.share([range(planes * i // count, planes * (i + 1) // count) for i in range(count)], work, count)
    else:
        work(0, range(planes))
    return out


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    for function in (library.forward, library.inverse):
        function.argtypes, function.restype = (c_void_p, c_void_p, *(c_long,) * 5), None
    return library
