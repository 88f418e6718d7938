"""Do the gradients of several tasks pull against each other on a group of parameters?

g_a is the gradient of task a's own mean loss, restricted to one parameter group; task-private heads stay out. The same
functions serve other axes (tasks within one expert, experts within one shared matrix): say which one is shown.

Minibatch noise pulls every cosine to 0 and the conflict rate to 1/2. So each task gives two gradients, g' and g'', of
independent half batches; all that is kept of them is the stack of three Gramians (3, n, n)

    G1_ab = <g'_a, g'_b>,   G2_ab = <g''_a, g''_b>,   X_ab = <g'_a, g''_b>,

and g = (g' + g'') / 2. A task whose gradient is zero (no tokens routed) has no direction: NaN, never 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from workbench.errors import InputError


@dataclass(frozen=True)
class ConflictStats:
    """Conflict of n tasks on one parameter group. Means run over the pairs a < b whose cosine is defined.

    Attributes:
        cosine: (n, n) c_ab = <g_a, g_b> / (|g_a| |g_b|); diagonal 1; conflict iff < 0 (Yu et al. 2020, PCGrad).
        corrected: (n, n) <g_a, g_b> / sqrt(X_aa X_bb): the cosine without the shrinkage by noise (Spearman 1904). An
            estimate, it may leave [-1, 1]; NaN where a self-product is not above 0, "below noise". Diagonal 1.
        self_cosine: (n,) cosine of the two halves of a task: about 1 if noise is small, about 0 if noise is all.
        rate: share of pairs with c < 0; null 1/2.
        gcd: mean of 1 - c ("gradient conflict degree", no standard name); 0 .. 2, above 1 means conflict.
        magnitude: mean of relu(-c), the penalty of CDSP-MoE; 0 .. 1.
        max_neg: max of -c (ScaleZero); above 0 iff any pair conflicts. Grows with the number of pairs.
        gms: mean of 2 |g_a| |g_b| / (|g_a|^2 + |g_b|^2), gradient magnitude similarity (Yu et al. 2020); 0 .. 1.
        diversity: sum |g_a|^2 / |sum g_a|^2 (Yin et al. 2018); 1/n if equal, 1 if orthogonal, inf if cancelling.
        condition: sigma_max / sigma_min of the stacked gradients (Senushkin et al. 2023, Aligned-MTL); 1 .. inf; NaN
            if a gradient is zero.
        cancellation: 1 - |sum g_a| / sum |g_a|, the share of gradient length lost by summing; 0 .. 1.
        n_pairs: number of pairs behind the means.
        band: 1 / sqrt(P), the standard deviation of the cosine of random directions; None if P is not given.
    """

    cosine: Float64[Tensor, "*batch tasks tasks"]
    corrected: Float64[Tensor, "*batch tasks tasks"]
    self_cosine: Float64[Tensor, "*batch tasks"]
    rate: Float64[Tensor, "*batch"]
    gcd: Float64[Tensor, "*batch"]
    magnitude: Float64[Tensor, "*batch"]
    max_neg: Float64[Tensor, "*batch"]
    gms: Float64[Tensor, "*batch"]
    diversity: Float64[Tensor, "*batch"]
    condition: Float64[Tensor, "*batch"]
    cancellation: Float64[Tensor, "*batch"]
    n_pairs: Float64[Tensor, "*batch"]
    band: float | None


def gramians(
    first: Sequence[Sequence[Tensor | None]], second: Sequence[Sequence[Tensor | None]]
) -> Float64[Tensor, "3 tasks tasks"]:
    """[G1, G2, X] of two half batches, summed over parameters in float64; the gradients are not kept.

    Args:
        first: for each task the gradients g' of the same parameters, any shapes; None stands for zero.
        second: the same for g''.
    """
    sizes = {len(task) for task in (*first, *second)}
    if len(first) != len(second) or len(sizes) != 1:
        raise InputError(
            f"first and second hold {len(first)} and {len(second)} tasks with {sorted(sizes)} parameters "
            "but must hold the same tasks and parameters"
        )
    n = len(first)
    total = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    for parameter in zip(*first, *second, strict=True):
        present = [i for i, gradient in enumerate(parameter) if gradient is not None]
        if present:
            stacked = torch.stack([parameter[i].detach().flatten() for i in present]).double()
            total[torch.meshgrid([torch.tensor(present)] * 2, indexing="ij")] += (stacked @ stacked.T).cpu()
    return torch.stack([total[:n, :n], total[n:, n:], total[:n, n:]])


def mean_gramian(gram3: Float[Tensor, "*batch 3 tasks tasks"]) -> Float64[Tensor, "*batch tasks tasks"]:
    """<g_a, g_b> of g = (g' + g'') / 2: (G1 + G2 + X + X^T) / 4."""
    first, second, cross = gram3.double().unbind(-3)
    return (first + second + cross + cross.mT) / 4


def cosine_matrix(gramian: Float[Tensor, "*batch tasks tasks"]) -> Float64[Tensor, "*batch tasks tasks"]:
    """c_ab = G_ab / sqrt(G_aa G_bb); -1 .. 1, diagonal 1; NaN in the rows and columns of zero gradients."""
    gramian = gramian.double()
    norm = _diagonal(gramian).sqrt()
    cosine = gramian / (norm.unsqueeze(-1) * norm.unsqueeze(-2))
    return _with_unit_diagonal(cosine, norm > 0)


def corrected_cosine(gram3: Float[Tensor, "*batch 3 tasks tasks"]) -> Float64[Tensor, "*batch tasks tasks"]:
    """Disattenuated cosine <g_a, g_b> / sqrt(X_aa X_bb); NaN where a self-product X_aa is not above 0."""
    own = _diagonal(gram3.double()[..., 2, :, :])
    above = own > 0
    scale = own.where(above, torch.nan).sqrt()
    return _with_unit_diagonal(mean_gramian(gram3) / (scale.unsqueeze(-1) * scale.unsqueeze(-2)), above)


def self_cosine(gram3: Float[Tensor, "*batch 3 tasks tasks"]) -> Float64[Tensor, "*batch tasks"]:
    """X_aa / sqrt(G1_aa G2_aa), the cosine of the two half-batch gradients of a task; -1 .. 1."""
    first, second, cross = _diagonal(gram3.double()).unbind(-2)
    return cross / (first * second).sqrt()


def conflict_rate(cosine: Float[Tensor, "*batch tasks tasks"], margin: float = 0.0) -> Float64[Tensor, "*batch"]:
    """Share of the defined pairs a < b with c_ab < -margin; 0 .. 1; NaN without a pair. Null 1/2 for margin 0.

    With `margin` the band 1 / sqrt(P) it counts conflicts beyond what random directions show; with a layer-wise score
    it is the count of Recon (Shi et al. 2023) as a share.
    """
    pairs = _pairs(cosine.double())
    return _mean((pairs < -margin).double().where(~pairs.isnan(), torch.nan))


def conflict_stats(gram3: Float[Tensor, "..."], n_parameters: int | None = None) -> ConflictStats:
    """All conflict measures from the Gramians of two half batches; see `ConflictStats` for formulas and ranges.

    Args:
        gram3: (..., 3, n, n) [G1, G2, X] as `gramians` gives them, with any leading dimensions (steps).
        n_parameters: P of the group, for the band of random directions.

    Raises:
        InputError: a shape other than (..., 3, n, n).
    """
    if gram3.ndim < 3 or gram3.shape[-3] != 3 or gram3.shape[-1] != gram3.shape[-2]:
        raise InputError(f"gram3 has shape {tuple(gram3.shape)} but must have shape (..., 3, n, n)")
    gramian = mean_gramian(gram3)
    cosine = cosine_matrix(gramian)
    pairs = _pairs(cosine)
    squares = _diagonal(gramian)
    norm = squares.sqrt()
    lowest = (
        pairs.nan_to_num(torch.inf).amin(-1) if pairs.shape[-1] else gramian.new_full(gramian.shape[:-2], torch.inf)
    )
    both = norm.unsqueeze(-1) * norm.unsqueeze(-2)
    gms = _pairs((2 * both / (squares.unsqueeze(-1) + squares.unsqueeze(-2))).where(both > 0, torch.nan))
    # a sum this far below the sum of squares is rounding: the gradients cancel
    summed = gramian.sum((-2, -1))
    summed = summed.where(summed > 1e-14 * gramian.abs().sum((-2, -1)), 0.0)
    return ConflictStats(
        cosine=cosine,
        corrected=corrected_cosine(gram3),
        self_cosine=self_cosine(gram3),
        rate=conflict_rate(cosine),
        gcd=_mean(1 - pairs),
        magnitude=_mean((-pairs).clamp(min=0)),
        max_neg=(-lowest).where(lowest.isfinite(), torch.nan),
        gms=_mean(gms),
        diversity=squares.sum(-1) / summed,
        condition=_condition(gramian),
        cancellation=1 - summed.sqrt() / norm.sum(-1),
        n_pairs=(~pairs.isnan()).double().sum(-1),
        band=None if n_parameters is None else n_parameters**-0.5,
    )


def overlap_cosine(gradients: Float[Tensor, "n dim"], shared: Bool[Tensor, "n dim"]) -> Float64[Tensor, "n n"]:
    """Cosine of two gradients over the coordinates both own; NaN where they share none or one is zero there.

    For experts carved from one matrix (CDSP-MoE), row i of `shared` marks the entries of expert i. Its penalty takes 0
    for an empty overlap; as a measure it is undefined.
    """
    own = shared.double()
    values = gradients.double() * own
    squares = values.square() @ own.T  # [i, j]: energy of gradient i on the coordinates it shares with j
    return (values @ values.T) / (squares * squares.T).sqrt()


def token_conflict(
    token_gradients: Float[Tensor, "*batch tokens dim"], threshold: float = 0.0
) -> Float64[Tensor, "*batch"]:
    """Share of an expert's tokens with cos(g_token, mean gradient) < threshold (STGC, Yang et al. 2025); 0 .. 1.

    Tokens without a gradient do not count; NaN if none has one or the mean is zero.
    """
    values = token_gradients.double()
    mean = values.mean(-2, keepdim=True)
    cosine = (values * mean).sum(-1) / (values.norm(dim=-1) * mean.norm(dim=-1))
    return _mean((cosine < threshold).double().where(~cosine.isnan(), torch.nan))


def _condition(gramian: Float64[Tensor, "*batch tasks tasks"]) -> Float64[Tensor, "*batch"]:
    """sigma_max / sigma_min; inf where the smallest eigenvalue is within rounding of 0, NaN beside a zero gradient."""
    defined = (_diagonal(gramian) > 0).all(-1) & gramian.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(gramian.where(defined[..., None, None], 0.0))
    low, high = eigenvalues[..., 0], eigenvalues[..., -1]
    low = low.where(low > 1e-14 * gramian.shape[-1] * high, 0.0)
    return (high / low).sqrt().where(defined, torch.nan)


def _diagonal(gramian: Tensor) -> Tensor:
    return gramian.diagonal(dim1=-2, dim2=-1)


def _with_unit_diagonal(cosine: Tensor, defined: Tensor) -> Tensor:
    """The diagonal is 1 by definition: set it, so that rounding (or noise) does not show there."""
    ones = torch.ones_like(_diagonal(cosine)).where(defined, torch.nan)
    return torch.diagonal_scatter(cosine, ones, dim1=-2, dim2=-1)


def _pairs(matrix: Tensor) -> Float64[Tensor, "*batch pairs"]:
    """The cells a < b of a symmetric matrix."""
    first, second = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], 1, device=matrix.device)
    return matrix[..., first, second]


def _mean(values: Tensor) -> Float64[Tensor, "*batch"]:
    return values.nanmean(-1)
