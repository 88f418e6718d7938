"""RegMean: the matrix that answers each expert's inputs most like the expert."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.merge.calibration import gram_matrices, of_experts
from workbench.lib.core.merge.merger import Matrices
from workbench.lib.core.merge.vectors import TaskVectors


class RegMean(Matrices):
    """(sum of G_i)^-1 sum of G_i W_i^T for every linear layer (Jin et al. 2022, arXiv:2212.09849); others are averaged.

    G_i = X^T X / N of the inputs of the layer in expert i. It is the minimum of sum_i |X_i (W - W_i)^T|^2.

    Args:
        grams: of each expert, the G of its linear layers by their names, (I, I); "0" is of "0.weight".
        batches: in their place, of each expert, inputs to measure them on (`gram_matrices`); it must be a module.
        off_diagonal: factor on what is not on the diagonal of G, 0 to 1; 1 is the minimum above, the paper takes less.
        ridge: what is added to the diagonal of each G, in parts of the mean of all diagonals; it pulls towards the
            average, so that directions that no input has are averaged. At 0 a sum without an inverse is an error.
    """

    def __init__(
        self,
        grams: Sequence[Any] | None = None,
        batches: Sequence[Any] | None = None,
        off_diagonal: float = 0.95,
        ridge: float = 1e-6,
    ):
        if not 0 <= off_diagonal <= 1:
            raise InputError(f"off_diagonal is {off_diagonal} but must be from 0 to 1")
        if ridge < 0:
            raise InputError(f"ridge is {ridge} but must be at least 0")
        self.grams, self.batches, self.off_diagonal, self.ridge = grams, batches, off_diagonal, ridge

    def facts(self, vectors: TaskVectors) -> dict[str, Float[Tensor, "n I I"]]:
        """The G of all experts by the name of the weight."""
        found = of_experts(vectors, self.grams, self.batches, "grams", gram_matrices)
        for i, own in enumerate(found):
            if not isinstance(own, Mapping) or not all(isinstance(gram, Tensor) for gram in own.values()):
                raise InputError(f"grams[{i}] must hold tensors by the names of layers")
        names = {f"{layer}.weight" if layer else "weight": layer for layer in found[0]}
        grams = {}
        for name, layer in names.items():
            if name not in vectors.shapes:
                continue
            width = vectors.shapes[name][-1]
            for i, own in enumerate(found):
                if layer not in own or own[layer].shape != (width, width):
                    raise InputError(f"grams[{i}] has no {layer!r} of shape {(width, width)}")
                if not own[layer].isfinite().all() or (own[layer].diagonal() < 0).any():
                    raise InputError(f"grams[{i}] has {layer!r} with values that are not finite, or no sum of squares")
            grams[name] = torch.stack([own[layer].double() for own in found])
        if not grams:
            raise InputError("grams are of no layer whose weight is merged")
        return grams

    def merges(self, name: str, vectors: TaskVectors, facts: Any) -> bool:
        return name in facts

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: Any) -> Float[Tensor, "O I"]:
        grams = facts[name].to(tau.device)
        if self.ridge > 0 and not grams.any():  # no input at all has been there
            return tau.mean(0)
        eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        grams = grams * (self.off_diagonal + (1 - self.off_diagonal) * eye)
        grams = grams + self.ridge * grams.diagonal(dim1=1, dim2=2).mean() * eye
        right = (grams @ tau.double().mT).sum(0)
        try:
            return torch.linalg.solve(grams.sum(0), right).T.to(tau.dtype)
        except torch.linalg.LinAlgError as error:
            raise InputError(f"the grams of {name} have a sum without an inverse; ridge must be above 0") from error
