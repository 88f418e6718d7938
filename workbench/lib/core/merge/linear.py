"""Sums of task vectors: the average, and task arithmetic."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.merge.merger import Pieces
from workbench.lib.core.merge.vectors import Place, TaskVectors


def weights_of(given: Sequence[float] | None, vectors: TaskVectors) -> list[float]:
    """One weight an expert, ones where none are given.

    Raises:
        InputError: there are more or fewer weights than experts.
    """
    if given is not None and len(given) != vectors.n:
        raise InputError(f"weights has {len(given)} numbers but must have one for each of {vectors.n} experts")
    return [1.0] * vectors.n if given is None else [float(weight) for weight in given]


class TaskArithmetic(Pieces):
    """base + scale * sum of weight_i * tau_i (Ilharco et al. 2022, arXiv:2212.04089).

    Args:
        scale: lambda; 1 with `divide="weights"`, and 0.3 where sums of many tasks are known to stay near the base.
        weights: one number an expert; ones by default.
        divide: by the sum of the weights, or not: weights of [1, 1] then give once or twice the mean.
    """

    def __init__(
        self, scale: float = 1.0, weights: Sequence[float] | None = None, divide: Literal["weights"] | None = None
    ):
        self.scale, self.weights, self.divide = scale, weights, divide

    def facts(self, vectors: TaskVectors) -> list[float]:
        """The factor of each task vector."""
        weights = weights_of(self.weights, vectors)
        total = sum(weights) if self.divide == "weights" else 1.0
        if abs(total) <= 1e-12 * sum(map(abs, weights)):
            raise InputError(f"weights {weights} have the sum 0, or next to it, but are to divide by it")
        return [self.scale * weight / total for weight in weights]

    def piece(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        return torch.tensor(facts, dtype=tau.dtype, device=tau.device) @ tau


class Average(TaskArithmetic):
    """The mean of the experts, or the mean with weights: of [2, 1] the first counts twice as much as the second."""

    def __init__(self, weights: Sequence[float] | None = None):
        super().__init__(1.0, weights, "weights")
