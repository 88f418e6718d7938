"""Put low-rank adapters, or mixtures of them, on the linear layers of any model.

    adapted = workbench.adapt(model, "mixlora", targets="*.mlp.*", experts=8, rank=4)
    with adapted.given(task=tasks):            # only for systems that are told something beside the input
        loss = model(...).loss + sum(adapted.losses().values())
    adapted.save("my-adapter")
    adapted = workbench.load_adapter(another, "my-adapter")    # a model with the same weights

A system says what becomes of a linear layer and, if its experts are whole feed-forward blocks, of such a block:

    class MixLoRA(Adapter):
        def __init__(self, experts: int = 8, rank: int = 8, top_k: int = 2): ...
        def linear(self, layer: nn.Linear, name: str) -> nn.Module: ...
        def feed_forward(self, block: FeedForward, name: str) -> nn.Module | None: ...

and names that class as `ADAPTER` in its file.
"""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workbench import catalogue
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.adapted import Adapted, Adapter, adapted_with
from workbench.lib.core.adapt.feed_forward import find_feed_forward
from workbench.lib.core.adapt.files import base_digest, own_state, read_adapter
from workbench.lib.core.adapt.lora import LoRA
from workbench.lib.core.adapt.options import Room, check_options


def adapt(model: nn.Module, slug: str = "lora", targets: str | Sequence[str] = "*", **options: Any) -> Adapted:
    """Put the system `slug` on the linear layers of `model` whose names match `targets`; everything else is frozen.

    Args:
        model: any module; changed in place.
        slug: a system of the catalogue that has an `ADAPTER`, or "lora", the baseline of them all.
        targets: glob patterns over the names of linear layers, one or several; "*" matches every one.
        options: of the system, such as experts, rank and top_k; `workbench.method(slug)` says which.

    Returns:
        The handle to train, tell, report, keep and undo the adaptation.

    Raises:
        InputError: unknown slug or option, targets that match nothing or something that is no linear layer, a model
            that is adapted already, a rank above a layer's width. The model is as it was before.
    """
    return _adapt(model, slug, targets, options)


def _adapt(model: nn.Module, slug: str, targets: str | Sequence[str], options: dict[str, Any]) -> Adapted:
    if (slug_there := adapted_with(model)) is not None:
        raise InputError(f"model is adapted with {slug_there!r} already; remove() that first")
    adapter, options = make_adapter(slug, options)
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    linears = match_targets(model, patterns)
    adapted = Adapted(model, adapter, patterns, options)
    try:
        _put(adapted, linears)
        adapter.finish(adapted)
        adapted.listen()
    except BaseException:
        adapted.remove()
        raise
    return adapted


def load_adapter(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` as the model was whose adaptation `Adapted.save` has kept in `folder`.

    Args:
        model: with the weights it was made on, in the layers it was put on; changed in place.

    Raises:
        InputError: the folder holds no adaptation, a damaged one or one of a newer format; or it was made on other
            weights, or has tensors of other names or shapes: all of it in one message. The model is unchanged then.
    """
    sidecar, tensors = read_adapter(folder)
    with Room(4 * sum(tensor.numel() for tensor in tensors.values()) + 2**20):
        adapted = _adapt(model, sidecar["slug"], sidecar["targets"], sidecar["options"])
    try:
        _fill(adapted, folder, sidecar["base_sha256"], tensors)
    except BaseException:
        adapted.remove()
        raise
    return adapted


def _fill(adapted: Adapted, folder: str | Path, base: str, tensors: dict[str, Tensor]) -> None:
    """Give an adapted model the tensors of a folder; an `InputError` with all that does not fit."""
    here = own_state(adapted.layers)
    wrong = [f"{name} is missing" for name in here if name not in tensors]
    wrong += [f"{name} has no place in this model" for name in tensors if name not in here]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} but must be {tuple(here[name].shape)}"
        for name in here
        if name in tensors and tensors[name].shape != here[name].shape
    ]
    if base_digest(adapted.layers) != base:
        wrong.append("the layers it was made on have other weights than this model's")
    if wrong:
        raise InputError(f"{folder} does not fit this model: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(tensors[name])


def make_adapter(slug: str, options: dict[str, Any]) -> tuple[Adapter, dict[str, Any]]:
    """The system's `Adapter` with these options, and the options with the defaults filled in."""
    if slug == "lora":
        kind = LoRA
    else:
        row = catalogue.method(slug)
        kind = getattr(import_module(row.module), "ADAPTER", None) if row.ready else None
        if kind is None:
            allowed = ", ".join(["lora", *(row.slug for row in catalogue.methods() if row.adapts)])
            raise InputError(f"slug {slug!r} is no adapter that stands; allowed: {allowed}")
    check_options(slug, kind, options)
    bound = inspect.signature(kind).bind(**options)
    bound.apply_defaults()
    return kind(**options), dict(bound.arguments)


def match_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose names match one of the patterns.

    Raises:
        InputError: a pattern matches no linear layer. One that matches a single module of another kind is told what
            kind that is, one that matches nothing the nearest names.
    """
    modules = dict(model.named_modules())
    # not a subclass: multi-head attention of torch, for one, reads the weight of its output layer past any wrapper
    linears = {name: module for name, module in modules.items() if type(module) is nn.Linear and name}
    found: dict[str, nn.Linear] = {}
    for pattern in patterns:
        matched = {name: layer for name, layer in linears.items() if fnmatchcase(name, pattern)}
        if not matched:
            other = [name for name in modules if fnmatchcase(name, pattern)]
            if other:
                kind = type(modules[other[0]]).__name__
                raise InputError(f"targets {pattern!r} matches {other[0]!r}, a {kind}, but must match linear layers")
            raise unknown("targets", pattern, linears)
        found |= matched
    return {name: layer for name, layer in linears.items() if name in found}  # in the order of the model


def _put(adapted: Adapted, linears: dict[str, nn.Linear]) -> None:
    """Replace whole feed-forward blocks where the system wants them and all their layers are wanted, then the rest."""
    model, adapter, left = adapted.model, adapted.adapter, dict(linears)
    for name, module in list(model.named_modules()):
        block = find_feed_forward(module)
        inside = {f"{name}.{key}".lstrip(".") for key in block.linears} if block else set()
        if not name or not block or not inside <= left.keys():
            continue
        layer = adapter.feed_forward(block, name)
        if layer is not None:
            adapted.put(name, module, layer)
            left = {key: value for key, value in left.items() if key not in inside}
    for name, linear in left.items():
        adapted.put(name, linear, adapter.linear(linear, name))
