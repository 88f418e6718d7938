"""UniPool: one pool of experts for all layers, each with a router of its own.

2026, "UniPool: A Globally Shared Expert Pool for Mixture-of-Experts" (arXiv:2605.06665). Usually each of L layers has
E experts, so that expert parameters grow with depth. Here every layer may use all M experts of one pool. Against the
obvious way, to tie the experts and leave the rest as it was, two things are new:

    NormRouter    z = x W_l^T,  s = c0 gamma_l relu(z / ||z||),  the K largest;  y = sum_k s_k expert_k(x)
    pool loss     M <f, P>  with  f_i, P_i the share of assignments and the mean score of expert i, MEAN OVER THE LAYERS

The scores are no probabilities and are not made to sum to one: their scale gamma_l is learned, and a token whose logits
are all negative gets nothing. The loss sees the traffic of the whole pool, so that a layer may use few experts as long
as others use the rest, which a balance loss for each layer forbids. It is lowered by a smaller gamma as well.

The scale c0 makes the K selected scores a vector of about unit length at the start. The released one is the mean of
1/||selected|| over directions of z, by 100,000 samples. It is no number: where all entries of z are negative it is 1/0,
and without these, too, the mean diverges (the largest entry is as likely to be near 0 as at it), so that the samples
decide: at M = 8 two seeds give 29.4 and 3.2, at M = 16 2.40 and 2.41. Hence c0 = 1/E||selected|| by default. It exists
for every M (1.93 at M = 8), and the mean length is 1 with it; with the released it is 1.08 at M = 16, 1.02 at M = 96.

Tensor letters: N tokens, D model width, M experts of the pool, K active experts, L layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import ResidualStack
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.pool import ExpertPool, assign_pools, stored_once
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routers import LinearRouter, TopKRouter, check_finite, check_top_k
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.information import entropy
from workbench.lib.measures.pools import top_set_jaccard, top_set_union

METHOD = Method(
    slug="unipool",
    title="UniPool: A Globally Shared Expert Pool for Mixture-of-Experts",
    family="sharing",
    year=2026,
    paper="arXiv:2605.06665",
    claim="One pool of experts used by every layer reaches a lower validation loss than separate experts per layer, "
    "with fewer expert parameters.",
    objects=("pooled_layers", "NormRouter", "PoolBalance", "PooledMoELayer", "pool_diagnostics", "randomize_router"),
)

SCALES = ("mean", "monte_carlo", "one")


def example() -> nn.Module:
    """Two layers with one pool of eight experts, one after the other."""
    return ResidualStack(pooled_layers(2, d_model=32, n_experts=8, top_k=2, d_hidden=32))


@dataclass
class NormRouting(Routing):
    """A routing by scores that are no probabilities.

    Attributes:
        scores: (N, M) all of them, before the K largest are taken. `probs` are these over their sum; 1/M each where it
            is 0.
    """

    scores: Float[Tensor, "tokens experts"] | None = None

    def only(self, mask: Bool[Tensor, " tokens"] | None) -> "NormRouting":
        if mask is None:
            return self
        return replace(super(NormRouting, replace(self, scores=None)).only(mask), scores=self.scores[mask])


@cache
def norm_router_scale(n_experts: int, top_k: int, init: str = "mean", n: int = 100_000, seed: int = 0) -> float:
    """c0, from `n` random directions u in R^M; the selected are the K largest of relu(u), s their length.

    Args:
        init: "mean" 1 / E[s]; "monte_carlo" E[1/s] over the directions with s > 0, as released, which for M below 16
            depends on the samples (see the module); "one" 1.
    """
    check_top_k(top_k, n_experts)
    if init not in SCALES:
        raise unknown("init", init, SCALES)
    if init == "one":
        return 1.0
    u = torch.randn(n, n_experts, generator=torch.Generator().manual_seed(seed))
    u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(u.relu().topk(top_k, dim=-1).values, dim=-1).double()
    return float(1 / length.mean() if init == "mean" else (1 / length[length > 0]).mean())


class NormRouter(TopKRouter):
    """s = c0 gamma relu(z / ||z||) with z = x W^T; the K largest, with the scores as weights. Gives a `NormRouting`.

    Scores do not change with the length of x, and their length is at most c0 gamma.

    Args:
        n_experts: M.
        init: of c0, see `norm_router_scale`.
        eps: added to ||z||.
        options: coefficients of balance losses of this layer alone, and bias_rate; as in `TopKRouter`.
    """

    def __init__(
        self, d_model: int, n_experts: int, top_k: int, *, init: str = "mean", eps: float = 1e-8, **options: Any
    ):
        super().__init__(n_experts, top_k, renormalize=False, **options)
        self.eps, self.init = eps, init
        self.projection = nn.Linear(d_model, n_experts, bias=False)
        self.gamma = nn.Parameter(torch.ones(1))  # FSDP2 takes no scalar
        nn.init.normal_(self.projection.weight, std=0.02)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        return self.projection(x)

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        direction = logits / (torch.linalg.vector_norm(logits, dim=-1, keepdim=True) + self.eps)
        scores = norm_router_scale(self.n_experts, self.top_k, self.init) * self.gamma * direction.relu()
        indices = (scores if self.bias is None else scores + self.bias.bias).topk(self.top_k, dim=-1).indices
        total = scores.sum(-1, keepdim=True)
        probs = torch.where(total > 0, scores / total.where(total > 0, 1.0), 1 / self.n_experts)
        routing = NormRouting.fixed(
            indices, scores.gather(-1, indices), self.n_experts, probs=probs, logits=logits, scores=scores
        )
        return self.balanced(routing, mask)


@dataclass
class _Pass:
    """What the layers of one forward pass have said so far, and the shares (M,) of the pass before; None at first."""

    before: Tensor | None
    shares: Tensor
    scores: Tensor
    layers: int = 0


class PoolBalance(nn.Module):
    """M <f, P> of a pool, f and P means over its L layers, layer by layer; held by all of them.

    Each layer's term is M <f, P_l> / L. With `lagged`, as released, f is that of the micro-batch before, which is known
    already, so that the first has no loss; else that of this one: the terms of all layers but the last are 0 then, the
    last is the whole, and the gradient of each is as it should be. f never has a gradient. Only training counts, and
    what a checkpoint repeats neither counts again nor sees another f.

    One forward pass is one `Context`. In a state dict is what is needed to go on exactly.

    Args:
        n_experts: M.
        n_layers: L, the layers that use the pool.
    """

    def __init__(self, n_experts: int, n_layers: int, lagged: bool = True):
        super().__init__()
        if min(n_experts, n_layers) < 1:
            raise InputError(f"n_experts, n_layers are {n_experts}, {n_layers} but must both be at least 1")
        self.n_layers, self.lagged = n_layers, lagged
        self.register_buffer("shares", torch.zeros(n_experts))  # of the last complete pass; all 0 before it
        stored_once(self)

    def reset(self) -> None:
        """Forget the traffic of earlier passes."""
        self.shares.zero_()

    def observe(
        self, scores: Float[Tensor, "tokens experts"], counts: Int64[Tensor, " experts"], context: Context
    ) -> Float[Tensor, ""] | None:
        """The term of the next layer of a pass; None where f is not known yet.

        Args:
            scores: s, or probabilities, of the tokens that count; all of them, before the K largest are taken.
            counts: their assignments.
        """
        share, mean = counts.to(scores.dtype) / counts.sum().clamp(min=1), scores.sum(0) / max(1, len(scores))
        now = context.notes.get(self)
        if not recomputing():
            if now is None or now.layers == self.n_layers:
                before = self.shares.to(scores.dtype, copy=True) if self.shares.any() else None
                now = context.notes[self] = _Pass(before, torch.zeros_like(share), torch.zeros_like(share))
            now.shares, now.scores, now.layers = now.shares + share, now.scores + mean.detach(), now.layers + 1
            if now.layers == self.n_layers:
                self.shares.copy_(now.shares / self.n_layers)
        if not self.lagged:
            return _WhenKnown.apply(mean, now, self.n_layers)
        if now.before is None:
            return None
        return len(share) / self.n_layers * (now.before * mean).sum()


class _WhenKnown(torch.autograd.Function):
    """The term of one layer by the f of its own pass, which is complete only when the gradient is asked for."""

    @staticmethod
    def forward(ctx, mean, now, n_layers):
        ctx.now, ctx.n_layers = now, n_layers
        whole = len(mean) * (now.shares * now.scores).sum() / n_layers**2
        return whole if now.layers == n_layers else torch.zeros_like(whole)

    @staticmethod
    def backward(ctx, grad):
        now, n_layers = ctx.now, ctx.n_layers
        if now.layers != n_layers:
            raise InputError(f"n_layers is {n_layers} but {now.layers} layers used the pool in this pass")
        return grad * len(now.shares) * now.shares / n_layers**2, None, None


class PooledMoELayer(MoELayer):
    """An MoE layer whose experts are a pool, with its term of the pool's balance loss, "pool".

    Args:
        router: a `NormRouter`, or any with probabilities over the pool.
        balance: shared by the layers of the pool; None for no such loss.
        coefficient: lambda; from here on `router.coefficients["pool"]`.
    """

    def __init__(
        self, router: TopKRouter, pool: ExpertPool, balance: PoolBalance | None = None, coefficient: float = 0.01
    ):
        super().__init__(router, pool)
        if not coefficient >= 0:
            raise InputError(f"coefficient is {coefficient} but must be at least 0")
        if balance is not None and len(balance.shares) != pool.n_experts:
            size = len(balance.shares)
            raise InputError(f"balance is of {size} experts but must be of {pool.n_experts}, those of the pool")
        self.balance = balance
        if balance is not None:
            router.coefficients["pool"] = coefficient

    def serve(
        self, tokens: Float[Tensor, "tokens dim"], routing: Routing, context: Context
    ) -> Float[Tensor, "tokens dim"]:
        if self.balance is not None:
            term = self._term(routing, context) if self.training else None
            routing.losses["pool"] = routing.weight.new_zeros(()) if term is None else term
        return super().serve(tokens, routing, context)

    def _term(self, routing: Routing, context: Context) -> Tensor | None:
        real = routing.only(context.mask)
        scores = real.scores if isinstance(real, NormRouting) else real.probs
        return self.balance.observe(scores, real.counts, context)


ROUTERS = {"norm": NormRouter, "softmax": LinearRouter}


def pooled_layers(
    n_layers: int,
    d_model: int,
    n_experts: int,
    top_k: int,
    d_hidden: int,
    *,
    group: int | None = None,
    router: str = "norm",
    coefficient: float | None = 0.01,
    lagged: bool = True,
    **options: Any,
) -> list[PooledMoELayer]:
    """The MoE layers of a model with one pool of SwiGLU experts for every `group` of them.

    >>> layers = pooled_layers(4, d_model=64, n_experts=16, top_k=1, d_hidden=64)
    >>> model = DecoderLM(256, 64, 4, 4, lambda layer: layers[layer], seq_len=64)

    Args:
        n_experts: M of each pool. As many parameters as E experts for each layer have M = E * group.
        group: g, which divides L; each group has a pool and a loss of its own. None: one pool. 1: no sharing.
        router: "norm", or "softmax" for the usual one.
        coefficient: lambda of the pool's loss; None for no such loss.
        options: of the routers.
    """
    if router not in ROUTERS:
        raise unknown("router", router, ROUTERS)
    pools = assign_pools(n_layers, lambda: GLUExperts(n_experts, d_model, d_hidden), group)
    balances = {pool: PoolBalance(n_experts, pools.count(pool), lagged) for pool in pools}
    layers = []
    for pool in pools:
        made = ROUTERS[router](d_model, n_experts, top_k, **options)
        balance = None if coefficient is None else balances[pool]
        layers.append(PooledMoELayer(made, pool, balance, coefficient or 0.0))
    return layers


def pool_diagnostics(counts: Num[Tensor, "layers experts"], top: int = 16) -> dict[str, Any]:
    """How the layers use the pool, from the assignments (L, M) on held-out text: the measures of the release.

    Returns:
        coverage: of each layer, the share of its assignments on its `top` most used experts; entropy_bits: of each
        layer's traffic; jaccard: mean over pairs of layers of the overlap of these sets; union: share of the pool that
        is in one of them; dead: experts without an assignment in any layer.
    """
    if not 1 <= top <= counts.shape[-1]:
        raise InputError(f"top is {top} but must be between 1 and the pool size {counts.shape[-1]}")
    counts = counts.double()
    best = counts.topk(top, dim=-1).values.sum(-1) / counts.sum(-1)
    return {
        "coverage": best.tolist(),
        "entropy_bits": (entropy(counts) / torch.tensor(2.0).log().double()).tolist(),
        "jaccard": float(top_set_jaccard(counts, top)),
        "union": float(top_set_union(counts, top)),
        "dead": int((counts.sum(0) == 0).sum()),
    }


@contextmanager
def randomize_router(layer: MoELayer, seed: int) -> Iterator[None]:
    """Inside, the layer's router has random weights of the same spread: what did it matter that it was learned?

    The scale of a `NormRouter` stays as it was learned.
    """
    weight = layer.router.projection.weight
    kept = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    with torch.no_grad():
        weight.copy_(noise * kept.square().mean().sqrt())
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
