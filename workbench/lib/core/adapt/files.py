"""Adapters on disk: two files in a folder, `adapter.safetensors` and `adapter.json`. Nothing is unpickled."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.adapt.layer import AdaptedLayer
from workbench.sealed import sealed_folder, whole

FORMAT = 1
TENSORS, SIDECAR = "adapter.safetensors", "adapter.json"


def write_adapter(
    folder: str | Path,
    layers: Mapping[str, AdaptedLayer],
    slug: str,
    targets: Sequence[str],
    options: Mapping[str, Any],
) -> Path:
    """Keep the layers of an adapted model in a new folder, or in place of the adaptation that is there.

    Raises:
        InputError: something else is at `folder`.
        OSError: the disk is full or not writable; what was there still is.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / SIDECAR).is_file():
        raise InputError(f"folder is {str(folder)!r} but must be new, or hold an adaptation")
    content = safetensors.save({name: t.detach().contiguous().cpu() for name, t in own_state(layers).items()})
    sidecar = {
        "format": FORMAT,
        "slug": slug,
        "targets": list(targets),
        "options": dict(options),
        "base_sha256": base_digest(layers),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with sealed_folder(folder) as unfinished:
        (unfinished / TENSORS).write_bytes(content)
        (unfinished / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
    return folder


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a folder says of an adaptation, and its tensors.

    Raises:
        InputError: it holds no adaptation, a damaged one or one of a newer format.
    """
    folder, there = Path(folder), whole(folder)
    if not (there / SIDECAR).is_file():
        raise InputError(f"folder is {str(folder)!r} but must hold an adaptation ({SIDECAR}, {TENSORS})")
    try:
        sidecar = json.loads((there / SIDECAR).read_text())
        if sidecar["format"] > FORMAT:
            raise InputError(f"{folder} has format {sidecar['format']} but this workbench reads up to {FORMAT}")
        content = (there / TENSORS).read_bytes()
        if hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
            raise InputError(f"{folder} is damaged: the SHA-256 of {TENSORS} is not the one it was saved with")
        return sidecar, safetensors.load(content)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged or half-written: {error}") from error


def own_state(layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """Every tensor that was put in, trained or not, by its name in the model; one that several layers share, once."""
    found: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if not key.startswith("base.") and id(tensor) not in found:
                found.add(id(tensor))
                state[f"{name}.{key}"] = tensor
    return state


def base_digest(layers: Mapping[str, AdaptedLayer]) -> str:
    """SHA-256 of the frozen weights of the adapted layers."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        for key, tensor in layer.base.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
