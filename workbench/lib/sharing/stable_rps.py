"""STABLE-RPS: the weights of a network looked up, by a hash, in one array that is a fraction of their number.

Desai and Shrivastava 2023, "In defense of parameter sharing for model-compression" (arXiv:2310.11611); public code:
apd10/FakeRoast. The n weights of all shared layers, one after the other, are made of m <= n stored numbers M:

    theta_i = lambda_l g_i M[h(i)]     i-th of all weights, in layer l; g_i a hashed sign
    lambda_l = sigma_l / s             sigma_l the size of the layer's weights, s that of the numbers in M

Biases and norms are not shared. How h is made is what the schemes differ in:

- `HashMapper` (HashedNet, Chen et al. 2015): every weight for itself; how many weights a number has is Poisson.
- `RoastTileMapper` (ROAST, Desai et al. 2022): a tile of a matrix is one run of M, from a hashed start.
- `RandomFoldMapper` (STABLE-RPS): every m weights in a row are M once, turned by a hashed shift. A number has n / m
  weights, rounded up or down; for m = n the network is the dense one in another order.

The gradient of a number is a sum over its weights, each times lambda. So the smaller s the larger the step, by s^-2:
ROAST learns or diverges by the scale its array happened to start at. `GradScaler` divides the gradient of M[j] by

    Gamma_j = (sum over the weights i of j of lambda_i)^2 / n_j      "mean", v1 of the code; n_j their number
    Gamma_j = sum over i of lambda_i^2                               "squares", v5: the same where lambda is one

Under SGD the weights of a number then move by the mean of their gradients, whatever s is, and momentum and weight decay
mean what they mean in a dense network: the decay of the optimizer comes after the scaling, and M -> (1 - a) M is theta
-> (1 - a) theta. (A decay that is part of the loss would be scaled with it and depend on s.) Adam divides by the size
of the gradient itself: for it the scaling changes nothing, and s stays in what a step does to theta, lambda times the
rate. Gradients are clipped before the scaling unless `GradScaler.apply_` is called by hand, before the clipping.

Where the printed text and the code leave it open: M is normal with standard deviation s (the code's U(-s, s) has
s / sqrt 3, and theta as much too small), sigma_l is the root mean square of the weights the layer had.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels import shared_linear, shared_weight
from workbench.kernels.random_basis import philox
from workbench.kernels.shared_store.reference import negative, places
from workbench.lib.core.budget import count_params
from workbench.lib.core.modes import evaluating
from workbench.lib.core.pool import stored_once

METHOD = Method(
    slug="stable-rps",
    title="In Defense of Parameter Sharing for Model Compression (STABLE-RPS)",
    family="sharing",
    year=2023,
    paper="arXiv:2310.11611",
    claim="Hashed parameter sharing, made stable, is at least as good as pruning at initialisation at every memory "
    "budget and loses nothing at zero compression.",
    objects=(
        "compress_model",
        "GradScaler",
        "expand",
        "SharedParameterStore",
        "SharedLinear",
        "SharedConv2d",
        "SharedEmbedding",
        "RandomFoldMapper",
        "RoastTileMapper",
        "HashMapper",
    ),
)

FORMS = ("mean", "squares")
STARTS = 2**62
"""The block of the generator that the first hashed place is made of; signs are made of the first blocks."""


def example() -> nn.Module:
    """A perceptron of 4,096 weights in 409 numbers."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    return compress_model(model, 0.1).model


@runtime_checkable
class Mapper(Protocol):
    """Where the weights `offset` and following of a seed are, in `shape`, and with which sign."""

    def check(self, m: int) -> None:
        """Raise `InputError` where an array of m numbers is too small."""

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        """Places in the array, 0 to m - 1."""


@dataclass(frozen=True)
class RandomFoldMapper:
    """Partitions of m weights, each the whole array turned by a hashed shift. Nothing is kept of it."""

    def check(self, m: int) -> None:
        pass

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        return places(seed, m, offset, math.prod(shape)).view(*shape)


