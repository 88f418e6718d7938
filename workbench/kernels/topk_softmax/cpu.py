"""The CPU path of `topk_softmax`: `torch.topk`, and a sort for the rows in which equal logits compete."""

import torch
from torch import Tensor

from workbench.kernels.topk_softmax import reference


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """As `reference.topk_softmax`. Which of several equal logits, or of several NaN, `torch.topk` returns is open."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, index = wide.topk(min(k + 1, wide.shape[1]), dim=1)
    tied = (best[:, 1:] == best[:, :-1]).any(1) | best.isnan().any(1)
    score = best[:, :k].softmax(1) if renormalize else wide.softmax(1).gather(1, index[:, :k])
    index = index[:, :k].contiguous()
    if bool(tied.any()):
        score[tied], index[tied] = reference.topk_softmax(wide[tied], k, renormalize)
    return score, index
