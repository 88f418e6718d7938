"""The path of `moe_mlp` through torch's own grouped product, `torch.nn.functional.grouped_mm`.

The formulas are those of `reference`, each over all experts at once. torch's product takes no bias, no float64, and
rows of whole 16 bytes only; the operator refuses the rest.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from workbench.kernels.gather_sum import cpu, reference
from workbench.kernels.moe_mlp.reference import activate, derivative
from workbench.kernels.plan import RoutePlan


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.forward`."""
    if plan.n_pairs == 0:
        return torch.zeros_like(x), x.new_empty(0, w1.shape[1])
    ends, expert = plan.offs[1:], _expert(plan)
    z = grouped_mm(x[plan.tok], w1.transpose(1, 2), offs=ends)
    if b1 is not None:
        z += b1[expert]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = grouped_mm(activate(z.to(wide), activation).to(x.dtype), w2.transpose(1, 2), offs=ends)
    if b2 is not None:
        y += b2[expert]
    return _gather_sum(y, plan, score), z if save else None


def backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    plan: RoutePlan,
    score: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    db1, db2 = (None if b is None else torch.zeros_like(b) for b in (b1, b2))
    if plan.n_pairs == 0:
        return *(torch.zeros_like(t) for t in (x, w1, w2, score)), db1, db2
    wide = torch.promote_types(x.dtype, torch.float32)
    ends, expert = plan.offs[1:], _expert(plan)
    s = score[plan.order].to(wide)[:, None]
    dout = grad[plan.tok]
    u = grouped_mm(dout, w2, offs=ends).to(wide)
    hidden = activate(z.to(wide), activation)
    ds = (u * hidden).sum(1)
    dz = derivative(s * u, z.to(wide), activation)
    if b2 is not None:
        ds += (dout.to(wide) * b2[expert].to(wide)).sum(1)
        db2.copy_(_sums(s * dout.to(wide), expert, plan))
    if b1 is not None:
        db1.copy_(_sums(dz, expert, plan))
    dz = dz.to(x.dtype)
    empty = (plan.offs.diff() == 0)[:, None, None]
    dw2 = grouped_mm(dout.T, (s * hidden).to(x.dtype), offs=ends).masked_fill_(empty, 0)
    dw1 = grouped_mm(dz.T, x[plan.tok], offs=ends).masked_fill_(empty, 0)
    dx = _gather_sum(grouped_mm(dz, w1, offs=ends), plan, None)
    return dx, dw1, dw2, ds[plan.inv].to(score.dtype), db1, db2


def _gather_sum(y: Tensor, plan: RoutePlan, weight: Tensor | None) -> Tensor:
    return (cpu if y.device.type == "cpu" else reference).gather_sum(y, plan, weight)


def _expert(plan: RoutePlan) -> Tensor:
    """(P,) expert of each grouped row."""
    experts = torch.arange(plan.n_experts, device=plan.offs.device)
    return experts.repeat_interleave(plan.offs.diff(), output_size=plan.n_pairs)


def _sums(rows: Tensor, expert: Tensor, plan: RoutePlan) -> Tensor:
    """(E, columns) sum of each expert's rows."""
    return rows.new_zeros(plan.n_experts, rows.shape[1]).index_add_(0, expert, rows)
