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
from workbench.kernels.memory import Workspace, on_large_pages, workspaces

LOG2E = 1 / math.log(2)
CACHE = 1 << 20  # numbers in the scores and gathered rows of a tile: four megabytes in float32, found by trial
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


@threads.confined()
def forward(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Output (N, H, d) and L (N, H), as the reference; scores and sums are in float32 (float64 where q is)."""
    n_tokens, heads, d = q.shape
    out, lse = on_large_pages(torch.empty_like(q)), q.new_empty(n_tokens, heads, dtype=accumulator(q))
    places = block_places(index, n_tokens)
    offsets, size, group = index.col_offs.tolist(), index.block_size, heads // k.shape[1]

    def work(memory: Workspace, g: int) -> None:
        own_keys, own_values = padded(memory, "own keys", k[:, g]), padded(memory, "own values", v[:, g])
        for h in range(g * group, (g + 1) * group):
            order, tiles = plan(index, h, offsets, n_tokens, d)
            tokens = places[order]
            keys = taken(memory, "keys", own_keys, tokens.flatten(), tokens.shape).transpose(1, 2)
            values = taken(memory, "values", own_values, tokens.flatten(), tokens.shape)
            queries = padded(memory, "queries", q[:, h]).mul_(scale * LOG2E)
            parts, sums = memory("parts", n_tokens + 1, d).zero_(), memory("sums", n_tokens + 1).zero_()
            peak = float(queries.norm(dim=1).max() * own_keys.norm(dim=1).max())  # no score is larger
            top = None if peak <= SAFE else largest_scores(queries, keys, tiles, memory)
            for tile in tiles:
                mine = taken(memory, "mine", queries, tile.rows, tile.shape)
                scores = torch.bmm(mine, keys[tile.columns], out=memory("scores", *tile.shape, size))
                if top is not None:
                    scores.sub_(top[tile.rows].view(*tile.shape, 1))
                mask_own(scores.exp2_(), tile)
                sums.index_add_(0, tile.rows, scores.sum(-1).flatten())
                part = torch.bmm(scores, values[tile.columns], out=memory("part", *tile.shape, d))
                parts.index_add_(0, tile.rows, part.flatten(0, 1))
            torch.div(parts[:-1], sums[:-1, None], out=parts[:-1])
            out[:, h] = parts[:-1]
            lse[:, h] = (sums.log2_() if top is None else sums.log2_().add_(top))[:-1].div_(LOG2E)

    each_head(work, k.shape[1], lse.dtype)
    return out, lse


def largest_scores(queries: Tensor, keys: Tensor, tiles: list[Tile], memory: Workspace) -> Tensor:
    """(N + 1,) the largest score of each query, 0 for the row of padding."""
    top = torch.full_like(queries[:, 0], -torch.inf)
    for tile in tiles:
        mine = taken(memory, "mine", queries, tile.rows, tile.shape)
        scores = torch.bmm(mine, keys[tile.columns], out=memory("scores", *tile.shape, keys.shape[2]))
        mask_own(scores, tile, -torch.inf)
        top.scatter_reduce_(0, tile.rows, scores.amax(-1).flatten(), "amax")
    top[-1] = 0
    return top


@threads.confined()
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: BlockIndex, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: with P = exp(S - L) for each tile, dV = P' dO, dS = P (dO V' - delta), dK = dS' Q and
    dQ = dS K, where delta is the product of the output and its gradient.
    """
    n_tokens, heads, d = q.shape
    dq, dk, dv = (on_large_pages(torch.empty_like(x)) for x in (q, k, v))
    places = block_places(index, n_tokens)
    offsets, size, group = index.col_offs.tolist(), index.block_size, heads // k.shape[1]

    def work(memory: Workspace, g: int) -> None:
        own_keys, own_values = padded(memory, "own keys", k[:, g]), padded(memory, "own values", v[:, g])
        dk_all, dv_all, d_queries = (memory(name, n_tokens + 1, d) for name in ("dk", "dv", "dq"))
        dk_all.zero_(), dv_all.zero_()
        for h in range(g * group, (g + 1) * group):
            order, tiles = plan(index, h, offsets, n_tokens, d)
            tokens = places[order]
            keys = taken(memory, "keys", own_keys, tokens.flatten(), tokens.shape)
            values = taken(memory, "values", own_values, tokens.flatten(), tokens.shape)
            queries = padded(memory, "queries", q[:, h]).mul_(scale * LOG2E)
            grads = padded(memory, "grads", grad[:, h])
            minus_l = padded(memory, "lse", lse[:, h, None]).mul_(-LOG2E)[:, 0]
            minus_delta = padded(memory, "product", out[:, h]).mul_(grads).sum(1).neg_()
            d_keys, d_values = (memory(name, *keys.shape).zero_() for name in ("d keys", "d values"))
            d_queries.zero_()
            for tile in tiles:
                shape, at, rows = tile.shape, tile.columns, tile.rows
                mine = taken(memory, "mine", queries, rows, shape)
                p = memory("scores", *shape, size)
                torch.baddbmm(minus_l[rows].view(*shape, 1), mine, keys[at].transpose(1, 2), out=p)
                mask_own(p.exp2_(), tile)
                down = taken(memory, "down", grads, rows, shape)
                d_values[at].baddbmm_(p.transpose(1, 2), down)
                ds = memory("d scores", *shape, size)
                torch.baddbmm(minus_delta[rows].view(*shape, 1), down, values[at].transpose(1, 2), out=ds).mul_(p)
                d_keys[at].baddbmm_(ds.transpose(1, 2), mine)
                part = torch.bmm(ds, keys[at], out=memory("part", *shape, d))
                d_queries.index_add_(0, rows, part.flatten(0, 1))
            dq[:, h] = d_queries[:-1].mul_(scale)
            tokens = tokens.flatten()
            dk_all.index_add_(0, tokens, d_keys.flatten(0, 1), alpha=1 / LOG2E)  # takes off the queries' log2(e)
            dv_all.index_add_(0, tokens, d_values.flatten(0, 1))
        dk[:, g], dv[:, g] = dk_all[:-1], dv_all[:-1]

    each_head(work, k.shape[1], lse.dtype)
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


def padded(memory: Workspace, name: str, x: Tensor) -> Tensor:
    """(N + 1, width) the rows of x and a row of zeros, which stands for padding."""
    rows = memory(name, x.shape[0] + 1, x.shape[1])
    rows[:-1], rows[-1] = x, 0
    return rows


def taken(memory: Workspace, name: str, x: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(*shape, width) these rows of x."""
    found = memory(name, *shape, x.shape[1])
    torch.index_select(x, 0, rows, out=found.view(-1, x.shape[1]))
    return found


def each_head(work: Callable[[Workspace, int], None], heads: int, kind: torch.dtype) -> None:
    """`work(memory, head)` for each head, in as many threads as there are heads for."""
    count = max(1, min(threads.available(), heads))
    with workspaces(count, kind) as memories:
        if count > 1:
            threads.share(range(heads), lambda thread, head: work(memories[thread], head), count)
        else:
            for head in range(heads):
                work(memories[0], head)


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


def block_places(index: BlockIndex, n_tokens: int) -> Tensor:
    """(M, B) the token at each place of each block, N behind a block's end."""
    within = torch.arange(index.block_size)
    return torch.where(within < index.lengths[:, None], index.starts[:, None] + within, n_tokens)
