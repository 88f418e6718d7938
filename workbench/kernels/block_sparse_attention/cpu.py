"""The CPU path: one batched product for several key blocks at a time, in buffers that stay in the cache.

A column (one head, one key block) is a small dense attention of the queries that chose the block. Columns of about
equal length are padded to the longest of their tile and computed together; what each gives its queries is added to
their rows of the output, in a fixed order. While no score is above 100 (to base 2) the exponentials need no maximum
taken off, which saves two passes; otherwise the largest score of each query is found first.

Exponentials are to base 2, for which the processor is three times as fast; log2(e) is in the scale of the queries.
Key-value heads are independent: with several threads each works on heads of its own.

Tensor letters: N tokens, H query heads, G key-value heads, d head width, M blocks, B tokens a block; a tile has C
columns of R rows.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from workbench.kernels import threads
from workbench.kernels.block_sparse_attention.index import BlockIndex

LOG2E = 1 / math.log(2)
CACHE = 1 << 19  # numbers in the scores and gathered rows of a tile: two megabytes in float32, found by trial
SLACK = 0.75  # a tile ends before a column shorter than this share of its longest: so much padding at most
SAFE = 100.0  # scores up to which no power of two leaves the range of float32, whatever their number


class Tile(NamedTuple):
    """Columns of one padded length.

    Attributes:
        columns: in the order of `plan`.
        rows: (C R,) query of each row, N for padding.
        shape: (C, R).
        first: whether the rows are the first of their columns, where a block's own queries are.
    """

    columns: slice
    rows: Tensor
    shape: tuple[int, int]
    first: bool


def forward(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, H, d) and L (N, H), as the reference; scores and sums are in float32 (float64 where q is)."""
    n_tokens, heads, d = q.shape
    out, lse = torch.empty_like(q), q.new_empty(n_tokens, heads, dtype=accumulator(q))
    places = block_places(index, n_tokens)
    offsets, size, group = index.col_offs.tolist(), index.block_size, heads // k.shape[1]

    def work(g: int) -> None:
        own_keys, own_values = padded(k[:, g], lse.dtype), padded(v[:, g], lse.dtype)
        for h in range(g * group, (g + 1) * group):
            order, tiles = plan(index, h, offsets, n_tokens, d)
            keys, values = (by_block(x, places, order) for x in (own_keys, own_values))
            keys = keys.transpose(1, 2)
            queries = padded(q[:, h], lse.dtype).mul_(scale * LOG2E)
            parts, sums = torch.zeros_like(queries), torch.zeros_like(queries[:, 0])
            scratch = Scratch(tiles, queries)
            peak = float(queries.norm(dim=1).max() * own_keys.norm(dim=1).max())  # no score is larger
            top = None if peak <= SAFE else largest_scores(queries, keys, tiles, scratch)
            for tile in tiles:
                mine = torch.index_select(queries, 0, tile.rows, out=scratch(0, tile, d)).view(*tile.shape, d)
                scores = torch.bmm(mine, keys[tile.columns], out=scratch(1, tile, size).view(*tile.shape, size))
                if top is not None:
                    scores.sub_(top[tile.rows].view(*tile.shape, 1))
                mask_own(scores.exp2_(), tile)
                sums.index_add_(0, tile.rows, scores.sum(-1).flatten())
                part = scratch(2, tile, d)
                torch.bmm(scores, values[tile.columns], out=part.view(*tile.shape, d))
                parts.index_add_(0, tile.rows, part)
            out[:, h] = parts[:-1].div_(sums[:-1, None])
            lse[:, h] = (sums.log2_() if top is None else sums.log2_().add_(top))[:-1].div_(LOG2E)

    each_head(work, k.shape[1])
    return out, lse


