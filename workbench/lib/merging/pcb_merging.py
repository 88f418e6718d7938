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
experiments, which `kernels.pcb_merge` has in C; its reference has the parts that all three share. Quantiles are order
statistics of the whole vector, as there: of P different scores P - floor(P (1 - r)) - 1 stay.

A task whose weights all moved by the same size says nothing of which of them matter, and has no say: Norm of it is 0/0.
One whose weights did not, but do once they are clipped (99 % of them did not move at all), is refused.

Tensor letters: n tasks, P weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels.pcb_merge import MODELS, Bounds, pcb_bounds, pcb_piece
from workbench.kernels.pcb_merge import pcb_merge as kernel
from workbench.kernels.pcb_merge import reference as parts
from workbench.lib.core.merge import Merger, TaskVectors, merged_state
from workbench.lib.core.merge.linear import weights_of
from workbench.lib.core.merge.merger import Update
from workbench.lib.core.merge.trimmed import magnitudes_at

METHOD = Method(
    slug="pcb-merging",
    title="PCB-Merging: Parameter Competition Balancing for Model Merging",
    family="merging",
    year=2024,
    paper="arXiv:2410.02396",
    claim="Grading each parameter by its weight within a task and its agreement across tasks merges better than TIES "
    "and task arithmetic.",
    objects=("pcb_merge", "pcb_scores", "pcb_terms", "Pcb"),
    kind="merge",
)

Vectors = Float[Tensor, "tasks weights"]


def example() -> Callable[..., dict[str, Tensor]]:
    """The quantiles are of all tensors together."""
    return lambda base, experts: merged_state(TaskVectors(base, experts), Pcb(ratio=0.3))


def norm(z: Vectors) -> Vectors:
    """Each row from 0 (its least) to 1 (its largest); a row that is the same everywhere becomes 0."""
    return parts.between(z, z.amin(1, keepdim=True), z.amax(1, keepdim=True))


def pairwise_tanh(tau: Vectors, signed: Vectors) -> Vectors:
    """sum_j tanh(g_i g_j), of the clipped and normed g: the vision script."""
    return parts.pairwise_tanh(signed)


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
IN_C = "pairwise_tanh"
"""The form that `kernels.pcb_merge` has."""


def pcb_terms(tau: Tensor, inter: str = "pairwise_tanh", clip: float = 0.01) -> tuple[Vectors, Vectors, Vectors]:
    """The clipped task vectors c, the intra and the inter term, (n, P) each, in float32 or wider.

    Args:
        tau: (n, P) task vectors; float, finite.
        inter: one of `INTER`.
        clip: q, at least 0 and below 0.5.

    Raises:
        InputError: an option is out of its range; tau is no matrix of floats, or not finite; or a task's magnitudes
            differ, but are all the same once they are clipped.
    """
    _check(inter, clip)
    tau = _checked(tau)
    clipped, signed = parts.placed(tau, *parts.ends(tau, _clip_ranks(tau.shape[1], clip)))
    return clipped, parts.intra(signed), INTER[inter](tau, signed)


def pcb_scores(
    tau: Tensor, ratio: float = 0.2, inter: str = "pairwise_tanh", clip: float = 0.01
) -> tuple[Vectors, Vectors]:
    """The clipped task vectors c (n, P), and the scales s (n, P) from 0 to 1.

    Args:
        tau, inter, clip: as in `pcb_terms`.
        ratio: r, the share of each task's weights that stays, above `clip` and at most 1. The weights above the upper
            quantile are of one size, so that no smaller share could tell them apart.

    Raises:
        InputError: as `pcb_terms`, or ratio is out of its range.
    """
    _check(inter, clip, ratio)
    clipped, intra, agreement = pcb_terms(tau, inter, clip)
    return clipped, parts.shares(intra * agreement, _rank(tau.shape[1], 1 - ratio))


def pcb_merge(
    tau: Tensor,
    ratio: float = 0.2,
    lam: float | Tensor = 1.0,
    inter: str = "pairwise_tanh",
    clip: float = 0.01,
) -> Float[Tensor, " weights"]:
    """What is added to the base (P,), in the type of tau.

    Args:
        tau, ratio, inter, clip: as in `pcb_scores`.
        lam: lambda, one for all tasks or one each, (n,).

    Raises:
        InputError: as `pcb_scores`, or lam is neither one finite number nor one a task.
    """
    _check(inter, clip, ratio)
    wide = _checked(tau)
    lam = torch.as_tensor(lam, dtype=wide.dtype, device=wide.device).detach()
    if lam.shape not in ((), (len(tau),)):
        raise InputError(
            f"lam has shape {tuple(lam.shape)} but must be one number, or one for each of {len(tau)} tasks"
        )
    if not lam.isfinite().all():
        raise InputError(f"lam is {lam.tolist()} but must be finite")
    lam = lam.expand(len(tau))
    if inter == IN_C and len(tau) <= MODELS:
        clip, drop = _clip_ranks(tau.shape[1], clip), _rank(tau.shape[1], 1 - ratio)
        return kernel(wide, clip=clip, drop=drop, scale=lam).to(tau.dtype)
    clipped, share = pcb_scores(wide, ratio, inter, clip)
    return parts.weighted(clipped, share, lam).to(tau.dtype)


