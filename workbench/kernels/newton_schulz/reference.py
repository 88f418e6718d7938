"""The meaning of `newton_schulz`: x <- a x + (b y + c y^2) x with y = x x^T."""

from collections.abc import Sequence

from torch import Tensor


def newton_schulz(x: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """(B, n, m) from (B, n, m), n <= m."""
    a, b, c = coefficients
    for _ in range(steps):
        y = x @ x.mT
        x = a * x + (b * y + c * (y @ y)) @ x
    return x
