"""The expert layer as ScatterMoE lays it out, to compare what it keeps: no path of the operator.

The gather is part of the first product and is repeated in the backward pass, so x is kept and its gathered rows are
not; the second product keeps its input and, for the gradient of the scores, the output of every pair.

Tan et al. 2024, arXiv:2403.08245; shawntan/scattermoe, `parallel_experts.py`. Any floating type; shapes as in
`moe_mlp`, of a plan with a fixed K.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.plan import RoutePlan


def scattered(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts up dim"],
    w2: Float[Tensor, "experts dim hidden"],
    plan: RoutePlan,
    score: Float[Tensor, " pairs"],
) -> Float[Tensor, "tokens dim"]:
    """`moe_mlp` for SwiGLU without biases."""
    gate, up = Up.apply(x, w1, plan.tok, plan.offs).chunk(2, dim=-1)
    return Down.apply(F.silu(gate) * up, w2, score, plan.order, plan.inv, plan.offs, plan.top_k)


class Up(torch.autograd.Function):
    """x[tok] times each row's expert: keeps x and gathers again in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, tok, offs):
        ctx.save_for_backward(x, weight, tok, offs)
        return grouped(x[tok], weight, offs)

    @staticmethod
    def backward(ctx, grad):
        x, weight, tok, offs = ctx.saved_tensors
        d_rows = grouped(grad, weight.transpose(1, 2), offs)
        return torch.zeros_like(x).index_add(0, tok, d_rows), grouped_outer(grad, x[tok], offs), None, None


class Down(torch.autograd.Function):
    """Grouped rows times each row's expert, weighted and summed by token: keeps the rows and every pair's output."""

    @staticmethod
    def forward(ctx, rows, weight, score, order, inv, offs, top_k):
        pairs = grouped(rows, weight, offs)[inv]
        ctx.save_for_backward(rows, weight, score, pairs, order, offs)
        ctx.top_k = top_k
        return (pairs * score[:, None]).view(-1, top_k, pairs.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, score, pairs, order, offs = ctx.saved_tensors
        each = grad.repeat_interleave(ctx.top_k, dim=0)
        d_pairs = (each * score[:, None])[order]
        d_rows = grouped(d_pairs, weight.transpose(1, 2), offs)
        return d_rows, grouped_outer(d_pairs, rows, offs), (each * pairs).sum(-1), None, None, None, None


def grouped(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Rows in expert order, each times its own expert's matrix (E, out, in)."""
    parts = zip(rows.split(offs.diff().tolist()), weight.unbind(0), strict=True)
    return torch.cat([part @ w.T for part, w in parts])


def grouped_outer(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """(E, l, r): for each expert the sum of left_i right_i^T over its rows."""
    counts = offs.diff().tolist()
    return torch.stack([a.T @ b for a, b in zip(left.split(counts), right.split(counts), strict=True)])
