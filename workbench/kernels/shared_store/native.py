"""The native path: `native.c` forms some rows of the matrix at a time, in the cache, and torch multiplies with them.

No result depends on how many threads form them; gradients are folded into the array by one thread, in the order of the
weights.
"""

import ctypes
from collections.abc import Iterator
from ctypes import c_float, c_long, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from workbench.kernels import native
from workbench.kernels.memory import fresh, scratch
from workbench.kernels.trim_elect_merge.native import in_threads

SOURCE = Path(__file__).with_name("native.c")
PANEL = 2**20  # weights formed at a time: 4 MiB, so that threads meet seldom
PIECE = 2**15  # of these, what a thread forms at a time


def expand(memory: Tensor, seed: Tensor, scale: Tensor, offset: int, numel: int) -> Tensor:
    out = fresh((numel,), memory.dtype)
    _form(memory, seed, scale, offset, out)
    return out


def fold(values: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    out = torch.zeros(m, dtype=values.dtype)
    _add(out, values, seed, scale, offset)
    return out


def product(
    x: Tensor, memory: Tensor, seed: Tensor, scale: Tensor, offset: int, width: int, transposed: bool
) -> Tensor:
    depth = x.shape[1]
    if transposed:
        out = torch.zeros(len(x), width, dtype=x.dtype)
        for first, panel in _panels(depth, width):
            _form(memory, seed, scale, offset + first * width, panel)
            out.addmm_(x[:, first : first + len(panel)], panel)
        return out
    out = torch.empty(len(x), width, dtype=x.dtype)
    for first, panel in _panels(width, depth):
        _form(memory, seed, scale, offset + first * depth, panel)
        torch.mm(x, panel.T, out=out[:, first : first + len(panel)])
    return out


def outer(grad: Tensor, x: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int) -> Tensor:
    out, depth = torch.zeros(m, dtype=x.dtype), x.shape[1]
    for first, panel in _panels(grad.shape[1], depth):
        torch.mm(grad[:, first : first + len(panel)].T, x, out=panel)
        _add(out, panel, seed, scale, offset + first * depth)
    return out


def _panels(rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """A matrix some rows at a time: the first, and room for them."""
    step = max(1, min(rows, PANEL // max(1, columns)))
    (room,) = scratch(((step, columns), torch.float32))
    for first in range(0, rows, step):
        yield first, room[: min(step, rows - first)]


def _form(memory: Tensor, seed: Tensor, scale: Tensor, offset: int, out: Tensor) -> None:
    library, place = _library(), out.data_ptr()
    given = c_uint64(int(seed)), native.address(memory), c_long(len(memory)), c_float(float(scale))

    def work(_: int, first: int) -> None:
        count = min(PIECE, out.numel() - first)
        library.expand(*given, c_uint64(offset + first), c_long(count), c_void_p(place + 4 * first))

    in_threads(range(0, out.numel(), PIECE), work)


def _add(out: Tensor, values: Tensor, seed: Tensor, scale: Tensor, offset: int) -> None:
    size, how = c_long(values.numel()), (c_long(len(out)), c_float(float(scale)), c_uint64(offset))
    _library().fold(c_uint64(int(seed)), native.address(values), *how, size, native.address(out))


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    kinds = c_uint64, c_void_p, c_long, c_float, c_uint64, c_long, c_void_p
    library.expand.argtypes = library.fold.argtypes = kinds
    library.expand.restype = library.fold.restype = None
    return library