class Pcb(Merger):
    """Weights graded by their size within a task and their agreement across tasks, the lowest dropped.

    Quantiles are of all tensors together. With "pairwise_tanh" models are read a piece at a time, and in memory are a
    few pieces (in float64, on a GPU or without a C compiler also the scores, as large as all experts); the other forms
    hold about eight times all experts.

    Args:
        ratio: the share of each task vector that stays, above `clip` and at most 1.
        scale: lambda, of the merged update.
        weights: one number an expert, ones by default: lambda_i is scale times it. They are no part of the scores.
        inter: how agreement is measured: by the tanh of products of pairs ("pairwise_tanh"), of products with the sum
            ("sum_tanh", which depends on how large task vectors are), or by a softmax of products ("paper_softmax").
        clip: the share of the smallest, and of the largest magnitudes that are made equal, at least 0 and below 0.5.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        scale: float = 1.0,
        weights: Sequence[float] | None = None,
        inter: Literal["pairwise_tanh", "sum_tanh", "paper_softmax"] = "pairwise_tanh",
        clip: float = 0.01,
    ):
        _check(inter, clip, ratio)
        self.ratio, self.scale, self.weights, self.inter, self.clip = ratio, scale, weights, inter, clip

    def update(self, vectors: TaskVectors) -> Update:
        lam = [self.scale * weight for weight in weights_of(self.weights, vectors)]
        if self.inter == IN_C and vectors.n <= MODELS:
            yield from self._streamed(vectors, lam)
            return
        if not vectors.size:
            return
        merged = pcb_merge(vectors.flat(), self.ratio, torch.tensor(lam, dtype=torch.float64), self.inter, self.clip)
        for place in vectors.places():
            yield place, merged[place.whole]

    def bounds(self, vectors: TaskVectors) -> Bounds:
        """The magnitudes that are clipped, and the scores that drop, of each expert among all weights."""
        clip, drop = _clip_ranks(vectors.size, self.clip), _rank(vectors.size, 1 - self.ratio)
        ranks = [0, *clip, vectors.size - 1]
        found = [magnitudes_at(vectors, i, vectors.names, lambda _: ranks) for i in range(vectors.n)]
        low, high = zip(*(parts.checked_ends(i, four) for i, four in enumerate(found)), strict=True)
        return pcb_bounds(_Pieces(vectors), low, high, drop)

    def _streamed(self, vectors: TaskVectors, lam: list[float]) -> Update:
        bounds = self.bounds(vectors) if vectors.size else None
        for place, tau in zip(vectors.places(), _Pieces(vectors), strict=True):
            yield place, pcb_piece(tau, bounds, lam)


MERGER = Pcb


class _Pieces:
    """All weights in pieces (n, p) of one type, read anew each time that they are gone through."""

    def __init__(self, vectors: TaskVectors):
        self.vectors = vectors

    def __iter__(self) -> Iterator[Vectors]:
        return (tau.to(self.vectors.dtype) for _, tau in self.vectors.pieces())


def _check(inter: str, clip: float, ratio: float = 1.0) -> None:
    if inter not in INTER:
        raise unknown("inter", inter, INTER)
    if not 0 <= clip < 0.5:
        raise InputError(f"clip is {clip} but must be at least 0 and below 0.5")
    if not clip < ratio <= 1:
        raise InputError(f"ratio is {ratio} but must be above clip, {clip}, and at most 1")


def _checked(tau: Tensor) -> Vectors:
    """In float32, or float64 as it is."""
    if tau.ndim != 2 or 0 in tau.shape or not tau.is_floating_point() or tau.dtype.itemsize == 1:
        raise InputError(
            f"tau is {tau.dtype} of shape {tuple(tau.shape)} but must be floats of two bytes at least (tasks, weights)"
        )
    if not tau.isfinite().all():
        raise InputError("tau has values that are not finite; a task vector must be finite")
    return tau.detach().to(torch.promote_types(tau.dtype, torch.float32))


def _clip_ranks(size: int, clip: float) -> tuple[int, int]:
    low = _rank(size, clip)
    return low, max(low, _rank(size, 1 - clip, above=True))


def _rank(size: int, share: float, above: bool = False) -> int:
    """The rank at a share of `size` values: number floor(size share), or the one before it."""
    return min(max(math.floor(size * share) - above, 0), size - 1)
