"""The plan of routed pairs as an operator: what expert order is, where each expert begins, and the way back.

Paths: "reference", which is `RoutePlan.build` and what None chooses on every device, and "triton", which needs neither
a sort nor a search: it counts, adds the counts up, and puts every pair where it belongs.

Tensor letters: T tokens, E experts, P routed pairs.
"""

from importlib import import_module

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.kernels import dispatch
from workbench.kernels.plan import RoutePlan, check, check_values

BACKENDS = ("reference", "triton")


def route_metadata(
    expert: Int[Tensor, " pairs"],
    n_experts: int,
    *,
    top_k: int | None = None,
    tok_offs: Int[Tensor, " tokens_plus_1"] | None = None,
    backend: str | None = None,
) -> RoutePlan:
    """`RoutePlan.build`, with a choice of the path. Both give the same plan; it has no gradient.

    Args:
        expert, n_experts, top_k, tok_offs: as `RoutePlan.build` takes them.
        backend: one of `BACKENDS`; None is "reference".

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    chosen = dispatch.choose("route_metadata", backend or "reference", expert.device, BACKENDS)
    if chosen == "reference":
        dispatch.begin("route_metadata", chosen)
        return RoutePlan.build(expert, n_experts, top_k=top_k, tok_offs=tok_offs)
    n_tokens = check(expert, n_experts, top_k, tok_offs)
    check_values(expert, n_experts, tok_offs)
    tok_offs = None if tok_offs is None else tok_offs.to(torch.int32)
    return RoutePlan(*_triton(expert, n_experts, top_k, tok_offs), tok_offs, n_tokens, n_experts, top_k)


@torch.library.custom_op("workbench::route_metadata", mutates_args=())
def _triton(
    expert: Tensor, n_experts: int, top_k: int | None, tok_offs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inv and tok (P,) and offs (E + 1,), int32."""
    check(expert, n_experts, top_k, tok_offs)
    check_values(expert, n_experts, tok_offs)
    dispatch.admit("route_metadata", "triton", expert.device, BACKENDS)
    dispatch.begin("route_metadata", "triton")
    return import_module(f"{__name__}.triton").route_metadata(expert, n_experts, top_k, tok_offs)


@_triton.register_fake
def _(expert, n_experts, top_k, tok_offs):
    each = [torch.empty_like(expert, dtype=torch.int32) for _ in range(3)]
    return *each, expert.new_empty(n_experts + 1, dtype=torch.int32)
