"""Weights looked up, by a hash, in one array: the store, and the ways from a seed to the places of the weights.

The n weights of all shared layers, one after the other, are made of m <= n stored numbers M:

    theta_i = lambda_l g_i M[h(i)]     i-th of all weights, in layer l; g_i a hashed sign
    lambda_l = sigma_l / s             sigma_l the size of the layer's weights, s that of the numbers in M

How h is made is what the mappers differ in. `core.shared_layers` puts layers with such weights on any model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.kernels import shared_weight
from workbench.kernels.random_basis import philox
from workbench.kernels.shared_store.reference import negative, places
from workbench.lib.core.pool import stored_once

FORMS = ("mean", "squares")
STARTS = 2**62
"""The block of the generator that the first hashed place is made of; signs are made of the first blocks."""


@runtime_checkable
class Mapper(Protocol):
    """Where the weights `offset` and following of a seed are, in `shape`; signs are the store's."""

    def check(self, m: int) -> None:
        """Raise `InputError` where an array of m numbers is too small."""

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        """Places in the array, 0 to m - 1."""


@dataclass(frozen=True)
class RandomFoldMapper:
    """STABLE-RPS (Desai and Shrivastava 2023): every m weights in a row are the array once, turned by a hashed shift.

    A number has n / m weights, rounded up or down. No places are kept: the operators make them.
    """

    def check(self, m: int) -> None:
        pass

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        return places(seed, m, offset, math.prod(shape)).view(*shape)


@dataclass(frozen=True)
class HashMapper:
    """HashedNet (Chen et al. 2015): every weight anywhere; how many weights a number has is Poisson.

    Its places are kept: 8 bytes a weight, twice what a dense network takes.
    """

    def check(self, m: int) -> None:
        pass

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        i = torch.arange(offset, offset + math.prod(shape), device=seed.device)
        return _below(m, seed, i).view(*shape)


@dataclass(frozen=True)
class RoastTileMapper:
    """ROAST (Desai et al. 2022): tiles of a matrix (first axis by all others), each a run from a hashed start.

    Starts go to m - rows * columns inclusive, or the last number would have no weight; the hash is the store's own
    instead of the released code's universal one. Its places are kept.
    """

    rows: int = 16
    columns: int = 16

    def __post_init__(self):
        if min(self.rows, self.columns) < 1:
            raise InputError(f"rows, columns are {self.rows}, {self.columns} but must be at least 1")

    def check(self, m: int) -> None:
        if m < self.rows * self.columns:
            raise InputError(f"m is {m} but must be at least the {self.rows * self.columns} numbers of a tile")

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        height, width = shape[0], math.prod(shape[1:])
        row = torch.arange(height, device=seed.device)[:, None]
        column = torch.arange(width, device=seed.device)
        tile_row, tile_column = row // self.rows, column // self.columns
        first = offset + tile_row[:: self.rows] * self.rows * width + tile_column[:: self.columns] * self.columns
        start = _below(m - self.rows * self.columns + 1, seed, first)[tile_row, tile_column]
        return (start + row % self.rows * self.columns + column % self.columns).view(*shape)


def _below(limit: int, seed: Tensor, number: Tensor) -> Tensor:
    """A hash of each number, from 0 to limit - 1."""
    words = philox(STARTS + number, seed)
    return (words[..., 0] >> 1 << 32 | words[..., 1]) % limit


