"""Which experts of one layer are chosen together, for K >= 2 experts per token.

N_ij counts the tokens that have both i and j; N_ii = n_i. All matrices are (..., E, E). Under a fixed K the choice of
one expert uses up a slot, so the null of lift is NOT 1 but E (K - 1) / (K (E - 1)): read `lift_corrected`, or, for
uneven loads, the z-scores of `curveball`. For K = 1 nothing can occur together: those matrices are NaN off the diagonal
or all over, and `coactivation` says why.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64, Num
from torch import Tensor

from workbench.errors import InputError, unknown


class TokenCount(NamedTuple):
    """Tokens and (mean) experts per token behind a co-activation matrix."""

    n_tokens: Float64[Tensor, "*batch"]
    top_k: Float64[Tensor, "*batch"]


class Pair(NamedTuple):
    """Two experts and the value of their cell."""

    first: int
    second: int
    value: float


@dataclass(frozen=True)
class CoactivationMatrix:
    """One kind of co-activation matrix of one layer.

    Attributes:
        values: (E, E).
        null: value of an off-diagonal cell if the same amount of co-activation were spread evenly over all pairs.
        undefined_reason: why all values are NaN, else None.
    """

    values: Float64[Tensor, "experts experts"]
    null: float
    undefined_reason: str | None


def selection_mask(indices: Int[Tensor, "tokens k"], n_experts: int) -> Bool[Tensor, "tokens experts"]:
    """(N, E) mask of the experts listed in (N, K) indices."""
    mask = torch.zeros(indices.shape[0], n_experts, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices.long(), True)


def coactivation_counts(
    selection: Bool[Tensor, "tokens experts"] | Float[Tensor, "tokens experts"],
) -> Int64[Tensor, "experts experts"] | Float64[Tensor, "experts experts"]:
    """N_ij = sum_t M_ti M_tj. A mask M gives int64 counts; combine weights (the weighted variant) give float64 sums."""
    return pair_sums(selection, selection)


def pair_sums(
    left: Bool[Tensor, "tokens left"] | Float[Tensor, "tokens left"],
    right: Bool[Tensor, "tokens right"] | Float[Tensor, "tokens right"],
) -> Int64[Tensor, "left right"] | Float64[Tensor, "left right"]:
    """sum_t left_ti right_tj: exact int64 for masks, float64 for weights."""
    if left.dtype != torch.bool:
        return left.double().T @ right.double()
    # float32 holds every integer up to 2^24, and its matmul is the fastest that is exact
    dtype = torch.float32 if left.shape[0] < 2**24 else torch.float64
    return (left.to(dtype).T @ right.to(dtype)).long()


def tokens_and_k(counts: Num[Tensor, "*batch experts experts"]) -> TokenCount:
    """N and K from the counts of a FIXED-K router: trace = N K and sum = N K^2."""
    counts = counts.double()
    trace, total = _trace(counts), counts.sum((-2, -1))
    return TokenCount(trace.square() / total, total / trace)


def conditional(counts: Num[Tensor, "*batch experts experts"]) -> Float64[Tensor, "*batch experts experts"]:
    """A_ij = N_ij / N_ii = P(j active | i active); diagonal 1, rows of unused experts NaN.

    Not symmetric; off-diagonal rows sum to K - 1 for fixed K. OLMoE's co-activation (Muennighoff et al. 2024).
    """
    counts = counts.double()
    return counts / _loads(counts).unsqueeze(-1)


def joint_share(
    counts: Num[Tensor, "*batch experts experts"], n_tokens: Num[Tensor, "*#batch"] | int | None = None
) -> Float64[Tensor, "*batch experts experts"]:
    """N_ij / N, the share of tokens with both; 0 .. 1. `n_tokens` may be left out for fixed K."""
    return counts.double() / _tokens(counts, n_tokens)


def jaccard(counts: Num[Tensor, "*batch experts experts"]) -> Float64[Tensor, "*batch experts experts"]:
    """N_ij / (N_ii + N_jj - N_ij): overlap of the two token sets; 0 .. 1, diagonal 1, NaN if both are empty."""
    counts = counts.double()
    loads = _loads(counts)
    return counts / (loads.unsqueeze(-1) + loads.unsqueeze(-2) - counts)


def lift(
    counts: Num[Tensor, "*batch experts experts"], n_tokens: Num[Tensor, "*#batch"] | int | None = None
) -> Float64[Tensor, "*batch experts experts"]:
    """N N_ij / (N_ii N_jj) (Brin et al. 1997); 0 .. N / max(N_ii, N_jj); null `lift_null`, not 1; diagonal N / N_ii."""
    loads = _loads(counts.double())
    return counts.double() * _tokens(counts, n_tokens) / (loads.unsqueeze(-1) * loads.unsqueeze(-2))


def lift_null(n_experts: int, top_k: int) -> float:
    """E (K - 1) / (K (E - 1)): lift of every pair under balanced random routing with fixed K; NaN for one expert."""
    if not 1 <= top_k <= n_experts:
        raise InputError(f"top_k is {top_k} but must be between 1 and n_experts = {n_experts}")
    return n_experts * (top_k - 1) / (top_k * (n_experts - 1)) if n_experts > 1 else float("nan")


def lift_corrected(
    counts: Num[Tensor, "*batch experts experts"], n_tokens: Num[Tensor, "*#batch"] | int | None = None
) -> Float64[Tensor, "*batch experts experts"]:
    """lift / lift_0, null 1; NaN on the diagonal (an expert with itself has no null) and for K = 1.

    lift_0 spreads the off-diagonal sum over all pairs of equally loaded experts: `lift_null` for fixed K, and its
    counterpart for a variable number of experts per token.
    """
    null = _nulls(counts.double(), _tokens(counts, n_tokens))["lift"]
    values = lift(counts, n_tokens) / null
    eye = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return values.masked_fill(eye, torch.nan)


def npmi(
    counts: Num[Tensor, "*batch experts experts"], n_tokens: Num[Tensor, "*#batch"] | int | None = None
) -> Float64[Tensor, "*batch experts experts"]:
    """ln(lift) / -ln(N_ij / N), normalised pointwise mutual information (Bouma 2009): -1 never together, 1 always.

    NaN for unused experts and where both are in every token.
    """
    ratio, share = lift(counts, n_tokens), joint_share(counts, n_tokens)
    value = ratio.log() / -share.log()
    return value.where(ratio != 0, -1.0)  # the limit of -inf / inf; NaN ratios stay NaN


def effective_partners(counts: Num[Tensor, "*batch experts experts"]) -> Float64[Tensor, "*batch experts"]:
    """1 / sum_j q_ij^2 over j != i with q_ij = N_ij / sum_l N_il: how many partners an expert has, in effect.

    K - 1 with fixed partners, E - 1 if it meets all others equally often; NaN for an expert that meets none. Uneven
    loads alone lower it: compare with the same of `coactivation_scores(...).mean`.
    """
    pairs = counts.double() - counts.double().diagonal(dim1=-2, dim2=-1).diag_embed()
    return 1 / (pairs / pairs.sum(-1, keepdim=True)).square().sum(-1)


KINDS = {
    "conditional": lambda counts, n_tokens: conditional(counts),
    "joint": joint_share,
    "jaccard": lambda counts, n_tokens: jaccard(counts),
    "lift": lift,
    "lift_corrected": lift_corrected,
    "npmi": npmi,
}


def coactivation(
    counts: Num[Tensor, "experts experts"], kind: str = "lift_corrected", n_tokens: int | None = None
) -> CoactivationMatrix:
    """One kind of matrix ("conditional", "joint", "jaccard", "lift", "lift_corrected", "npmi") with its null value.

    Args:
        counts: N_ij of one layer.
        kind: which matrix.
        n_tokens: N; may be left out for a fixed number of experts per token.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    counts = counts.double()
    trace = _trace(counts)
    if not trace > 0:
        reason = "undefined: no tokens in this window"
    elif not counts.sum() > trace:
        reason = "undefined for K = 1: one expert per token cannot occur together with another"
    else:
        null = float(_nulls(counts, _tokens(counts, n_tokens))[kind])
        return CoactivationMatrix(KINDS[kind](counts, n_tokens), null, None)
    return CoactivationMatrix(torch.full_like(counts, torch.nan), float("nan"), reason)


