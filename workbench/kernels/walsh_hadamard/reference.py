"""The meaning of `walsh_hadamard`: n rounds of butterflies (a, b) -> (a + b, a - b), of pairs 1, 2, 4, ... apart."""

import torch
from torch import Tensor


def walsh_hadamard(x: Tensor) -> Tensor:
    """(rows, 2^n) from (rows, 2^n), added in float32 or wider."""
    rows, length = x.shape
    y, apart = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while apart < length:
        a, b = y.view(rows, length // (2 * apart), 2, apart).unbind(2)
        y, apart = torch.stack([a + b, a - b], 2).view(rows, length), 2 * apart
    return y.to(x.dtype, copy=True)
