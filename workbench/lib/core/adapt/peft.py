"""Plain LoRAs in the folder format of Hugging Face's peft: `adapter_model.safetensors` and `adapter_config.json`.

Written folders load with `peft.PeftModel.from_pretrained`; read ones may come from there. peft itself is not needed.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import Adapted
from workbench.lib.core.adapt.put import adapt
from workbench.lib.core.low_rank import LowRankExperts
from workbench.sealed import sealed_file

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""What the settings of a plain LoRA are; peft has more features, and a folder that uses one is refused."""

LoRAs = dict[str, tuple[Tensor, Tensor, float]]


def write_peft(banks: Mapping[str, LowRankExperts], folder: str | Path, expert: int = 0) -> Path:
    """Write one expert of the banks, by the names of their layers, as a LoRA that peft loads.

    Args:
        banks: of an adapted model, `{name: layer.experts for name, layer in adapted.layers.items()}`.
        folder: made if it is not there; other files in it stay.
        expert: which one, 0..E-1.
    """
    for name, bank in banks.items():
        if not 0 <= expert < bank.n_experts:
            raise InputError(f"expert is {expert} but {name} has {bank.n_experts} of them, numbered from 0")
    folder = Path(folder)
    tensors, ranks, alphas = {}, {}, {}
    for name, bank in banks.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = bank.a[expert].detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = bank.b[expert].detach().cpu().contiguous()
        ranks[name], alphas[name] = bank.rank, float(bank.scale[expert]) * bank.rank
    first = next(iter(banks))
    config = PLAIN | {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": list(banks),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }
    # the settings last: with them the folder says that it holds a LoRA
    with sealed_file(folder / CONFIG) as settings, sealed_file(folder / TENSORS) as content:
        settings.write_text(json.dumps(config, indent=1) + "\n")
        content.write_bytes(save(tensors))
    return folder


def read_loras(folder: str | Path) -> LoRAs:
    """The LoRAs of a peft folder: layer name -> (A (r, I), B (O, r), scale).

    Raises:
        InputError: no such folder, half-written files, or features beyond plain LoRA, all of them named.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise InputError(f"folder is {str(folder)!r} but must hold {CONFIG} and {TENSORS}") from error
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged or half-written: {error}") from error
    other = {key: config[key] for key, plain in PLAIN.items() if config.get(key, plain) not in (plain, None)}
    if other:
        shown = ", ".join(f"{key} = {value!r}" for key, value in other.items())
        raise InputError(f"{folder} is no plain LoRA: {shown}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if not match or tensor.ndim != 2:
            raise InputError(
                f"{folder} holds {key!r} of shape {tuple(tensor.shape)}, which no LoRA of a linear layer has"
            )
        pairs.setdefault(match.group(1), {})[match.group(2)] = tensor
    halves = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if halves or not pairs:
        raise InputError(f"{folder} lacks one half of the LoRA of {', '.join(halves) or 'every layer'}")
    return {name: (pair["A"], pair["B"], _scale(config, name, pair["A"].shape[0])) for name, pair in pairs.items()}


def read_peft(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` with the LoRAs of a peft folder.

    Lower ranks are padded with zeros to the highest, which changes nothing.

    Raises:
        InputError: as `read_loras`; or layers that the model lacks or that have other widths, all in one message.
    """
    loras = read_loras(folder)
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
    adapted = adapt(model, "lora", list(loras), rank=rank)
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            a, b, scale = loras[name]
            bank = layer.experts
            bank.a.zero_(), bank.b.zero_(), bank.scale.fill_(scale)
            bank.a[0, : a.shape[0]], bank.b[0, :, : b.shape[1]] = a, b
    return adapted


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    matched = (alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(matched, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
