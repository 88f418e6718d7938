"""PCB-Merging: a weight counts by how large it is in its own task and how far the other tasks agree with it.

Du et al. 2024, "Parameter Competition Balancing for Model Merging" (arXiv:2410.02396); public code:
duguodong7/pcb-merging. Of n experts of one base, tau_i = theta_i - theta_base (P weights of all layers in one vector):

    a_i    = |tau_i| held within its q and 1 - q quantiles,      c_i = sign(tau_i) a_i
    intra  = exp(n Norm(a_i)^2),      Norm(z) = (z - min z) / (max z - min z) over the P weights of a task
    inter  = sum_j tanh(g_i g_j),     g_i = sign(tau_i) Norm(a_i), j over all tasks, i among them
    s_i    = Norm(max(intra inter, its 1 - r quantile)):         0 but for the share r of largest scores
    merged = theta_base + sum_i lambda_i s_i c_i / sum_i s_i     and theta_base where no task is left

The coefficients lambda are no part of the scores. TIES keeps and drops likewise, but with equal weights and by size
alone. The intra term has no softmax's denominator: it is one positive number a task, which Norm takes out again.

The published code has two forms of the inter term and the paper a third, see `INTER`. The default is that of its vision
experiments. Quantiles are order statistics, as there: of P different scores
P - floor(P (1 - r)) - 1 stay.

Tensor letters: n tasks, P weights.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError, unknown

Vectors = Float[Tensor, "tasks weights"]


def norm(z: Vectors) -> Vectors:
    """Each row from 0 (its least) to 1 (its largest); a row that is the same everywhere becomes 0."""
    low, high = z.amin(1, keepdim=True), z.amax(1, keepdim=True)
    return torch.where(high > low, (z - low) / torch.where(high > low, high - low, 1), 0)


def pairwise_tanh(tau: Vectors, signed: Vectors) -> Vectors:
    """sum_j tanh(g_i g_j), of the clipped and normed g: the vision script."""
    return torch.stack([(g * signed).tanh().sum(0) for g in signed])


def sum_tanh(tau: Vectors, signed: Vectors) -> Vectors:
    """tanh(tau_i sum_j tau_j), of what was neither clipped nor normed: the root script. Depends on tau's scale."""
    return (tau * tau.sum(0)).tanh()


def paper_softmax(tau: Vectors, signed: Vectors) -> Vectors:
    """sum_j Softmax(Norm(tau_i tau_j)) over the weights: as the paper words it."""
    return torch.stack([norm(row * tau).softmax(1).sum(0) for row in tau])


#: Name -> the inter term (n, P) of tau and g.
INTER: dict[str, Callable[[Vectors, Vectors], Vectors]] = {
    "pairwise_tanh": pairwise_tanh,
    "sum_tanh": sum_tanh,
    "paper_softmax": paper_softmax,
}


def pcb_scores(
    tau: Tensor, ratio: float = 0.2, inter: str = "pairwise_tanh", clip: float = 0.01
) -> tuple[Vectors, Vectors]:
    """The clipped task vectors c (n, P), and the scales s (n, P) from 0 to 1.

    A task whose weights all moved by the same size says nothing of which of them matter, and has scale 0 throughout.

    Args:
        tau: (n, P) task vectors; float, finite.
        ratio: r, the share of each task's weights that stays, above `clip` and at most 1. The weights above the upper
            quantile are of one size, so that no smaller share could tell them apart.
        inter: one of `INTER`.
        clip: q, at least 0 and below 0.5.

    Raises:
        InputError: an option is out of its range, tau is no matrix of floats, or it is not finite.
    """
    if inter not in INTER:
        raise unknown("inter", inter, INTER)
    if not 0 <= clip < 0.5:
        raise InputError(f"clip is {clip} but must be at least 0 and below 0.5")
    if not clip < ratio <= 1:
        raise InputError(f"ratio is {ratio} but must be above clip, {clip}, and at most 1")
    if tau.ndim != 2 or 0 in tau.shape or not tau.is_floating_point():
        raise InputError(f"tau is {tau.dtype} of shape {tuple(tau.shape)} but must be floats (tasks, weights)")
    if not tau.isfinite().all():
        raise InputError("tau has values that are not finite; a task vector must be finite")
    size, n = tau.abs(), len(tau)
    a = size.clamp(_at(size, clip), _at(size, 1 - clip, above=True))
    z, sign = norm(a), tau.sign()
    intra = (n * (z.square() - 1)).exp()  # e^-n of the formula's, which Norm takes out; e^n would be too large
    scores = intra * INTER[inter](tau, sign * z)
    return sign * a, norm(scores.clamp(min=_at(scores, 1 - ratio)))


def pcb_merge(tau: Tensor, ratio: float = 0.2, lam: float | Tensor = 1.0, **options) -> Float[Tensor, " weights"]:
    """What is added to the base (P,).

    Args:
        tau, ratio, options: as in `pcb_scores`.
        lam: lambda, one for all tasks or one each, (n,).

    Raises:
        InputError: as `pcb_scores`, or lam is neither one number nor one a task.
    """
    clipped, scale = pcb_scores(tau, ratio, **options)
    lam = torch.as_tensor(lam, dtype=tau.dtype, device=tau.device)
    if lam.shape not in ((), (len(tau),)):
        raise InputError(
            f"lam has shape {tuple(lam.shape)} but must be one number, or one for each of {len(tau)} tasks"
        )
    total = scale.sum(0)
    summed = (lam.reshape(-1, 1) * scale * clipped).sum(0)
    return torch.where(total > 0, summed / torch.where(total > 0, total, 1), 0)


def _at(z: Vectors, share: float, above: bool = False) -> Float[Tensor, "tasks 1"]:
    """The order statistic of each row at a share of its P values: number floor(P share), or the one before it."""
    p = z.shape[1]
    place = min(max(math.floor(p * share) - above, 0), p - 1)
    return z.kthvalue(place + 1, dim=1, keepdim=True).values
