"""Singular values of sampled matrices: of the weights, of one step's change to them, and of their gradients."""

import weakref
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from workbench.lib.measures.spectra import low_rank_singular_values, singular_values
from workbench.live.probes.find import LowRank, Matrix
from workbench.live.records import SPECTRUM


class SpectrumProbe:
    """Spectra of the sampled matrices.

    The change of a weight is what the optimizer step did to it, weight decay included: `remember` before that step
    keeps a copy of the sampled matrices, `take` after it compares. A gradient is taken as the optimizer used it
    (clipped, where there is clipping): when an optimizer of torch steps, else as it stands in `.grad`.

    Args:
        matrices: see `find.matrices`.
    """

    def __init__(self, matrices: Sequence[Matrix | LowRank]):
        self.dense = [matrix for matrix in matrices if isinstance(matrix, Matrix)]
        self.low_rank = [matrix for matrix in matrices if isinstance(matrix, LowRank)]
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._armed = False
        probe = weakref.ref(self)  # optimizers outlive a probe that nobody closes
        self.close = register_optimizer_step_pre_hook(lambda *call: (seen := probe()) and seen._stepping(*call)).remove

    def gone(self, model: nn.Module) -> list[str]:
        """Names of the matrices whose parameters are not in the model any more; they are measured no more."""
        there = {id(parameter) for parameter in model.parameters()}
        left = {m.name for m in self.dense if id(m.parameter) not in there}
        left |= {m.name for m in self.low_rank if not there.issuperset(map(id, m.parameters))}
        self.dense = [matrix for matrix in self.dense if matrix.name not in left]
        self.low_rank = [matrix for matrix in self.low_rank if matrix.name not in left]
        return sorted(left)

    @torch.no_grad()
    def _stepping(self, optimizer: torch.optim.Optimizer, inputs: tuple, keywords: dict) -> None:
        """Before any optimizer of torch steps, and before anything sets gradients to zero after that."""
        if not self._armed or torch.compiler.is_compiling():
            return
        used = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for matrix in self.dense:
            if id(matrix.parameter) in used and matrix.parameter.grad is not None:
                self._gradients[matrix.name] = matrix.pick(matrix.parameter.grad).clone()

    def remember(self) -> None:
        """Keep the weights as they are now, until the next `take`."""
        self._before = {m.name: (m.pick(m.parameter.detach()).clone(),) for m in self.dense}
        self._before |= {m.name: tuple(factor.clone() for factor in m.factors()) for m in self.low_rank}
        self._gradients, self._armed = {}, True

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
            gradient = self._gradients.get(matrix.name)
            if gradient is None and matrix.parameter.grad is not None:
                gradient = matrix.pick(matrix.parameter.grad)
            if gradient is not None:
                wanted[SPECTRUM.name("gradient", matrix.name)] = gradient
        found = spectra(wanted, torch.Generator().manual_seed(seed))
        for matrix in self.low_rank:
            a, b = matrix.factors()
            found[SPECTRUM.name("weight", matrix.name)] = _float32(low_rank_singular_values(b, a, matrix.scale).values)
            if matrix.name in self._before:
                old_a, old_b = self._before[matrix.name]
                change = low_rank_singular_values(torch.cat([b, old_b], 1), torch.cat([a, -old_a]), matrix.scale)
                found[SPECTRUM.name("update", matrix.name)] = _float32(change.values)
        self._before, self._gradients, self._armed = {}, {}, False
        return found


def spectra(wanted: Mapping[Hashable, Tensor], generator: torch.Generator) -> dict[Hashable, np.ndarray]:
    """The spectra of many matrices, those of one shape together: LAPACK is called once for each shape."""
    shapes: dict[tuple, list[Hashable]] = {}
    for name, matrix in wanted.items():
        shapes.setdefault((tuple(matrix.shape), matrix.device), []).append(name)
    found = {}
    for names in shapes.values():
        values = singular_values(torch.stack([wanted[name].float() for name in names]), generator=generator).values
        found |= {name: _float32(row) for name, row in zip(names, values, strict=True)}
    return {name: found[name] for name in wanted}


def _float32(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float32)
