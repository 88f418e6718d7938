"""The native path: `native.c` computes one head, from the choice of blocks to the gradients; threads take the heads.

A block's keys and values are packed once, and its queries pass by in tiles of a few rows, read from where they are and
added to where their output belongs. Scores, probabilities and their sums never leave the first levels of cache, and of
a query's own block only the keys that it sees are multiplied. Key-value heads are independent; the query heads of one
follow one another, as their gradients add up.

Tensor letters: N tokens, H query heads, G key-value heads, d head width, M blocks.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_long, c_void_p
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels import native, threads
from workbench.kernels.block_sparse_attention.index import BlockIndex, token_blocks
from workbench.kernels.memory import on_large_pages

SOURCE = Path(__file__).with_name("native.c")


class Matrix(ctypes.Structure):
    """`matrix` of native.c: the rows of one head in a tensor."""

    _fields_ = (("at", c_void_p), ("row", c_long), ("step", c_long))

    @classmethod
    def of(cls, x: Tensor, head: int) -> "Matrix":
        """Of x (N, heads, d) or (N, heads)."""
        return cls(x[:, head].data_ptr(), x.stride(0), x.stride(2) if x.ndim == 3 else 1)


class Columns(ctypes.Structure):
    """`columns` of native.c: which queries attend to which block, of one head."""

    _fields_ = (
        *((name, c_long) for name in ("n_tokens", "n_blocks", "size")),
        *((name, c_void_p) for name in ("starts", "lengths", "rows", "offs")),
    )

    @classmethod
    def of(cls, index: BlockIndex, head: int) -> "Columns":
        offs = index.col_offs[head * index.n_blocks :]
        where = (native.address(x) for x in (index.starts, index.lengths, index.rows, offs))
        return cls(index.blocks.shape[0], index.n_blocks, index.block_size, *where)


def fits(index: BlockIndex) -> bool:
    """Whether the values of an index are right, for `BlockIndex.require`."""
    library, (_, heads, top_k) = native.library(SOURCE), index.blocks.shape
    if not library.fit(Columns.of(index, 0), c_long(heads), c_long(len(index.rows))):
        return False
    good = [0] * heads

    def head(h: int) -> None:
        choices = (native.address(x[:, h]) for x in (index.blocks, index.pair))
        good[h] = library.fits(Columns.of(index, h), c_long(top_k), *choices, c_long(heads * top_k))

    each(heads, head)
    if -1 in good:
        raise MemoryError("block_sparse_attention found no memory to look at its index")
    return all(good)


def forward(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, H, d) and L (N, H), as the reference."""
    out, lse, group = result(q), q.new_empty(q.shape[:2]), q.shape[1] // k.shape[1]

    def head(h: int) -> None:
        g = h // group
        heads = (q, h), (k, g), (v, g), (out, h), (lse, h)
        call("forward", Columns.of(index, h), c_long(q.shape[2]), c_float(scale), *starmap(Matrix.of, heads))

    each(q.shape[1], head)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: BlockIndex, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv, group = result(q), result(k).zero_(), result(v).zero_(), q.shape[1] // k.shape[1]

    def key_value_head(g: int) -> None:
        for h in range(g * group, (g + 1) * group):
            heads = (q, h), (k, g), (v, g), (out, h), (lse, h), (grad, h), (dq, h), (dk, g), (dv, g)
            call("backward", Columns.of(index, h), c_long(q.shape[2]), c_float(scale), *starmap(Matrix.of, heads))

    each(k.shape[1], key_value_head)
    return dq, dk, dv


def gate(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`blocks`, `rows`, `col_offs` and `pair` of a `BlockIndex`: the same choice as the reference, but for scores that
    differ in their last bits.
    """
    n_tokens, heads, d = q.shape
    n_blocks, group = len(starts), heads // k.shape[1]
    own, first = token_blocks(n_tokens, starts, lengths, cu_seqlens)
    number = int((own - first + 1).clamp(max=top_k).sum())  # choices of a head: every head makes as many
    blocks, pair = (torch.empty(n_tokens, heads, top_k, dtype=torch.int32) for _ in range(2))
    rows = torch.full((n_tokens * heads * top_k,), -1, dtype=torch.int32)
    counts = torch.empty(heads, n_blocks, dtype=torch.int64)

    def head(h: int) -> None:
        sizes = (c_long(size) for size in (n_tokens, d, n_blocks, top_k))
        tables = (native.address(x) for x in (starts, lengths, own, first))
        results = native.address(blocks[:, h]), native.address(pair[:, h]), c_long(heads * top_k)
        by_block = native.address(rows[h * number :]), native.address(counts[h])
        queries, keys = Matrix.of(q, h), Matrix.of(k, h // group)
        call("gate", *sizes, queries, keys, *tables, c_int32(h * number), *results, *by_block)

    each(heads, head)
    return blocks, rows, F.pad(counts.flatten().cumsum(0), (1, 0)), pair


def result(x: Tensor) -> Tensor:
    return on_large_pages(torch.empty_like(x))


def each(heads: int, work: Callable[[int], None]) -> None:
    """`work(head)` for every head, in as many threads as there are heads for."""
    count = min(threads.available(), heads)
    if count > 1:
        threads.share(range(heads), lambda thread, head: work(head), count)
    else:
        for head in range(heads):
            work(head)


def call(name: str, *arguments) -> None:
    if native.library(SOURCE)[name](*arguments):
        raise MemoryError(f"block_sparse_attention found no memory for the scratch of {name}")
