"""Singular values of sampled matrices: of the weights, of one step's change to them, and of their gradients."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from workbench.lib.measures.spectra import low_rank_singular_values, singular_values
from workbench.live.probes.find import LowRank, Matrix
from workbench.live.records import SPECTRUM


class SpectrumProbe:
    """Spectra of the sampled matrices.

    The change of a weight is what the optimizer step did to it, weight decay included: `remember` before that step
    keeps a copy of the sampled matrices, `take` after it compares. A gradient is taken as it stands in `.grad`, that is
    as the optimizer used it (clipped, where there is clipping).

    Args:
        matrices: see `find.matrices`.
    """

    def __init__(self, matrices: Sequence[Matrix | LowRank]):
        self.dense = [matrix for matrix in matrices if isinstance(matrix, Matrix)]
        self.low_rank = [matrix for matrix in matrices if isinstance(matrix, LowRank)]
        self._before: dict[str, tuple[Tensor, ...]] = {}

    def remember(self) -> None:
        """Keep the weights as they are now, until the next `take`."""
        self._before = {m.name: (m.pick(m.parameter.detach()).clone(),) for m in self.dense}
        self._before |= {m.name: (m.a.detach().clone(), m.b.detach().clone()) for m in self.low_rank}

    @torch.no_grad()
    def take(self, seed: int) -> dict[str, np.ndarray]:
        """Descending singular values float32 (n,) of weight, update and gradient, by their `records.SPECTRUM`.

        An update that is not remembered and a gradient that is not there are left out. Of a matrix too large for its
        whole spectrum the largest values, from a random start that `seed` gives.
        """
        wanted: dict[str, Tensor] = {}
        for matrix in self.dense:
            weight = matrix.pick(matrix.parameter.detach())
            wanted[SPECTRUM.name("weight", matrix.name)] = weight
            if matrix.name in self._before:
                wanted[SPECTRUM.name("update", matrix.name)] = weight - self._before[matrix.name][0]
            if matrix.parameter.grad is not None:
                wanted[SPECTRUM.name("gradient", matrix.name)] = matrix.pick(matrix.parameter.grad)
        found = _spectra(wanted, torch.Generator().manual_seed(seed))
        for matrix in self.low_rank:
            a, b = matrix.a.flatten(1), matrix.b.flatten(1)
            found[SPECTRUM.name("weight", matrix.name)] = _float32(low_rank_singular_values(b, a, matrix.scale).values)
            if matrix.name in self._before:
                old_a, old_b = (part.flatten(1) for part in self._before[matrix.name])
                change = low_rank_singular_values(torch.cat([b, old_b], 1), torch.cat([a, -old_a]), matrix.scale)
                found[SPECTRUM.name("update", matrix.name)] = _float32(change.values)
        self._before = {}
        return found


def _spectra(wanted: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, np.ndarray]:
    """The spectra of many matrices, those of one shape together: LAPACK is called once for each shape."""
    shapes: dict[tuple, list[str]] = {}
    for name, matrix in wanted.items():
        shapes.setdefault((tuple(matrix.shape), matrix.device), []).append(name)
    found = {}
    for names in shapes.values():
        values = singular_values(torch.stack([wanted[name].float() for name in names]), generator=generator).values
        found |= {name: _float32(row) for name, row in zip(names, values, strict=True)}
    return {name: found[name] for name in wanted}


def _float32(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float32)
