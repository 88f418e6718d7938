"""What a host sees that looks at a layer which is not there any more.

Models read their layers: T5 the dtype of `wo.weight`, before it computes; Mamba multiplies by `dt_proj.weight` itself;
WavLM's attention, and torch's fast path for a `TransformerEncoder`, hand weights to a function of torch. What they read
of a layer in a linear layer's place is its weight with the update, where that is one matrix. Where it depends on the
token, or the whole block is gone, they can read what kind of tensor it was; computing with it is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from workbench.errors import InputError
from workbench.lib.core.adapt.matrix import Matrix

ASKED = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_leaf", "requires_grad")
KIND = {getattr(Tensor, name).__get__ for name in ASKED} | {
    getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size")
}


class Unreadable(Tensor):
    """A tensor that says what it is like; any computation with it is an `InputError` that says why."""

    why: str

    @staticmethod
    def __new__(cls, like: Tensor, why: str) -> "Unreadable":
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self.why = why
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in KIND:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise InputError(next(leaf.why for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)))

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise InputError(next(leaf.why for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls)))


def of_base(layer: nn.Module, name: str, update: Callable[[], Tensor | None]) -> Any:
    """The attribute `name` of what `layer`, once it is in a model, has taken the place of: its `base`.

    Args:
        update: gives the (O, I) matrix that is added to the weight of a linear layer; None where no matrix is.

    Raises:
        AttributeError: the base has none of that name, or it is a module, which takes no part any more.
    """
    base, place = layer.__dict__.get("_modules", {}).get("base"), layer.__dict__.get("place")
    if base is None or place is None or name.startswith("_"):
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
    there = base.whole if isinstance(base, Matrix) and base.whole is not None else base
    value = getattr(there, name)
    if isinstance(value, nn.Module):
        raise AttributeError(f"{name!r} of a {type(there).__name__} is out of reach: a {type(layer).__name__} is there")
    if not isinstance(value, Tensor) or (name == "bias" and isinstance(base, nn.Linear)):
        return value
    delta = update() if name == "weight" and isinstance(base, nn.Linear) else None
    if delta is None:
        return Unreadable(
            value,
            f"the model computes with {name!r} of {place} itself, and passes by what was put there, whose update "
            f"depends on the token: leave {place} out of targets",
        )
    return value + (delta.T if isinstance(base, Matrix) and base.transposed else delta).to(value.dtype)
