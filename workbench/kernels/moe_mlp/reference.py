"""The meaning of `moe_mlp`: one expert at a time, in plain torch, with the backward written out.

    Z = X[tok] W1_e^T + b1_e           (P, 2I), or (P, I) with activation "relu"
    A = silu(Z_gate) * Z_up            (P, I),  or relu(Z)
    Y = A W2_e^T + b2_e                (P, H)
    O_t = sum over the pairs of token t of score * Y

The backward needs X, Z, the weights and the scores, and neither A nor Y nor the gathered rows of X, so what is kept
does not grow when experts become finer (SonicMoE, arXiv:2512.14080). With U = dO[tok] W2_e:

    dscore = sum_i U_i A_i + <dO[tok], b2_e>       instead of <dO[tok], Y>
    dA = score * U,  dZ = dA times the derivative of the activation
    dW2_e = dO[tok]^T (score * A),  db2_e = sum score * dO[tok]
    dW1_e = dZ^T X[tok],            db1_e = sum dZ
    dX_t = sum over the pairs of token t of dZ W1_e

Half precision: products are made in the type of `x`, everything else in float32.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.kernels.gather_sum.reference import gather_sum
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
    """(T, H) output, and Z (P, 2I or I) where `save` is set, else None."""
    z = x.new_empty(plan.n_pairs, w1.shape[1])
    y = x.new_empty(plan.n_pairs, w2.shape[1])
    for e, rows in enumerate(_groups(plan)):
        z[rows] = F.linear(x[plan.tok[rows]], w1[e], None if b1 is None else b1[e])
        hidden = activate(z[rows].to(wide_type(x.dtype)), activation).to(x.dtype)
        y[rows] = F.linear(hidden, w2[e], None if b2 is None else b2[e])
    return gather_sum(y, plan, score), z if save else None


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
    """Gradients of x, w1, w2, score, b1 and b2 (None where there is no bias) from `grad` (T, H)."""
    wide = wide_type(x.dtype)
    dw1, dw2 = torch.zeros_like(w1), torch.zeros_like(w2)
    db1 = None if b1 is None else torch.zeros_like(b1)
    db2 = None if b2 is None else torch.zeros_like(b2)
    dx_rows = x.new_empty(plan.n_pairs, x.shape[1])
    dscore = score.new_empty(plan.n_pairs)
    for e, rows in enumerate(_groups(plan)):
        xg, dout, pairs = x[plan.tok[rows]], grad[plan.tok[rows]], plan.order[rows]
        s = score[pairs].to(wide)[:, None]
        u = (dout @ w2[e]).to(wide)
        hidden = activate(z[rows].to(wide), activation)
        ds = (u * hidden).sum(1)
        if b2 is not None:
            ds = ds + (dout.to(wide) * b2[e].to(wide)).sum(1)
            db2[e] = (s * dout.to(wide)).sum(0)
        dscore[pairs] = ds.to(score.dtype)
        dz = derivative(s * u, z[rows].to(wide), activation)
        if b1 is not None:
            db1[e] = dz.sum(0)
        dz = dz.to(x.dtype)
        dw2[e] = dout.T @ (s * hidden).to(x.dtype)
        dw1[e] = dz.T @ xg
        dx_rows[rows] = dz @ w1[e]
    return gather_sum(dx_rows, plan, None), dw1, dw2, dscore, db1, db2


def _groups(plan: RoutePlan) -> list[slice]:
    """The grouped rows of each expert."""
    offs = plan.offs.tolist()
    return [slice(first, end) for first, end in pairwise(offs)]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return z.relu()
    gate, up = z.chunk(2, dim=1)
    return F.silu(gate) * up


def derivative(da: Tensor, z: Tensor, activation: str) -> Tensor:
    """dZ from dA."""
    if activation == "relu":
        return da * (z > 0)
    gate, up = z.chunk(2, dim=1)
    sigmoid = gate.sigmoid()
    return torch.cat([da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid], dim=1)
