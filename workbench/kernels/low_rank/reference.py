"""The meaning of `low_rank`: one expert at a time, in plain torch, with the backward written out.

    U = X[tok] A_e^T          (P, r)
    Y = (score * U) B_e^T     (P, O)
    O_n = sum over the pairs of token n of Y

With dV = dO[tok] B_e, which is the gradient of score * U:

    dscore = <dV, U>                       instead of <dO[tok], B_e U>: no (P, O) tensor is kept or made
    dB_e = dO[tok]^T (score * U),  dA_e = (score * dV)^T X[tok]
    dX_n = sum over the pairs of token n of (score * dV) A_e

U is made once more in the backward, where X[tok] is needed anyway. Half precision: products are made in the type of
`x`, everything else in float32.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from workbench.kernels.gather_sum.reference import gather_sum
from workbench.kernels.low_rank.order import pack, unpack
from workbench.kernels.plan import RoutePlan


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, O) output, no codes, and the index where `save` is set."""
    plan = RoutePlan.build(expert, a.shape[0], top_k=top_k, tok_offs=tok_offs)
    y = x.new_empty(plan.n_pairs, b.shape[1])
    for e, rows in enumerate(_groups(plan)):
        y[rows] = weighted(x[plan.tok[rows]] @ a[e].T, score[plan.order[rows]]) @ b[e].T
    return gather_sum(y, plan, None), x.new_empty(0), pack(plan) if save else plan.order.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b and score from `grad` (N, O); all of them, whichever are wanted."""
    plan = unpack(index, x.shape[0], expert.shape[0], a.shape[0], tok_offs, top_k)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    dx_rows, dscore = x.new_empty(plan.n_pairs, x.shape[1]), torch.empty_like(score)
    for e, rows in enumerate(_groups(plan)):
        xg, dout, pairs = x[plan.tok[rows]], grad[plan.tok[rows]], plan.order[rows]
        u, dv = xg @ a[e].T, dout @ b[e]
        du = weighted(dv, score[pairs])
        dscore[pairs] = inner(u, dv).to(score.dtype)
        db[e] = dout.T @ weighted(u, score[pairs])
        da[e] = du.T @ xg
        dx_rows[rows] = du @ a[e]
    return gather_sum(dx_rows, plan, None), da, db, dscore


def weighted(codes: Tensor, score: Tensor) -> Tensor:
    """Each row of codes (..., r) by its score (...), in float32 or wider, in the type of codes."""
    if codes.dtype == score.dtype:
        return codes * score[..., None]
    return (codes.to(torch.promote_types(codes.dtype, torch.float32)) * score[..., None]).to(codes.dtype)


def inner(u: Tensor, v: Tensor) -> Tensor:
    """<u, v> of the last dimension, in float32 or wider."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return torch.linalg.vecdot(u.to(wide), v.to(wide))


def _groups(plan: RoutePlan) -> list[slice]:
    """The grouped rows of each expert."""
    return [slice(first, end) for first, end in pairwise(plan.offs.tolist())]
