"""The native path: `native.c` computes some rows of one expert, from reading them where they are to the last product.

The formulas are those of `reference`. Threads take pieces of experts in turn, the largest first. A piece of the forward
is some rows. In the backward it is a whole expert; one so large that the other threads would wait for it is divided by
rows, and then, once they are done, by rows of its weight gradients. No number depends on who computes it.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_long, c_void_p
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from workbench.kernels import native, threads
from workbench.kernels.gather_sum.cpu import gather_sum
from workbench.kernels.memory import fresh, scratch
from workbench.kernels.plan import RoutePlan

SOURCE = Path(__file__).with_name("native.c")
SHARED = 2**22  # multiply-adds of the first product from which on handing pieces to threads pays
LEAST, MOST = 256, 1024  # rows of a piece
TURNS = 3  # experts a thread must have to take in turn, lest it wait for the others at the end
PANEL = 512 * 64  # numbers

Group = tuple[int, int, int]  # an expert, its first grouped row, and the end of its rows
Item = TypeVar("Item")


class Layer(ctypes.Structure):
    """`layer` of native.c."""

    _fields_ = (
        *((name, c_long) for name in ("dim", "hidden", "up")),
        *((name, c_void_p) for name in ("w1", "w2", "b1", "b2", "score", "order", "tok")),
    )


#: The arguments of the functions of native.c.
ARGUMENTS = {
    "pitch": (c_long,),
    "fits": (*(c_long,) * 4, *(c_void_p,) * 5),
    "forward": (Layer, *(c_long,) * 3, c_void_p, c_long, *(c_void_p,) * 3),
    "backward": (Layer, *(c_long,) * 5, *(c_void_p,) * 6),
    "weights": (Layer, *(c_long,) * 5, c_void_p, c_long, *(c_void_p,) * 6),
}

RESULTS = {"pitch": c_long, "fits": c_int}


def fits(plan: RoutePlan) -> bool:
    """Whether the values of a plan are right, for `RoutePlan.require`."""
    sizes = plan.n_tokens, plan.n_experts, plan.n_pairs, plan.top_k or 0
    return bool(_function("fits")(*sizes, *_addresses(plan.order, plan.inv, plan.tok, plan.offs, plan.tok_offs)))


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.forward`."""
    layer, count = _layer(w1, w2, plan, score, b1, b2), _threads(plan, w1)
    z = fresh((plan.n_pairs, w1.shape[1]), x.dtype) if save else None
    size = MOST if count == 1 else max(LEAST, min(MOST, plan.n_pairs // (TURNS * count)))
    pieces = sorted((piece for group in _groups(plan) for piece in _pieces(group, size)), key=_size, reverse=True)
    most = _size(pieces[0]) if pieces else 0
    y, *buffers = _buffers(plan, x, *[PANEL + most * (_pitch(w2.shape[2]) + 2 * 64)] * count)
    results = [None if z is None else z.data_ptr(), y.data_ptr()]

    def work(thread: int, piece: Group) -> None:
        _function("forward")(layer, *piece, x.data_ptr(), x.stride(0), *results, buffers[thread].data_ptr())

    _each(pieces, work, count)
    return gather_sum(y, plan, score), z


def backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    layer, count = _layer(w1, w2, plan, score, b1, b2), _threads(plan, w1)
    dw1, dw2, dscore = fresh(w1.shape, w1.dtype), fresh(w2.shape, w2.dtype), torch.empty_like(score)
    db1, db2 = (None if b is None else torch.zeros_like(b) for b in (b1, b2))
    for e in (plan.offs.diff() == 0).nonzero().flatten().tolist():  # no rows, and nobody writes its gradient below
        dw1[e].zero_()
        dw2[e].zero_()
    groups = sorted(_groups(plan), key=_size, reverse=True)
    large = [group for group in groups if count > 1 and _size(group) * TURNS * count > plan.n_pairs]
    whole = groups[len(large) :]
    kept = sum(_pitch(width) for width in (w1.shape[1], w2.shape[2], x.shape[1]))  # numbers of a row, see native.c
    of_large, of_whole = (_size(some[0]) * kept if some else 0 for some in (large, whole))
    most = min(MOST, _size(groups[0])) if groups else 0
    each = PANEL + most * 64
    dx, shared, *buffers = _buffers(plan, x, of_large, *[each + of_whole] * count)
    inputs, results = _addresses(grad, z), _addresses(dx, dscore)
    gradients = _addresses(dw1, dw2, db1, db2)

    def rows(group: Group, piece: Group, store: Tensor, buffer: Tensor) -> None:
        e, start, end = group
        _function("backward")(
            layer, e, start, end - start, *piece[1:], *inputs, *results, store.data_ptr(), buffer.data_ptr()
        )

    def weights(group: Group, part: int, parts: int, store: Tensor, buffer: Tensor) -> None:
        e, start, end = group
        _function("weights")(
            layer, e, start, end - start, part, parts, x.data_ptr(), x.stride(0), store.data_ptr(), *gradients,
            buffer.data_ptr(),
        )  # fmt: skip

    def expert(thread: int, group: Group) -> None:
        buffer, store = buffers[thread][:each], buffers[thread][each:]
        for piece in _pieces(group, MOST):
            rows(group, piece, store, buffer)
        weights(group, 0, 1, store, buffer)

    def divided(group: Group) -> None:
        pieces, parts = _pieces(group, min(MOST, -(-_size(group) // count))), 2 * count
        _each(pieces, lambda thread, piece: rows(group, piece, shared, buffers[thread]), count)
        _each(range(parts), lambda thread, part: weights(group, part, parts, shared, buffers[thread]), count)

    for group in large:
        divided(group)
    _each(whole, expert, count)
    return gather_sum(dx, plan, None), dw1, dw2, dscore, db1, db2


def _layer(w1: Tensor, w2: Tensor, plan: RoutePlan, score: Tensor, b1: Tensor | None, b2: Tensor | None) -> Layer:
    return Layer(w2.shape[1], w2.shape[2], w1.shape[1], *_addresses(w1, w2, b1, b2, score, plan.order, plan.tok))


def _threads(plan: RoutePlan, w1: Tensor) -> int:
    return threads.available() if plan.n_pairs * w1[0].numel() >= SHARED else 1


def _groups(plan: RoutePlan) -> list[Group]:
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(plan.offs.tolist())) if end > start]


def _pieces(group: Group, most: int) -> list[Group]:
    """The rows of a group in equal pieces of at most so many."""
    number = -(-_size(group) // most)
    bounds = [group[1] + _size(group) * i // number for i in range(number + 1)]
    return [(group[0], first, end) for first, end in pairwise(bounds)]


def _size(group: Group) -> int:
    return group[2] - group[1]


def _buffers(plan: RoutePlan, x: Tensor, *sizes: int) -> list[Tensor]:
    """Scratch: (P, H) rows, and buffers of these sizes."""
    return scratch(((plan.n_pairs, x.shape[1]), x.dtype), *(((size,), x.dtype) for size in sizes))


def _each(items: Sequence[Item], work: Callable[[int, Item], None], count: int) -> None:
    """`work(thread, item)` for each, in turn."""
    if count > 1 and len(items) > 1:
        threads.share(items, work, count)
    else:
        for item in items:
            work(0, item)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _pitch(width: int) -> int:
    return _function("pitch")(width)


@cache
def _function(name: str):
    function = native.library(SOURCE)[name]
    function.argtypes, function.restype = ARGUMENTS[name], RESULTS.get(name)
    return function
