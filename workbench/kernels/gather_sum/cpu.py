"""The CPU path of `gather_sum`: torch's embedding bag, which reads each row once and writes each token once."""

import torch
from torch import Tensor

from workbench.kernels.gather_sum import reference
from workbench.kernels.plan import RoutePlan


def gather_sum(y: Tensor, plan: RoutePlan, weight: Tensor | None) -> Tensor:
    """As `reference.gather_sum`; half precision, which the bag would round at every step, takes the reference."""
    if y.dtype not in (torch.float32, torch.float64) or plan.n_pairs == 0 or y.shape[1] == 0:
        return reference.gather_sum(y, plan, weight)
    return torch.embedding_bag(
        y,
        plan.inv,
        plan.token_offsets(),
        mode=0,  # the sum
        per_sample_weights=None if weight is None else weight.to(y.dtype),
        include_last_offset=True,
    )[0]