class SharedParameterStore(nn.Module):
    """The array that the weights of several layers are looked up in.

    Weights are registered one after the other, then `finalize` ends that; only then are they made. The state dict has
    the numbers, the seed, and the scale of every weight: with these a model goes on exactly.

    Args:
        m: how many numbers are stored.
        std: s, of their start.
        seed: of the places and signs, any 64-bit integer; None draws one.
        mapper: how places are made.
    """

    def __init__(self, m: int, std: float = 0.05, seed: int | None = None, mapper: Mapper | None = None):
        super().__init__()
        mapper = RandomFoldMapper() if mapper is None else mapper
        if m < 1:
            raise InputError(f"m is {m} but must be at least 1")
        if not 0 < std < math.inf:
            raise InputError(f"std is {std} but must be above 0")
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise InputError(f"seed is {seed} but must be an integer of 64 bits")
        mapper.check(m)
        self.m, self.std, self.mapper = m, std, mapper
        self.weight = nn.Parameter(torch.randn(m) * std)
        self.register_buffer("seed", torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed))
        self.weights: list[SharedWeight] = []
        self.finalized = False
        stored_once(self)

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return sum(weight.numel for weight in self.weights)

    def register(self, shape: Sequence[int], sigma: float) -> "SharedWeight":
        """The next weights, as a tensor of this shape and of size sigma (root mean square).

        Raises:
            InputError: the store is finalized, the shape is empty, or sigma is not above 0.
        """
        if self.finalized:
            raise InputError(f"shape {tuple(shape)} cannot be registered: the store is finalized with {self.numel}")
        weight = SharedWeight(self, self.numel, shape, sigma)
        self.weights.append(weight)
        return weight

    def finalize(self) -> "SharedParameterStore":
        """Nothing is registered after this."""
        if self.numel < self.m:
            raise InputError(f"m is {self.m} but must be at most the {self.numel} weights that are registered")
        self.finalized = True
        return self

    def loads(self) -> Int64[Tensor, " m"]:
        """n_j, how many weights each number has."""
        return sum(torch.bincount(weight.index().flatten(), minlength=self.m) for weight in self.weights)

    def scaling(self, form: str = "mean") -> Float[Tensor, " m"]:
        """What the gradient of each number is scaled by where it is the sum over its weights; 1 where it has none.

        Args:
            form: "mean", (sum of lambda_i over its weights)^2 / n_j; or "squares", the sum of lambda_i^2.
        """
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        power, total = 1 if form == "mean" else 2, torch.zeros_like(self.weight, dtype=torch.float64)
        for weight in self.weights:
            index = weight.index().flatten()
            total.index_add_(0, index, (weight.scale.double() ** power).expand(len(index)))
        loads = self.loads()
        gamma = total.square() / loads if form == "mean" else total
        return torch.where(loads > 0, gamma, 1.0).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"m={self.m}, weights={self.numel}, {self.mapper}"


class SharedWeight(nn.Module):
    """A tensor of weights that is made of the store's numbers each time it is called. `SharedParameterStore.register`
    makes it.

    Attributes:
        offset: the number of its first weight.
        scale: lambda.
    """

    def __init__(self, store: SharedParameterStore, offset: int, shape: Sequence[int], sigma: float):
        super().__init__()
        if not shape or min(shape) < 1:
            raise InputError(f"shape is {tuple(shape)} but must have at least one number")
        if not 0 < sigma < math.inf:
            raise InputError(f"sigma is {sigma} but must be above 0: weights that are all zero have no size to share")
        self.store, self.offset, self.shape = store, offset, tuple(shape)
        self.register_buffer("scale", torch.full_like(store.weight.detach().sum(), sigma / store.std))
        self._kept: tuple[Tensor, int, Tensor, Tensor] | None = None
        stored_once(self)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def forward(self) -> Tensor:
        return self.of(self.store.weight)

    def of(self, memory: Float[Tensor, " m"]) -> Tensor:
        """The weights that another array gives in the place of the store's."""
        self.check(memory)
        if self.folds:
            return shared_weight(memory, self.store.seed, self.scale, self.shape, offset=self.offset)
        index, sign = self._places()
        return memory[index] * (sign * self.scale)

    @property
    def folds(self) -> bool:
        """Whether its places are so regular that the operators of `kernels.shared_store` make them."""
        return isinstance(self.store.mapper, RandomFoldMapper)

    def check(self, memory: Tensor) -> None:
        """Raise `InputError` where the store is not ready, or the array is not of its size."""
        if not self.store.finalized:
            raise InputError("the store is not finalized: call finalize() once all weights are registered")
        if memory.shape != (self.store.m,):
            raise InputError(f"the store's weight has shape {tuple(memory.shape)} but must have ({self.store.m},)")

    def index(self) -> Int64[Tensor, "..."]:
        """Where each weight is."""
        return self.store.mapper.index(self.store.seed, self.offset, self.shape, self.store.m)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Index and sign, kept until the seed, the type or the device is another."""
        seed, kept, like = self.store.seed, self._kept, self.store.weight
        if kept is None or kept[0] is not seed or kept[1] != seed._version or kept[3].dtype != like.dtype:
            sign = torch.where(negative(seed, self.offset, self.numel), -1, 1).to(like.dtype).view(self.shape)
            self._kept = kept = seed, seed._version, self.index(), sign
        return kept[2:]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, offset={self.offset}"
