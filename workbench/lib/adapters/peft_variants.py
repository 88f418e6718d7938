"""Variants of LoRA in the folders of Hugging Face's peft: VeRA, RandLoRA, HiRA and AdaLoRA.

Written folders load with `peft.PeftModel.from_pretrained`; read ones may come from there. peft itself is not needed.
Plain LoRAs, and variants that are one, are in `lib.core.adapt.peft`. peft divides AdaLoRA's product by r + 1e-5 where
r is the ranks it began with; that is put into its singular values here. In its RandLoRA column k of B, counted (base,
rank), meets row k of A, counted (rank, base): for each number of bases another order. `own={"peft_order": 1}` has it,
and so has what is read; in our own order B is written where all layers have as many bases, its columns moved.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.adapters.lora_variants import LoRAVariants
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.files import read_object, short
from workbench.lib.core.adapt.matrix import Matrix, is_turned
from workbench.lib.core.adapt.peft import PREFIX, exactly, parts, write_folder
from workbench.lib.core.adapt.put import match_targets

SHARED = "base_model."
EPS = 1e-5  # peft's, of AdaLoRA


class Format(NamedTuple):
    """How a variant lies in a folder.

    Attributes:
        peft_type: what peft calls it.
        own: of each layer, names in the folder.
        shared: of all layers together, names in the folder and in each layer.
        bases: those tensors, of the layers and in the order of `shared`, as peft has them.
        rank, alpha, dropout: names of settings; None where there is none.
        tensors: those of a layer, in the order of `own`, as they are trained; alpha in them where it is no setting.
        put: the reverse, in place.
        fixed: settings that are always these, without which it is something else.
        free: further settings, which say nothing of the function, as they are written.
    """

    peft_type: str
    own: tuple[str, ...]
    shared: dict[str, str]
    bases: Callable[[list[Any]], tuple[Tensor, ...]]
    rank: str
    alpha: str | None
    dropout: str
    tensors: Callable[[Any], tuple[Tensor, ...]]
    put: Callable[..., None]
    fixed: dict[str, Any]
    free: dict[str, Any]


def _randlora(layers: list[Any]) -> tuple[Tensor, Tensor]:
    """A and B in peft's order, and filled up with zeros to the sizes that it has them in."""
    first, bases = layers[0], {layer.bases for layer in layers}
    a, b, rank = first.shared_a, first.shared_b, first.rank
    if not first.peft_order:
        if len(bases) > 1:
            raise InputError(
                f"the layers have {', '.join(map(str, sorted(bases)))} bases, which peft pairs in another order for "
                'each: adapt with own={"peft_order": 1}'
            )
        b = b.transpose(1, 2).reshape(len(b), -1, rank)
    small, large = sorted(max(getattr(la.base, key) for la in layers) for key in ("in_features", "out_features"))
    wide_a, wide_b = a.new_zeros(rank, 1, small), b.new_zeros(large, math.ceil(small / rank), rank)
    wide_a[:, :, : a.shape[2]], wide_b[:, : b.shape[1]] = a, b
    return wide_a, wide_b


def _put_hira(layer: Any, a: Tensor, b: Tensor) -> None:
    layer.experts.a.copy_(a[None]), layer.experts.b.copy_(b[None])


def _adalora(layer: Any) -> tuple[Tensor, ...]:
    values = layer.l * layer.alive * (layer.rank + EPS) / layer.alive.sum().clamp(min=1)
    return layer.q, layer.p, values[:, None]


def _put_adalora(layer: Any, q: Tensor, p: Tensor, values: Tensor) -> None:
    """The parts that are alive, which may be fewer than there were."""
    alive = len(values)
    layer.alive.copy_(torch.arange(layer.rank, device=layer.alive.device) < alive)
    layer.q[:alive], layer.p[:, :alive] = q, p
    layer.l.zero_()[:alive] = values[:, 0] * alive / (layer.rank + EPS)