def largest_scores(queries: Tensor, keys: Tensor, tiles: list[Tile], scratch: "Scratch") -> Tensor:
    """(N + 1,) the largest score of each query, 0 for the row of padding."""
    top, (_, d, size) = torch.full_like(queries[:, 0], -torch.inf), keys.shape
    for tile in tiles:
        mine = torch.index_select(queries, 0, tile.rows, out=scratch(0, tile, d)).view(*tile.shape, d)
        scores = torch.bmm(mine, keys[tile.columns], out=scratch(1, tile, size).view(*tile.shape, size))
        mask_own(scores, tile, -torch.inf)
        top.scatter_reduce_(0, tile.rows, scores.amax(-1).flatten(), "amax")
    top[-1] = 0
    return top


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: BlockIndex, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: with P = exp(S - L) for each tile, dV = P' dO, dS = P (dO V' - delta), dK = dS' Q and
    dQ = dS K, where delta is the product of the output and its gradient.
    """
    n_tokens, heads, d = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    places, kind = block_places(index, n_tokens), lse.dtype
    offsets, size, group = index.col_offs.tolist(), index.block_size, heads // k.shape[1]

    def work(g: int) -> None:
        own_keys, own_values = padded(k[:, g], kind), padded(v[:, g], kind)
        dk_all, dv_all = torch.zeros_like(own_keys), torch.zeros_like(own_values)
        for h in range(g * group, (g + 1) * group):
            order, tiles = plan(index, h, offsets, n_tokens, d)
            keys, values = (by_block(x, places, order) for x in (own_keys, own_values))
            queries, grads = padded(q[:, h], kind).mul_(scale * LOG2E), padded(grad[:, h], kind)
            minus_l = padded(lse[:, h, None], kind).mul_(-LOG2E)[:, 0]
            minus_delta = (grads * padded(out[:, h], kind)).sum(1).neg_()
            d_keys, d_values, d_queries = torch.zeros_like(keys), torch.zeros_like(values), torch.zeros_like(queries)
            scratch = Scratch(tiles, queries)
            for tile in tiles:
                shape, at, rows = tile.shape, tile.columns, tile.rows
                mine = torch.index_select(queries, 0, rows, out=scratch(0, tile, d)).view(*shape, d)
                p = scratch(1, tile, size).view(*shape, size)
                torch.baddbmm(minus_l[rows].view(*shape, 1), mine, keys[at].transpose(1, 2), out=p)
                mask_own(p.exp2_(), tile)
                down = torch.index_select(grads, 0, rows, out=scratch(2, tile, d)).view(*shape, d)
                d_values[at].baddbmm_(p.transpose(1, 2), down)
                ds = scratch(3, tile, size).view(*shape, size)
                torch.baddbmm(minus_delta[rows].view(*shape, 1), down, values[at].transpose(1, 2), out=ds).mul_(p)
                d_keys[at].baddbmm_(ds.transpose(1, 2), mine)
                part = scratch(0, tile, d)
                torch.bmm(ds, keys[at], out=part.view(*shape, d))
                d_queries.index_add_(0, rows, part)
            dq[:, h] = d_queries[:-1].mul_(scale)
            tokens = places[order].flatten()
            dk_all.index_add_(0, tokens, d_keys.flatten(0, 1), alpha=1 / LOG2E)  # takes off the queries' log2(e)
            dv_all.index_add_(0, tokens, d_values.flatten(0, 1))
        dk[:, g], dv[:, g] = dk_all[:-1], dv_all[:-1]

    each_head(work, k.shape[1])
    return dq, dk, dv


def plan(index: BlockIndex, head: int, offsets: list[int], n_tokens: int, d: int) -> tuple[Tensor, list[Tile]]:
    """The blocks of one head that have rows, by falling number of rows, and the tiles they make."""
    first = head * index.n_blocks
    begins = offsets[first : first + index.n_blocks + 1]
    nnz = [end - begin for begin, end in pairwise(begins)]
    order = sorted((j for j in range(len(nnz)) if nnz[j]), key=nnz.__getitem__, reverse=True)
    columns = index.rows[begins[0] : begins[-1]].long().split(nnz)
    most = max(CACHE // (index.block_size + 2 * d), index.block_size)  # rows of a tile
    tiles, at = [], 0
    while at < len(order):
        longest = nnz[order[at]]
        chosen = [columns[j] for j in order[at : at + max(1, most // longest)] if nnz[j] >= SLACK * longest]
        where = slice(at, at + len(chosen))
        if len(chosen) == 1:
            pieces = chosen[0].split(most)
            tiles += [Tile(where, rows, (1, len(rows)), i == 0) for i, rows in enumerate(pieces)]
        else:
            rows = pad_sequence(chosen, batch_first=True, padding_value=n_tokens)
            tiles.append(Tile(where, rows.flatten(), tuple(rows.shape), True))
        at += len(chosen)
    return torch.tensor(order), tiles


class Scratch:
    """Memory that every tile uses anew: `scratch(number, tile, width)` is (C R, width) of buffer `number`."""

    def __init__(self, tiles: list[Tile], like: Tensor):
        self.most, self.like, self.buffers = max(len(tile.rows) for tile in tiles), like, {}

    def __call__(self, number: int, tile: Tile, width: int) -> Tensor:
        if number not in self.buffers:
            self.buffers[number] = self.like.new_empty(self.most, width)
        return self.buffers[number][: len(tile.rows)]


def each_head(work: Callable[[int], None], heads: int) -> None:
    """`work(head)` for each head, in as many threads as there are heads for."""
    count = min(threads.available(), heads)
    if count > 1:
        threads.share(range(heads), lambda _, head: work(head), count)
    else:
        for head in range(heads):
            work(head)


def mask_own(scores: Tensor, tile: Tile, value: float = 0.0) -> None:
    """Within its own block a query sees what is not after it. The own queries are the first rows of a column."""
    if tile.first:
        own = scores[:, : scores.shape[2]]
        if value == 0.0:
            own.tril_()
        else:
            own.masked_fill_(torch.ones_like(own[0], dtype=torch.bool).triu_(1), value)


def accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def padded(x: Tensor, kind: torch.dtype) -> Tensor:
    """(N + 1, width) the rows of x and a row of zeros, which stands for padding."""
    rows = x.new_empty(x.shape[0] + 1, x.shape[1], dtype=kind)
    rows[:-1], rows[-1] = x, 0
    return rows


def block_places(index: BlockIndex, n_tokens: int) -> Tensor:
    """(M, B) the token at each place of each block, N behind a block's end."""
    within = torch.arange(index.block_size)
    return torch.where(within < index.lengths[:, None], index.starts[:, None] + within, n_tokens)


def by_block(x: Tensor, places: Tensor, order: Tensor) -> Tensor:
    """(blocks, B, d) the rows of x at the places of the blocks in `order`."""
    return x.index_select(0, places[order].flatten()).view(len(order), places.shape[1], -1)
