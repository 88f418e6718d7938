"""Task vectors: what experts changed of the base they were fine-tuned from, whole or a bounded piece at a time.

    vectors = TaskVectors(base, [expert_a, expert_b], exclude="head.*")
    vectors.deltas("0.weight")                 # (n, *shape)
    for place, tau in vectors.pieces(): ...    # (n, p) of one tensor, p at most PIECE
    vectors.apply({"0.weight": update})        # a state dict in the base's dtypes

Merged are the floating tensors that `include` names and `exclude` does not; integers and all else are the base's. A
tensor with several names (tied weights) is merged once.

Tensor letters: n experts, P merged weights, p weights of a piece.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.merge.sources import Held, Source, open_source

PIECE = 2**18
"""The most weights of a piece: of each expert at once, a megabyte in float32."""

SHOWN = 24
"""Mismatches that a message lists; it counts the others."""


@dataclass(frozen=True)
class Place:
    """The weights start to stop of the flattened tensor `name`, which begins at `offset` in the vector of all P."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def whole(self) -> slice:
        """Where it lies in the vector of all merged weights."""
        return slice(self.offset + self.start, self.offset + self.stop)


class TaskVectors:
    """What each expert changed of a base.

    Args:
        base, experts: state dicts, modules, or paths of safetensors files or of folders of them, in any mixture.
        include, exclude: glob patterns over the names of tensors, one or several; what is excluded, or not included,
            is the base's, and need not be in the experts or fit (a classifier's head).

    Attributes:
        base, experts: the sources that they are read from.
        names: the merged tensors, in the base's order.
        shapes, dtypes: of each of them; dtypes are the base's.
        n: experts.
        size: P.

    Raises:
        InputError: no experts, or a pattern that matches nothing, or nothing left to merge. All that does not fit
            between base and experts (names, shapes, dtypes, ties) is in one message.
    """

    def __init__(
        self,
        base: Any,
        experts: Any,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ):
        check_list(experts)
        self.base = open_source(base, "base")
        self.experts = [open_source(expert, f"experts[{i}]") for i, expert in enumerate(experts)]
        self.n = len(self.experts)
        include, exclude = _patterns(include), _patterns(exclude)
        kept = _chosen(self.base, self.experts, include, exclude)
        _check_fit(self.base, self.experts, kept, lambda name: _matches(name, include) and not _matches(name, exclude))
        self.names = [
            name for name in kept if self.base.specs[name][1].is_floating_point and name not in self.base.ties
        ]
        if not self.names:
            raise InputError("base has no floating tensor to merge among those that include and exclude leave")
        self.shapes = {name: self.base.specs[name][0] for name in self.names}
        self.dtypes = {name: self.base.specs[name][1] for name in self.names}
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.sizes, self.offsets, self.size = sizes, {}, 0
        for name in self.names:
            self.offsets[name] = self.size
            self.size += sizes[name]

    def only(self, names: Sequence[str]) -> "TaskVectors":
        """The same models, of whose merged tensors only these are merged."""
        part = copy.copy(self)
        part.names, part.offsets, part.size = list(names), {}, 0
        for name in names:
            part.offsets[name] = part.size
            part.size += self.sizes[name]
        return part

    @property
    def device(self) -> torch.device:
        """Where it is computed: where the base's first merged tensor is."""
        return self.base.read(self.names[0], 0, 0).device

    @property
    def held(self) -> bool:
        """Whether all models are in memory."""
        return all(isinstance(source, Held) for source in (self.base, *self.experts))

    @property
    def dtype(self) -> torch.dtype:
        """What all of it together is computed in: float32, or float64 where a tensor of the base is."""
        return torch.float64 if torch.float64 in self.dtypes.values() else torch.float32

    def deltas(self, name: str) -> Float[Tensor, "n ..."]:
        """What each expert changed of one tensor, (n, *shape), in float32 or, of a float64 tensor, float64."""
        return self._read(name, 0, self.sizes[name]).view(self.n, *self.shapes[name])

    def flat(self) -> Float[Tensor, "n P"]:
        """All task vectors, tensor after tensor. As large as all experts together in float32."""
        tau = torch.empty(self.n, self.size, dtype=self.dtype, device=self.device)
        for place, piece in self.pieces():
            tau[:, place.whole] = piece
        return tau

    def pieces(self, names: Sequence[str] | None = None) -> Iterator[tuple[Place, Float[Tensor, "n p"]]]:
        """Every weight once, in bounded pieces of one tensor each; gone through anew, it reads anew.

        Raises:
            InputError: a weight of the base or of an expert is not finite.
        """
        for place in self.places(names):
            yield place, self._read(place.name, place.start, place.stop)

    def places(self, names: Sequence[str] | None = None) -> Iterator[Place]:
        """Where `pieces` goes."""
        for name in self.names if names is None else names:
            for start in range(0, self.sizes[name], PIECE):
                yield Place(name, start, min(start + PIECE, self.sizes[name]), self.offsets[name])

    def values(self, place: Place) -> Float[Tensor, " p"]:
        """The base's weights at a place, in the dtype that deltas have."""
        return _wide(self.base.read(place.name, place.start, place.stop))

    def apply(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """base + update as a state dict: the base's names, order, dtypes and ties; its own tensors where none is given.

        Args:
            update: merged name -> (*shape).

        Raises:
            InputError: a name that is not merged; or what comes out is not finite in the base's dtype.
        """
        state, specs = {}, self.base.specs
        for name in update:
            if name not in self.shapes:
                raise unknown("name", name, self.names)
        for name in specs:
            if (twin := self.base.ties.get(name)) is not None:
                state[name] = state[twin]
            elif name in update:
                wide = _wide(self.base.whole(name))
                state[name] = narrowed(wide + update[name].to(wide), specs[name][1], name)
            else:
                state[name] = self.base.whole(name).clone()
        return state

    def operands(self, expert: int, names: Sequence[str]) -> "tuple[Operand, Operand | None]":
        """One expert and the base as the operators of `kernels` take them; or its task vector and None.

        The latter where the tensors are of several types, of which an operator takes one, or of a byte, of which none.
        """
        kinds = {self.dtypes[name] for name in names}
        mixed = len(kinds) > 1 or any(kind.itemsize == 1 for kind in kinds)
        return Operand(self, self.experts[expert], names, mixed), None if mixed else Operand(self, self.base, names)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        base = _wide(self.base.read(name, start, stop))
        tau = base.new_empty(self.n, stop - start)
        for row, expert in zip(tau, self.experts, strict=True):
            torch.sub(expert.read(self.name_in(expert, name), start, stop).to(base), base, out=row)
        if tau.numel() and not torch.stack(tau.aminmax()).isfinite().all():  # one pass, and NaN is the least and most
            self._refuse(name, start, stop)
        return tau

    def name_in(self, expert: Source, name: str) -> str:
        """What the expert calls it: a file has tied weights under one of their names."""
        return name if name in expert.specs else next(x for x in self.base.alike(name) if x in expert.specs)

    def _refuse(self, name: str, start: int, stop: int) -> None:
        for source in (self.base, *self.experts):
            bad = ~_wide(source.read(self.name_in(source, name), start, stop)).isfinite()
            if bad.any():
                at = start + int(bad.nonzero()[0])
                raise InputError(
                    f"{name} of {source.label} has {int(bad.sum())} weights that are not finite, the first at {at} of "
                    f"the flattened tensor; a model must be finite to be merged"
                )
        raise InputError(f"{name} differs between experts and base by more than {self.dtype} can hold")


@dataclass(frozen=True)
class Operand:
    """Flat tensors of one model in their own types, each time that it is gone through; or what it changed of the base.

    Models in memory come a tensor at a time, others a piece at a time.
    """

    vectors: TaskVectors
    source: Source
    names: Sequence[str]
    changed: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        vectors = self.vectors
        for name in self.names:
            size, own = vectors.sizes[name], vectors.name_in(self.source, name)
            step = max(size, 1) if vectors.held else PIECE
            for start in range(0, size, step):
                piece = self.source.read(own, start, start + step).to(vectors.device)
                if self.changed:
                    piece = (_wide(piece) - _wide(vectors.base.read(name, start, start + step))).to(vectors.dtype)
                yield piece


def check_list(experts: Any) -> None:
    """Raise `InputError` unless it is a list with something in it."""
    if isinstance(experts, str | Mapping) or not isinstance(experts, Sequence):
        raise InputError(f"experts is a {type(experts).__name__} but must be a list of models")
    if not experts:
        raise InputError("experts is empty but must hold at least one model")


def narrowed(merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Merged weights in a dtype; an `InputError` where it cannot hold them."""
    if merged.numel():
        low, high = merged.aminmax()
        if not max(-low, high) <= torch.finfo(dtype).max:  # nor is NaN
            raise InputError(
                f"{name} comes out of the merge with weights of {float(low):.3g} to {float(high):.3g}, which {dtype} "
                "cannot hold: a scale, a weight or 1 / density is too large, or a sum of weights next to 0"
            )
    return merged.to(dtype)


def _wide(tensor: Tensor) -> Tensor:
    """In float32, float64 kept."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _patterns(patterns))


def _chosen(base: Source, experts: Sequence[Source], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    """The base's names that are included and not excluded."""
    if not base.specs:
        raise InputError(f"{base.label} holds no tensors, of which there must be some to merge")
    everywhere = list(dict.fromkeys(name for source in (base, *experts) for name in source.specs))
    for argument, patterns, names in (("include", include, list(base.specs)), ("exclude", exclude, everywhere)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unknown(argument, pattern, names)
    kept = [name for name in base.specs if _matches(name, include) and not _matches(name, exclude)]
    for name, twin in base.ties.items():
        if (name in kept) != (twin in kept):
            raise InputError(f"include and exclude part {name} and {twin}, which are tied in {base.label}")
    return kept


def _check_fit(base: Source, experts: Sequence[Source], kept: Sequence[str], wanted: Callable[[str], bool]) -> None:
    """One `InputError` with everything in which experts differ from the base, of the names that are kept."""
    wrong = [f"{base.label} has {name} as {base.specs[name][1]}" for name in kept if base.specs[name][1].is_complex]
    for expert in experts:
        for name in kept:
            wrong += _misfit(base, expert, name)
        for name in expert.specs:
            floating = expert.specs[name][1].is_floating_point
            if floating and wanted(name) and not any(other in base.specs for other in expert.alike(name)):
                wrong.append(f"{expert.label} has {name}, which the base has not")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InputError(f"experts do not fit the base: {'; '.join(wrong[:SHOWN])}{more}")


def _misfit(base: Source, expert: Source, name: str) -> list[str]:
    """In what an expert's tensor differs from the base's."""
    if name not in expert.specs:
        if not base.specs[name][1].is_floating_point:
            return []  # it is the base's anyhow; older files have buffers of integers that newer ones leave out
        tied = any(other in expert.specs for other in base.alike(name))  # which a file has under one name
        return [] if tied else [f"{expert.label} has no {name}"]
    (shape, dtype), (here, kind), twin = base.specs[name], expert.specs[name], base.ties.get(name)
    if here != shape:
        rows = len(shape) == len(here) == 2 and here[1] == shape[1]
        hint = ", as with another vocabulary" if rows else ""
        return [f"{expert.label} has {name} of shape {here}, the base {shape}{hint}"]
    if kind != dtype:
        return [f"{expert.label} has {name} as {kind}, the base as {dtype}"]
    if twin in expert.specs and expert.specs[twin] == (here, kind) and not _tied(expert, name, twin):
        return [f"{expert.label} has {name} and {twin} apart, which the base has tied"]
    return []


def _tied(source: Source, name: str, twin: str) -> bool:
    return twin in source.alike(name) or torch.equal(source.read(name), source.read(twin))
