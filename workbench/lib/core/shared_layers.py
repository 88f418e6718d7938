"""Layers whose weights are looked up in one shared store: on any model by one call, and dense again by another.

    made = compress_model(model, 0.1)      # a tenth of the numbers; a new start, to be trained
    made.report(x)                         # parameters and operations, before and after
    dense = expand(made.model)             # plain layers again, the same function

Biases and norms are not shared. State dicts have the store once, so that `core.checkpoint` and safetensors save it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError, unknown
from workbench.kernels import shared_linear
from workbench.lib.core.budget import count_params
from workbench.lib.core.modes import evaluating
from workbench.lib.core.shared_store import Mapper, SharedParameterStore, SharedWeight


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


def _size(weight: Tensor) -> float:
    """Root mean square."""
    return float(weight.detach().double().square().mean().sqrt())
