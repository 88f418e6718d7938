"""Token-choice routing, and the baselines every routing study needs: linear, fixed random, hash.

Where experts choose tokens is `expert_choice`.

Tensor letters: N tokens, D model width, E experts, K active experts per token.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.balance import BALANCE_LOSSES, LossFreeBias, balance_losses, check_coefficients
from workbench.lib.core.replicas import ALONE, Replicas
from workbench.lib.core.routing import Context, Routing


def check_top_k(top_k: int, n_experts: int) -> None:
    """Raise `InputError` unless 1 <= top_k <= n_experts."""
    if n_experts < 1:
        raise InputError(f"n_experts is {n_experts} but must be at least 1")
    if not 1 <= top_k <= n_experts:
        raise InputError(f"top_k is {top_k} but must be between 1 and n_experts = {n_experts}")


def check_tokens(x: Tensor) -> None:
    """Raise `InputError` unless x is (N, D) with at least one token."""
    if x.ndim != 2 or x.shape[0] == 0:
        raise InputError(f"x has shape {tuple(x.shape)} but must be (tokens, dim) with at least one token")


def check_mask(mask: Tensor | None, n_tokens: int) -> None:
    """Raise `InputError` unless there is no mask, or one of True and False for each token."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (n_tokens,)):
        raise InputError(
            f"context.mask is {mask.dtype} of shape {tuple(mask.shape)} but must be bool ({n_tokens},), one for each "
            "token"
        )


def check_finite(logits: Tensor) -> None:
    """Raise `InputError` where router logits hold NaN or infinity: routing them would hide a diverged model."""
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).sum())
        raise InputError(f"logits hold {bad} values that are NaN or infinite; router logits must be finite")


class TopKRouter(nn.Module):
    """Base of the token-choice routers: softmax over ALL experts in float32 (or wider), then the top K.

    A subclass gives `scores(x, context) -> (N, E)`.

    Args:
        n_experts: E.
        top_k: K, 1..E.
        renormalize: divide the K weights by their sum. Default: for K > 1 only, because a renormalised top-1 weight is
            the constant 1 and leaves the router without a gradient.
        coefficients: weight of each balance loss, e.g. {"lbl": 0.01, "z": 0.001}.
        bias_rate: rate of a `LossFreeBias` on the selection; 0 for none.
    """

    replicas: Replicas = ALONE

    def __init__(
        self,
        n_experts: int,
        top_k: int,
        *,
        renormalize: bool | None = None,
        coefficients: dict[str, float] | None = None,
        bias_rate: float = 0.0,
    ):
        super().__init__()
        check_top_k(top_k, n_experts)
        self.n_experts = n_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.coefficients = check_coefficients(coefficients)
        self.bias = LossFreeBias(n_experts, bias_rate) if bias_rate else None

    def set_top_k(self, top_k: int) -> None:
        """Change K from the next forward on; no parameter changes."""
        check_top_k(top_k, self.n_experts)
        self.top_k = top_k

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        check_tokens(x)
        context = context or Context()
        return self.route(self.scores(x, context), context.mask)

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Select and weigh experts by their logits; tokens outside `mask` count in no loss and no load."""
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs = torch.softmax(logits, dim=-1)
        if self.bias is None:
            weights, indices = probs.topk(self.top_k, dim=-1)
        else:
            indices = (probs + self.bias.bias).topk(self.top_k, dim=-1).indices
            weights = probs.gather(-1, indices)
        if self.top_k > 1 if self.renormalize is None else self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        routing = Routing.fixed(indices, weights, self.n_experts, probs=probs, logits=logits)
        return self.balanced(routing, mask)

    def balanced(self, routing: Routing, mask: Bool[Tensor, " tokens"] | None) -> Routing:
        """The routing with its balance losses, counted by the bias where there is one."""
        names = [name for name in self.coefficients if name in BALANCE_LOSSES]  # others are those of the layer
        routing.losses = balance_losses(routing, names, mask, self.replicas)
        if self.bias is not None and self.training:
            self.bias.count(routing, mask)
        return routing


class LinearRouter(TopKRouter):
    """The usual router: logits = x W with W (D, E). Options as in `TopKRouter`.

    Args:
        jitter: j; in training the router sees x times numbers from U(1 - j, 1 + j) (Fedus et al. 2021).
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, *, jitter: float = 0.0, **options):
        super().__init__(n_experts, top_k, **options)
        if not 0 <= jitter < 1:
            raise InputError(f"jitter is {jitter} but must be at least 0 and below 1")
        self.jitter = jitter
        self.projection = nn.Linear(d_model, n_experts, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        return self.projection(self.jittered(x))

    def jittered(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """What the router sees of x."""
        if not self.jitter or not self.training:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)


class FixedRandomRouter(LinearRouter):
    """A linear router whose random weights are never trained: the control for "does learning to route matter".

    Its weights have unit-variance logits for inputs of unit RMS, so that its choices are decided ones.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, **options):
        super().__init__(d_model, n_experts, top_k, **options)
        nn.init.normal_(self.projection.weight, std=d_model**-0.5)
        self.projection.weight.requires_grad_(False)


class HashRouter(nn.Module):
    """Experts by token id, through a fixed random table (Roller et al. 2021, Hash Layers); weights 1/K.

    Args:
        vocab: number of token ids.
        seed: of the table; each of the K columns is a balanced random assignment, the K experts of an id are distinct.
    """

    def __init__(self, vocab: int, n_experts: int, top_k: int, seed: int = 0):
        super().__init__()
        check_top_k(top_k, n_experts)
        self.n_experts, self.top_k = n_experts, top_k
        self.coefficients: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(vocab, generator=generator)
        first, group = order % n_experts, order // n_experts  # the ids of a group have one expert each
        # steps from the first expert to the others; the same within a group, so that each column has every expert once
        steps = [torch.randperm(n_experts - 1, generator=generator) + 1 for _ in range(-(-vocab // n_experts))]
        others = (first[:, None] + torch.stack(steps)[group, : top_k - 1]) % n_experts
        self.register_buffer("table", torch.cat([first[:, None], others], dim=1))

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context) -> Routing:
        check_tokens(x)
        if context.token_ids is None:
            raise InputError("context.token_ids is None but a HashRouter routes by token id: give the (tokens,) ids")
        indices = self.table[context.token_ids]
        return Routing.fixed(indices, x.new_full(indices.shape, 1 / self.top_k), self.n_experts)
