"""Which key blocks each query attends to, stored by query and by block.

A packed batch of N tokens holds S sequences; each is cut into blocks of B tokens, the last one maybe shorter. A query
attends to its own block and to earlier blocks of its own sequence.

Tensor letters: N tokens, H query heads, M blocks (numbered through the batch), K blocks per query, B tokens a block.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from workbench.errors import InputError


@dataclass(frozen=True)
class BlockIndex:
    """The chosen blocks of every query and head; what `block_sparse_attention` attends over.

    A column is the pair (head h, block j), number h M + j; its rows are the queries that attend to the block.

    Attributes:
        block_size: B.
        blocks: (N, H, K) block of each choice, ascending, the query's own block the last; -1 after them where a query
            has fewer than K earlier blocks.
        rows: (H N K,) query of each choice, column by column, ascending within a column; -1 after the last choice.
        col_offs: (H M + 1,) first entry of each column in `rows`; the last number is the number of choices.
        pair: (N, H, K) where in `rows` each choice is; -1 where there is none.
        starts, lengths: (M,) first token and number of tokens of each block. M is the bound N // B + S, which needs no
            look at the sequence lengths; blocks there is no need for are last and have length 0.
    """

    block_size: int
    blocks: Int32[Tensor, "tokens heads k"]
    rows: Int32[Tensor, " choices"]
    col_offs: Int64[Tensor, " columns_plus_1"]
    pair: Int32[Tensor, "tokens heads k"]
    starts: Int32[Tensor, " blocks"]
    lengths: Int32[Tensor, " blocks"]

    @classmethod
    def from_blocks(
        cls, blocks: Int32[Tensor, "tokens heads k"], block_size: int, cu_seqlens: Int32[Tensor, " seqs_plus_1"] | None
    ) -> "BlockIndex":
        """From any choice of blocks, (N, H, K) with -1 for none, in any order: random ones, or those of another gate.

        Raises:
            InputError: a query lacks its own block, or has a later one, one of another sequence, or one twice.
        """
        starts, lengths = block_table(blocks.shape[0], block_size, cu_seqlens, blocks.device)
        own, first = token_blocks(blocks.shape[0], starts, lengths, cu_seqlens)
        ordered = ascending(blocks)
        low, high = first[:, None, None], own[:, None, None]
        if not (((ordered >= low) & (ordered <= high)) | (ordered == -1)).all():
            raise InputError("blocks must hold for each query only its own and earlier blocks of its sequence, or -1")
        if not (ordered == high).any(-1).all():
            raise InputError("blocks must hold each query's own block")
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise InputError("blocks must hold each block at most once for one query and head")
        return cls(block_size, ordered, *invert(ordered, starts.numel()), starts, lengths)

    @property
    def col_nnz(self) -> Int64[Tensor, " columns"]:
        """(H M,) queries of each column."""
        return self.col_offs.diff()

    @property
    def n_blocks(self) -> int:
        """M."""
        return self.starts.numel()

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the class: what operators take."""
        return self.blocks, self.rows, self.col_offs, self.pair, self.starts, self.lengths


def block_table(
    n_tokens: int, block_size: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Int32[Tensor, " blocks"], Int32[Tensor, " blocks"]]:
    """First token and length of each block, (M,) each, with a static bound M (exact for one sequence)."""
    if cu_seqlens is None:
        starts = torch.arange(0, n_tokens, block_size, dtype=torch.int32, device=device)
        return starts, (n_tokens - starts).clamp(max=block_size)
    ends = cu_seqlens[1:].long()
    blocks_to = ((ends - cu_seqlens[:-1] + block_size - 1) // block_size).cumsum(0)  # (S,) blocks up to and with each
    block = torch.arange(n_tokens // block_size + ends.numel(), device=device)
    sequence = torch.searchsorted(blocks_to, block, right=True)
    used = sequence < ends.numel()
    sequence = sequence.clamp(max=ends.numel() - 1)
    before = torch.nn.functional.pad(blocks_to, (1, 0))[sequence]
    starts = cu_seqlens[sequence] + (block - before) * block_size
    lengths = (ends[sequence] - starts).clamp(max=block_size)
    return torch.where(used, starts, n_tokens).int(), torch.where(used, lengths, 0).int()


def token_blocks(
    n_tokens: int, starts: Tensor, lengths: Tensor, cu_seqlens: Tensor | None
) -> tuple[Int32[Tensor, " tokens"], Int32[Tensor, " tokens"]]:
    """The block of each token, and the first block of its sequence, (N,) each."""
    token = torch.arange(n_tokens, dtype=torch.int32, device=starts.device)
    own = torch.searchsorted(starts, token, right=True, out_int32=True) - 1
    if cu_seqlens is None:
        return own, torch.zeros_like(own)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return own, torch.searchsorted(starts, cu_seqlens[sequence].contiguous(), out_int32=True)


def ascending(blocks: Int32[Tensor, "tokens heads k"]) -> Int32[Tensor, "tokens heads k"]:
    """Each query's blocks in ascending order, with -1 (none) after them."""
    last = torch.iinfo(torch.int32).max
    ordered = blocks.int().masked_fill(blocks < 0, last).sort(-1).values
    return ordered.masked_fill_(ordered == last, -1)


def invert(blocks: Int32[Tensor, "tokens heads k"], n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choices by column: `rows`, `col_offs` and `pair` of a `BlockIndex`. No look at the values."""
    n_tokens, heads, k = blocks.shape
    columns = heads * n_blocks
    by_head = blocks.transpose(0, 1)
    first = (torch.arange(heads, dtype=torch.int32, device=blocks.device) * n_blocks)[:, None, None]
    key = torch.where(by_head < 0, columns, by_head + first).flatten()  # (H N K,), by head and then query
    order = torch.argsort(key, stable=True)
    nnz = torch.zeros(columns + 1, dtype=torch.int64, device=blocks.device)
    nnz = nnz.scatter_add_(0, key.long(), torch.ones_like(order))
    col_offs = torch.nn.functional.pad(nnz[:-1].cumsum(0), (1, 0))
    place = torch.arange(order.numel(), device=blocks.device)
    valid = place < col_offs[-1]
    rows = torch.where(valid, order // k % n_tokens, -1).int()
    pair = torch.empty_like(rows).scatter_(0, order, torch.where(valid, place, -1).int())
    return rows, col_offs, pair.view(heads, n_tokens, k).transpose(0, 1).contiguous()
