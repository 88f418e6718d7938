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
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from workbench import catalogue
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.adapted import Adapted, Adapter, adapted_with
from workbench.lib.core.adapt.feed_forward import recognise
from workbench.lib.core.adapt.files import base_digest, own_state, read_adapter, short
from workbench.lib.core.adapt.lora import LoRA
from workbench.lib.core.adapt.matrix import as_linear, is_linear
from workbench.lib.core.adapt.options import Room, check_options
from workbench.lib.core.adapt.packed import find_packed, unpack


def adapt(model: nn.Module, slug: str = "lora", targets: str | Sequence[str] = "*", **options: Any) -> Adapted:
    """Put the system `slug` on the linear layers of `model` whose names match `targets`; everything else is frozen.

    Args:
        model: any module; changed in place.
        slug: a system of the catalogue that has an `ADAPTER`, or "lora", the baseline of them all.
        targets: glob patterns over the names of linear layers (GPT-2's `Conv1D` among them) and of packed experts
            (`*.experts.gate_up_proj`), one or several; "*" matches every one. `report()` says what was left out.
        options: of the system, such as experts, rank and top_k; `workbench.method(slug)` says which.

    Returns:
        The handle to train, tell, report, keep and undo the adaptation.

    Raises:
        InputError: unknown slug or option, targets that match nothing or something that is no linear layer, a model
            that is adapted already (by peft, too), compiled or wrapped, a rank above a layer's width. The model is as
            it was before.
    """
    return _adapt(model, slug, targets, options)


def _adapt(model: nn.Module, slug: str, targets: str | Sequence[str], options: dict[str, Any]) -> Adapted:
    check_model(model)
    adapter, options = make_adapter(slug, options)
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns:
        raise InputError("targets is empty but must hold at least one pattern")
    found, left_out = find_targets(model, patterns)
    adapted = Adapted(model, adapter, patterns, options)
    adapted.left_out = left_out
    try:
        _put(adapted, found)
        adapter.finish(adapted)
        adapted.listen()
    except BaseException:
        adapted.remove()
        raise
    return adapted


def check_model(model: nn.Module) -> None:
    """Raise `InputError` for a model that is adapted already, or whose modules have names that are not its own."""
    if (slug_there := adapted_with(model)) is not None:
        raise InputError(f"model is adapted with {slug_there!r} already; remove() that first")
    for name, module in model.named_modules():
        where = f"at {name!r}" if name else "itself"
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise InputError(f"model is adapted with peft already, {where}; merge_and_unload() or unload() that first")
        if "_orig_mod" in module._modules:
            raise InputError(f"model is compiled, {where}; adapt it first, and compile what comes of it")
        if isinstance(module, DataParallel | DistributedDataParallel):
            raise InputError(f"model is wrapped in a {type(module).__name__}, {where}; adapt it first, then wrap it")


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


def restore_adapter(adapted: Adapted, folder: str | Path) -> None:
    """Give an adapted model what `Adapted.save` has kept of it in `folder`: its numbers as they were then.

    Raises:
        InputError: as `load_adapter`; or it was adapted otherwise. The adaptation is unchanged then.
    """
    sidecar, tensors = read_adapter(folder)
    here = {"slug": adapted.adapter.slug, "targets": list(adapted.targets), "options": adapted.options}
    here = json.loads(json.dumps(here))  # a tuple is a list there
    other = [key for key in here if sidecar[key] != here[key]]
    if wrong := [f"{key} was {short(sidecar[key])} and is {short(here[key])}" for key in other]:
        raise InputError(f"{folder} is of a model that was adapted otherwise: {'; '.join(wrong)}")
    _fill(adapted, folder, sidecar["base_sha256"], tensors)


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


def match_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """What matches one of the patterns: linear layers by their names, packed experts by the names of their tensors.

    Raises:
        InputError: a pattern matches nothing of the kind. One that matches a single module of another kind is told what
            kind that is, one that matches nothing the nearest names.
    """
    return find_targets(model, patterns)[0]


def find_targets(model: nn.Module, patterns: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What matches, and what matches by its name and cannot be adapted, with the reason."""
    modules = {name: module for name, module in model.named_modules() if name}
    allowed, other = {}, {}
    for name, module in modules.items():
        packed = [f"{name}.{key}" for key in find_packed(module)]
        if is_linear(module):
            allowed[name] = module
        elif packed and (not any(fnmatchcase(n, p) for n in packed for p in patterns) or unpack(module) is not None):
            allowed |= dict.fromkeys(packed, module)
        elif packed:
            why = f"packed in a {type(module).__name__}, which computes what is not known here"
            other |= dict.fromkeys(packed, why)
        else:
            other[name] = f"a {type(module).__name__}"
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in allowed if fnmatchcase(name, pattern)]
        if not matched:
            near = next((name for name in other if fnmatchcase(name, pattern)), None)
            if near:
                raise InputError(f"targets {pattern!r} matches {near!r}, {other[near]}, but must match linear layers")
            raise unknown("targets", pattern, allowed)
        found |= set(matched)
    left = {
        name: why
        for name, why in other.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
        and (name not in modules or any(p is not None and p.ndim > 1 for p in modules[name]._parameters.values()))
    }
    return {name: module for name, module in allowed.items() if name in found}, left  # in the order of the model


def _put(adapted: Adapted, found: dict[str, nn.Module]) -> None:
    """Replace whole feed-forward blocks where the system wants them and all their layers are wanted, then the rest."""
    model, adapter = adapted.model, adapted.adapter
    left = _unpacked(adapted, found)
    whole = type(adapter).feed_forward is not Adapter.feed_forward
    for name, module in list(model.named_modules()) if whole else ():
        block = recognise(module) if name and any(key.startswith(f"{name}.") for key in left) else None
        if isinstance(block, str):
            adapted.by_layer[name] = block
            continue
        block = block and block.within(name)
        if not block or not set(block.names.values()) <= left.keys():
            continue
        place = f"{name}.{block.place}".rstrip(".")
        layer = adapter.feed_forward(block, place)
        if layer is not None:
            if block.passed is not None:  # first: in the layer it goes on as it was
                adapted.replace(block.passed, nn.Identity())
            adapted.put(place, model.get_submodule(place), layer)
            left = {key: value for key, value in left.items() if key not in block.names.values()}
    for name, linear in left.items():
        adapted.put(name, linear, adapter.linear(as_linear(linear, own=True), name))


def _unpacked(adapted: Adapted, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear layers among what was found, with packed experts taken apart into theirs."""
    left, taken = {}, {}
    for name, module in found.items():
        if is_linear(module):
            left[name] = module
            continue
        place, _, key = name.rpartition(".")
        if module not in taken:
            taken[module] = unpack(module)
            taken[module].side, taken[module].place = adapted.side, place
            adapted.replace(module, taken[module])
        for e in range(taken[module].n_experts):
            left[f"{place}.{e}.{key}"] = taken[module].get_submodule(f"{e}.{key}")
    return left
