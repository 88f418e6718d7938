"""Adapters on disk: two files in a folder, `adapter.safetensors` and `adapter.json`. Nothing is unpickled.

`save` writes a folder under another name and renames it, so that a folder of that name is complete or was damaged
later. `load` compares everything before it changes anything, and says all that does not fit at once.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.adapted import Adapted
from workbench.lib.core.adapt.put import adapt

FORMAT = 1
TENSORS, SIDECAR = "adapter.safetensors", "adapter.json"


def save(adapted: Adapted, folder: str | Path) -> Path:
    """Keep an adaptation in a new folder, or in place of the adaptation that is there.

    Args:
        folder: a path that does not exist, or one that holds an adaptation.

    Raises:
        InputError: something else is at `folder`.
        OSError: the disk is full or not writable; what was there still is.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / SIDECAR).is_file():
        raise InputError(f"folder is {str(folder)!r} but must be new, or hold an adaptation")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in own_state(adapted).items()}
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(tensors, unfinished / TENSORS)
        sidecar = {
            "format": FORMAT,
            "slug": adapted.adapter.slug,
            "targets": adapted.targets,
            "options": adapted.options,
            "base_sha256": base_digest(adapted),
            "sha256": hashlib.sha256((unfinished / TENSORS).read_bytes()).hexdigest(),
        }
        (unfinished / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load(model: nn.Module, folder: str | Path) -> Adapted:
    """Adapt `model` as the model of a saved adaptation was.

    Raises:
        InputError: the folder holds no adaptation, a damaged one or one of a newer format; or it was made on other
            weights, or has tensors of other names or shapes: all of it in one message. The model is unchanged then.
    """
    folder = Path(folder)
    sidecar, tensors = _read(folder)
    adapted = adapt(model, sidecar["slug"], sidecar["targets"], **sidecar["options"])
    here = own_state(adapted)
    wrong = [f"{name} is missing" for name in here if name not in tensors]
    wrong += [f"{name} has no place in this model" for name in tensors if name not in here]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} but must be {tuple(here[name].shape)}"
        for name in here
        if name in tensors and tensors[name].shape != here[name].shape
    ]
    if base_digest(adapted) != sidecar["base_sha256"]:
        wrong.append("the layers it was made on have other weights than this model's")
    if wrong:
        adapted.remove()
        raise InputError(f"{folder} does not fit this model: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(tensors[name])
    return adapted


def own_state(adapted: Adapted) -> dict[str, Tensor]:
    """Every tensor that was put in, trained or not, by its name in the model; one that several layers share, once."""
    found: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    for name, layer in adapted.layers.items():
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if not key.startswith("base.") and id(tensor) not in found:
                found[id(tensor)] = f"{name}.{key}"
                state[f"{name}.{key}"] = tensor
    return state


def base_digest(adapted: Adapted) -> str:
    """SHA-256 of the frozen weights of the adapted layers."""
    digest = hashlib.sha256()
    for name, layer in adapted.layers.items():
        for key, tensor in layer.base.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / SIDECAR).is_file():
        raise InputError(f"folder is {str(folder)!r} but must hold an adaptation ({SIDECAR}, {TENSORS})")
    try:
        sidecar = json.loads((folder / SIDECAR).read_text())
        if sidecar["format"] > FORMAT:
            raise InputError(f"{folder} has format {sidecar['format']} but this workbench reads up to {FORMAT}")
        content = (folder / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
            raise InputError(f"{folder} is damaged: the SHA-256 of {TENSORS} is not the one it was saved with")
        return sidecar, load_file(folder / TENSORS)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged or half-written: {error}") from error
