"""The mixture-of-experts layer: any router with any bank of experts.

Tensor letters: N tokens, D model width, E experts, K active experts per token, P routed pairs.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.observe import Announcing
from workbench.lib.core.recompute import Call, Repeat, find, recomputing, sample
from workbench.lib.core.routing import Context, Experts, Router, Routing


class MoELayer(Announcing):
    """y = sum_k weight_k expert_k(x) [+ shared(x)], with observers who see every routing decision.

    May be checkpointed, with its context, reentrant or not: see `lib.core.recompute`. The state of a recurrent router
    has no gradient under a reentrant one, which is refused.

    Args:
        router: see `Router`.
        experts: see `Experts`; the router and the bank must agree on the number of experts.
        shared: a block every token passes through as well, (..., D) -> (..., D).
        capacity_factor: each expert serves at most C = ceil(capacity_factor * P / E) pairs of a batch; the rest is
            dropped (the token keeps its residual stream). A `Capacity` says whom, a number those of the highest combine
            weight. None: no limit.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        capacity_factor: float | Capacity | None = None,
    ):
        super().__init__()
        if router.n_experts != experts.n_experts:
            raise InputError(
                f"router.n_experts is {router.n_experts} but must equal experts.n_experts = {experts.n_experts}"
            )
        self.router = router
        self.experts = experts
        self.shared = shared
        self.capacity_factor = capacity_factor
        if isinstance(capacity_factor, int | float):
            Capacity(capacity_factor)  # refuses what is no factor

    @property
    def capacity(self) -> Capacity | None:
        """The limit on what an expert serves."""
        factor = self.capacity_factor
        return factor if factor is None or isinstance(factor, Capacity) else Capacity(factor)

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int | None:
        return self.router.top_k

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        context = context if context is not None else Context()
        tokens = x.reshape(-1, x.shape[-1])
        return self.serve(tokens, self.router(tokens, self.told(tokens, context)), context).view_as(x)

    def told(self, tokens: Float[Tensor, "tokens dim"], context: Context) -> Context:
        """What the router is told: in a forward that a checkpoint repeats, what it was told then."""
        first = find(context.calls.get(self, ()), tokens) if recomputing() else None
        if first is None:
            return context
        if first.context.state is not None and not first.graph and torch.is_grad_enabled():
            raise InputError(
                "the state that routers hand on has no gradient under a reentrant checkpoint: use_reentrant=False"
            )
        return first.context

    def serve(
        self, tokens: Float[Tensor, "tokens dim"], routing: Routing, context: Context
    ) -> Float[Tensor, "tokens dim"]:
        """The layer for a routing that is already decided: run its experts, add its losses, announce it."""
        if self.capacity is not None:
            routing.kept = self.capacity.kept(routing, self.training)
        y = self.joined(tokens, self.experts(tokens, routing.served()))
        parts = {name: coefficient * routing.losses[name] for name, coefficient in self.router.coefficients.items()}
        if recomputing():
            first = find(context.calls.get(self, ()), tokens)
            return y if first is None else Repeat(first, parts).carry(y)
        call = Call(self, replace(context, aux=0.0, calls={}), sample(tokens), parts)
        context.calls.setdefault(self, []).append(call)
        context.state = routing.state if routing.state is not None else context.state
        with torch.set_grad_enabled(
            not torch.is_inference_mode_enabled()
        ):  # a reentrant checkpoint has switched it off
            for name in parts:
                context.aux = context.aux + call.part(name)
        self.announce(routing, context)
        return y

    def joined(
        self, tokens: Float[Tensor, "tokens dim"], routed: Float[Tensor, "tokens dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """What the experts say together with what every token passes."""
        return routed if self.shared is None else routed + self.shared(tokens)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by their module name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
