"""What a way to merge is: its options, and one rule, on pieces of weights, on matrices, or on whole task vectors.

    class Halved(Pieces):
        \"\"\"Half of the sum of the task vectors.\"\"\"

        def __init__(self, scale: float = 0.5): ...            # the options, with their types and their defaults

        def piece(self, tau, place, facts):                    # (n, p) -> (p,)
            return self.scale * tau.sum(0)

A system of the catalogue names its class as `MERGER` in its own file; nothing else registers it. `workbench.merge` then
takes it by its slug, or by a word of the slug that no other has ("pcb" for pcb-merging).

Tensor letters: n experts, P merged weights, p weights of a piece, O x I a matrix.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench import catalogue
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.options import check_options
from workbench.lib.core.merge.vectors import Place, TaskVectors, narrowed

#: What comes with the core, as a module and a class.
BUILT_IN = {
    "average": "workbench.lib.core.merge.linear:Average",
    "task-arithmetic": "workbench.lib.core.merge.linear:TaskArithmetic",
    "ties": "workbench.lib.core.merge.trimmed:Ties",
    "dare": "workbench.lib.core.merge.trimmed:Dare",
    "dare-ties": "workbench.lib.core.merge.trimmed:DareTies",
    "fisher": "workbench.lib.core.merge.fisher:Fisher",
    "regmean": "workbench.lib.core.merge.regmean:RegMean",
    "adamerging": "workbench.lib.core.merge.adamerging:AdaMerging",
    "knots": "workbench.lib.core.merge.spectral:Knots",
    "tsv-m": "workbench.lib.core.merge.spectral:TsvM",
}

Update = Iterator[tuple[Place, Tensor]]


class Merger:
    """Makes one update of n task vectors. Options are the arguments of its `__init__`, checked by their types."""

    def facts(self, vectors: TaskVectors) -> Any:
        """What the rule needs to know of all the weights, from as many passes over them as it takes."""
        return None

    def update(self, vectors: TaskVectors) -> Update:
        """What to add to the base: each merged weight once, in order, in pieces of one tensor."""
        raise NotImplementedError


class Pieces(Merger):
    """A rule that merges each weight by itself: in memory are a piece of every expert and what `facts` keeps."""

    def piece(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        """The update of the weights at a place."""
        raise NotImplementedError

    def update(self, vectors: TaskVectors) -> Update:
        facts = self.facts(vectors)
        for place, tau in vectors.pieces():
            yield place, self.piece(tau, place, facts)


class Matrices(Merger):
    """A rule that merges each matrix as one; all other tensors are averaged. In memory is a matrix of every expert."""

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: Any) -> Float[Tensor, "O I"]:
        """The update of the matrix `name`."""
        raise NotImplementedError

    def other(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        """The update of what is in no matrix."""
        return tau.mean(0)

    def merges(self, name: str, vectors: TaskVectors, facts: Any) -> bool:
        """Whether `matrix` takes the tensor: any that has two dimensions and weights."""
        return len(vectors.shapes[name]) == 2 and vectors.sizes[name] > 0

    def update(self, vectors: TaskVectors) -> Update:
        facts = self.facts(vectors)
        for name in vectors.names:
            if self.merges(name, vectors, facts):
                merged = self.matrix(vectors.deltas(name), name, facts)
                yield Place(name, 0, vectors.sizes[name], vectors.offsets[name]), merged.reshape(-1)
            else:
                for place, tau in vectors.pieces([name]):
                    yield place, self.other(tau, place, facts)


class Flat(Merger):
    """A rule on the whole vectors: in memory are all experts at once, in float32 (float64 where a tensor is)."""

    def vector(self, tau: Float[Tensor, "n P"], facts: Any) -> Float[Tensor, " P"]:
        """The update of all merged weights."""
        raise NotImplementedError

    def update(self, vectors: TaskVectors) -> Update:
        facts = self.facts(vectors)
        merged = self.vector(vectors.flat(), facts)
        for place in vectors.places():
            yield place, merged[place.whole]


@torch.no_grad()
def merged_state(vectors: TaskVectors, merger: Merger) -> dict[str, Tensor]:
    """The merged model as a state dict, as `merge` returns it."""
    state = {}
    for name, (shape, dtype) in vectors.base.specs.items():
        if name in vectors.shapes:
            state[name] = torch.empty(shape, dtype=dtype, device=vectors.base.read(name, 0, 0).device)
        elif (twin := vectors.base.ties.get(name)) is not None:
            state[name] = state[twin]
        else:
            state[name] = vectors.base.whole(name).clone()
    for place, merged in merged_pieces(vectors, merger):
        state[place.name].view(-1)[place.start : place.stop] = merged
    return state


@torch.no_grad()
def merged_pieces(vectors: TaskVectors, merger: Merger) -> Update:
    """The merged weights in the base's dtypes, piece by piece and tensor after tensor, for writing as it goes.

    Raises:
        InputError: what comes out is not finite in the base's dtype.
    """
    for place, update in merger.update(vectors):
        values = vectors.values(place)
        yield place, narrowed(values + update.to(values.dtype), vectors.dtypes[place.name], place.name)


def mergers() -> list[str]:
    """All methods that `merge` takes: the built-in ones, and the systems of the catalogue with a `MERGER`."""
    return [*BUILT_IN, *(row.slug for row in catalogue.methods() if row.merges)]


def merger_class(method: str) -> type[Merger]:
    """The class of a method; its signature has the options.

    Raises:
        InputError: no method has that name.
    """
    if method in BUILT_IN:
        module, _, name = BUILT_IN[method].partition(":")
        return getattr(import_module(module), name)
    names = mergers()
    found = [name for name in names if method == name] or [name for name in names if method in name.split("-")]
    if len(found) != 1 or found[0] in BUILT_IN:
        raise unknown("method", method, names, most=len(names))  # the shell's help promises all of them
    return import_module(catalogue.method(found[0]).module).MERGER


def make_merger(method: str, options: dict[str, Any]) -> Merger:
    """The method with its options, checked against the types in its signature.

    Raises:
        InputError: an unknown method or option, a value of another kind, or one that is not allowed.
    """
    kind = merger_class(method)
    check_options(method, kind, options)
    bound = inspect.signature(kind)
    missing = [n for n, p in bound.parameters.items() if p.default is inspect.Parameter.empty and n not in options]
    if missing:
        raise InputError(f"{method} needs {', '.join(missing)}, which must be given")
    return kind(**options)
