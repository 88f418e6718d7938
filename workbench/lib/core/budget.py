"""What a model costs: parameters, active parameters, floating-point operations. Studies match and print these.

Which parameters a token does not use, a layer says itself. Any `Announcing` module that has a submodule `experts` says
that its parameters are those of its n_experts experts in equal shares, and announces which of them each token is sent
to. So whole feed-forward blocks count as banks do, and a layer that mixes the parameters of all its experts, and
therefore announces them all, has none that are idle. What lies outside `experts` is used by every token.
"""

from collections.abc import Sized
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from workbench.lib.core.observe import Announcing, observing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Task

aten = torch.ops.aten


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Of a grouped product: groups split one axis of the three, unless each has matrices of its own on both sides."""
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


UNCOUNTED = {  # operators of the CPU paths that torch's own counter does not know
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Budget:
    """Cost of one model.

    Attributes:
        params: trained and fixed parameters together.
        active_params: parameters a token uses on average (the rest are experts it is not routed to).
        flops: floating-point operations of one forward and backward pass over `rows` rows, counted, not estimated.
        rows: rows of the batch the operations were counted on.
    """

    params: int
    active_params: int
    flops: int
    rows: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def count_params(model: nn.Module) -> int:
    """Number of parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def measure_budget(model: nn.Module, task: Task, batch: Sized) -> Budget:
    """Count the cost of `model` on a batch of the task; gradients are left as found (None if there were none)."""
    kept = {p: p.grad for p in model.parameters()}
    for p in kept:
        p.grad = None
    layers = [
        m for m in model.modules() if isinstance(m, Announcing) and isinstance(getattr(m, "experts", None), nn.Module)
    ]
    try:
        counting = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        with observing(layers, _share) as seen, counting as counter, torch.enable_grad():
            loss, context = task.loss(model, batch)
            if (total := loss + context.aux).requires_grad:  # of a frozen model the forward alone counts
                total.backward()
    finally:
        for p, grad in kept.items():
            p.grad = grad
    used: dict[nn.Module, float] = {}  # share of its experts that a token uses, by bank: several layers may share one
    for layer, shares in seen.items():
        used[layer.experts] = used.get(layer.experts, 0.0) + sum(shares)
    idle = sum(count_params(bank) * max(0.0, 1 - share) for bank, share in used.items())
    params = count_params(model)
    return Budget(params, round(params - idle), counter.get_total_flops(), len(batch))


def _share(routing: Routing, context: Context) -> float:
    """The share of its experts that a layer sends a token to, mean over the tokens."""
    return routing.expert.numel() / (routing.n_tokens * routing.n_experts)
