"""The meaning of `pcb_merge`: the straightforward form in tensors (n, P), the pairs of models one after the other.

Its parts are functions, of which `lib.merging.pcb_merging` makes the other forms of the method, too.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError

Vectors = Float[Tensor, "models params"]


def pcb_merge(
    experts: Sequence[Tensor], base: Tensor | None, clip: tuple[int, int], drop: int, scale: Sequence[float]
) -> Tensor:
    """(P,) merged, from n experts and base (P,)."""
    wide = torch.promote_types(experts[0].dtype, torch.float32)
    tau = torch.stack([x.to(wide) if base is None else x.to(wide) - base.to(wide) for x in experts])
    if bool(tau.isnan().any()):
        raise InputError("experts - base has NaN but must have none")
    clipped, place = placed(tau, *ends(tau, clip))
    merged = weighted(clipped, shares(scores(place), drop), tau.new_tensor(scale))
    return (merged if base is None else base.to(wide) + merged).to(experts[0].dtype)


def bounds(
    pieces: Iterable[Float[Tensor, "models piece"]], low: Sequence[float], high: Sequence[float], drop: int
) -> tuple[list[float], list[float]]:
    """The score of rank `drop` and the largest of each model, (n,). In memory are the scores of all parameters."""
    found = torch.cat([scores(placed(tau, *(tau.new_tensor(x)[:, None] for x in (low, high)))[1]) for tau in pieces], 1)
    return found.kthvalue(drop + 1, dim=1).values.tolist(), found.amax(1).tolist()


def piece(
    tau: Float[Tensor, "models piece"],
    low: Sequence[float],
    high: Sequence[float],
    least: Sequence[float],
    most: Sequence[float],
    scale: Sequence[float],
) -> Float[Tensor, " piece"]:
    """The merged difference of some parameters, from what `bounds` says of all."""
    low, high, least, most, scale = (tau.new_tensor(x)[:, None] for x in (low, high, least, most, scale))
    clipped, place = placed(tau, low, high)
    return weighted(clipped, between(scores(place), least, most), scale[:, 0])


def ends(tau: Vectors, clip: Sequence[int]) -> tuple[Float[Tensor, "models 1"], Float[Tensor, "models 1"]]:
    """The magnitudes at two ranks of each row."""
    sizes = tau.abs()
    low, high = (sizes.kthvalue(rank + 1, dim=1, keepdim=True).values for rank in clip)
    for i, four in enumerate(torch.cat([sizes.amin(1, keepdim=True), low, high, sizes.amax(1, keepdim=True)], 1)):
        checked_ends(i, four.tolist())
    return low, high


def checked_ends(model: int, magnitudes: Sequence[float]) -> tuple[float, float]:
    """The second and third of a model's magnitudes at the first rank, at the two of clip, and at the last.

    Raises:
        InputError: they are equal although the first and the last are not, so that clipping leaves nothing to compare;
            or infinite.
    """
    first, low, high, last = magnitudes
    if not high < float("inf"):
        raise InputError(f"experts[{model}] - base has magnitude {high} at the upper rank of clip but must be finite")
    if low == high and first < last:
        raise InputError(
            f"experts[{model}] - base has magnitudes of {first:g} to {last:g} but {low:g} at both ranks of clip, which "
            "would make them all the same; it must clip less"
        )
    return low, high


def placed(tau: Vectors, low: Float[Tensor, "models 1"], high: Float[Tensor, "models 1"]) -> tuple[Vectors, Vectors]:
    """The clipped differences c, and g, where their magnitudes are between low, 0, and high, 1, with the sign of tau.

    g is 0 throughout a row whose magnitudes are all the same.
    """
    sizes, signs = tau.abs().clamp(low, high), tau.sign()
    return signs * sizes, signs * torch.where(high > low, (sizes - low) / torch.where(high > low, high - low, 1), 0)


def scores(place: Vectors) -> Vectors:
    """Of the places of all models, the weight in the own one times the agreement of all."""
    return intra(place) * pairwise_tanh(place)


def intra(place: Vectors) -> Vectors:
    """exp(n (g^2 - 1)): e^-n of the paper's, which is a factor of a row and does not overflow; 0 where g is throughout.

    So a row that says nothing of which of its parameters matter has no say in any form of the method.
    """
    weight = torch.exp(len(place) * (place.square() - 1))
    return torch.where(place.any(1, keepdim=True), weight, 0)


def pairwise_tanh(place: Vectors) -> Vectors:
    """sum over j of tanh(g_i g_j), j = i among them."""
    total = torch.zeros_like(place)
    for other in place:
        total += torch.tanh(place * other)
    return total


def shares(score: Vectors, drop: int) -> Vectors:
    """Where a score stands between that of rank `drop` in its row, 0 as all below it, and the largest, 1."""
    return between(score, score.kthvalue(drop + 1, dim=1, keepdim=True).values, score.amax(1, keepdim=True))


def between(score: Vectors, least: Float[Tensor, "models 1"], most: Float[Tensor, "models 1"]) -> Vectors:
    return torch.where(score > least, (score - least) / torch.where(most > least, most - least, 1), 0)


def weighted(clipped: Vectors, share: Vectors, scale: Float[Tensor, " models"]) -> Float[Tensor, " params"]:
    """sum of scale_i s_i c_i / sum of s_i, and 0 where all s_i are 0."""
    total = share.sum(0)
    summed = (scale[:, None] * share * clipped).sum(0)
    return torch.where(total > 0, summed / torch.where(total > 0, total, 1), 0)
