"""Merges of trimmed task vectors: TIES, and DARE, which drops by chance.

Conventions differ between libraries, and each has a name here; `conventions` beside this file says who has which.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.trim_elect_merge import magnitudes, trim_elect_merge
from workbench.lib.core.merge.linear import weights_of
from workbench.lib.core.merge.merger import Pieces
from workbench.lib.core.merge.vectors import Place, TaskVectors

LEAST = 2.0**-149
"""The least positive float32: as a threshold, it takes out zeros and nothing else."""


def check_density(density: float) -> None:
    """Raise `InputError` for a density at which nothing would be left, or more than there is."""
    if not 0 < density <= 1:
        raise InputError(f"density is {density} but must be above 0 and at most 1")


def kept_count(density: float, size: int, least: int) -> int:
    """How many of `size` weights a density keeps: rounded down, but `least` of them at the least."""
    return min(size, max(least, int(density * size)))


def threshold(vectors: TaskVectors, expert: int, names: Sequence[str], k: int) -> float:
    """The k-th largest magnitude of one task vector of all weights of these tensors, exactly; 0 of none.

    Raises:
        InputError: a weight is NaN.
    """
    if not any(vectors.sizes[name] for name in names):
        return 0.0
    return magnitudes_at(vectors, expert, names, lambda size: [size - k])[0]


def magnitudes_at(
    vectors: TaskVectors, expert: int, names: Sequence[str], ranks: Callable[[int], Sequence[int]]
) -> list[float]:
    """The magnitudes of one task vector at `ranks(number of weights)`, 0 for the smallest; see `threshold`."""
    own, base = vectors.operands(expert, names)
    try:
        return magnitudes(own, ranks, base)
    except InputError:
        for _ in vectors.pieces(names):  # says which
            pass
        raise


class Ties(Pieces):
    """Trim, elect a sign, merge what agrees with it (Yadav et al. 2023, arXiv:2306.01708).

    Thresholds are exact: of each expert the largest weights stay, and more than asked for only where some are equal to
    the last of them. So all of a task vector that is the same everywhere stays.

    Args:
        density: the share of each task vector that stays, above 0 and at most 1 (nothing is trimmed).
        weights: one number an expert; ones by default.
        scale: lambda, of the merged update.
        scope: whether the share is of all weights together, or of each tensor.
        elect: the sign of the sum of what is left ("values"), of the sum with weights ("weighted"), the sign that more
            experts have ("signs"), or None: all that is left is merged.
        tie: the sign where that sum is 0: plus, or the sign elected by more of the weights of all tensors (minus
            where none is).
        divide: the sum by how many agree ("count"), by the sum of their weights ("weights"), or not.
        least: of how many weights at least stay where density x size is below 1.
    """

    def __init__(
        self,
        density: float = 0.2,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        scope: Literal["global", "tensor"] = "global",
        elect: Literal["values", "weighted", "signs"] | None = "values",
        tie: Literal["plus", "majority"] = "plus",
        divide: Literal["count", "weights"] | None = "count",
        least: Literal[0, 1] = 0,
    ):
        check_density(density)
        self.density, self.weights, self.scale, self.scope = density, weights, scale, scope
        self.elect, self.tie, self.divide, self.least = elect, tie, divide, least

    def facts(self, vectors: TaskVectors) -> tuple[list[float], dict[str, list[float]], bool]:
        """Weights, thresholds (n,) of each tensor, and whether a tie elects minus."""
        weights = weights_of(self.weights, vectors)
        thresholds = self._thresholds(vectors)
        minus = self.tie == "majority" and self.elect is not None and self._majority(vectors, weights, thresholds) <= 0
        return weights, thresholds, minus

    def piece(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        weights, thresholds, minus = facts
        return self.merged(tau, weights, thresholds[place.name], minus)

    def merged(self, tau: Tensor, weights: list[float], thresholds: list[float], minus: bool = False) -> Tensor:
        """The update of (n, ...) task vectors, trimmed at the thresholds (n,)."""
        tau = -tau if minus else tau  # plus is what the operator elects at a tie
        elect = self.elect
        if elect == "signs":
            vote = sum(row.sign() * (row.abs() >= least) for row, least in zip(tau, thresholds, strict=True))
            tau = torch.where(torch.where(vote < 0, tau < 0, tau > 0), tau, 0)
            elect, thresholds = None, [max(threshold, LEAST) for threshold in thresholds]
        update = trim_elect_merge(
            tau, weights=weights, thresholds=thresholds, elect=elect, divide=self.divide, scale=self.scale
        )
        return -update if minus else update

    def _thresholds(self, vectors: TaskVectors) -> dict[str, list[float]]:
        if self.density == 1:
            return dict.fromkeys(vectors.names, [0.0] * vectors.n)

        def of(names: Sequence[str]) -> list[float]:
            k = kept_count(self.density, sum(vectors.sizes[name] for name in names), self.least)
            return [threshold(vectors, i, names, k) for i in range(vectors.n)]

        if self.scope == "global":
            return dict.fromkeys(vectors.names, of(vectors.names))
        return {name: of([name]) for name in vectors.names if vectors.sizes[name]}

    def _majority(self, vectors: TaskVectors, weights: list[float], thresholds: dict[str, list[float]]) -> float:
        """By how many more weights plus is elected than minus."""
        total = 0.0
        for place, tau in vectors.pieces():
            vote = torch.zeros_like(tau[0])
            for row, weight, least in zip(tau, weights, thresholds[place.name], strict=True):
                kept = torch.where(row.abs() >= least, row, 0)
                vote += {"values": kept, "weighted": weight * kept, "signs": kept.sign()}[self.elect]
            total += float(vote.sign().sum())
        return total


class Dare(Pieces):
    """Drop weights by chance and enlarge the others (Yu et al. 2023, arXiv:2311.03099), then task arithmetic or TIES.

    One seed drops the same weights, in memory and from files.

    Args:
        density: the chance of each weight to stay, 1 - p in the paper; above 0 and at most 1.
        weights, scale, elect, divide: as of `Ties`; by default the sum with weights.
        rescale: what stays by 1 / density, so that the mean over draws is the task vector; to the tensor's sum of
            magnitudes before the drop ("l1"); or not.
        seed: of the draws.
    """

    def __init__(
        self,
        density: float = 0.5,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        rescale: Literal["density", "l1"] | None = "density",
        elect: Literal["values", "weighted"] | None = None,
        divide: Literal["count", "weights"] | None = None,
        seed: int = 0,
    ):
        check_density(density)
        self.density, self.weights, self.scale, self.rescale = density, weights, scale, rescale
        self.elect, self.divide, self.seed = elect, divide, seed

    def facts(self, vectors: TaskVectors) -> tuple[list[float], dict[str, list[float]]]:
        """Weights, and the factor of what stays of each expert in each tensor."""
        factors = dict.fromkeys(vectors.names, [1 / self.density if self.rescale == "density" else 1.0] * vectors.n)
        if self.rescale == "l1" and self.density < 1:
            factors = {name: self._factors(vectors, name) for name in vectors.names}
        return weights_of(self.weights, vectors), factors

    def piece(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        weights, factors = facts
        tau = tau * self.kept(tau, place) * tau.new_tensor(factors[place.name])[:, None]
        return trim_elect_merge(tau, weights=weights, elect=self.elect, divide=self.divide, scale=self.scale)

    def kept(self, tau: Float[Tensor, "n p"], place: Place) -> Float[Tensor, "n p"]:
        """1 where a weight stays, else 0; the same at each call."""
        if self.density == 1:
            return torch.ones_like(tau)
        text = f"{self.seed} {place.name} {place.start}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        draws = torch.rand(tau.shape, generator=torch.Generator().manual_seed(seed))
        return (draws < self.density).to(tau.device, tau.dtype)

    def _factors(self, vectors: TaskVectors, name: str) -> list[float]:
        before, after = torch.zeros(2, vectors.n, dtype=torch.float64)
        for place, tau in vectors.pieces([name]):
            before += tau.abs().sum(1, dtype=torch.float64).cpu()
            after += (tau * self.kept(tau, place)).abs().sum(1, dtype=torch.float64).cpu()
        return torch.where(after > 0, before / after.clamp(min=LEAST), 1).tolist()


class DareTies(Dare):
    """DARE, and then the signs and the mean of TIES, without a trim of its own."""

    def __init__(
        self,
        density: float = 0.5,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        rescale: Literal["density", "l1"] | None = "density",
        elect: Literal["values", "weighted"] = "values",
        divide: Literal["count", "weights"] | None = "count",
        seed: int = 0,
    ):
        super().__init__(density, weights, scale, rescale, elect, divide, seed)
