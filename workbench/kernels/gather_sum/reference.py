"""The meaning of `gather_sum`: O_t = sum over the pairs j of token t of weight_j * Y[inv_j], pairs in their order."""

import torch
from torch import Tensor

from workbench.kernels.plan import RoutePlan


def gather_sum(y: Tensor, plan: RoutePlan, weight: Tensor | None) -> Tensor:
    """(T, H) from y (P, H) in grouped order and weight (P,) in token-major order; None stands for ones.

    Sums in float32 or wider, and returns the type of `y`.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y[plan.inv].to(wide)
    if weight is not None:
        rows = rows * weight.to(wide)[:, None]
    out = rows.new_zeros(plan.n_tokens, y.shape[1])
    return out.index_add_(0, plan.tok[plan.inv], rows).to(y.dtype)
