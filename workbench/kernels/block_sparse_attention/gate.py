"""The choice of blocks on a CPU: scores in slices that fit the cache, selection by numpy's partition.

torch's topk takes six times as long as the partition on rows this short.

Tensor letters: N tokens, H query heads, G key-value heads, d head width, M blocks, B tokens a block, K blocks per
query; S sequences of T tokens in n blocks.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.block_sparse_attention.cpu import each_head
from workbench.kernels.block_sparse_attention.reference import accurate

SCORES = 1 << 18  # at a time: a megabyte in float32


def gate(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, starts: Tensor, lengths: Tensor
) -> Int32[Tensor, "tokens heads k"]:
    """`BlockIndex.blocks`: the same choice as the reference, but for scores that differ in their last bits."""
    group = q.shape[1] // k.shape[1]
    blocks = torch.empty(q.shape[1], q.shape[0], top_k, dtype=torch.int32)
    means = mean_keys(k, starts)
    bounds = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    by_length: dict[int, list[tuple[int, int]]] = {}
    block = 0
    for start, end in pairwise(bounds):
        if end > start:
            by_length.setdefault(end - start, []).append((start, block))
        block += (end - start + block_size - 1) // block_size
    for length, sequences in by_length.items():
        first_token, first_block = (torch.tensor(x)[:, None] for x in zip(*sequences, strict=True))
        token = (first_token + torch.arange(length)).flatten()  # (S T,)
        centre = first_block + torch.arange((length + block_size - 1) // block_size)  # (S, n)
        whole = len(token) == q.shape[0]

        def work(head: int) -> None:
            queries = accurate(q[:, head] if whole else q[:, head].index_select(0, token))  # noqa: B023
            queries = queries.unflatten(0, (len(sequences), length))  # noqa: B023
            chosen = one_head(queries, means[:, head // group][centre], block_size, top_k)  # noqa: B023
            if block > centre.shape[1]:  # noqa: B023
                chosen += torch.where(chosen < 0, 0, first_block[..., None]).int()  # noqa: B023
            blocks[head].index_copy_(0, token, chosen.flatten(0, 1))  # noqa: B023

        each_head(work, q.shape[1])
    return blocks.transpose(0, 1)


def mean_keys(k: Tensor, starts: Tensor) -> Tensor:
    """(M, G, d) the mean key of each block: blocks follow one another, so each ends where the next one starts."""
    token = torch.arange(k.shape[0], dtype=torch.int32)
    return F.embedding_bag(token, accurate(k).flatten(1), starts, mode="mean").unflatten(1, k.shape[1:])


def one_head(queries: Tensor, centres: Tensor, block_size: int, top_k: int) -> Int32[Tensor, "seqs time k"]:
    """The blocks (S, T, K) of queries (S, T, d) by the mean keys (S, n, d), numbered within their sequence."""
    n_seqs, length, _ = queries.shape
    own = torch.arange(length, dtype=torch.int32) // block_size
    every = torch.arange(top_k, dtype=torch.int32)
    chosen = (
        torch.where(every <= own[:, None], every, -1).expand(n_seqs, -1, -1).contiguous()
    )  # the first K blocks: all
    chosen[:, top_k * block_size :, -1] = own[top_k * block_size :]
    block, n = top_k, centres.shape[1]
    while block < n and top_k > 1:
        # As many blocks of queries as fit; none of them needs the scores of blocks after its own.
        upto = min(n, block + max(1, SCORES // (n_seqs * block_size * n)))
        rows = slice(block * block_size, min(upto * block_size, length))
        scores = torch.bmm(queries[:, rows], centres[:, :upto].transpose(1, 2))
        later = torch.arange(block, upto, dtype=torch.int32) >= own[rows, None]
        scores[..., block:].masked_fill_(later, -torch.inf)
        chosen[:, rows, :-1] = largest(scores.flatten(0, 1), top_k - 1).view(n_seqs, -1, top_k - 1)
        block = upto
    return chosen


def largest(scores: Tensor, count: int) -> Int32[Tensor, "rows count"]:
    """Columns of the `count` largest scores of each row, ascending; of equal ones the first."""
    rows, width = scores.shape
    numbers = scores.numpy()
    taken = numbers >= np.partition(numbers, width - count, axis=1)[:, width - count, None]
    flat = np.flatnonzero(taken)
    first = np.arange(0, rows * width, width)
    if len(flat) != rows * count or (flat[::count] < first).any() or (flat[count - 1 :: count] >= first + width).any():
        odd = np.flatnonzero(taken.sum(1) != count)  # equal scores at the edge, or scores that are no numbers
        order = scores[torch.from_numpy(odd)].sort(dim=1, descending=True, stable=True).indices[:, :count].numpy()
        taken[odd] = False
        taken[odd[:, None], order] = True
        flat = np.flatnonzero(taken)
    return torch.from_numpy((flat.reshape(rows, count) - first[:, None]).astype(np.int32))


def invert(blocks: Int32[Tensor, "tokens heads k"], n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `index.invert`, head by head with numpy's radix sort."""
    n_tokens, heads, k = blocks.shape
    small = np.uint8 if n_blocks < 2**8 else np.uint16 if n_blocks < 2**16 else np.uint32
    query = torch.arange(n_tokens, dtype=torch.int32).repeat_interleave(k)
    place = torch.arange(n_tokens * k, dtype=torch.int32)
    numbers = (blocks >= 0).sum((0, 2)).cumsum(0).tolist()
    rows = torch.full((n_tokens * heads * k,), -1, dtype=torch.int32)
    pair = torch.full((heads, n_tokens * k), -1, dtype=torch.int32)
    counts = torch.empty(heads, n_blocks, dtype=torch.int64)

    def work(head: int) -> None:
        key = torch.where(blocks[:, head] < 0, n_blocks, blocks[:, head]).flatten().numpy().astype(small)
        start, end = numbers[head - 1] if head else 0, numbers[head]
        order = torch.from_numpy(np.argsort(key, kind="stable"))[: end - start]
        counts[head] = torch.from_numpy(np.bincount(key, minlength=n_blocks + 1)[:n_blocks])
        rows[start:end] = query[order]
        pair[head].scatter_(0, order, place[: end - start] + start)

    each_head(work, heads)
    col_offs = F.pad(counts.flatten().cumsum(0), (1, 0))
    return rows, col_offs, pair.view(heads, n_tokens, k).transpose(0, 1)