@dataclass(frozen=True)
class HashMapper:
    """Every weight anywhere. Its places are kept: 8 bytes a weight, twice what a dense network takes."""

    def check(self, m: int) -> None:
        pass

    def index(self, seed: Int64[Tensor, ""], offset: int, shape: Sequence[int], m: int) -> Int64[Tensor, "..."]:
        i = torch.arange(offset, offset + math.prod(shape), device=seed.device)
        return _below(m, seed, i).view(*shape)


@dataclass(frozen=True)
class RoastTileMapper:
    """Tiles of a matrix (first axis by all others), each a run of the array from a hashed start. Its places are kept.

    Starts go to m - rows * columns inclusive, or the last number would have no weight; the hash is the store's own
    instead of the code's universal one.
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
        """Gamma_j, 1 for a number that has no weight."""
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


class _Shared(nn.Module):
    """What the shared layers have in common: `weight` is made when it is asked for."""

    shared: SharedWeight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "shared" in self.__dict__.get("_modules", {}):
            return self.shared()
        return super().__getattr__(name)

    def made_matrices(self) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
        """What is there to watch, as what trains is an array: the matrix that it makes here."""
        yield "weight", self.shared.store.weight, lambda memory: self.shared.of(memory).flatten(1)

    def _share(self, store: SharedParameterStore, sigma: float | None) -> None:
        weight = store.register(self.weight.shape, _size(self.weight) if sigma is None else sigma)
        del self.weight
        self.shared = weight


class SharedLinear(_Shared, nn.Linear):
    """A linear layer whose weight is in a store; its bias is its own.

    Args:
        args, options: of `nn.Linear`.
        sigma: of its weights; None for what they would start with.
    """

    def __init__(self, store: SharedParameterStore, *args: Any, sigma: float | None = None, **options: Any):
        super().__init__(*args, **options)
        self._share(store, sigma)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        weight, store = self.shared, self.shared.store
        if not weight.folds:
            return super().forward(x)
        weight.check(store.weight)
        y = shared_linear(x, store.weight, store.seed, weight.scale, self.out_features, offset=weight.offset)
        return y if self.bias is None else y + self.bias


class SharedConv2d(_Shared, nn.Conv2d):
    """A convolution whose kernels are in a store. Arguments as for `SharedLinear`, of `nn.Conv2d`."""

    def __init__(self, store: SharedParameterStore, *args: Any, sigma: float | None = None, **options: Any):
        super().__init__(*args, **options)
        self._share(store, sigma)


class SharedEmbedding(_Shared, nn.Embedding):
    """An embedding whose table is in a store. Arguments as for `SharedLinear`, of `nn.Embedding`; what is padded is
    zero. The table is made as a whole, as the gradient of a dense one is.
    """

    def __init__(self, store: SharedParameterStore, *args: Any, sigma: float | None = None, **options: Any):
        super().__init__(*args, **options)
        if self.max_norm is not None or self.sparse or self.scale_grad_by_freq:
            raise InputError("max_norm, sparse and scale_grad_by_freq are not for a table that is shared")
        self._share(store, sigma)

    def forward(self, ids: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        rows = super().forward(ids)
        return rows if self.padding_idx is None else rows.masked_fill((ids == self.padding_idx)[..., None], 0.0)


KINDS = {nn.Linear: SharedLinear, nn.Conv2d: SharedConv2d, nn.Embedding: SharedEmbedding}


@dataclass(frozen=True)
class Compressed:
    """A model whose weights are shared.

    Attributes:
        model, store: of it.
        shared: layer -> shape of its weight.
        left_out: layer -> why its weight is not shared.
    """

    model: nn.Module
    store: SharedParameterStore
    shared: dict[str, tuple[int, ...]]
    left_out: dict[str, str]

    def report(self, *inputs: Any) -> dict[str, Any]:
        """What it costs beside the dense model.

        Args:
            inputs: of the model; with them the operations of a forward pass are counted.

        Returns:
            weights: n, how many are shared; stored: m; compression: m / n; parameters: {"before", "after"} of the whole
            model; flops: the same, of a pass over the inputs. A weight that is made costs one operation, its product as
            many as in the dense model: sharing saves memory, and no work. layers, left_out.
        """
        store, after = self.store, count_params(self.model)
        found: dict[str, Any] = {
            "weights": store.numel,
            "stored": store.m,
            "compression": store.m / store.numel,
            "parameters": {"before": after - store.m + store.numel, "after": after},
            "layers": len(self.shared),
            "left_out": dict(self.left_out),
        }
        if inputs:
            with evaluating(self.model), torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.model(*inputs)
            dense = counter.get_total_flops()
            found["flops"] = {"before": dense, "after": dense + store.numel}
        return found


def compress_model(
    model: nn.Module,
    compression: float,
    mapper: Mapper | None = None,
    *,
    std: float = 0.05,
    min_size: int = 0,
    skip: str | Sequence[str] = (),
    seed: int | None = None,
) -> Compressed:
    """Share the weights of every `nn.Linear`, `nn.Conv2d` and `nn.Embedding` of a model, which is to be trained then.

    The layers start anew: at random, in the size of the weights they had. Tied weights stay tied and count once.

    Args:
        model: changed in place, its layers stay where they are.
        compression: m / n, above 0 and at most 1; n counts the weights that are shared.
        mapper: default `RandomFoldMapper()`.
        std, seed: of the store.
        min_size: layers whose weight has fewer numbers keep it.
        skip: glob patterns of layers that keep their weight, as the last one often does.

    Raises:
        InputError: compression is out of range or leaves less than one number, no layer is left to share, a pattern
            matches none, weights are tied to what is not shared, or are of several types, or all zero. The model is as
            it was then.
    """
    if not 0 < compression <= 1:
        raise InputError(f"compression is {compression} but must be above 0 and at most 1")
    found, left_out = _shareable(model, min_size, (skip,) if isinstance(skip, str) else tuple(skip))
    first = {id(layer.weight): layer.weight for layer in found.values()}  # tied ones once
    kinds = {(weight.dtype, weight.device) for weight in first.values()}
    if len(kinds) > 1:
        raise InputError(f"the weights to share are {sorted(map(str, kinds))} but must be of one type on one device")
    n = sum(weight.numel() for weight in first.values())
    m = math.floor(round(compression * n, 6))
    if m < 1:
        raise InputError(f"compression is {compression}, which leaves {compression * n:.3g} of {n} numbers, below 1")
    ((dtype, device),) = kinds
    store = SharedParameterStore(m, std, seed, mapper).to(device=device, dtype=dtype)
    made = {key: store.register(weight.shape, _size(weight)) for key, weight in first.items()}
    store.finalize()
    for layer in found.values():
        weight = made[id(layer.weight)]
        del layer.weight
        layer.shared, layer.__class__ = weight, KINDS[type(layer)]
    return Compressed(model, store, {name: layer.shared.shape for name, layer in found.items()}, left_out)


def _shareable(model: nn.Module, min_size: int, skip: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to share by name, and why the others that have a matrix are left out."""
    if any(isinstance(module, SharedParameterStore) for module in model.modules()):
        raise InputError("model has shared weights already; expand() it first")
    layers = {name: module for name, module in model.named_modules() if type(module) in KINDS}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise unknown("skip", pattern, layers)
    found, left_out = {}, {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        reason = None
        if name in layers and any(fnmatchcase(name, pattern) for pattern in skip):
            reason = "skipped"
        elif name not in layers or weight is None:
            matrices = [key for key, p in module._parameters.items() if p is not None and p.ndim > 1]
            reason = f"{', '.join(matrices)} of a {type(module).__name__}" if matrices else None
            if reason is None:
                continue
        elif weight.numel() < min_size:
            reason = f"{weight.numel()} numbers, fewer than {min_size}"
        elif not weight.requires_grad:
            reason = "frozen"
        elif isinstance(module, nn.Embedding) and (module.max_norm or module.sparse or module.scale_grad_by_freq):
            reason = "an embedding with max_norm, sparse or scale_grad_by_freq"
        if reason is None:
            found[name] = module
        else:
            left_out[name] = reason
    if not found:
        said = (
            "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "it has no linear layer, convolution ..."
        )
        raise InputError(f"model has no layer to share ({said})")
    _check_ties(model, found)
    return found, left_out


def _check_ties(model: nn.Module, found: dict[str, nn.Module]) -> None:
    owners = {(id(module), "weight") for module in found.values()}
    shared = {id(module.weight): name for name, module in found.items()}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in shared and (id(module), key) not in owners:
                raise InputError(
                    f"the weight of {shared[id(parameter)]!r} is tied to {f'{name}.{key}'.lstrip('.')!r}, which is not "
                    "shared: skip both"
                )


def expand(model: nn.Module) -> nn.Module:
    """A copy of a model with the weights that its store makes, as plain layers.

    Tied weights are tied again; but a table with a padded row, which is zero there alone, is its own.

    Raises:
        InputError: the model has no shared weights.
    """
    dense, made = deepcopy(model), {}
    layers = [module for module in dense.modules() if isinstance(module, _Shared)]
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without shared weights")
    for layer in layers:
        shared, padded = layer.shared, getattr(layer, "padding_idx", None)
        if (shared, padded) not in made:
            weight = made[shared, padded] = nn.Parameter(shared().detach().clone())
            if padded is not None:
                weight.data[padded] = 0.0
        del layer.shared
        layer.__class__ = next(plain for plain, kind in KINDS.items() if isinstance(layer, kind))
        layer.weight = made[shared, padded]
    return dense


class GradScaler:
    """Divides the gradients of a model's stores by Gamma.

    Args:
        model: whose stores are looked for.
        form: "mean" or "squares", see the head of this file.
    """

    def __init__(self, model: nn.Module, form: str = "mean"):
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        self.stores = [module for module in model.modules() if isinstance(module, SharedParameterStore)]
        if not self.stores:
            raise InputError(f"model is a {type(model).__name__} without a SharedParameterStore")
        self.form = form
        self._kept: dict[SharedParameterStore, tuple[list[tuple[Tensor, int]], Tensor]] = {}

    @torch.no_grad()
    def apply_(self) -> None:
        """Divide what is in `.grad` now, once for each backward pass."""
        for store in self.stores:
            if store.weight.grad is not None:
                store.weight.grad /= self.gamma(store)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Divide before each step of an optimizer; `remove()` what is returned to end that.

        A step with a closure is refused: its gradients would come after.
        """

        def before(_: torch.optim.Optimizer, args: tuple, options: dict) -> None:
            if options.get("closure") is not None or any(callable(arg) for arg in args[1:]):
                raise InputError("closure is given, and makes gradients after the scaling, but must be None")
            self.apply_()

        return optimizer.register_step_pre_hook(before)

    def gamma(self, store: SharedParameterStore) -> Float[Tensor, " m"]:
        """Gamma of a store, made anew where its seed or a scale was loaded or moved."""
        made_of = [(t, t._version) for t in (store.seed, *(weight.scale for weight in store.weights))]
        kept = self._kept.get(store)
        if (
            kept is None
            or kept[1].dtype != store.weight.dtype
            or kept[1].device != store.weight.device
            or any(a is not b or v != w for (a, v), (b, w) in zip(kept[0], made_of, strict=True))
        ):
            self._kept[store] = kept = made_of, store.scaling(self.form)
        return kept[1]


def _size(weight: Tensor) -> float:
    """Root mean square."""
    return float(weight.detach().double().square().mean().sqrt())
