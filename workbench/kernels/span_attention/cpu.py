"""Span attention on a processor: only the first keys and the band are touched, heads of equal span together.

A tile of queries needs a contiguous range of keys and the sink before it. torch's own fused attention does each tile,
with a mask that is the same for all tiles away from the start; the tiles are short, because a tile of C queries reads
C - 1 keys more than a query sees.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64
"""Queries a tile. From 32 to 512, at spans of 64 to 4,096 on a processor with AVX-512, none was faster by much."""


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int) -> Tensor:
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    for heads, span in _groups(spans):
        q_g, k_g, v_g = q[:, heads], _of(k, q, heads), _of(v, q, heads)
        if span >= q.shape[2] or sink >= q.shape[2]:
            output[:, heads] = F.scaled_dot_product_attention(q_g, k_g, v_g, is_causal=True)
            continue
        result = output[:, heads]
        for rows, keys, mask in _tiles(q.shape[2], span, sink, q.device):
            result[:, :, rows] = F.scaled_dot_product_attention(
                q_g[:, :, rows], _take(k_g, keys, sink), _take(v_g, keys, sink), attn_mask=mask
            )
        if not isinstance(heads, slice):
            output[:, heads] = result
    return output


def span_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sink: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, a tile at a time: a tile has all the keys of its queries, so nothing was saved for it."""
    group, scale = q.shape[1] // max(k.shape[1], 1), q.shape[-1] ** -0.5
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for heads, span in _groups(spans):
        q_g, k_g, v_g, grad_g = q[:, heads], _of(k, q, heads), _of(v, q, heads), grad[:, heads]
        dq_g, dk_g, dv_g = torch.empty_like(q_g), torch.zeros_like(k_g), torch.zeros_like(v_g)
        for rows, keys, mask in _tiles(q.shape[2], span, sink, q.device):
            q_t, k_t, v_t, grad_t = q_g[:, :, rows], _take(k_g, keys, sink), _take(v_g, keys, sink), grad_g[:, :, rows]
            p = (q_t @ k_t.mT * scale).masked_fill_(~mask, float("-inf")).softmax(-1)
            ds = grad_t @ v_t.mT
            ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq_g[:, :, rows] = ds @ k_t
            _give(dk_g, keys, sink, ds.mT @ q_t)
            _give(dv_g, keys, sink, p.mT @ grad_t)
        dq[:, heads] = dq_g
        kv = torch.arange(q.shape[1], device=q.device)[heads] // group
        dk.index_add_(1, kv, dk_g)
        dv.index_add_(1, kv, dv_g)
    return dq, dk, dv


def span_decode(q: Tensor, k: Tensor, v: Tensor, start: Sequence[int], length: Sequence[int]) -> Tensor:
    """Key heads of equal length that lie one after the other at equal distances are one call on a view of the cache."""
    batch, _, d = q.shape
    output = torch.empty_like(q, memory_format=torch.contiguous_format).view(batch, len(start), -1, d)
    queries = q.reshape(batch, len(start), -1, d)
    for heads, step in _runs(start, length):
        shape = (batch, heads.stop - heads.start, length[heads.start], d)
        k_g, v_g = (
            x.as_strided(
                shape,
                (x.stride(0), step * x.stride(1), x.stride(1), x.stride(2)),
                x.storage_offset() + start[heads.start] * x.stride(1),
            )
            for x in (k, v)
        )
        output[:, heads] = F.scaled_dot_product_attention(queries[:, heads], k_g, v_g)
    return output.view(q.shape)


def _groups(spans: Sequence[int]) -> Iterator[tuple[slice | list[int], int]]:
    """Heads of equal span, as a slice where they are neighbours."""
    groups = defaultdict(list)
    for head, span in enumerate(spans):
        groups[span].append(head)
    for span, heads in groups.items():
        neighbours = heads == list(range(heads[0], heads[-1] + 1))
        yield (slice(heads[0], heads[-1] + 1) if neighbours else heads), span


def _of(x: Tensor, q: Tensor, heads: slice | list[int]) -> Tensor:
    """The keys or values (B, heads, N, d) of these query heads."""
    if x.shape[1] == q.shape[1]:
        return x[:, heads]
    return x[:, torch.arange(q.shape[1], device=q.device)[heads] // (q.shape[1] // x.shape[1])]


def _tiles(n: int, span: int, sink: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, band of keys, mask (rows, keys)) of each tile; where the band begins after the sink, the sink comes first.

    Away from the start the mask depends on the number of rows alone.
    """
    inner: dict[int, Tensor] = {}
    for begin in range(0, n, TILE):
        end, low = min(begin + TILE, n), max(begin - span + 1, 0)
        rows = torch.arange(begin, end, device=device)[:, None]
        if low <= sink:
            low = 0
            keys = torch.arange(end, device=device)
            mask = (keys <= rows) & ((keys < sink) | (rows - keys < span))
        elif (mask := inner.get(end - begin)) is None:
            keys = torch.arange(low, end, device=device)
            band = (keys <= rows) & (rows - keys < span)
            mask = inner[end - begin] = torch.cat([band.new_ones(end - begin, sink), band], 1)
        yield slice(begin, end), slice(low, end), mask


def _take(x: Tensor, keys: slice, sink: int) -> Tensor:
    """The sink and the band of x (B, heads, N, d); a band that begins at 0 holds the sink."""
    band = x[:, :, keys]
    return torch.cat([x[:, :, :sink], band], 2) if keys.start and sink else band


def _give(x: Tensor, keys: slice, sink: int, value: Tensor) -> None:
    """Add to x what belongs to its sink and band, the inverse of `_take`."""
    if keys.start and sink:
        x[:, :, :sink] += value[:, :, :sink]
        value = value[:, :, sink:]
    x[:, :, keys] += value


def _runs(start: Sequence[int], length: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Neighbouring heads of equal length and equal distance between their starts, and that distance."""
    begin = 0
    while begin < len(start):
        end = begin + 1
        step = start[end] - start[begin] if end < len(start) else 0
        while end < len(start) and length[end] == length[begin] and start[end] - start[end - 1] == step > 0:
            end += 1
        yield slice(begin, end), max(step, 0) if end - begin > 1 else 0
        begin = end
