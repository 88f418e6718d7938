"""The choice of blocks on a CPU: scores in slices that fit the cache, selection by numpy's partition.

torch's topk takes six times as long as the partition on rows this short. A thread takes whole heads, from the scores to
the finished index of the head, in memory that it uses again.

Tensor letters: N tokens, H query heads, G key-value heads, d head width, M blocks, B tokens a block, K blocks per
query; S sequences of T tokens in n blocks.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels import threads
from workbench.kernels.block_sparse_attention.cpu import accumulator, each_head
from workbench.kernels.memory import Workspace

SCORES = 1 << 17  # at a time: half a megabyte in float32, which fits the cache of a core with its copy


@threads.confined()
def index(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`blocks`, `rows`, `col_offs` and `pair` of a `BlockIndex`: the same choice as the reference, but for scores that
    differ in their last bits.
    """
    n_tokens, heads, _ = q.shape
    groups = sequences(n_tokens, block_size, cu_seqlens)
    # Every head makes as many choices: all the blocks there are, K at most.
    each = [(torch.arange(token.shape[1]) // block_size + 1).clamp(max=top_k).sum() * len(token) for token, _ in groups]
    number = int(sum(each))
    blocks, pairs = (torch.empty(n_tokens, heads, top_k, dtype=torch.int32) for _ in range(2))
    rows = torch.full((heads * n_tokens * top_k,), -1, dtype=torch.int32)
    counts = torch.empty(heads, len(starts), dtype=torch.int64)
    query = torch.arange(n_tokens, dtype=torch.int32).repeat_interleave(top_k)

    def work(memory: Workspace, head: int) -> None:
        means = mean_keys(k[:, head // (heads // k.shape[1])], starts)
        chosen = torch.empty(n_tokens, top_k, dtype=torch.int32)
        for token, centre in groups:
            queries = q[:, head] if len(groups) == 1 else q[:, head].index_select(0, token.flatten())
            queries = queries.to(means.dtype).unflatten(0, token.shape)
            found = one_head(queries, means[centre], block_size, top_k, memory)
            if len(starts) > centre.shape[1]:
                found += torch.where(found < 0, 0, centre[:, :1, None]).int()
            chosen.index_copy_(0, token.flatten(), found.flatten(0, 1))
        order, counts[head] = by_column(chosen, len(starts))
        first, last = head * number, (head + 1) * number
        torch.index_select(query, 0, order, out=rows[first:last])
        pair = torch.full((n_tokens * top_k,), -1, dtype=torch.int32)
        pair[order] = torch.arange(first, last, dtype=torch.int32)
        blocks[:, head], pairs[:, head] = chosen, pair.view(n_tokens, top_k)

    each_head(work, heads, accumulator(q))
    return blocks, rows, F.pad(counts.flatten().cumsum(0), (1, 0)), pairs


def sequences(n_tokens: int, block_size: int, cu_seqlens: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """For each length there is, the tokens (S, T) and the blocks (S, n) of the sequences that have it."""
    bounds = [0, n_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    by_length: dict[int, list[tuple[int, int]]] = {}
    block = 0
    for start, end in pairwise(bounds):
        if end > start:
            by_length.setdefault(end - start, []).append((start, block))
        block += (end - start + block_size - 1) // block_size
    found = []
    for length, firsts in by_length.items():
        first_token, first_block = (torch.tensor(x)[:, None] for x in zip(*firsts, strict=True))
        blocks = torch.arange((length + block_size - 1) // block_size)
        found.append((first_token + torch.arange(length), first_block + blocks))
    return found


def mean_keys(keys: Tensor, starts: Tensor) -> Tensor:
    """(M, d) the mean key of each block: blocks follow one another, so each ends where the next one starts."""
    token = torch.arange(keys.shape[0], dtype=torch.int32)
    return F.embedding_bag(token, keys.to(accumulator(keys)), starts, mode="mean")


def one_head(
    queries: Tensor, centres: Tensor, block_size: int, top_k: int, memory: Workspace
) -> Int32[Tensor, "seqs time k"]:
    """The blocks (S, T, K) of queries (S, T, d) by the mean keys (S, n, d), numbered within their sequence."""
    n_seqs, length, _ = queries.shape
    own = torch.arange(length, dtype=torch.int32) // block_size
    every = torch.arange(top_k, dtype=torch.int32)
    chosen = torch.where(every <= own[:, None], every, -1).repeat(n_seqs, 1, 1)  # the first K blocks: all
    chosen[:, top_k * block_size :, -1] = own[top_k * block_size :]
    block, n = top_k, centres.shape[1]
    while block < n and top_k > 1:
        # As many blocks of queries as fit; none of them needs the scores of blocks after its own.
        upto = min(n, block + max(1, SCORES // (n_seqs * block_size * n)))
        rows = slice(block * block_size, min(upto * block_size, length))
        mine, means = queries[:, rows], centres[:, :upto]
        scores = torch.bmm(mine, means.transpose(1, 2), out=memory("scores", *mine.shape[:2], upto))
        numbers = scores.numpy()
        for later in range(block, upto):  # a block's queries may not take it, nor those after it
            at = (later - block) * block_size
            numbers[:, at : at + block_size, later:] = -np.inf
        partitioned = memory("partitioned", n_seqs * mine.shape[1], upto)
        chosen[:, rows, :-1] = largest(scores.flatten(0, 1), top_k - 1, partitioned).view(n_seqs, -1, top_k - 1)
        block = upto
    return chosen


def largest(scores: Tensor, count: int, partitioned: Tensor) -> Int32[Tensor, "rows count"]:
    """Columns of the `count` largest scores of each row, ascending; of equal ones the first. Uses up `partitioned`."""
    rows, width = scores.shape
    numbers, edge = scores.numpy(), partitioned.copy_(scores).numpy()
    edge.partition(width - count, axis=1)
    taken = numbers >= edge[:, width - count, None]
    flat = np.flatnonzero(taken)
    first = np.arange(0, rows * width, width)
    if len(flat) != rows * count or (flat[::count] < first).any() or (flat[count - 1 :: count] >= first + width).any():
        odd = np.flatnonzero(taken.sum(1) != count)  # equal scores at the edge, or scores that are no numbers
        order = scores[torch.from_numpy(odd)].sort(dim=1, descending=True, stable=True).indices[:, :count].numpy()
        taken[odd] = False
        taken[odd[:, None], order] = True
        flat = np.flatnonzero(taken)
    return torch.from_numpy(np.subtract(flat.reshape(rows, count), first[:, None], dtype=np.int32, casting="unsafe"))


def by_column(chosen: Int32[Tensor, "tokens k"], n_blocks: int) -> tuple[Tensor, Tensor]:
    """The choices that there are, by block and then by query, and how many each block has; by numpy's radix sort."""
    small = np.uint8 if n_blocks < 2**8 else np.uint16 if n_blocks < 2**16 else np.uint32
    key = torch.where(chosen < 0, n_blocks, chosen).flatten().numpy().astype(small)
    counts = torch.from_numpy(np.bincount(key, minlength=n_blocks + 1)[:n_blocks])
    return torch.from_numpy(np.argsort(key, kind="stable"))[: int(counts.sum())], counts
