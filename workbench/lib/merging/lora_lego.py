"""LoRA-LEGO: LoRAs fall apart into rank-one pieces; alike pieces are fused, and what comes out is a LoRA of any rank.

Zhao et al. 2024, "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise
Clustering" (arXiv:2409.16167, ICLR 2025); no public code was found. Of adapters A_i (r_i, I), B_i (O, r_i) of a layer:

    u_ij = [row j of A_i, column j of B_i]          a "minimal semantic unit"; N = sum_i r_i of them
    k-means of all u into k clusters C_c, Euclidean;   mu_c = mean of C_c
    mu_c <- mu_c mean_{u in C_c} |u| / |mu_c|       the mean of vectors that are not parallel is too short
    merged = gamma B' A' of the halves of mu_c,     gamma = sqrt(r / k): k pieces vary as r did

With k = N and neither of the two corrections the pieces are stacked, which is the sum of the adapters. Both corrections
are written from their names and purposes: the formulas were not at hand. An adapter's scale is folded in first, its
root in either half. A cluster whose members cancel (a mean below `CANCELLED` of their length) keeps its mean, and is
counted. There is no overall scale; who tunes one for another method should tune it here, too.

(c a, b / c) and (-a, -b) are the same piece to a model and other points to k-means. `canonical` makes them the same
point: halves of equal length, the largest entry of a positive. The paper does not, so that is off by default.

Tensor letters: n adapters, r rank, N pieces, k clusters, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.merge import Matrices, TaskVectors, merged_state
from workbench.lib.core.merge.low_rank import Factors, of_units, thin_svd, units

METHOD = Method(
    slug="lora-lego",
    title="LoRA-LEGO: Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise "
    "Clustering",
    family="merging",
    year=2024,
    paper="arXiv:2409.16167",
    claim="Clustering the rank-one pieces of several LoRAs builds a merged LoRA of any rank that beats averaging and "
    "TIES-like merges.",
    objects=("lego_merge", "merge_adapters", "lego_prune", "Merged"),
    kind="merge",
)

CANCELLED = 1e-3
STARTS = 10  # of k-means; the best is taken


def example() -> Callable[..., dict[str, Tensor]]:
    """Full experts, each matrix's update cut to rank 4 and merged into rank 4."""
    return lambda base, experts: merged_state(TaskVectors(base, experts), Lego(rank=4))


@dataclass(frozen=True, eq=False)
class Merged:
    """A layer's merged adapter, scale B A, and how it came about.

    Attributes:
        a, b: (k, I) and (O, k).
        scale: gamma; alpha of an adapter folder is gamma k.
        label: (N,) the cluster of each piece.
        owner: (N,) the adapter each piece is of.
        inertia: squared distance of the pieces from their cluster's mean, summed.
        cancelled: clusters whose length was left alone.
    """

    a: Float[Tensor, "k I"]
    b: Float[Tensor, "O k"]
    scale: float
    label: Int64[Tensor, " N"]
    owner: Int64[Tensor, " N"]
    inertia: float
    cancelled: int

    @property
    def factors(self) -> Factors:
        return self.a, self.b, self.scale

    @property
    def mixed(self) -> int:
        """Clusters with pieces of more than one adapter."""
        return sum(len(self.owner[self.label == c].unique()) > 1 for c in range(len(self.a)))


def lego_merge(
    loras: Sequence[Factors],
    rank: int | None = None,
    *,
    reweight_params: bool = True,
    reweight_output: bool = True,
    canonical: bool = False,
    seed: int = 0,
) -> Merged:
    """One adapter of one layer's adapters, whose ranks may differ.

    Args:
        loras: (A (r, I), B (O, r), scale) each.
        rank: k; default the largest rank among them, or as many as there are different pieces.
        reweight_params: give each mean the mean length of its members.
        reweight_output: gamma = sqrt(mean r / k) instead of 1.
        canonical: see the head of this file.
        seed: of the starts of k-means.

    Raises:
        InputError: adapters of other widths, numbers that are not finite, or a rank that is not from 1 to the number
            of different pieces.
    """
    pool, owner = units(loras)
    d_in = loras[0][0].shape[1]
    if canonical:
        pool = canonical_units(pool, d_in)
    ranks = [len(a) for a, _, _ in loras]
    k = min(max(ranks), len(pool.unique(dim=0))) if rank is None else rank
    label = clusters(pool, k, seed)
    member = torch.nn.functional.one_hot(label, k).to(pool.dtype)
    count = member.sum(0)
    mean = member.T @ pool / count[:, None]
    inertia, cancelled = float((pool - mean[label]).square().sum()), 0
    if reweight_params:
        wanted, length = member.T @ pool.norm(dim=1) / count, mean.norm(dim=1)
        stands = length > CANCELLED * wanted
        cancelled = int((~stands & (wanted > 0)).sum())
        mean = mean * torch.where(stands, wanted / torch.where(stands, length, 1), 1)[:, None]
    a, b, _ = of_units(mean, d_in)
    gamma = (sum(ranks) / len(ranks) / k) ** 0.5 if reweight_output else 1.0
    return Merged(a, b, gamma, label, owner, inertia, cancelled)


