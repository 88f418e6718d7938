"""The native path: rows are read where they are, and what lies between them, r numbers a pair, stays in the cache.

`native.c` sorts the pairs. Then it takes a batch of tokens, the experts in turn, and of each a few rows: their codes,
and what these give is added to the rows of the output. The gradients of A and B are made by columns. Threads take
batches, or columns, of their own; they are those of torch's operators, which are awake between two of them. The
formulas are those of `reference`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from workbench.kernels import native, threads
from workbench.kernels.low_rank.order import quick
from workbench.kernels.memory import fresh

SOURCE = Path(__file__).with_name("native.c")
SHARED = 2**20  # multiply-adds of a product from which on threads share it


class Job(ctypes.Structure):
    """`job` of native.c."""

    _fields_ = (
        *((name, c_long) for name in ("n_tokens", "n_pairs", "n_experts", "top_k", "rank", "d_in", "d_out")),
        *((name, c_void_p) for name in ("index", "x", "a", "b", "score", "grad", "out", "dx", "d_a", "d_b", "d_score")),
        ("threads", c_long),
        ("parallel", c_void_p),
    )


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    index, out = order(expert, x.shape[0], a.shape[0], tok_offs, top_k), fresh((x.shape[0], b.shape[1]), x.dtype)
    _run("forward", (index, x, a, b, score, None, out), top_k)
    return out, x.new_empty(0), index if save else index.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`, of what is wanted."""
    of = zip((x, a, b, score), needs, strict=True)
    results = tuple(fresh(t.shape, t.dtype) if needed else None for t, needed in of)
    _run("backward", (index, x, a, b, score, grad, None, *results), top_k)
    return results


def order(expert: Tensor, n_tokens: int, n_experts: int, tok_offs: Tensor | None, top_k: int | None) -> Tensor:
    """As `order.quick`."""
    n_pairs, expert = expert.shape[0], expert.long().contiguous()
    first = None if tok_offs is None else tok_offs.long().contiguous()
    index = torch.empty(3 * n_pairs + n_experts + 1, dtype=torch.int32)
    places = [None if t is None else t.data_ptr() for t in (expert, first, index)]
    if _library().order(n_tokens, n_pairs, n_experts, top_k or 0, *places):
        quick(expert, n_tokens, n_experts, tok_offs, top_k)  # says what is wrong
    return index


def _run(name: str, tensors: tuple[Tensor | None, ...], top_k: int | None) -> None:
    """A function of native.c on the tensors of a `Job`, in its order."""
    _, x, a, b, score, *_ = tensors
    n_pairs, (n_experts, rank, d_in), d_out = score.shape[0], a.shape, b.shape[1]
    parallel = _parallel() if n_pairs * rank * (d_in + d_out) >= SHARED else None
    sizes = x.shape[0], n_pairs, n_experts, top_k or 0, rank, d_in, d_out
    places = [None if t is None else t.data_ptr() for t in tensors]
    places += [None] * (11 - len(places))
    job = Job(*sizes, *places, 1 if parallel is None else threads.available(), parallel)
    if getattr(_library(), name)(job):
        raise MemoryError(f"low_rank found no memory for the scratch of {name}")


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.order.argtypes = (*(c_long,) * 4, *(c_void_p,) * 3)
    library.forward.argtypes = library.backward.argtypes = (ctypes.POINTER(Job),)
    return library


@cache
def _parallel() -> int | None:
    """Where the function is with which OpenMP's threads, as torch has them, call a C function; None without it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None
