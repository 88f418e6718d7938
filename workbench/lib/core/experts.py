"""Dense experts: one gated feed-forward block, a bank of E of them, and a bank of plain two-layer perceptrons.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, P routed pairs.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
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
        order = torch.argsort(routing.expert, stable=True)
        counts = routing.counts
        rows = x[routing.token[order]]
        gate, up = grouped_linear(rows, self.gate_up, counts).chunk(2, dim=-1)
        return combine(grouped_linear(F.silu(gate) * up, self.down, counts), routing, order)


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
        order = torch.argsort(routing.expert, stable=True)
        expert, counts = routing.expert[order], routing.counts
        hidden = torch.relu(grouped_linear(x[routing.token[order]], self.up, counts) + self.up_bias[expert])
        return combine(grouped_linear(hidden, self.down, counts) + self.down_bias[expert], routing, order)


def _linears(n_experts: int, d_out: int, d_in: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights (E, out, in) and biases (E, out), each expert initialised as `nn.Linear` is."""
    bound = d_in**-0.5
    weight, bias = torch.empty(n_experts, d_out, d_in), torch.empty(n_experts, d_out)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


def grouped_linear(
    rows: Float[Tensor, "pairs d_in"], weight: Float[Tensor, "experts d_out d_in"], counts: Int64[Tensor, " experts"]
) -> Float[Tensor, "pairs d_out"]:
    """Rows sorted by expert, each multiplied by its own expert's matrix: the first counts[0] by weight[0], and so on.

    Uses `torch.nn.functional.grouped_mm` where it is exact and allowed (float32, widths divisible by 4), else one
    matrix product per expert. `unbind` rather than indexing: each index would write a full-size zero gradient.
    """
    if rows.dtype == weight.dtype == torch.float32 and weight.shape[1] % 4 == 0 and weight.shape[2] % 4 == 0:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    parts = rows.split(counts.tolist())
    return torch.cat([part @ w.T for part, w in zip(parts, weight.unbind(0), strict=True)])


def combine(
    outputs: Float[Tensor, "pairs dim"], routing: Routing, order: Int64[Tensor, " pairs"]
) -> Float[Tensor, "tokens dim"]:
    """Sum of the expert outputs of each token by its combine weights; row i of `outputs` belongs to pair order[i]."""
    weight = routing.weight.to(outputs.dtype)
    if routing.top_k is not None:  # gather and sum: a fixed order of addition, and no scattered writes
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        pairs = outputs[inverse] * weight[:, None]
        return pairs.view(routing.n_tokens, routing.top_k, -1).sum(1)
    zeros = outputs.new_zeros(routing.n_tokens, outputs.shape[-1])
    return zeros.index_add(0, routing.token[order], outputs * weight[order, None])
