"""Singular values of weights, updates and gradients, and the measures of a spectrum.

W is (o, i), n = min(o, i); s_1 >= ... >= s_n are its singular values and l_k = s_k^2 its energies (not divided by the
longer side). Measures take the values of a whole spectrum, (..., n); trailing zeros may be left out. A spectrum that is
zero or not finite gives NaN. All measures but the two norms ignore the scale of W: show a norm beside them. The null to
compare with is not n but an i.i.d. matrix of the same shape: see `random_matrix`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.measures.information import entropy

METHODS = ("auto", "svd", "gram", "rsvd")
EXACT_UP_TO = 256  # shorter side up to which "auto" takes the whole spectrum
RANDOMISED_VALUES = 64  # values "auto" and "rsvd" take if not told


@dataclass(frozen=True)
class SpectrumResult:
    """Singular values of one matrix or of a stack of matrices.

    Attributes:
        values: (..., k) descending; NaN for a matrix that is zero or not finite.
        tail_energy: sum of the squares of the values that are not in `values`; 0 for an exact spectrum.
        exact: whether `values` is the whole spectrum, up to rounding.
        method: "svd", "gram" (values below 1e-8 of the largest are rounding), "rsvd" (each an under-estimate) or "qr".
        undefined_reason: why values are NaN, else None.
    """

    values: Float64[Tensor, "*batch k"]
    tail_energy: Float64[Tensor, "*batch"]
    exact: bool
    method: str
    undefined_reason: str | None = None


def as_matrix(weight: Float[Tensor, "..."]) -> Float[Tensor, "out columns"]:
    """The matrix of one layer's weight: (o, i) as it is, a convolution (o, i, ...) as (o, i * ...).

    Split fused weights (query, key and value; packed experts) into their matrices first.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise InputError(f"weight has shape {tuple(weight.shape)} but must be a matrix or a convolution, and not empty")
    return weight.flatten(1)


