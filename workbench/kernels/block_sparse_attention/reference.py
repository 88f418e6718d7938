"""The meaning: which blocks a query takes, and exact softmax attention over their union, by dense masks.

Differentiable by torch itself, in any floating type; memory grows with N^2, so it is for tests and short sequences.

Tensor letters: N tokens, H query heads, G key-value heads, d head width, M blocks, K blocks per query.
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from workbench.kernels.block_sparse_attention.index import BlockIndex, ascending, token_blocks


def gate(
    q: Tensor, k: Tensor, block_size: int, top_k: int, cu_seqlens: Tensor | None, starts: Tensor, lengths: Tensor
) -> Int32[Tensor, "tokens heads k"]:
    """`BlockIndex.blocks`: the own block and the earlier ones whose mean key has the largest product with the query.

    Where two blocks are equal the earlier one is taken.
    """
    own, first = token_blocks(q.shape[0], starts, lengths, cu_seqlens)
    means = mean_keys(k, starts, lengths).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("nhd,mhd->nhm", accurate(q), means)
    block = torch.arange(starts.numel(), device=q.device)
    own, first = own[:, None, None], first[:, None, None]
    scores = scores.masked_fill((block >= own) | (block < first), -torch.inf).masked_fill(block == own, torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True)
    kept = min(top_k, starts.numel())
    blocks = torch.where(order.values[..., :kept] > -torch.inf, order.indices[..., :kept], -1).int()
    return ascending(torch.nn.functional.pad(blocks, (0, top_k - kept), value=-1))


def mean_keys(k: Tensor, starts: Tensor, lengths: Tensor) -> Float[Tensor, "blocks kv_heads dim"]:
    """The mean key of each block over the tokens it has, in float32 (float64 where the keys are)."""
    sums = torch.nn.functional.pad(accurate(k).cumsum(0, dtype=torch.float64), (0, 0, 0, 0, 1, 0))
    means = (sums[(starts + lengths).long()] - sums[starts.long()]) / lengths.clamp(min=1)[:, None, None]
    return means.to(accurate(k).dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float
) -> tuple[Float[Tensor, "tokens heads dim"], Float[Tensor, "tokens heads"]]:
    """The output (N, H, d), and L (N, H), the logarithm of the sum of exp(scale q.k) over the keys attended to."""
    allowed = mask(index).transpose(0, 1)
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (accurate(x).repeat_interleave(group, 1) for x in (k, v))
    scores = scale * torch.einsum("thd,shd->hts", accurate(q), wide_k)
    scores = scores.masked_fill(~allowed, -torch.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), wide_v)
    return out.to(q.dtype), scores.logsumexp(-1).T.contiguous()


def mask(index: BlockIndex) -> Bool[Tensor, "tokens heads keys"]:
    """(N, H, N) True where the query attends to the key."""
    n_tokens, heads, _ = index.blocks.shape
    chosen = torch.zeros(n_tokens, heads, index.n_blocks + 1, dtype=torch.bool, device=index.blocks.device)
    chosen.scatter_(2, torch.where(index.blocks < 0, index.n_blocks, index.blocks).long(), True)
    token = torch.arange(n_tokens, device=index.blocks.device)
    block = torch.repeat_interleave(index.lengths.long(), output_size=n_tokens)
    return chosen[:, :, block] & (token <= token[:, None])[:, None]


def accurate(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64."""
    return x if x.dtype == torch.float64 else x.float()
