"""Genomes of ensembles of paths through layers of operators: encoded, decoded, checked, and their multiplications.

Tensor letters: K paths, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.cells.inverted_residual import (
    InvertedResidual,
    check_dims,
    convolution,
    inverted_residual_macs,
    smaller,
)

SKIP = -1
Kept = tuple[tuple[int, ...], ...]
"""The operators that may be drawn, layer by layer, in ascending order."""


@dataclass(frozen=True)
class PathSpace:
    """The networks that may be found: a stem, L layers of inverted residuals, and a head for each path.

    The operators of a layer are numbered len(expansions) * kernel + expansion; `SKIP`, -1, leaves the layer out, where
    that fits.

    Attributes:
        channels, size: of an input (channels, size) or (channels, size, size).
        widths, strides: of the layers, L each.
        stem, head: width behind the stem's convolution and behind the head's.
        dims: 1 for signals, 2 for images.
    """

    channels: int
    size: int
    n_classes: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (2, 4)
    stem: int = 8
    head: int = 32
    dims: int = 1

    def __post_init__(self):
        check_dims(self.dims)
        if not self.widths or len(self.widths) != len(self.strides):
            raise InputError(
                f"widths has {len(self.widths)} layers but strides has {len(self.strides)}: as many of both"
            )
        total = 1
        for stride in self.strides:
            total *= stride
        if self.size < total:
            raise InputError(f"size is {self.size} but must be at least {total}, the stride of the whole network")

    @property
    def n_layers(self) -> int:
        return len(self.widths)

    @property
    def n_ops(self) -> int:
        """Without the skip."""
        return len(self.kernels) * len(self.expansions)

    def ops(self, layer: int) -> tuple[int, ...]:
        """The operators of a layer, the skip first where there is one."""
        fits = self.strides[layer] == 1 and self.d_in(layer) == self.widths[layer]
        return ((SKIP,) if fits else ()) + tuple(range(self.n_ops))

    @property
    def everything(self) -> Kept:
        """All operators of all layers."""
        return tuple(self.ops(layer) for layer in range(self.n_layers))

    def d_in(self, layer: int) -> int:
        return self.widths[layer - 1] if layer else self.stem

    def sides(self) -> list[int]:
        """The side before each layer and behind the last."""
        sides = [self.size]
        for stride in self.strides:
            sides.append(smaller(sides[-1], stride))
        return sides

    def options(self, layer: int, op: int) -> tuple[int, int, int, int]:
        """Width before and behind, kernel and expansion of an operator."""
        kernel, expansion = divmod(op, len(self.expansions))
        return self.d_in(layer), self.widths[layer], self.kernels[kernel], self.expansions[expansion]

    def build(self, layer: int, op: int) -> nn.Module:
        if op == SKIP:
            return nn.Identity()
        return InvertedResidual(*self.options(layer, op), self.strides[layer], self.dims)

    def macs(self, layer: int, op: int) -> int:
        """Multiplications of an operator for one input."""
        if op == SKIP:
            return 0
        return inverted_residual_macs(*self.options(layer, op), self.sides()[layer], self.strides[layer], self.dims)

    def stem_macs(self) -> int:
        return self.channels * self.stem * 3**self.dims * self.size**self.dims

    def head_macs(self) -> int:
        return self.widths[-1] * self.head * self.sides()[-1] ** self.dims + self.head * self.n_classes

    def build_stem(self) -> nn.Module:
        return nn.Sequential(*convolution(self.channels, self.stem, 3, dims=self.dims), nn.SiLU())


@dataclass(frozen=True)
class EnsembleGenome:
    """K paths of L genes, the first `split` of which are the same in all: what an ensemble is.

    Of a single path the split says nothing about the network; it is L.
    """

    split: int
    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        lengths = {len(path) for path in self.paths}
        if len(lengths) != 1 or not 0 <= self.split <= len(self.paths[0]):
            raise InputError(f"paths has lengths {sorted(lengths)} and split is {self.split}: one length, 0 to it")
        if len({path[: self.split] for path in self.paths}) > 1:
            raise InputError(f"paths differ before the split, {self.split}: {self.paths}")

    @property
    def k(self) -> int:
        return len(self.paths)

    def encode(self) -> list[int]:
        """[s, K, stem, s shared genes, then for each path L - s genes and its final one]: 2 + (s + 1) + K (L + 1 - s).

        Stem and final gene are 0: there is one of each. So the released code writes its networks.
        """
        branches = [gene for path in self.paths for gene in (*path[self.split :], 0)]
        return [self.split, self.k, 0, *self.paths[0][: self.split], *branches]

    @classmethod
    def decode(cls, genes: Sequence[int]) -> "EnsembleGenome":
        """The inverse of `encode`."""
        wrong = InputError(f"genes is {list(genes)} but must be [split, paths, 0, shared ..., (branch ..., 0) each]")
        if len(genes) < 4 or genes[0] < 0 or genes[1] < 1 or genes[2] != 0:
            raise wrong
        split, k, rest = genes[0], genes[1], tuple(genes[3:])
        shared, branches = rest[:split], rest[split:]
        each, left = divmod(len(branches), k)
        if len(shared) < split or left or not each or any(gene != 0 for gene in branches[each - 1 :: each]):
            raise wrong
        return cls(split, tuple(shared + branches[path * each : (path + 1) * each - 1] for path in range(k)))

    def validate(self, space: PathSpace) -> None:
        """Raise `InputError` unless it is a genome of the space."""
        if len(self.paths[0]) != space.n_layers:
            raise InputError(f"paths have {len(self.paths[0])} genes but the space has {space.n_layers} layers")
        for path in self.paths:
            for layer, op in enumerate(path):
                if op not in space.ops(layer):
                    raise InputError(f"gene of layer {layer} is {op} but must be one of {space.ops(layer)}")

    def macs(self, space: PathSpace) -> int:
        """Multiplications of the ensemble for one input: those of the trunk once, and those of every branch."""
        self.validate(space)
        trunk = sum(space.macs(layer, op) for layer, op in enumerate(self.paths[0][: self.split]))
        branches = sum(space.macs(layer, path[layer]) for path in self.paths for layer in range(self.split, len(path)))
        return space.stem_macs() + trunk + branches + self.k * space.head_macs()


def sample_genome(
    kept: Kept, k: int, generator: torch.Generator | None = None, splits: Sequence[int] | None = None
) -> EnsembleGenome:
    """K paths of operators drawn uniformly, and a split drawn from `splits`, by default 0 to L; L for one path."""
    n_layers = len(kept)
    splits = [n_layers] if k == 1 else range(n_layers + 1) if splits is None else splits
    split = splits[int(torch.randint(len(splits), (), generator=generator))]
    shared = tuple(_any(ops, generator) for ops in kept[:split])
    return EnsembleGenome(split, tuple(shared + tuple(_any(ops, generator) for ops in kept[split:]) for _ in range(k)))


def _any(ops: Sequence[int], generator: torch.Generator | None) -> int:
    return ops[int(torch.randint(len(ops), (), generator=generator))]
