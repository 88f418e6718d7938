"""Dense experts: one gated feed-forward block, a bank of E of them, and a bank of plain two-layer perceptrons.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, P routed pairs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.moe_mlp import moe_mlp
from workbench.kernels.plan import RoutePlan
from workbench.lib.core.routing import Context, Routing


class GLU(nn.Module):
    """SwiGLU feed-forward block: down(silu(gate x) * up x) (Shazeer 2020, 2002.05202). (..., D) -> (..., D)."""

    def __init__(self, d_model: int, d_hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GLUExperts(nn.Module):
    """A bank of E SwiGLU experts.

    The weights have the packed layout of transformers' MoE models: `gate_up` (E, 2H, D), gate first, and `down`
    (E, D, H).
    """

    def __init__(self, n_experts: int, d_model: int, d_hidden: int):
        super().__init__()
        if min(n_experts, d_model, d_hidden) < 1:
            raise InputError(
                f"n_experts, d_model, d_hidden are {n_experts}, {d_model}, {d_hidden} but must all be at least 1"
            )
        self.n_experts = n_experts
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_hidden))
        for weight in (self.gate_up, self.down):  # as nn.Linear would initialise each expert
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        return moe_mlp(x, self.gate_up, self.down, plan_of(routing), score_of(routing, x))


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of a bank of SwiGLU experts without the bank: gate_up (E, 2H, D), gate first, and down (E, D, H)."""

    gate_up: Float[Tensor, "experts twice dim"]
    down: Float[Tensor, "experts dim hidden"]


def expert_outputs(
    experts: GLUExperts | ExpertWeights, x: Float[Tensor, "tokens dim"]
) -> Float[Tensor, "experts tokens dim"]:
    """What every expert says of every token, whether it is routed there or not."""
    gate, up = torch.einsum("nd,ehd->enh", x, experts.gate_up).chunk(2, dim=-1)
    return torch.einsum("enh,edh->end", F.silu(gate) * up, experts.down)


class MLPExperts(nn.Module):
    """A bank of E two-layer perceptrons W2 relu(W1 x + b1) + b2: E (2 D H + H + D) parameters."""

    def __init__(self, n_experts: int, d_model: int, d_hidden: int):
        super().__init__()
        if min(n_experts, d_model, d_hidden) < 1:
            raise InputError(
                f"n_experts, d_model, d_hidden are {n_experts}, {d_model}, {d_hidden} but must all be at least 1"
            )
        self.n_experts = n_experts
        self.up, self.up_bias = _linears(n_experts, d_hidden, d_model)
        self.down, self.down_bias = _linears(n_experts, d_model, d_hidden)

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        plan, score = plan_of(routing), score_of(routing, x)
        return moe_mlp(x, self.up, self.down, plan, score, self.up_bias, self.down_bias, activation="relu")


def _linears(n_experts: int, d_out: int, d_in: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights (E, out, in) and biases (E, out), each expert initialised as `nn.Linear` is."""
    bound = d_in**-0.5
    weight, bias = torch.empty(n_experts, d_out, d_in), torch.empty(n_experts, d_out)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


def plan_of(routing: Routing) -> RoutePlan:
    """The pairs of a routing in expert order, as the kernels take them."""
    if routing.top_k is not None:
        return RoutePlan.build(routing.expert, routing.n_experts, top_k=routing.top_k)
    return RoutePlan.build(routing.expert, routing.n_experts, tok_offs=routing.offsets)


def score_of(routing: Routing, x: Tensor) -> Float[Tensor, " pairs"]:
    """The combine weights in a type that the kernels take beside `x`: float32 as it is, else the type of `x`."""
    return routing.weight if routing.weight.dtype == torch.float32 else routing.weight.to(x.dtype)
