"""The native path: `native.c` makes a thousand numbers of the basis at a time and adds them up, in the cache.

A sum over tensors is split over threads by its elements, products by the tensors, so that no result depends on how many
threads there are.
"""

import ctypes
from ctypes import c_long, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from workbench.kernels import native
from workbench.kernels.memory import fresh
from workbench.kernels.trim_elect_merge.native import in_threads

SOURCE = Path(__file__).with_name("native.c")
BLOCK = 1024  # elements at a time, that of native.c
PIECE = 2**19  # numbers of the basis that a thread makes at a time


def mix(coefficients: Tensor, seed: Tensor, numel: int, start: int) -> Tensor:
    """As `reference.mix`."""
    k, out = len(coefficients), fresh((numel,), coefficients.dtype)
    step = BLOCK * max(1, PIECE // (BLOCK * max(1, k)))
    given = c_uint64(int(seed)), c_uint64(start), c_long(numel), c_long(k), native.address(coefficients)
    library = _library()

    def work(_: int, first: int) -> None:
        library.mix(*given, c_long(first), c_long(min(first + step, numel)), native.address(out))

    in_threads(range(0, numel, step), work)
    return out


def products(x: Tensor, seed: Tensor, k: int, start: int) -> Tensor:
    """As `reference.products`."""
    numel, out = len(x), torch.zeros(k, dtype=torch.float64)
    step = max(1, PIECE // max(1, numel))
    given, library = (c_uint64(int(seed)), c_uint64(start), c_long(numel), native.address(x)), _library()

    def work(_: int, first: int) -> None:
        library.products(*given, c_long(first), c_long(min(first + step, k)), native.address(out))

    in_threads(range(0, k, step), work)
    return out.to(x.dtype)


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.mix.argtypes = c_uint64, c_uint64, c_long, c_long, c_void_p, c_long, c_long, c_void_p
    library.products.argtypes = c_uint64, c_uint64, c_long, c_void_p, c_long, c_long, c_void_p
    library.mix.restype = library.products.restype = None
    return library
