"""Which key blocks each query attends to, stored by query and by block.

A packed batch of N tokens holds S sequences; each is cut into blocks of B tokens, the last one maybe shorter. A query
attends to its own block and to earlier blocks of its own sequence.

Tensor letters: N tokens, H query heads, M blocks (numbered through the batch), K blocks per query, B tokens a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from workbench.errors import InputError

LARGEST = 2**16  # tokens of a block, where a sequence has fewer
MOST_CHOICES = 2**10  # of a query, where there are fewer blocks


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
        if blocks.ndim != 3 or blocks.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"blocks is {blocks.dtype} of shape {tuple(blocks.shape)} but must be integers (tokens, heads, k)"
            )
        require_block_size(block_size, blocks.shape[0])
        if cu_seqlens is not None:
            require_sequences(cu_seqlens, blocks.shape[0], blocks.device)
        starts, lengths = block_table(blocks.shape[0], block_size, cu_seqlens, blocks.device)
        require_top_k(blocks.shape[2], *blocks.shape[:2], len(starts))
        own, first = token_blocks(blocks.shape[0], starts, lengths, cu_seqlens)
        low, high = first[:, None, None], own[:, None, None]
        if not (((blocks >= low) & (blocks <= high)) | (blocks == -1)).all():
            raise InputError("blocks must hold for each query only its own and earlier blocks of its sequence, or -1")
        ordered = ascending(blocks).contiguous()
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

    def require_form(self, n_tokens: int, heads: int) -> None:
        """Raise `InputError` unless types and shapes are those of an index of so many tokens and heads."""
        require_block_size(self.block_size, n_tokens)
        top_k, n_blocks = self.blocks.shape[-1] if self.blocks.ndim else 0, self.starts.numel()
        require_top_k(top_k, n_tokens, heads, n_blocks)
        wanted = {
            "blocks": ((n_tokens, heads, top_k), torch.int32),
            "rows": ((heads * n_tokens * top_k,), torch.int32),
            "col_offs": ((heads * n_blocks + 1,), torch.int64),
            "pair": ((n_tokens, heads, top_k), torch.int32),
            "starts": ((n_blocks,), torch.int32),
            "lengths": ((n_blocks,), torch.int32),
        }
        for name, (shape, dtype) in wanted.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != self.blocks.device:
                raise InputError(
                    f"index.{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} but must be "
                    f"{dtype} of shape {shape} on {self.blocks.device}, for {n_tokens} tokens and {heads} heads of q"
                )
            if not tensor.is_contiguous():
                raise InputError(f"index.{name} has strides {tensor.stride()} but must be contiguous")

    def require(self, n_tokens: int, heads: int, fits: Callable[["BlockIndex"], bool] | None = None) -> None:
        """Raise `InputError` unless this is, to the last number, an index that the gate or `from_blocks` could make.

        Operators ask when an index enters, for they read and write where it points. Values are read on a CPU only: on
        other devices that would make the host wait for them, and it is the caller who sees to it. Of sequences an index
        knows no more than where blocks end, so a block of an earlier one is not found out here.

        Args:
            fits: a faster way to tell whether the values of an index whose form is right are right.
        """
        self.require_form(n_tokens, heads)
        if self.blocks.device.type == "cpu" and not (fits is not None and fits(self)):
            self._require_values()
            if fits is not None:
                raise InputError("index is none that the gate or BlockIndex.from_blocks could make")

    def _require_values(self) -> None:
        n_tokens, heads, _ = self.blocks.shape
        lengths = self.lengths.long()
        ends = lengths.cumsum(0)
        if (
            ((lengths < 0) | (lengths > self.block_size)).any()
            or (lengths[1:] > 0).logical_and(lengths[:-1] == 0).any()
            or (self.starts != ends - lengths).any()
            or int(lengths.sum()) != n_tokens
        ):
            raise InputError(
                f"index.starts and index.lengths must cut the {n_tokens} tokens into blocks of at most "
                f"{self.block_size} that follow one another, empty ones last"
            )
        own = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[:, None]
        none = self.blocks == -1
        later, earlier = self.blocks[..., 1:], self.blocks[..., :-1]
        if (
            not (none | (self.blocks >= 0)).all()
            or not (none[..., 1:] | ((later > earlier) & ~none[..., :-1])).all()
            or (self.blocks.amax(-1) != own).any()
        ):
            raise InputError(
                "index.blocks must hold for each query blocks in ascending order, its own the last of them, and -1 "
                "after it"
            )
        rows, offs, pair = (tensor.numpy() for tensor in (self.rows, self.col_offs, self.pair))
        number = none.numel() - int(none.sum())
        if offs[0] != 0 or offs[-1] != number or (offs[1:] < offs[:-1]).any():
            raise InputError(f"index.col_offs must rise from 0 to the number of choices, {number}")
        if number and (pair.min() < -1 or pair.max() >= number or (rows[number:] != -1).any()):
            raise InputError(
                f"index.pair must hold places from 0 to {number - 1}, and like index.rows -1 for no choice"
            )
        column = self.blocks + torch.arange(heads, dtype=torch.int32)[:, None] * len(lengths)
        none, column = none.numpy(), column.masked_fill_(none, 0).numpy()  # of no choice nothing below is asked
        own_row = rows.take(pair, mode="wrap") == torch.arange(n_tokens, dtype=torch.int32).numpy()[:, None, None]
        own_column = (offs.take(column) <= pair) & (pair < offs.take(column + 1))
        begins = torch.zeros(number + 1, dtype=torch.bool).numpy()
        begins[offs] = True
        rise = rows[1:number] > rows[: max(number - 1, 0)]
        if not (((pair == -1) & none) | (own_row & own_column & ~none)).all() or not (rise | begins[1:number]).all():
            raise InputError("index.rows must hold the queries of each block in ascending order, and index.pair where")

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of the class: what operators take."""
        return self.blocks, self.rows, self.col_offs, self.pair, self.starts, self.lengths


def require_block_size(block_size: int, n_tokens: int) -> None:
    """Raise `InputError` for a size for which a path would take memory that no token needs."""
    most = max(n_tokens, LARGEST)
    if not 1 <= block_size <= most:
        raise InputError(f"block_size is {block_size} but must be from 1 to {most}")


def require_top_k(top_k: int, n_tokens: int, heads: int, n_blocks: int) -> None:
    """Raise `InputError` for more choices than there can be; that is asked before there is memory for them."""
    most = max(n_blocks, MOST_CHOICES)
    if not 1 <= top_k <= most:
        raise InputError(f"top_k is {top_k} but must be from 1 to {most}")
    if heads * max(n_tokens * top_k, n_blocks + 1) > 2**31:
        raise InputError(
            f"top_k is {top_k} but {n_tokens} tokens of {heads} heads in {n_blocks} blocks must make at most 2**31 "
            "choices and columns: they are numbered in int32"
        )


def require_sequences(cu_seqlens: Tensor, n_tokens: int, device: torch.device) -> None:
    """Raise `InputError` unless these are the first tokens of sequences and the number of all tokens."""
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise InputError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)} but must be int32 of shape "
            "(sequences + 1,) with at least one sequence"
        )
    if cu_seqlens.device != device:
        raise InputError(f"cu_seqlens is on {cu_seqlens.device} but must be where q is, on {device}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait for it
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != n_tokens or any(a > b for a, b in pairwise(ends)):
            raise InputError(f"cu_seqlens is {ends} but must rise from 0 to the number of tokens, {n_tokens}")


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
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
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