FORMATS = {
    "vera": Format(
        "VERA",
        ("vera_lambda_b", "vera_lambda_d"),
        {"vera_A": "shared_a", "vera_B": "shared_b"},
        lambda layers: (layers[0].shared_a, layers[0].shared_b),
        *("r", None, "vera_dropout"),
        lambda layer: (layer.b, layer.d),
        lambda layer, b, d: (layer.b.copy_(b), layer.d.copy_(d)),
        {"save_projection": True, "bias": "none"},
        {"d_initial": 0.1, "init_weights": True, "projection_prng_key": 0},
    ),
    "randlora": Format(
        "RANDLORA",
        ("randlora_lambda", "randlora_gamma"),
        {"randlora_A": "shared_a", "randlora_B": "shared_b"},
        _randlora,
        *("r", "randlora_alpha", "randlora_dropout"),
        lambda layer: (layer.l, layer.g),
        lambda layer, l, g: (layer.l.copy_(l), layer.g.copy_(g)),  # noqa: E741
        {"save_projection": True, "bias": "none"},
        {"sparse": False, "very_sparse": False, "init_weights": True, "projection_prng_key": 0},
    ),
    "hira": Format(
        "HIRA",
        ("hira_A", "hira_B"),
        {},
        lambda layers: (),
        *("r", None, "hira_dropout"),
        lambda layer: (layer.experts.a[0], layer.experts.scale[0] * layer.experts.b[0]),
        _put_hira,
        {"rank_pattern": {}},
        {"init_weights": True},
    ),
    "adalora": Format(
        "ADALORA",
        ("lora_A", "lora_B", "lora_E"),
        {},
        lambda layers: (),
        *("init_r", "lora_alpha", "lora_dropout"),
        _adalora,
        _put_adalora,
        {"bias": "none", "use_dora": False, "use_rslora": False, "alpha_pattern": {}},
        # which parts are dead the shapes say; the others are of a training, and needed to have the settings at all
        {"rank_pattern": None, "r": 8, "target_r": 8, "total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        | {"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "init_lora_weights": True},
    ),
}
"""By the name of the variant."""

