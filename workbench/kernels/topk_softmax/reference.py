"""The meaning of `topk_softmax`: the K largest logits of each row, and their softmax over the K or over all E."""

import torch
from torch import Tensor


def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """score (T, K) in float32 or wider and index (T, K) int64, by falling logit; of equal logits the first wins."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, index = wide.sort(dim=1, descending=True, stable=True)
    score = ordered[:, :k].softmax(1) if renormalize else ordered.softmax(1)[:, :k]
    return score.contiguous(), index[:, :k].contiguous()
