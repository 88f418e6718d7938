"""How far the changes of several experts agree: cosines of task vectors, and signs, tensor by tensor.

Read a piece at a time, as a merge is: models larger than memory can be compared too.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lib.core.merge.vectors import TaskVectors


def task_cosines(vectors: TaskVectors) -> dict[str, Float[Tensor, "n n"]]:
    """The cosine of every pair of task vectors in each tensor, in float64; NaN where one of them is zero there."""
    return {name: _cosine(gram) for name, gram in task_grams(vectors).items()}


def total_cosine(vectors: TaskVectors) -> Float[Tensor, "n n"]:
    """The cosine of every pair of whole task vectors."""
    return _cosine(sum(task_grams(vectors).values()))


def task_grams(vectors: TaskVectors) -> dict[str, Float[Tensor, "n n"]]:
    """<tau_i, tau_j> in each tensor, in float64."""
    grams = {name: torch.zeros(vectors.n, vectors.n, dtype=torch.float64) for name in vectors.names}
    for place, tau in vectors.pieces():
        tau = tau.double().cpu()
        grams[place.name] += tau @ tau.T
    return grams


def sign_conflict(vectors: TaskVectors) -> dict[str, float]:
    """Of the weights of each tensor that more than one expert changed, the share on whose sign they do not agree.

    Of n independent, even signs that is 1 - 2^(1 - n): a half for two experts. NaN where there is no such weight.
    """
    counts = {name: [0, 0] for name in vectors.names}
    for place, tau in vectors.pieces():
        several = (tau != 0).sum(0) > 1
        apart = (tau > 0).any(0) & (tau < 0).any(0)
        counts[place.name][0] += int(apart.sum())
        counts[place.name][1] += int(several.sum())
    return {name: apart / several if several else float("nan") for name, (apart, several) in counts.items()}


def _cosine(gram: Tensor) -> Tensor:
    length = gram.diagonal().sqrt()
    return gram / (length[:, None] * length)
