"""How several layers, or one at several depths, use one pool of experts.

From the layer x expert traffic matrix (the diagnostics of UniPool), or from the first expert of every token in each.
"""

import torch
from jaxtyping import Bool, Float64, Int, Num
from torch import Tensor

from workbench.errors import InputError


def top_set_jaccard(traffic: Num[Tensor, "layers experts"], top: int = 16) -> Float64[Tensor, ""]:
    """Mean over pairs of layers of |A and B| / |A or B|, A and B their `top` most used experts; 0 .. 1.

    Unused experts never count, whatever `top`.
    1: all layers use the same experts; 0: each has its own. NaN for a single layer.
    """
    sets = _top_sets(traffic, top).double()
    shared, size = sets @ sets.T, sets.sum(-1)
    value = shared / (size[:, None] + size - shared)
    n_layers = len(sets)
    return (value.sum() - value.trace()) / (n_layers * (n_layers - 1))


def top_set_union(traffic: Num[Tensor, "layers experts"], top: int = 16) -> Float64[Tensor, ""]:
    """Share of the pool that is among the `top` most used experts of at least one layer; top/E .. min(1, L top/E)."""
    return _top_sets(traffic, top).any(0).double().mean()


def first_agreement(first: Int[Tensor, "layers tokens"]) -> Float64[Tensor, "layers layers"]:
    """Share of the tokens whose first expert is the same in two layers; 0 .. 1, and 1 on the diagonal."""
    return (first[:, None] == first).double().mean(-1)


def chance_agreement(first: Int[Tensor, "layers tokens"], n_experts: int) -> Float64[Tensor, "layers layers"]:
    """Its null: what it would be of layers with the same loads that choose independently, sum_e f_a(e) f_b(e)."""
    loads = torch.nn.functional.one_hot(first.long(), n_experts).double().mean(1)
    return loads @ loads.T


def _top_sets(traffic: Num[Tensor, "layers experts"], top: int) -> Bool[Tensor, "layers experts"]:
    n_experts = traffic.shape[-1]
    if not 1 <= top <= n_experts:
        raise InputError(f"top is {top} but must be between 1 and the pool size {n_experts}")
    best = traffic.double().topk(top, dim=-1).indices
    return torch.zeros_like(traffic, dtype=torch.bool).scatter(-1, best, True) & (traffic > 0)
