"""The meaning of `column_adam`: the cosine transform, its columns of the largest norm, and Adam."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.kernels.column_topk import column_topk, gather_columns
from workbench.kernels.dct import dct2_rows


def column_adam(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    norm: int,
    remap: bool,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    chosen, low = column_topk(dct2_rows(grad), index.shape[-1], norm=norm)
    if remap and step > 1:
        for moment, moved in zip((exp_avg, exp_avg_sq), kept([exp_avg, exp_avg_sq], index, chosen), strict=True):
            moment.copy_(moved)
    index.copy_(chosen)
    return adam(low, exp_avg, exp_avg_sq, step, beta1, beta2, eps)


def kept(lows: Sequence[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
    """Of each (*batch, n, r) the columns `old` (*batch, r) as columns `new`: those that are not there are zeros."""
    before, order = old.sort(-1)
    at = torch.searchsorted(before, new).clamp_(max=old.shape[-1] - 1)
    stays, source = before.gather(-1, at) == new, order.gather(-1, at)
    return [gather_columns(low, source).masked_fill_(~stays.unsqueeze(-2), 0) for low in lows]


def adam(low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, beta1: float, beta2: float, eps: float) -> Tensor:
    """The direction of step number `step`; counts `low` into the moments."""
    exp_avg.lerp_(low, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    root, bias = exp_avg_sq.sqrt(), 1 - beta1**step  # both biases are corrected in the denominator
    return exp_avg / root.mul_(bias / (1 - beta2**step) ** 0.5).add_(bias * eps)
