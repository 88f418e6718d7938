"""The native path: torch makes the FFT, and `native.c` what is before and after it, in threads of some rows each.

Norms are added up piece by piece in the order of the rows, so no result depends on the number of threads. A row that is
short is transformed by the product with the basis, by the reference.
"""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from workbench.kernels import native
from workbench.kernels.column_adam import reference
from workbench.kernels.column_topk import SAFE
from workbench.kernels.dct.cpu import FFT_FROM, turns
from workbench.kernels.trim_elect_merge.native import in_threads

SOURCE = Path(__file__).with_name("native.c")
PIECE = 2**18  # entries that a thread takes at a time


def column_adam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    norm: int,
    remap: bool,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """As `reference.column_adam`."""
    how = norm, remap, step, beta1, beta2, eps
    if grad.shape[-1] < FFT_FROM:
        return reference.column_adam(grad, exp_avg, exp_avg_sq, index, *how)
    if grad.ndim == 2:
        return _matrix(grad, exp_avg, exp_avg_sq, index, *how)
    parts = (part.flatten(0, -1 - ends) for part, ends in ((grad, 2), (exp_avg, 2), (exp_avg_sq, 2), (index, 1)))
    return torch.stack([_matrix(*one, *how) for one in zip(*parts, strict=True)]).view(exp_avg.shape)


def _matrix(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    norm: int,
    remap: bool,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """One matrix."""
    library, (n, m), r = _library(), grad.shape, index.shape[0]
    rows, turns = max(1, PIECE // m), _turns(m)
    firsts, width = range(0, n, rows), turns.shape[1]
    x, mixed, by = grad.data_ptr(), torch.empty_like(grad), turns.data_ptr()
    v = mixed.data_ptr()

    def spread(_: int, first: int) -> None:
        at = 4 * first * m
        library.spread(min(rows, n - first), m, x + at, v + at)

    in_threads(firsts, spread)
    waves = torch.fft.rfft(mixed)
    w = waves.data_ptr()
    room = torch.empty(width * len(firsts) + 2 * m + 5 * r)  # sums, places to sort, what is chosen
    sums = room.data_ptr()
    sort = sums + 4 * width * len(firsts)
    chosen = sort + 8 * m

    def measure(_: int, first: int) -> None:
        out = sums + 4 * (first // rows) * width
        library.norms(min(rows, n - first), width, norm, w + 4 * first * width, by, out)

    in_threads(firsts, measure)
    old = index.data_ptr()
    if not library.choose(len(firsts), m, r, sums, by, SAFE, old, remap and step > 1, sort, chosen):
        # Squares have left the range of float32, and nothing has changed.
        return reference.column_adam(grad, exp_avg, exp_avg_sq, index, norm, remap, step, beta1, beta2, eps)
    bias = 1 - beta1**step
    how = 1 - beta1, beta2, 1 - beta2, bias / (1 - beta2**step) ** 0.5, bias * eps
    out = torch.empty_like(exp_avg)
    places = exp_avg.data_ptr(), exp_avg_sq.data_ptr(), out.data_ptr()

    def move(_: int, first: int) -> None:
        own, at = torch.empty(r), 4 * first * r
        lines = (place + at for place in places)
        library.step(min(rows, n - first), width, r, w + 4 * first * width, chosen, *how, own.data_ptr(), *lines)

    in_threads(firsts, move)
    return out


@lru_cache(maxsize=16)
def _turns(m: int) -> Tensor:
    """As `native.c` wants them (2, 2 (m // 2) + 2)."""
    with torch.inference_mode(False):
        real, imaginary = torch.view_as_real(turns(m)).float().unbind(-1)
        return torch.stack([real, real, -imaginary, imaginary], -1).view(-1, 2, 2).transpose(0, 1).flatten(1)


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.spread.argtypes = c_long, c_long, c_void_p, c_void_p
    library.norms.argtypes = c_long, c_long, c_int, c_void_p, c_void_p, c_void_p
    library.choose.argtypes = *[c_long] * 3, c_void_p, c_void_p, c_float, c_void_p, c_int, c_void_p, c_void_p
    library.choose.restype = c_int
    library.step.argtypes = *[c_long] * 3, c_void_p, c_void_p, *[c_float] * 5, *[c_void_p] * 4
    for name in ("spread", "norms", "step"):
        getattr(library, name).restype = None
    return library