def singular_values(
    weight: Float[Tensor, "*batch out in"],
    method: str = "auto",
    k: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectrumResult:
    """Singular values of one matrix or a stack, detached, computed in float32 or better.

    Args:
        weight: W.
        method: "svd"; "gram", the eigenvalues of the smaller Gram matrix in float64 (faster; for all but the smallest
            values); "rsvd", the k largest by a randomised range finder with two power iterations (Halko, Martinsson and
            Tropp 2011, alg. 4.4; good for gradients, some per cent low in a flat spectrum); "auto": "gram" up to a
            shorter side of 256, "rsvd" above.
        k: number of values of "rsvd", 64 if left out; the exact methods return all.
        generator: of the random start of "rsvd".

    Raises:
        InputError: unknown `method`, `k` below 1, an empty matrix.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if k is not None and k < 1:
        raise InputError(f"k is {k} but must be at least 1")
    if weight.ndim < 2 or 0 in weight.shape:
        raise InputError(f"weight has shape {tuple(weight.shape)} but must be a matrix or a stack, and not empty")
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.float()
    w = w if w.shape[-2] <= w.shape[-1] else w.mT  # the shorter side first
    n = w.shape[-2]
    if method == "auto":
        method = "gram" if n <= EXACT_UP_TO else "rsvd"
    k = min(k or RANDOMISED_VALUES, n)
    finite = w.isfinite().flatten(-2).all(-1)
    w = w.where(finite[..., None, None], 0.0)  # LAPACK refuses NaN; these become NaN again below
    energy = w.double().square().sum((-2, -1))
    defined = finite & (energy > 0)
    if method == "svd":
        values = torch.linalg.svdvals(w).double()
    elif method == "gram":
        w = w.double()
        values = torch.linalg.eigvalsh(w @ w.mT).flip(-1).clamp(min=0).sqrt()  # below 0 is rounding
    else:
        values = _randomised(w, k, generator).double()
    exact = method != "rsvd" or k == n
    tail = torch.zeros_like(energy) if exact else (energy - values.square().sum(-1)).clamp(min=0)
    return SpectrumResult(
        values.where(defined[..., None], torch.nan), tail.where(defined, torch.nan), exact, method, _reason(defined)
    )


def low_rank_singular_values(
    b: Float[Tensor, "*batch out rank"], a: Float[Tensor, "*batch rank in"], scale: float = 1.0
) -> SpectrumResult:
    """The min(o, r, i) leading singular values of scale * B A, all others being 0, without forming the product.

    B = Q1 R1 and A^T = Q2 R2 leave the singular values of the r x r matrix R1 R2^T: O((o + i) r^2).
    """
    r1 = torch.linalg.qr(b.detach().double(), mode="r").R
    r2 = torch.linalg.qr(a.detach().double().mT, mode="r").R
    core = scale * (r1 @ r2.mT)
    finite = core.isfinite().flatten(-2).all(-1)
    defined = finite & (core != 0).flatten(-2).any(-1)
    values = torch.linalg.svdvals(core.where(finite[..., None, None], 0.0))
    tail = torch.zeros_like(defined, dtype=torch.float64).where(defined, torch.nan)
    return SpectrumResult(values.where(defined[..., None], torch.nan), tail, True, "qr", _reason(defined))


def spectral_norm(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """s_1."""
    return values.double().amax(-1)


def rms_operator_norm(values: Num[Tensor, "*batch n"], shape: tuple[int, int]) -> Float64[Tensor, "*batch"]:
    """s_1 sqrt(i / o) for shape (o, i): the operator norm between root-mean-square norms.

    Order 1, at any width and time, for weights and for updates over the learning rate, if training transfers across
    widths (Yang, Simon and Bernstein 2023, 2310.17813).
    """
    return spectral_norm(values) * (shape[1] / shape[0]) ** 0.5


def normalised_spectrum(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch n"]:
    """s_k / s_1; 0 .. 1."""
    return values.double() / spectral_norm(values).unsqueeze(-1)


def minmax_spectrum(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch n"]:
    """(s_k - s_n) / (s_1 - s_n); 0 .. 1; NaN if flat. The threshold axis of WeLore (Jaiswal et al. 2024)."""
    values = values.double()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low)


def stable_rank(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """|W|_F^2 / s_1^2; 1 .. n (Rudelson and Vershynin 2007)."""
    return normalised_spectrum(values).square().sum(-1)


def effective_rank(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """exp(H(p)), p_k = s_k / sum s; 1 .. n (Roy and Vetterli 2007). Counts the bulk: .8 to .97 n if W is random."""
    return entropy(values).exp()


def energy_entropy_rank(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """exp(H(p)), p_k = s_k^2 / sum s^2; 1 .. n, at most `effective_rank`."""
    return entropy(normalised_spectrum(values).square()).exp()


def participation_ratio(values: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """(sum l)^2 / sum l^2; 1 .. n, between `stable_rank` and `energy_entropy_rank`."""
    energy = normalised_spectrum(values).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def energy_rank(
    values: Num[Tensor, "*batch n"], theta: float = 0.9, tail_energy: Num[Tensor, "*#batch"] | float = 0.0
) -> Float64[Tensor, "*batch"]:
    """min k with sum_{j<=k} l_j >= theta * |W|_F^2; 1 .. n.

    `tail_energy` is what the values leave out; NaN where they do not reach theta.
    """
    if not 0 < theta <= 1:
        raise InputError(f"theta is {theta} but must be above 0 and at most 1")
    energy = values.double().square()
    total = energy.sum(-1, keepdim=True) + torch.as_tensor(tail_energy, device=energy.device).double().unsqueeze(-1)
    reached = energy.cumsum(-1) >= theta * total * (1 - 1e-12)  # theta = 1 is reached up to rounding
    rank = energy.shape[-1] - reached.sum(-1) + 1
    return rank.double().where(reached.any(-1) & (total.squeeze(-1) > 0), torch.nan)


def measures(result: SpectrumResult, shape: tuple[int, int]) -> dict[str, Float64[Tensor, "*batch"]]:
    """All measures of a spectrum by name, for a matrix of shape (o, i).

    What needs the whole spectrum (the two entropies, the participation ratio) is NaN for a partial one; the energy
    ranks are NaN only where the partial spectrum does not reach them.
    """
    values, tail = result.values, result.tail_energy
    frobenius = (values.square().sum(-1) + tail).sqrt()
    whole = (lambda measure: measure(values)) if result.exact else (lambda measure: torch.full_like(tail, torch.nan))
    return {
        "spectral_norm": spectral_norm(values),
        "rms_operator_norm": rms_operator_norm(values, shape),
        "frobenius_norm": frobenius,
        "stable_rank": (frobenius / spectral_norm(values)).square(),
        "effective_rank": whole(effective_rank),
        "energy_entropy_rank": whole(energy_entropy_rank),
        "participation_ratio": whole(participation_ratio),
        "energy_rank_90": energy_rank(values, 0.90, tail),
        "energy_rank_99": energy_rank(values, 0.99, tail),
    }


def _randomised(w: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """The k largest singular values of (..., n, m), n <= m, from a random subspace of k + 8 directions."""
    width = min(k + 8, w.shape[-2])
    start = torch.randn(*w.shape[:-2], w.shape[-1], width, dtype=w.dtype, generator=generator).to(w.device)
    basis = torch.linalg.qr(w @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ basis).Q).Q
    return torch.linalg.svdvals(basis.mT @ w)[..., :k]


def _reason(defined: Tensor) -> str | None:
    if defined.all():
        return None
    if defined.ndim == 0:
        return "undefined: the matrix is zero or not finite"
    return f"undefined: {int((~defined).sum())} of {defined.numel()} matrices are zero or not finite"
