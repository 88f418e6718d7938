"""The meaning of `pcb_merge`: the straightforward form in tensors (n, P), the pairs of models one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import InputError


def pcb_merge(
    experts: Sequence[Tensor], base: Tensor | None, clip: tuple[int, int], drop: int, scale: Sequence[float]
) -> Tensor:
    """(P,) merged, from n experts and base (P,)."""
    wide = torch.promote_types(experts[0].dtype, torch.float32)
    tau = torch.stack([x.to(wide) if base is None else x.to(wide) - base.to(wide) for x in experts])
    if bool(tau.isnan().any()):
        raise InputError("experts - base has NaN but must have none")
    sizes = tau.abs()
    low, high = (sizes.kthvalue(rank + 1, dim=1, keepdim=True).values for rank in clip)
    require_spread(low.flatten().tolist(), high.flatten().tolist())
    clipped = sizes.clamp(low, high)
    signed = tau.sign() * ((clipped - low) / (high - low))
    score = torch.zeros_like(tau)
    for other in signed:
        score += torch.tanh(signed * other)
    score *= torch.exp(len(tau) * signed.square())
    least = score.kthvalue(drop + 1, dim=1, keepdim=True).values
    spread = score.amax(1, keepdim=True) - least
    share = torch.where(score > least, (score - least) / spread, 0)
    weight = torch.tensor(scale, dtype=wide, device=tau.device)[:, None]
    merged = (weight * share * tau.sign() * clipped).sum(0) / share.sum(0).clamp(min=1e-12)
    return (merged if base is None else base.to(wide) + merged).to(experts[0].dtype)


def require_spread(lows: Sequence[float], highs: Sequence[float]) -> None:
    """Raise `InputError` for a row in which nothing is between the clipped magnitudes."""
    for i, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if not low < high < float("inf"):
            raise InputError(
                f"experts[{i}] - base has magnitude {low} at the lower and {high} at the upper rank of clip, but the "
                "upper must be larger, and finite"
            )