SILENT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "peft_type"),
    *("loftq_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings that say nothing of the function: which layers there are, the tensors say."""


def write_variant(adapted: Adapted, folder: str | Path) -> Path:
    """Write an adaptation by `lora-variants` as peft has it.

    What AdaLoRA remembers of how much each part matters is not in the format; a part that is dead has the singular
    value 0.

    Raises:
        InputError: it is another system, or a variant that peft's folders have otherwise or not; its layers have
            different ranks, of which the format has one, or, of a RandLoRA in our own order, numbers of bases; one is
            of packed experts; or something else is at `folder`.
        OSError: the disk is full or not writable; what was there still is.
    """
    adapter, layers = adapted.adapter, adapted.layers
    form = FORMATS.get(adapter.variant) if isinstance(adapter, LoRAVariants) else None
    if form is None:
        what = adapter.variant if isinstance(adapter, LoRAVariants) else adapter.slug
        raise InputError(f"adapted is with {what!r} but what is written here is {', '.join(FORMATS)}")
    if packed := [n for n, la in layers.items() if isinstance(la.base, Matrix) and la.base.index is not None]:
        raise InputError(f"{', '.join(packed)} are packed experts, of which the folder of a {form.peft_type} has none")
    ranks = {name: layer.rank for name, layer in layers.items()}
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{rank} at {name}" for name, rank in ranks.items())
        raise InputError(f"the layers have the ranks {said}, but the folder of a {form.peft_type} has one for all")
    tensors = {
        f"{PREFIX}{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in zip(form.own, form.tensors(layer), strict=True)
    }
    first = next(iter(layers.values()))
    for key, tensor in zip(form.shared, form.bases(list(layers.values())), strict=True):
        tensors[f"{SHARED}{key}"] = tensor
    config = {
        "peft_type": form.peft_type,
        form.rank: first.rank,
        form.dropout: first.dropout.p,
        "target_modules": exactly(layers),
        "fan_in_fan_out": any(is_turned(layer.base) for layer in layers.values()),
        "modules_to_save": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    config |= form.fixed | form.free
    if form.alpha is not None:
        config[form.alpha] = first.scale * first.rank
    return write_folder(folder, tensors, config)


def read_variant(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` with the VeRA, RandLoRA, HiRA or AdaLoRA of a peft folder, its dropout included.

    Raises:
        InputError: no such folder, damaged or half-written files, another kind or features beyond it, all of them
            named; or layers that the model lacks or that have other widths, all in one message. The model is as it was
            before.
    """
    folder = Path(folder)
    path, tensors = parts(folder)
    found = read_object(path)
    variant, form = next(
        ((name, form) for name, form in FORMATS.items() if form.peft_type == found.get("peft_type")), (None, None)
    )
    if form is None:
        kinds = ", ".join(form.peft_type for form in FORMATS.values())
        raise InputError(f"{folder} is a {short(found.get('peft_type'))} but what is read here is {kinds}")
    rank, alpha, dropout = _settings(path, found, form)
    keys = [f"{SHARED}{key}" for key in form.shared]
    of: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(form.own)})", key)
        if key not in keys and _is_copy(form, key, tensors):
            continue
        if not (match or key in keys) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{folder} holds {key!r} of {tensor.dtype}, which is no part of a {form.peft_type}")
        if match:
            of.setdefault(match.group(1), {})[match.group(2)] = tensor
    missing = [key for key in keys if key not in tensors]
    missing += [f"{name}.{key}" for name, own in of.items() for key in form.own if key not in own]
    if missing or not of:
        raise InputError(f"{folder} lacks {', '.join(missing) or 'the tensors of every layer'}")
    here = match_targets(model, ("*",))
    if strange := [name for name in of if name not in here]:
        raise InputError(f"{folder} does not fit this model: it has no linear layer {', '.join(map(repr, strange))}")
    own = {"peft_order": 1} if variant == "randlora" else None
    options = {"variant": variant, "rank": rank, "alpha": alpha, "dropout": dropout, "own": own}
    adapted = adapt(model, "lora-variants", list(of), **options)
    try:
        _fill(adapted, folder, form, of, [tensors[f"{SHARED}{key}"] for key in form.shared])
    except BaseException:
        adapted.remove()
        raise
    return adapted


def _is_copy(form: Format, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is what all layers have: of a RandLoRA peft keeps that with each of them once more."""
    name, tensor = key.rpartition(".")[2], tensors[key]
    whole = tensors.get(f"{SHARED}{name}") if name in form.shared else None
    return whole is not None and whole.dtype == tensor.dtype and torch.equal(whole, tensor)


def _settings(path: Path, found: Mapping[str, Any], form: Format) -> tuple[int, float | None, float]:
    """Rank, alpha and dropout; an `InputError` of all that makes a folder something else."""
    fixed = {"modules_to_save": None} | form.fixed
    known = SILENT | form.free.keys() | {form.rank, form.alpha, form.dropout}
    off = (None, False, [], {})
    other = [
        f"{key} = {short(value)}"
        for key, value in found.items()
        if key not in known and value != fixed.get(key) and not (value in off and fixed.get(key) in (*off, "none"))
    ]
    if other:
        raise InputError(f"{path.parent} is more than a plain {form.peft_type}: {', '.join(other)}")
    rank, dropout = found.get(form.rank), found.get(form.dropout, 0.0)
    alpha = found.get(form.alpha) if form.alpha else None
    if type(rank) is not int or rank < 1:
        raise InputError(f"{path}: {form.rank} is {short(rank)} but must be a whole number, at least 1")
    for key, value, most in ((form.alpha, alpha, 1e30), (form.dropout, dropout, 1.0)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key and not (number and 0 <= value < most):
            raise InputError(f"{path}: {key} is {short(value)} but must be a number, at least 0 and below {most:g}")
    if alpha == 0:
        raise InputError(f"{path}: {form.alpha} is 0 but must be above 0")
    return rank, None if alpha is None else float(alpha), float(dropout)


@torch.no_grad()
def _fill(
    adapted: Adapted, folder: Path, form: Format, of: Mapping[str, Mapping[str, Tensor]], shared: list[Tensor]
) -> None:
    wrong = []
    for name, layer in adapted.layers.items():
        wanted = form.tensors(layer)
        if form.peft_type == "ADALORA":
            alive = len(of[name]["lora_E"])
            wanted = wanted[0][:alive], wanted[1][:, :alive], wanted[2][:alive]
        for key, tensor in zip(form.own, wanted, strict=True):
            if (there := tuple(of[name][key].shape)) != tuple(tensor.shape):
                wrong.append(f"{name}.{key} is {there} but must be {tuple(tensor.shape)}")
    first = next(iter(adapted.layers.values()))
    places = [getattr(first, name) for name in form.shared.values()]
    for key, place, tensor in zip(form.shared, places, shared, strict=True):
        if tensor.ndim != place.ndim or any(a < b for a, b in zip(tensor.shape, place.shape, strict=True)):
            wrong.append(f"{key} is {tuple(tensor.shape)} but must be at least {tuple(place.shape)}")
    if wrong:
        raise InputError(f"{folder} does not fit this model: {'; '.join(wrong)}")
    for name, layer in adapted.layers.items():
        form.put(layer, *(of[name][key].to(first.base.weight.device) for key in form.own))
    for place, tensor in zip(places, shared, strict=True):
        place.copy_(tensor[tuple(map(slice, place.shape))])
