"""Fisher merging: each weight of each expert counts by how much the expert's answers hang on it."""

from collections.abc import Sequence
from math import frexp, ldexp, sqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.merge.calibration import fisher_diagonal, of_experts
from workbench.lib.core.merge.linear import weights_of
from workbench.lib.core.merge.merger import Pieces
from workbench.lib.core.merge.sources import Source, open_source
from workbench.lib.core.merge.vectors import Place, TaskVectors


class Fisher(Pieces):
    """sum of w_i F_i theta_i / sum of w_i F_i (Matena and Raffel 2021, arXiv:2111.09832).

    Args:
        fishers: the diagonals F_i of each expert: state dicts or safetensors files with every merged name.
        batches: in their place, of each expert, inputs to measure them on (`fisher_diagonal`); it must be a module.
        weights: w, one number an expert; ones by default.
        floor: what is added to every F, above 0: where no expert's answers hang on a weight, it is averaged.
        balance: divide each expert's F by its norm first, so that an unsure expert does not outweigh the others.
        labels, seed: of `fisher_diagonal`.
    """

    def __init__(
        self,
        fishers: Sequence[Any] | None = None,
        batches: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        floor: float = 1e-6,
        balance: bool = False,
        labels: Literal["expected", "sampled"] = "expected",
        seed: int = 0,
    ):
        if floor <= 0:
            raise InputError(f"floor is {floor} but must be above 0")
        self.fishers, self.batches, self.weights = fishers, batches, weights
        self.floor, self.balance, self.labels, self.seed = floor, balance, labels, seed

    def facts(self, vectors: TaskVectors) -> tuple[list[float], list[Source]]:
        """The factor of each expert's F, and where to read F."""
        found = of_experts(
            vectors,
            self.fishers,
            self.batches,
            "fishers",
            lambda model, own: self._measured(model, own, vectors),
        )
        sources = [open_source(given, f"fishers[{i}]") for i, given in enumerate(found)]
        for source in sources:
            _check(source, vectors)
        weights = weights_of(self.weights, vectors)
        if any(weight < 0 for weight in weights) or not any(weights):
            raise InputError(f"weights are {weights} but must not be negative, and not all 0")
        if self.balance:
            weights = [w / (_norm(source, vectors) + self.floor) for w, source in zip(weights, sources, strict=True)]
        most = frexp(max(weights))[1]  # only their ratios matter: by a power of two they are the same, and in range
        return [ldexp(weight, -most) for weight in weights], sources

    def _measured(self, model: nn.Module, batches: Any, vectors: TaskVectors) -> dict[str, Tensor]:
        """The diagonals of the parameters, and 0 for what is merged beside them: buffers are averaged."""
        found, source = fisher_diagonal(model, batches, self.labels, self.seed), open_source(model, "the expert")

        def of(name: str) -> Tensor:
            # a file may have tied weights under another of their names than the module
            own = (found[own] for own in source.alike(vectors.name_in(source, name)) if own in found)
            return next(own, torch.zeros(vectors.shapes[name]))

        return {name: of(name) for name in vectors.names}

    def piece(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        weights, sources = facts
        total, divisor = torch.zeros_like(tau[0]), torch.zeros_like(tau[0])
        for row, weight, source in zip(tau, weights, sources, strict=True):
            share = weight * (_read(source, place).to(row) + self.floor)
            total += share * row
            divisor += share
        return total / divisor


def _check(source: Source, vectors: TaskVectors) -> None:
    wrong = [name for name in vectors.names if source.specs.get(name, (None, None))[0] != vectors.shapes[name]]
    if wrong:
        raise InputError(f"{source.label} has no {', '.join(wrong[:8])} of the base's shape, {len(wrong)} names in all")


def _read(source: Source, place: Place) -> Tensor:
    values = source.read(place.name, place.start, place.stop)
    if not (values.isfinite() & (values >= 0)).all():
        raise InputError(f"{place.name} of {source.label} has values that are negative or not finite")
    return values


def _norm(source: Source, vectors: TaskVectors) -> float:
    squares = (_read(source, place).double().square().sum().item() for place in vectors.places())
    return sqrt(sum(squares))
