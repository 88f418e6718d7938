"""The memory part of the study of SonicMoE: what three expert layers keep for the backward pass, counted.

All compute the same function of the same weights:

- gather: rows are gathered, and autograd keeps what each operation needs: the rows, the values before and after the
  activation, the activated hidden values, the expert outputs. This is what an eager loop over experts does.
- scatter: the design of ScatterMoE (`workbench.kernels.moe_mlp.scattered`): x is kept and the rows are not.
- ours: `GLUExperts`, which runs through `workbench.kernels.moe_mlp`.

Tensor letters: N tokens, D model width, H expert hidden width, E experts, K active experts per token, P routed pairs.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.memory import saved_bytes
from workbench.kernels.moe_mlp.scattered import grouped, scattered
from workbench.kernels.plan import RoutePlan
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
    plan = grouping(routing)
    gate, up = grouped(x[plan.tok], w1, plan.offs).chunk(2, dim=-1)
    pairs = grouped(F.silu(gate) * up, w2, plan.offs)[plan.inv] * routing.weight[:, None]
    return pairs.view(routing.n_tokens, routing.top_k, -1).sum(1)


def scatter(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts up dim"],
    w2: Float[Tensor, "experts dim hidden"],
    routing: Routing,
) -> Float[Tensor, "tokens dim"]:
    """The layer of ScatterMoE."""
    return scattered(x, w1, w2, grouping(routing), routing.weight)


def grouping(routing: Routing) -> RoutePlan:
    return RoutePlan.build(routing.expert, routing.n_experts, top_k=routing.top_k)
