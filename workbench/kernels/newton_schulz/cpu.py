"""`newton_schulz` in four buffers a matrix, with what is added inside the products."""

from collections.abc import Sequence

import torch
from torch import Tensor


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """As `reference.newton_schulz`."""
    a, b, c = coefficients
    out, spare = torch.empty_like(x), torch.empty_like(x[0])
    gram, factor = (x.new_empty(x.shape[1], x.shape[1]) for _ in range(2))
    for now, last in zip(x, out, strict=True):
        for step in reversed(range(steps)):
            following = last if step % 2 == 0 else spare
            torch.mm(now, now.T, out=gram)
            torch.addmm(gram, gram, gram, beta=b, alpha=c, out=factor)
            now = torch.addmm(now, factor, now, beta=a, out=following)
    return out
