"""What the spectrum of an i.i.d. random matrix of the same shape looks like, and what stands out from it.

n and N are the shorter and the longer side, q = n / N, s the standard deviation of an entry. For large matrices the
energies l_k = s_k^2 fill the Marchenko-Pastur bulk s^2 N (1 -+ sqrt(q))^2; larger ones are spikes, learned directions
(Martin and Mahoney 2021).
"""

import torch
from jaxtyping import Float64, Num
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.measures.spectra import (
    effective_rank,
    energy_entropy_rank,
    energy_rank,
    participation_ratio,
)

GRID = 8192  # points of the numerical distribution function
TRACY_WIDOM_99 = 2.02  # 99 % point of the Tracy-Widom law for real matrices


def mp_edge(shape: tuple[int, int], std: float | Tensor = 1.0, fluctuation: float = 0.0) -> Float64[Tensor, "*batch"]:
    """l_+ = s^2 (sqrt(N) + sqrt(n))^2, the largest energy of noise; plus `fluctuation` units of its spread.

    The largest energy of a finite Gaussian matrix fluctuates about the edge on the scale
    s^2 (sqrt(N) + sqrt(n)) (1/sqrt(N) + 1/sqrt(n))^(1/3), in Tracy-Widom form (Johnstone 2001).
    """
    n, m = _sides(shape)
    both = m**0.5 + n**0.5
    edge = both**2 + fluctuation * both * (m**-0.5 + n**-0.5) ** (1 / 3)
    return edge * torch.as_tensor(std, dtype=torch.float64).square()


def bulk_std(values: Num[Tensor, "*batch n"], shape: tuple[int, int]) -> Float64[Tensor, "*batch"]:
    """Entry standard deviation s of the noise, from the median energy over its Marchenko-Pastur value.

    Not moved by a minority of spikes (Gavish and Donoho 2014, eq. 5). Needs the whole spectrum.
    """
    n, m = _sides(shape)
    if values.shape[-1] != n:
        raise InputError(f"values holds {values.shape[-1]} values but must hold all {n} of a matrix of shape {shape}")
    median = values.double().square().quantile(0.5, dim=-1)
    return (median / (m * _quantiles(n / m, torch.tensor([0.5], dtype=torch.float64))[0])).sqrt()


def outliers(
    values: Num[Tensor, "*batch n"], shape: tuple[int, int], std: float | Tensor | None = None
) -> Float64[Tensor, "*batch"]:
    """Number of energies above the bulk's edge and its 99 % fluctuation; null 0. `std` is `bulk_std` if None."""
    std = bulk_std(values, shape) if std is None else std
    edge = mp_edge(shape, std, TRACY_WIDOM_99)
    count = (values.double().square() > edge.unsqueeze(-1)).sum(-1).double()
    return count.where(~values.isnan().any(-1), torch.nan)


def soft_rank(
    values: Num[Tensor, "*batch n"], shape: tuple[int, int], std: float | Tensor | None = None
) -> Float64[Tensor, "*batch"]:
    """l_+ / l_1: about 1 for noise, towards 0 as the strongest spike leaves the bulk (Martin and Mahoney 2021)."""
    std = bulk_std(values, shape) if std is None else std
    return mp_edge(shape, std) / values.double().amax(-1).square()


def marchenko_pastur_spectrum(shape: tuple[int, int], std: float = 1.0) -> Float64[Tensor, " n"]:
    """Typical singular values of an i.i.d. matrix, descending: sqrt of the (k - 1/2)/n quantiles of the law."""
    n, m = _sides(shape)
    levels = (torch.arange(n, 0, -1, dtype=torch.float64) - 0.5) / n
    return std * (m * _quantiles(n / m, levels)).sqrt()


def stable_rank_null(shape: tuple[int, int]) -> float:
    """n N / (sqrt(n) + sqrt(N))^2, the stable rank of an i.i.d. matrix: n/4 if square."""
    n, m = _sides(shape)
    return n * m / (n**0.5 + m**0.5) ** 2


def null_measures(shape: tuple[int, int]) -> dict[str, float]:
    """The rank measures of `spectra.measures`, by the same names, of an i.i.d. matrix: their null lines."""
    values = marchenko_pastur_spectrum(shape)
    return {
        "stable_rank": stable_rank_null(shape),
        "effective_rank": float(effective_rank(values)),
        "energy_entropy_rank": float(energy_entropy_rank(values)),
        "participation_ratio": float(participation_ratio(values)),
        "energy_rank_90": float(energy_rank(values, 0.90)),
        "energy_rank_99": float(energy_rank(values, 0.99)),
    }


def _sides(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"shape is {tuple(shape)} but must be two sizes of at least 1")
    return min(shape), max(shape)


def _quantiles(q: float, levels: Float64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """Quantiles of the Marchenko-Pastur law of l / (N s^2), with support (1 -+ sqrt(q))^2.

    With x = 1 + q - 2 sqrt(q) cos(t), t from 0 to pi, the density of t is 2 sin(t)^2 / (pi x): smooth even for q = 1.
    """
    t = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (torch.pi / GRID)
    x = 1 + q - 2 * q**0.5 * t.cos()
    mass = t.sin().square() / x
    reached = (mass.cumsum(0) - 0.5 * mass) / mass.sum()  # distribution function at the cell centres
    right = torch.searchsorted(reached, levels).clamp(1, GRID - 1)
    left = right - 1
    weight = (levels - reached[left]) / (reached[right] - reached[left])
    at = (t[left] + weight * (t[right] - t[left])).clamp(0, torch.pi)
    return 1 + q - 2 * q**0.5 * at.cos()
