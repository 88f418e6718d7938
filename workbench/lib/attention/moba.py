"""MoBA: attention whose queries choose the blocks of keys they attend to, as a router chooses experts.

Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv:2502.13189), and Xiao et al. 2025,
"Optimizing Mixture of Block Attention" (arXiv:2511.11571). Keys are cut into blocks of B; a query q_t attends to its
own block and to the K - 1 earlier ones of largest

    g_tj = q_t . c_j,   c_j = mean of the keys of block j        (no parameters, and no gradient through the choice)

with one softmax over the keys of all K blocks, causal within the own block. With as many blocks as there are, it is
dense attention.

The second paper says when the choice is right. For unit-norm queries and keys of width d whose noise has variance 1/d,
the score of the block that holds what is looked for exceeds that of another by D with mean dmu / B and variance
2 / (d B), where dmu grows with the m related keys in the block, `effective_gap`. So

    SNR = dmu sqrt(d / (2 B)),   P(another block wins) = Phi(-SNR),

and two things help: smaller blocks at the same K B, and more related keys in a block. The latter is what a short
causal convolution over the keys is for, `KeyShortConv`; it starts as the identity.

Each layer announces its choice to observers: rows are tokens, "experts" are key blocks, a pair is there where any head
chose the block, and its weight is the share of heads that did.

Tensor letters: B batch (block size in the formulas), T time, N = B T tokens, D model width, H heads, G key-value heads,
d head width, K blocks per query.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.kernels.block_sparse_attention import block_gate_topk, block_sparse_attention
from workbench.kernels.block_sparse_attention.index import BlockIndex
from workbench.lib.core.attention import rope
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="moba",
    title="Optimizing Mixture of Block Attention (MoBA, FlashMoBA)",
    family="attention",
    year=2025,
    paper="arXiv:2511.11571",
    claim="Small key blocks and a short convolution on keys raise the signal-to-noise ratio of block selection until "
    "sparse attention matches dense.",
    objects=("MoBA", "KeyShortConv", "effective_gap", "snr", "retrieval_fail_prob", "simulate_retrieval"),
)

KERNELS = (0, 3, 5)


def example() -> nn.Module:
    """Four heads that share two key-value heads; blocks of 16 keys, three of them for each query."""
    return MoBA(32, 4, kv_heads=2, block_size=16, top_k=3, seq_len=512, kconv=3, rope=True)


class KeyShortConv(nn.Module):
    """k_t + silu(sum_l w_l k_{t-l}), l = 0..width - 1: depthwise and causal over the keys, (B, T, G, d) -> the same.

    w is zero at first, which leaves the keys as they are, bit by bit.
    """

    def __init__(self, kv_heads: int, head_dim: int, width: int):
        super().__init__()
        if width < 1:
            raise InputError(f"width is {width} but must be at least 1")
        self.weight = nn.Parameter(torch.zeros(kv_heads * head_dim, 1, width))

    def forward(self, k: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "batch time heads dim"]:
        width = self.weight.shape[-1]
        channels = F.pad(k.flatten(2).transpose(1, 2), (width - 1, 0))
        mixed = F.conv1d(channels, self.weight.flip(-1), groups=len(self.weight))  # torch's convolution reads backwards
        return k + F.silu(mixed).transpose(1, 2).unflatten(2, k.shape[2:])


class MoBA(Announcing):
    """Causal self-attention over chosen blocks of keys, (..., T, D) -> (..., T, D) with at most one leading dimension.

    With as many key-value heads as heads its parameters are those of `workbench.lib.core.attention.Attention`.

    Args:
        n_heads: H; divides `d_model`.
        kv_heads: G, divides H; None for H.
        block_size: keys a block.
        top_k: K, the query's own block counted.
        seq_len: longest T; the number of blocks in it is `n_experts` for those who observe.
        kconv: width of the convolution over the keys, 3 or 5; 0 for none.
        rope: rotate queries and keys by their position, for the choice of blocks as well.
    """

    top_k = None  # a token's heads choose different blocks: their number varies

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        block_size: int,
        top_k: int,
        seq_len: int,
        kv_heads: int | None = None,
        kconv: int = 0,
        rope: bool = False,
    ):
        super().__init__()
        kv_heads = n_heads if kv_heads is None else kv_heads
        if n_heads < 1 or d_model % n_heads:
            raise InputError(f"d_model is {d_model} but must be divisible by n_heads = {n_heads}, which is at least 1")
        if kv_heads < 1 or n_heads % kv_heads:
            raise InputError(f"kv_heads is {kv_heads} but must be at least 1 and divide n_heads = {n_heads}")
        for name, value in (("block_size", block_size), ("top_k", top_k), ("seq_len", seq_len)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if kconv not in KERNELS:
            raise InputError(f"kconv is {kconv} but must be one of {', '.join(map(str, KERNELS))}")
        head_dim = d_model // n_heads
        if rope and head_dim % 2:
            raise InputError(f"d_model / n_heads is {head_dim} but must be even with rope")
        self.n_heads, self.kv_heads, self.rope = n_heads, kv_heads, rope
        self.block_size, self.blocks_per_query, self.seq_len = block_size, top_k, seq_len
        self.n_experts = math.ceil(seq_len / block_size)
        self.qkv = nn.Linear(d_model, d_model + 2 * kv_heads * head_dim, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.kconv = KeyShortConv(kv_heads, head_dim, kconv) if kconv else nn.Identity()

    def forward(
        self, x: Float[Tensor, "*batch time dim"], context: Context | None = None
    ) -> Float[Tensor, "*batch time dim"]:
        if x.ndim not in (2, 3) or not 1 <= x.shape[-2] <= self.seq_len:
            raise InputError(
                f"x has shape {tuple(x.shape)} but must be (time, dim) or (batch, time, dim) with 1 to "
                f"seq_len = {self.seq_len} rows"
            )
        batch, time = (1, *x.shape[:-1])[-2:]
        q, k, v = self.heads(x.reshape(batch, time, x.shape[-1]))
        sequences = None
        if batch != 1:
            sequences = torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=x.device)
        index = self.choose(q, k, sequences)
        y = block_sparse_attention(q, k, v, index)
        if self.observed:
            self.announce(self.routing(index, time), context if context is not None else Context())
        return self.out(y.reshape(x.shape))

    def heads(self, x: Float[Tensor, "batch time dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, d), keys and values (N, G, d), as the gate and the attention see them."""
        sizes = self.n_heads, self.kv_heads, self.kv_heads
        q, k, v = self.qkv(x).unflatten(-1, (sum(sizes), -1)).split(sizes, 2)
        k = self.kconv(k)
        if self.rope:
            q, k = (rope(part.transpose(1, 2)).transpose(1, 2) for part in (q, k))
        return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)

    def choose(self, q: Tensor, k: Tensor, sequences: Tensor | None) -> BlockIndex:
        """The blocks of each query; `sequences` as `cu_seqlens` of the operator."""
        return block_gate_topk(q, k, self.block_size, self.blocks_per_query, sequences)

    def routing(self, index: BlockIndex, time: int) -> Routing:
        """The choice as tokens routed to blocks of their sequence; weight: the share of heads that chose the block."""
        blocks = index.blocks.flatten(1).long()
        local = torch.where(blocks < 0, self.n_experts, blocks % math.ceil(time / self.block_size))
        share = torch.zeros(len(local), self.n_experts + 1, device=local.device)
        share.scatter_add_(1, local, torch.full_like(local, 1 / self.n_heads, dtype=share.dtype))
        return Routing.ragged(share[:, :-1] > 0, share[:, :-1])