def cluster_order(similarity: Float[Tensor, "experts experts"]) -> Int64[Tensor, " experts"]:
    """Order of the experts that puts similar ones side by side: average linkage on 1 / (1 + similarity).

    Takes any non-negative similarity, such as lift; NaN cells count as the mean, experts without any value come last.
    Deterministic: compute it once and keep it while the matrix moves.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # only needed to order a picture
    from scipy.spatial.distance import squareform

    if (similarity < 0).any():
        raise InputError(f"similarity holds {float(similarity.min()):.3g} but must not be negative")
    values = similarity.double().clone()
    values.fill_diagonal_(torch.nan)
    known = ~values.isnan().all(-1)
    used, unused = known.nonzero().flatten(), (~known).nonzero().flatten()
    if used.numel() < 3:  # nothing to order
        return torch.cat([used, unused])
    values = values[used][:, used]
    values = torch.where(values.isnan(), values.nanmean(), values)
    distance = 1 / (1 + (values + values.T) / 2)
    distance.fill_diagonal_(0)
    tree = linkage(squareform(distance.cpu().numpy(), checks=False), "average", optimal_ordering=True)
    return torch.cat([used[torch.from_numpy(leaves_list(tree)).long().to(used.device)], unused])


def top_pairs(matrix: Float[Tensor, "experts experts"], n: int = 10) -> list[Pair]:
    """The n largest off-diagonal cells, largest first, without NaN; each pair once where the matrix is symmetric."""
    n_experts = matrix.shape[-1]
    symmetric = torch.allclose(matrix, matrix.T, equal_nan=True)
    first, second = torch.triu_indices(n_experts, n_experts, 1)
    if not symmetric:
        first, second = torch.cat([first, second]), torch.cat([second, first])
    values = matrix[first, second].double().cpu()
    order = values.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:n]
    rows = zip(first[order].tolist(), second[order].tolist(), values[order].tolist(), strict=True)
    return [Pair(i, j, value) for i, j, value in rows if value == value]


def _loads(counts: Tensor) -> Float64[Tensor, "*batch experts"]:
    return counts.diagonal(dim1=-2, dim2=-1)


def _trace(counts: Tensor) -> Float64[Tensor, "*batch"]:
    return _loads(counts).sum(-1)


def _tokens(counts: Tensor, n_tokens: Tensor | int | None) -> Float64[Tensor, "*batch 1 1"]:
    """N as a float64 tensor that broadcasts against the matrices."""
    if n_tokens is None:
        return tokens_and_k(counts).n_tokens[..., None, None]
    return torch.as_tensor(n_tokens, device=counts.device).double()[..., None, None]


def _nulls(counts: Float64[Tensor, "*batch experts experts"], n_tokens: Tensor) -> dict[str, Tensor]:
    """The value of every off-diagonal cell, by kind, with the observed co-activation spread evenly over all pairs."""
    n_experts = counts.shape[-1]
    trace = _trace(counts)[..., None, None]
    pairs = counts.sum((-2, -1), keepdim=True) - trace
    share = pairs / (n_tokens * n_experts * (n_experts - 1))
    given = pairs / (trace * (n_experts - 1))
    ratio = given / (trace / (n_tokens * n_experts))
    one = torch.ones_like(share).where(pairs > 0, torch.nan)
    return {
        "conditional": given,
        "joint": share,
        "jaccard": given / (2 - given),
        "lift": ratio.where(pairs > 0, torch.nan),
        "lift_corrected": one,
        "npmi": ratio.log() / -share.log(),
    }
