"""The memory part of the study of SonicMoE: what three expert layers keep for the backward pass, counted.

All compute the same function of the same weights:

- gather: rows are gathered, and autograd keeps what each operation needs: the rows, the values before and after the
  activation, the activated hidden values, the expert outputs. This is what an eager loop over experts does.
- scatter: the design of ScatterMoE (Tan et al. 2024, 2403.08245; shawntan/scattermoe, `parallel_experts.py`): the
  gather is part of the first product and is repeated in the backward pass, so x is kept and the rows are not; the
  second product keeps its input and, for the gradient of the combine weights, the output of every pair.
- ours: `GLUExperts`, which runs through `workbench.kernels.moe_mlp`.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, K active experts per token, P routed pairs.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.memory import saved_bytes
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.routing import Routing
from workbench.lib.kernels.sonicmoe import topk_routing

Layer = Callable[[Tensor, Routing], Tensor]


def memory(
    d_model: int, n_tokens: int, n_experts: int, width: int, top_k: Sequence[int], seed: int = 0
) -> list[dict[str, int]]:
    """Bytes kept by each layer, weights left out, one entry for each K with H = width / K.

    Args:
        width: H K, the same for all K.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_model, generator=generator)
    logits = torch.randn(n_tokens, n_experts, generator=generator)
    table = []
    for k in top_k:
        bank = GLUExperts(n_experts, d_model, width // k)
        table.append({"top_k": k, "d_hidden": width // k})
        for name, layer in layers(bank).items():
            # The router's own memory is not the layer's: its weights arrive as a leaf.
            routing = topk_routing(logits, k)
            routing.weight = routing.weight.detach().requires_grad_()
            leaf = x.clone().requires_grad_()
            table[-1][name] = saved_bytes(lambda: layer(leaf, routing), bank.parameters())  # noqa: B023
    return table


def layers(bank: GLUExperts) -> dict[str, Layer]:
    """The three layers with the weights of one bank."""
    return {
        "gather": lambda x, routing: gather(x, bank.gate_up, bank.down, routing),
        "scatter": lambda x, routing: scatter(x, bank.gate_up, bank.down, routing),
        "ours": bank,
    }


def gather(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts up dim"],
    w2: Float[Tensor, "experts dim hidden"],
    routing: Routing,
) -> Float[Tensor, "tokens dim"]:
    """The layer as autograd would have it."""
    order, inverse, counts = grouping(routing)
    gate, up = grouped(x[routing.token[order]], w1, counts).chunk(2, dim=-1)
    pairs = grouped(F.silu(gate) * up, w2, counts)[inverse] * routing.weight[:, None]
    return pairs.view(routing.n_tokens, routing.top_k, -1).sum(1)


def scatter(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts up dim"],
    w2: Float[Tensor, "experts dim hidden"],
    routing: Routing,
) -> Float[Tensor, "tokens dim"]:
    """The layer of ScatterMoE."""
    order, inverse, counts = grouping(routing)
    gate, up = ScatterUp.apply(x, w1, routing.token[order], counts).chunk(2, dim=-1)
    return ScatterDown.apply(F.silu(gate) * up, w2, routing.weight, order, inverse, counts, routing.top_k)


class ScatterUp(torch.autograd.Function):
    """x[token] times each row's expert: keeps x and gathers again in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, token, counts):
        ctx.save_for_backward(x, weight, token, counts)
        return grouped(x[token], weight, counts)

    @staticmethod
    def backward(ctx, grad):
        x, weight, token, counts = ctx.saved_tensors
        d_rows = grouped(grad, weight.transpose(1, 2), counts)
        return torch.zeros_like(x).index_add(0, token, d_rows), grouped_outer(grad, x[token], counts), None, None


class ScatterDown(torch.autograd.Function):
    """Grouped rows times each row's expert, weighted and summed by token: keeps the rows and every pair's output."""

    @staticmethod
    def forward(ctx, rows, weight, score, order, inverse, counts, top_k):
        pairs = grouped(rows, weight, counts)[inverse]
        ctx.save_for_backward(rows, weight, score, pairs, order, counts)
        ctx.top_k = top_k
        return (pairs * score[:, None]).view(-1, top_k, pairs.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, score, pairs, order, counts = ctx.saved_tensors
        each = grad.repeat_interleave(ctx.top_k, dim=0)
        d_pairs = (each * score[:, None])[order]
        d_rows = grouped(d_pairs, weight.transpose(1, 2), counts)
        return d_rows, grouped_outer(d_pairs, rows, counts), (each * pairs).sum(-1), None, None, None, None


def grouping(routing: Routing) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"], Int64[Tensor, " experts"]]:
    """(P,) pair of each row in expert order, (P,) row of each pair, (E,) rows of each expert."""
    order = torch.argsort(routing.expert, stable=True)
    return order, torch.argsort(order), routing.counts


def grouped(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows in expert order, each times its own expert's matrix (E, out, in)."""
    return torch.cat([part @ w.T for part, w in zip(rows.split(counts.tolist()), weight.unbind(0), strict=True)])


def grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """(E, l, r): for each expert the sum of left_i right_i^T over its rows."""
    parts = zip(left.split(counts.tolist()), right.split(counts.tolist()), strict=True)
    return torch.stack([a.T @ b for a, b in parts])