def effective_gap(mu_signal: float, mu_noise: float, m: int = 1, mu_cluster: float = 0.0) -> float:
    """dmu: how much the sum of a block's affinities exceeds another's, with one key of affinity `mu_signal`, m - 1
    related ones of `mu_cluster`, and all others of `mu_noise`.
    """
    return (mu_signal - mu_noise) + (m - 1) * (mu_cluster - mu_noise)


def snr(gap: float, head_dim: int, block_size: int) -> float:
    """dmu sqrt(d / (2 B)), the signal-to-noise ratio of the choice between two blocks."""
    return gap * math.sqrt(head_dim / (2 * block_size))


def retrieval_fail_prob(ratio: float, n_blocks: int = 2, top_k: int = 1) -> float:
    """Probability that at least `top_k` of the n - 1 other blocks score above the block looked for.

    Exact for independent normal scores. With two blocks it is Phi(-SNR); it is small while (n - 1) Phi(-SNR) < top_k.

    Args:
        ratio: from `snr`.
        n_blocks: earlier blocks in all, the one looked for among them.
        top_k: how many of these are taken; the own block takes none of them.
    """
    if n_blocks < 1 or top_k < 1:
        raise InputError(f"n_blocks is {n_blocks} and top_k is {top_k} but both must be at least 1")
    from scipy.stats import binom, norm

    nodes, weights = np.polynomial.hermite_e.hermegauss(96)  # over the score of the block itself, in its deviations
    beaten = norm.sf(nodes + math.sqrt(2) * ratio)
    return float(weights @ binom.sf(top_k - 1, n_blocks - 1, beaten) / weights.sum())


def simulate_retrieval(
    affinities: tuple[float, ...],
    head_dim: int,
    block_size: int,
    trials: int,
    generator: torch.Generator,
    n_blocks: int = 2,
    top_k: int = 1,
) -> float:
    """The share of `trials` in which the choice by mean keys misses the block looked for.

    Keys and queries are random unit vectors, but for keys of the block that have the given affinities with the query.
    Arguments otherwise as in `retrieval_fail_prob`.
    """
    if not 1 <= len(affinities) <= block_size or not all(-1 <= a <= 1 for a in affinities):
        raise InputError(f"affinities is {affinities} but must be 1 to block_size = {block_size} numbers from -1 to 1")
    m, missed = len(affinities), 0
    affinity = torch.tensor(affinities)[:, None]
    for part in torch.arange(trials).split(max(1, 2**22 // (n_blocks * block_size * head_dim))):
        keys = torch.randn(len(part), n_blocks, block_size, head_dim, generator=generator)
        query = F.normalize(torch.randn(len(part), 1, head_dim, generator=generator), dim=-1)
        related = keys[:, 0, :m]
        across = F.normalize(related - (related * query).sum(-1, keepdim=True) * query, dim=-1)
        keys = F.normalize(keys, dim=-1)
        keys[:, 0, :m] = affinity * query + (1 - affinity**2).sqrt() * across
        scores = torch.einsum("nd,njd->nj", query[:, 0], keys.mean(2))
        missed += int(((scores[:, 1:] > scores[:, :1]).sum(1) >= top_k).sum())
    return missed / trials
