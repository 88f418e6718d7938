"""The meaning of `trim_elect_merge` and of `magnitude_threshold`: element by element, models in their order."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from workbench.errors import InputError


def trim_elect_merge(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    thresholds: Sequence[float],
    elect: str | None,
    divide: str | None,
    scale: float,
    out: Tensor,
) -> None:
    """n experts, base and out (P,)."""
    wide = torch.promote_types(experts[0].dtype, torch.float32)
    origin = None if base is None else base.to(wide)

    def trimmed(i: int) -> tuple[Tensor, Tensor]:
        tau = experts[i].to(wide) if origin is None else experts[i].to(wide) - origin
        return tau, ~(tau.abs() < number(thresholds[i]))  # NaN stays, to be seen

    def number(value: float) -> Tensor:  # rounded to the type first, and not after the product
        return torch.tensor(value, dtype=wide, device=experts[0].device)

    n = len(experts)
    negative = None
    if elect is not None:
        vote = experts[0].new_zeros(experts[0].shape, dtype=wide)
        for i in range(n):
            tau, kept = trimmed(i)
            vote = vote + torch.where(kept, tau if elect == "values" else number(weights[i]) * tau, 0)
        negative = vote < 0
    total = experts[0].new_zeros(experts[0].shape, dtype=wide)
    divisor = torch.zeros_like(total)
    for i in range(n):
        tau, kept = trimmed(i)
        if negative is not None:
            kept = kept & (tau != 0) & ~torch.where(negative, tau > 0, tau < 0)
        total = total + torch.where(kept, number(weights[i]) * tau, 0)
        if divide is not None:
            divisor = divisor + torch.where(kept, number(1.0 if divide == "count" else weights[i]), 0)
    merged = number(scale) * (total / torch.where(divisor == 0, 1, divisor))
    out.copy_(merged if origin is None else origin + merged)


def magnitudes(pieces: Iterable[tuple[Tensor, Tensor | None]], ranks: Callable[[int], Sequence[int]]) -> list[float]:
    """Those of |x - base| at the ranks, from 0 for the smallest; infinity at the rank behind the last."""
    parts = []
    for x, base in pieces:
        wide = torch.promote_types(x.dtype, torch.float32)
        parts.append((x.to(wide) if base is None else x.to(wide) - base.to(wide)).abs())
    sizes = torch.cat(parts)
    if bool(sizes.isnan().any()):
        raise InputError("experts - base has NaN but must have none")
    asked = [rank_of(len(sizes), rank) for rank in ranks(len(sizes))]
    return [float("inf") if rank == len(sizes) else float(sizes.kthvalue(rank + 1).values) for rank in asked]


def rank_of(size: int, rank: int) -> int:
    """The rank itself, if there is one like it; that behind the last is infinity's."""
    if not 0 <= rank <= size:
        raise InputError(f"k or a rank asks for entry {size - rank} from above but there are {size}")
    return rank
