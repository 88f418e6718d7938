"""Plain LoRAs in the folder format of Hugging Face's peft: `adapter_model.safetensors` and `adapter_config.json`.

Written folders load with `peft.PeftModel.from_pretrained`; read ones may come from there. peft itself is not needed.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import Adapted
from workbench.lib.core.adapt.files import parse_tensors, read_bytes
from workbench.lib.core.adapt.peft_config import Config, anchored
from workbench.lib.core.adapt.put import adapt, match_targets
from workbench.lib.core.low_rank import LowRankExperts
from workbench.sealed import sealed_folder, whole

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

LoRAs = dict[str, tuple[Tensor, Tensor, float]]


def write_peft(
    banks: Mapping[str, LowRankExperts],
    folder: str | Path,
    expert: int = 0,
    packed: Sequence[str] = (),
    magnitudes: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write one expert of the banks, by the names of their layers, as a LoRA that peft loads.

    Args:
        banks: of an adapted model, `{name: layer.experts for name, layer in adapted.layers.items()}`.
        folder: new, empty or with a LoRA, which is replaced; other files in it stay.
        expert: which one, 0..E-1.
        packed: names of packed parameters, such as "mlp.experts.gate_up_proj", whose banks are called by each of the
            model's experts, "mlp.experts.0.gate_up_proj" and so on; those of one module in the order it has them.
        magnitudes: of a DoRA, (O,) for every bank by its name; `read_peft` does not read such a folder.
        settings: of peft's, such as where the base is from, that say nothing of the update.

    Raises:
        InputError: something else is at `folder`, there is no such expert, or no bank; the banks of a packed
            parameter have different ranks or scales; or magnitudes are of others than the banks.
        OSError: the disk is full or not writable; what was there still is.
    """
    for name, bank in banks.items():
        if not 0 <= expert < bank.n_experts:
            raise InputError(f"expert is {expert} but {name} has {bank.n_experts} of them, numbered from 0")
    if not banks:
        raise InputError("banks is empty but must hold the LoRA of at least one layer")
    if magnitudes is not None and (packed or magnitudes.keys() != banks.keys()):
        raise InputError(f"magnitudes are of {', '.join(magnitudes)} but must be of all banks, none of them packed")
    tensors, ranks, alphas, plain = {}, {}, {}, dict(banks)
    for i, name in enumerate(packed):
        a, b, scale = _packed(name, plain, expert)
        place = name.rpartition(".")[0]
        # peft wraps a module once for each of its parameters, the first the innermost
        around = ".base_layer" * sum(other.rpartition(".")[0] == place for other in packed[i + 1 :])
        tensors[f"{PREFIX}{place}{around}.lora_A.weight"] = a
        tensors[f"{PREFIX}{place}{around}.lora_B.weight"] = b
        ranks[name], alphas[name] = scale[0], scale[0] * scale[1]
    for name, bank in plain.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = bank.a[expert]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = bank.b[expert]
        ranks[name], alphas[name] = bank.rank, float(bank.scale[expert]) * bank.rank
    for name, magnitude in (magnitudes or {}).items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
    first = next(iter(ranks))
    config = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {anchored(name): rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {anchored(name): alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": exactly(plain) if plain else [],
        "target_parameters": list(packed) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": magnitudes is not None,
        "init_lora_weights": True,
        # peft itself goes by the kind of layer, and says this of the last one; packed ones it does not take with it
        "fan_in_fan_out": any(bank.turned for bank in plain.values()),
        "modules_to_save": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    } | dict(settings or {})
    return write_folder(folder, tensors, config)


def exactly(names: Iterable[str]) -> str:
    """One pattern of `target_modules` that is whole names: of a list, peft takes each for the end of one."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def write_folder(folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write tensors and settings, new or in place of those that are there; other files stay.

    Raises:
        InputError: something else is at `folder`.
        OSError: the disk is full or not writable; what was there still is.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"folder is {str(folder)!r} but must be new, empty, or hold a LoRA")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with sealed_folder(folder) as unfinished:
        if folder.exists():
            shutil.copytree(folder, unfinished, symlinks=True, dirs_exist_ok=True)
        (unfinished / TENSORS).write_bytes(save(tensors))
        (unfinished / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return folder


def _packed(name: str, banks: dict[str, LowRankExperts], expert: int) -> tuple[Tensor, Tensor, tuple[int, float]]:
    """A (E r, I) in blocks, B (O, r E) interleaved, (r, scale): of the banks of a packed parameter, which are taken."""
    place, _, key = name.rpartition(".")
    found: list[LowRankExperts] = []
    while (one := banks.pop(f"{place}.{len(found)}.{key}", None)) is not None:
        found.append(one)
    kinds = {(bank.rank, float(bank.scale[expert])) for bank in found}
    if len(kinds) != 1:
        raise InputError(
            f"packed {name!r} has banks of (rank, scale) {sorted(kinds)} but must have some of the same, "
            f"{place}.0.{key} and so on"
        )
    a, b = (torch.stack([getattr(bank, half)[expert] for bank in found]) for half in "ab")
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), kinds.pop()


def read_loras(folder: str | Path, model: nn.Module | None = None) -> LoRAs:
    """The LoRAs of a peft folder: layer name -> (A (r, I), B (O, r), scale).

    One of packed parameters is one LoRA for each of their experts, "mlp.experts.0.gate_up_proj" and so on.

    Args:
        model: what they are for. Beside the LoRA of a head or an embedding, peft keeps a copy of the base weight: where
            it equals the model's it is left out.

    Raises:
        InputError: no such folder, damaged or half-written files, features beyond plain LoRA, all of them named; or a
            copy of a base weight that is not the model's, or with no model to compare it with.
    """
    return read_folder(Path(folder), model)[0]


def read_folder(folder: Path, model: nn.Module | None) -> tuple[LoRAs, Config, list[str]]:
    """The LoRAs, the settings, and what to adapt for them: names of layers and of packed parameters."""
    settings, tensors = parts(folder)
    config = Config(settings)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if match and tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() and _finite(tensor):
            pairs.setdefault(match.group(1), {})[match.group(2)] = tensor
        elif match or not _is_copy(folder, key, tensor, model):
            raise InputError(
                f"{folder} holds {key!r} of shape {tuple(tensor.shape)} and {tensor.dtype}, which is no LoRA of a "
                "linear layer in finite numbers"
            )
    halves = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if halves or not pairs:
        raise InputError(f"{folder} lacks one half of the LoRA of {', '.join(halves) or 'every layer'}")
    unequal = [f"{n}: A {tuple(p['A'].shape)}, B {tuple(p['B'].shape)}" for n, p in pairs.items() if _unequal(p)]
    if unequal:
        raise InputError(f"{folder} has halves of unequal ranks: {'; '.join(unequal)}")
    packed = _unpacked(folder, pairs, config, model)
    if strange := [name for name in pairs if not config.targeted(name)]:
        raise InputError(f"{folder} holds a LoRA of {', '.join(strange)}, which its settings do not name")
    plain = {name: (p["A"], p["B"], config.scale(name, len(p["A"]))) for name, p in pairs.items()}
    return plain | {k: v for loras in packed.values() for k, v in loras.items()}, config, [*plain, *packed]


def parts(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of settings of a peft folder, and its tensors.

    Raises:
        InputError: there are none, or they are damaged or half-written.
    """
    there = whole(folder)
    if not (there / CONFIG).is_file() or not (there / TENSORS).is_file():
        raise InputError(f"folder is {str(folder)!r} but must hold {CONFIG} and {TENSORS}")
    return there / CONFIG, parse_tensors(read_bytes(there / TENSORS), there / TENSORS)


def _unpacked(
    folder: Path, pairs: dict[str, dict[str, Tensor]], config: Config, model: nn.Module | None
) -> dict[str, LoRAs]:
    """The LoRAs of each packed parameter, expert by expert; their pairs are taken."""
    if not config.parameters:
        return {}
    if model is None:
        raise InputError(f"{folder} has target_parameters: give the model, which says what lies in them")
    found: dict[str, LoRAs] = {}
    for place, module in model.named_modules():
        held = [(f"{place}.{key}", p) for key, p in module.named_parameters(recurse=False)]
        held = [(name, p) for name, p in held if config.holds(name)]
        for i, (name, p) in enumerate(held):
            pair = pairs.pop(place + ".base_layer" * (len(held) - 1 - i), None)
            experts = len(p)
            if pair is None or p.ndim != 3 or len(pair["A"]) % experts:
                raise InputError(f"{folder} has no LoRA of {name}, {tuple(p.shape)}, that is one of packed experts")
            a, b, key = pair["A"], pair["B"], name.rpartition(".")[2]
            a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
            scale = config.scale(name, a.shape[1])
            found[name] = {f"{place}.{e}.{key}": (a[e], b[e], scale) for e in range(experts)}
    return found


def read_peft(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` with the LoRAs of a peft folder, its dropout included.

    Lower ranks are padded with zeros to the highest, which changes nothing.

    Raises:
        InputError: as `read_loras`; or layers that the model lacks or that have other widths, all in one message. The
            model is as it was before.
    """
    loras, config, names = read_folder(Path(folder), model)
    here = match_targets(model, ("*",))
    if wrong := [f"the model has no linear layer {name!r}" for name in sorted(names) if name not in here]:
        raise InputError(f"{folder} does not fit this model: {'; '.join(wrong)}")
    rank = max(a.shape[0] for a, _, _ in loras.values())
    if narrow := [name for name, (a, b, _) in loras.items() if rank > min(a.shape[1], b.shape[0])]:
        raise InputError(f"{folder} has LoRAs of rank {rank}, for which {', '.join(narrow)} is too narrow")
    adapted = adapt(model, "lora", names, rank=rank, dropout=config.dropout)
    try:
        _fill(adapted, folder, loras)
    except BaseException:
        adapted.remove()
        raise
    return adapted


@torch.no_grad()
def _fill(adapted: Adapted, folder: str | Path, loras: LoRAs) -> None:
    wrong = []
    for name, layer in adapted.layers.items():
        (a, b, scale), bank = loras[name], layer.experts
        if (b.shape[0], a.shape[1]) != (bank.d_out, bank.d_in):
            there, here = (b.shape[0], a.shape[1]), (bank.d_out, bank.d_in)
            wrong.append(f"{name} is for a layer of shape {there} but the model's is {here}")
            continue
        bank.a.zero_(), bank.b.zero_(), bank.scale.fill_(scale)
        bank.a[0, : a.shape[0]], bank.b[0, :, : b.shape[1]] = a, b
    if wrong:
        raise InputError(f"{folder} does not fit this model: {'; '.join(sorted(wrong))}")


def _is_copy(folder: Path, key: str, tensor: Tensor, model: nn.Module | None) -> bool:
    """Whether a tensor is the model's own base weight; an `InputError` where it should be and is not."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+?)(?:\.base_layer)?\.(weight|bias)", key)
    if not match or ".lora_" in key:
        return False
    name = f"{match.group(1)}.{match.group(2)}"
    if model is None:
        raise InputError(f"{folder} holds a copy of the base's {name}: give the model, to compare it with")
    here = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if here is None or here.shape != tensor.shape or not torch.equal(tensor.to(here.dtype), here.detach().cpu()):
        raise InputError(f"{folder} holds a base weight {name} that is not this model's: it is more than a plain LoRA")
    return True


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.float().isfinite().all())


def _unequal(pair: Mapping[str, Tensor]) -> bool:
    return pair["A"].shape[0] != pair["B"].shape[1]
