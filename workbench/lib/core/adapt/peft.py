"""Plain LoRAs in the folder format of Hugging Face's peft: `adapter_model.safetensors` and `adapter_config.json`.

Written folders load with `peft.PeftModel.from_pretrained`; read ones may come from there. peft itself is not needed.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import Adapted
from workbench.lib.core.adapt.files import parse_tensors, read_bytes
from workbench.lib.core.adapt.peft_config import Config, anchored
from workbench.lib.core.adapt.put import adapt
from workbench.lib.core.low_rank import LowRankExperts
from workbench.sealed import sealed_folder, whole

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

LoRAs = dict[str, tuple[Tensor, Tensor, float]]


def write_peft(banks: Mapping[str, LowRankExperts], folder: str | Path, expert: int = 0) -> Path:
    """Write one expert of the banks, by the names of their layers, as a LoRA that peft loads.

    Args:
        banks: of an adapted model, `{name: layer.experts for name, layer in adapted.layers.items()}`.
        folder: new, empty or with a LoRA, which is replaced; other files in it stay.
        expert: which one, 0..E-1.

    Raises:
        InputError: something else is at `folder`, there is no such expert, or no bank.
        OSError: the disk is full or not writable; what was there still is.
    """
    for name, bank in banks.items():
        if not 0 <= expert < bank.n_experts:
            raise InputError(f"expert is {expert} but {name} has {bank.n_experts} of them, numbered from 0")
    if not banks:
        raise InputError("banks is empty but must hold the LoRA of at least one layer")
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"folder is {str(folder)!r} but must be new, empty, or hold a LoRA")
    tensors, ranks, alphas = {}, {}, {}
    for name, bank in banks.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = bank.a[expert].detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = bank.b[expert].detach().cpu().contiguous()
        ranks[name], alphas[name] = bank.rank, float(bank.scale[expert]) * bank.rank
    first = next(iter(banks))
    config = {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {anchored(name): rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {anchored(name): alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        # one pattern that is a whole name: of a list, peft takes each for the end of one
        "target_modules": f"^(?:{'|'.join(re.escape(name) for name in banks)})$",
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    with sealed_folder(folder) as unfinished:
        if folder.exists():
            shutil.copytree(folder, unfinished, symlinks=True, dirs_exist_ok=True)
        (unfinished / TENSORS).write_bytes(save(tensors))
        (unfinished / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return folder


def read_loras(folder: str | Path, model: nn.Module | None = None) -> LoRAs:
    """The LoRAs of a peft folder: layer name -> (A (r, I), B (O, r), scale).

    Args:
        model: what they are for. Beside the LoRA of a head or an embedding, peft keeps a copy of the base weight: where
            it equals the model's it is left out.

    Raises:
        InputError: no such folder, damaged or half-written files, features beyond plain LoRA, all of them named; or a
            copy of a base weight that is not the model's, or with no model to compare it with.
    """
    return _read(Path(folder), model)[0]


def _read(folder: Path, model: nn.Module | None) -> tuple[LoRAs, Config]:
    there = whole(folder)
    if not (there / CONFIG).is_file() or not (there / TENSORS).is_file():
        raise InputError(f"folder is {str(folder)!r} but must hold {CONFIG} and {TENSORS}")
    config = Config(there / CONFIG)
    tensors = parse_tensors(read_bytes(there / TENSORS), there / TENSORS)
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
    if strange := [name for name in pairs if not config.targeted(name)]:
        raise InputError(f"{folder} holds a LoRA of {', '.join(strange)}, which its settings do not name")
    return {name: (p["A"], p["B"], config.scale(name, len(p["A"]))) for name, p in pairs.items()}, config


def read_peft(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` with the LoRAs of a peft folder, its dropout included.

    Lower ranks are padded with zeros to the highest, which changes nothing.

    Raises:
        InputError: as `read_loras`; or layers that the model lacks or that have other widths, all in one message. The
            model is as it was before.
    """
    loras, config = _read(Path(folder), model)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    wrong = [f"the model has no linear layer {name!r}" for name in loras if name not in linears]
    for name in loras.keys() & linears.keys():
        a, b, _ = loras[name]
        here = (linears[name].out_features, linears[name].in_features)
        if (b.shape[0], a.shape[1]) != here:
            wrong.append(f"{name} is for a layer of shape {(b.shape[0], a.shape[1])} but the model's is {here}")
    if wrong:
        raise InputError(f"{folder} does not fit this model: {'; '.join(sorted(wrong))}")
    rank = max(a.shape[0] for a, _, _ in loras.values())
    if narrow := [name for name, (a, b, _) in loras.items() if rank > min(a.shape[1], b.shape[0])]:
        raise InputError(f"{folder} has LoRAs of rank {rank}, for which {', '.join(narrow)} is too narrow")
    adapted = adapt(model, "lora", list(loras), rank=rank, dropout=config.dropout)
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            a, b, scale = loras[name]
            bank = layer.experts
            bank.a.zero_(), bank.b.zero_(), bank.scale.fill_(scale)
            bank.a[0, : a.shape[0]], bank.b[0, :, : b.shape[1]] = a, b
    return adapted


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