def lego_prune(lora: Factors, rank: int, **options: Any) -> Merged:
    """One adapter made smaller: its own pieces clustered. Options as in `lego_merge`."""
    return lego_merge([lora], rank, **options)


def merge_adapters(
    adapters: Sequence[Mapping[str, Factors]], rank: int | None = None, **options: Any
) -> dict[str, Factors]:
    """One adapter of several, each layer -> (A, B, scale). Options as in `lego_merge`.

    A layer that an adapter has not has no pieces of it.

    Raises:
        InputError: no adapters; or what `lego_merge` refuses, with the layer's name.
    """
    if not adapters:
        raise InputError("adapters is empty but must hold at least one adapter")
    merged = {}
    for name in dict.fromkeys(name for each in adapters for name in each):
        try:
            merged[name] = lego_merge([each[name] for each in adapters if name in each], rank, **options).factors
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return merged


def canonical_units(pool: Float[Tensor, "N width"], d_in: int) -> Float[Tensor, "N width"]:
    """The same pieces with halves of equal length and the largest entry of a positive; one that is zero is all zero."""
    a, b = pool[:, :d_in], pool[:, d_in:]
    one, other = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    length = (one * other).sqrt()
    zero, sign = length == 0, torch.where(a.gather(1, a.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(a.dtype)
    a, b = (half * sign * length / torch.where(zero, 1, norm) for half, norm in ((a, one), (b, other)))
    return torch.where(zero, 0, torch.cat([a, b], dim=1))


def clusters(pool: Float[Tensor, "N width"], k: int, seed: int = 0) -> Int64[Tensor, " N"]:
    """The cluster of each piece by k-means, from k-means++ and `STARTS` starts, in float64. None is empty.

    Raises:
        InputError: k is not from 1 to the number of different pieces, or the seed not one of scikit-learn's.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed} but must be at least 0 and below 2**32")
    distinct, same = pool.unique(dim=0, return_inverse=True)
    if not 1 <= k <= len(distinct):
        raise InputError(f"rank is {k} but must be from 1 to the number of different pieces, {len(distinct)}")
    if k == len(distinct):
        return same
    from sklearn.cluster import KMeans  # heavy
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the pools are small, and one thread adds in one order
        label = KMeans(k, n_init=STARTS, random_state=seed).fit(pool.double().cpu().numpy()).labels_
    return torch.from_numpy(label).to(pool.device, torch.int64)


class Lego(Matrices):
    """Full experts by their low-rank updates: each cut to a rank, then merged by pieces; all else is averaged.

    Args:
        rank: r of the cut and k of the merge; fewer where a matrix is narrower or has fewer different pieces.
        canonical, seed: see `lego_merge`.
    """

    def __init__(self, rank: int = 8, canonical: bool = False, seed: int = 0):
        if rank < 1:
            raise InputError(f"rank is {rank} but must be at least 1")
        self.rank, self.canonical, self.seed = rank, canonical, seed

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: None) -> Float[Tensor, "O I"]:
        cut = [thin_svd(each, min(self.rank, *each.shape)) for each in tau]
        loras = [(s.sqrt()[:, None] * v, u * s.sqrt(), 1.0) for u, s, v in cut]
        pieces = len(units(loras)[0].unique(dim=0))
        k = min(self.rank, pieces)
        merged = lego_merge(loras, k, canonical=self.canonical, seed=self.seed)
        return merged.scale * merged.b @ merged.a


MERGER = Lego
