"""WideNet: one attention and one mixture of experts at every depth, with layer norms of their own.

Xue et al. 2021, "Go Wider Instead of Deeper" (arXiv:2107.11817, AAAI 2022). As in ALBERT depth has no parameters; what
capacity is lost comes back in width, as experts. For depths l = 1..L, with x (B, T, D):

    u = x + attention(norm1_l(x))       attention, router and experts are the same at all l,
    x = u + moe(norm2_l(u))             the two norms are not

The norms are the point: they let the one router see another input at another depth, and so choose other experts. With
tied norms the network is one map applied L times. It saves parameters and no compute: L times attention and K experts
are run.

The router: p = softmax(x W^T), over all E, with noise N(0, 1/E^2) on the logits in training; the K largest, with p as
weights, not renormalised. Each expert has C = floor(c K N / E) places for the N tokens of a batch, which are given in
the order of the batch; the released code numbers the places from 1 and gives those below C, one less than is meant.
Experts are perceptrons with a GELU between their two layers (the released ones have another one behind). The balance
loss E sum_i f_i P_i of every depth is added up.

`group` shares over groups of adjacent depths: 1 shares nothing (a ViT-MoE). With one expert it is an ALBERT, which has
its norms behind the residual sum, `post_norm`.

Tensor letters: B batch, T time, N = B T tokens, D model width, H hidden width, E experts, K active experts, L depths.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.capacity import keep
from workbench.lib.core.experts import MLPExperts
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.pool import assign_pools
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.pools import first_agreement

METHOD = Method(
    slug="widenet",
    title="WideNet: Go Wider Instead of Deeper",
    family="sharing",
    year=2021,
    paper="arXiv:2107.11817",
    claim="One attention block and one MoE feed-forward reused at every depth, with layer norms of their own, beat "
    "deeper unshared models with fewer parameters.",
    objects=("WideNetEncoder", "CapacityTopKRouter", "routings_by_depth", "depth_routing_agreement"),
)


def example() -> nn.Module:
    """Three depths of one attention and one mixture of four experts; (T, 32) is one sequence."""
    return WideNetEncoder(32, depth=3, n_heads=2, d_hidden=16, n_experts=4, top_k=2)


class CapacityTopKRouter(LinearRouter):
    """Top K of a softmax, weights not renormalised, with places for so many tokens an expert.

    Each expert has C = floor(capacity_factor K N / E) places, at least one, given to its tokens in the order of the
    batch; padding has none. `Routing.kept` says which pairs have one. A capacity factor of E / K drops nothing.

    Args:
        capacity_factor: c; None for no limit.
        noise_std: of the noise on the logits in training; None for 1/E, 0 for none.
        options: as in `TopKRouter`; the balance loss is "lbl", at 0.01 by default.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = 1.2,
        noise_std: float | None = None,
        **options: Any,
    ):
        super().__init__(d_model, n_experts, top_k, **({"renormalize": False, "coefficients": {"lbl": 0.01}} | options))
        if capacity_factor is not None and not capacity_factor > 0:
            raise InputError(f"capacity_factor is {capacity_factor} but must be above 0, or None for no limit")
        if noise_std is not None and not noise_std >= 0:
            raise InputError(f"noise_std is {noise_std} but must be at least 0, or None for 1/n_experts")
        self.capacity_factor = capacity_factor
        self.noise_std = 1 / n_experts if noise_std is None else noise_std

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        logits = super().scores(x, context)
        return logits + self.noise_std * torch.randn_like(logits) if self.training and self.noise_std else logits

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        routing = super().route(logits, mask)
        if self.capacity_factor is not None:
            routing.kept = keep(routing, self.capacity(routing.n_tokens), "position", mask=mask)
        return routing

    def capacity(self, n_tokens: int) -> int:
        """C, the places of each expert for N tokens."""
        places = self.capacity_factor * self.top_k * n_tokens / self.n_experts
        return max(1, math.floor(places + 1e-9))  # E / K need not be a float


class GELUExperts(MLPExperts):
    """A bank of E perceptrons W2 gelu(W1 x + b1) + b2."""

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        y, token = torch.zeros_like(x), routing.token
        for expert in range(self.n_experts):
            pairs = (routing.expert == expert).nonzero().squeeze(1)
            mine = token[pairs]
            hidden = F.gelu(F.linear(x[mine], self.up[expert], self.up_bias[expert]))
            served = F.linear(hidden, self.down[expert], self.down_bias[expert])
            y = y.index_add(0, mine, served * routing.weight[pairs, None].to(x.dtype))
        return y


class WideNetEncoder(nn.Module):
    """L depths of shared attention and shared experts, (..., T, D) -> (..., T, D).

    Parameters where all is shared: 4 D^2 of attention, E (2 D H + H + D) of experts, D E of the router, 4 D of norms
    for each depth and 2 D of the last one.

    Args:
        depth: L.
        d_hidden: H of each expert.
        group: adjacent depths that share attention, router and experts; divides L. None: all of them. 1: none.
        share_router: one router where the experts are shared; else one for each depth.
        share_norms: two norms for all depths, the ablation.
        post_norm: norm(x + f(x)) in place of x + f(norm(x)), and no norm at the end.
        options: of the router, see `CapacityTopKRouter`.
    """

    def __init__(
        self,
        d_model: int,
        depth: int,
        n_heads: int,
        d_hidden: int,
        n_experts: int,
        top_k: int,
        *,
        group: int | None = None,
        share_router: bool = True,
        share_norms: bool = False,
        post_norm: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.depth, self.post_norm = depth, post_norm
        pools = assign_pools(depth, lambda: GELUExperts(n_experts, d_model, d_hidden), group)
        self.group = depth if group is None else group
        self.attentions = nn.ModuleList(Attention(d_model, n_heads, causal=False) for _ in range(depth // self.group))
        per_moe = self.group if share_router else 1
        self.moes = nn.ModuleList(
            MoELayer(CapacityTopKRouter(d_model, n_experts, top_k, **options), pools[first])
            for first in range(0, depth, per_moe)
        )
        if per_moe > 1:
            for i, moe in enumerate(self.moes):
                moe.depths = tuple(range(i * per_moe, (i + 1) * per_moe))
        n_norms = 1 if share_norms else depth
        self.attention_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_norms))
        self.moe_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_norms))
        self.norm = None if post_norm else nn.LayerNorm(d_model)

    def parts(self, depth: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """(norm1, attention, norm2, moe) of a depth, 0-based."""
        norm = min(depth, len(self.moe_norms) - 1)
        attention, moe = depth // self.group, depth * len(self.moes) // self.depth
        return self.attention_norms[norm], self.attentions[attention], self.moe_norms[norm], self.moes[moe]

    def forward(
        self, x: Float[Tensor, "*batch time dim"], context: Context | None = None
    ) -> Float[Tensor, "*batch time dim"]:
        context = context if context is not None else Context()
        for depth in range(self.depth):
            norm1, attention, norm2, moe = self.parts(depth)
            if self.post_norm:
                x = norm1(x + attention(x, context))
                x = norm2(x + moe(x, context))
            else:
                x = x + attention(norm1(x), context)
                x = x + moe(norm2(x), context)
        return x if self.norm is None else self.norm(x)


def routings_by_depth(model: nn.Module, inputs: Tensor) -> list[Routing]:
    """What the mixtures of a model decide in one forward pass in evaluation mode, in the order in which they decide."""
    seen: list[Routing] = []
    layers = moe_layers(model).values()
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without a MoELayer, so nothing is routed")
    handles = [layer.observe(lambda _, routing, context: seen.append(routing)) for layer in layers]
    try:
        with evaluating(model):
            model(inputs, Context())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def depth_routing_agreement(routings: Sequence[Routing]) -> Float64[Tensor, "depths depths"]:
    """Share of the tokens whose expert of the largest weight is the same at two depths; 1 on the diagonal."""
    return first_agreement(torch.stack([routing.first for routing in routings]))
