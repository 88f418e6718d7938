"""Adapters on disk: two files in a folder, `adapter.safetensors` and `adapter.json`. Nothing is unpickled.

A folder may come from anywhere, so nothing in it is trusted: what is not as it must be is an `InputError`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.adapt.layer import AdaptedLayer
from workbench.lib.core.adapt.matrix import is_turned, tensors_of
from workbench.sealed import sealed_folder, whole

FORMAT = 1
TENSORS, SIDECAR = "adapter.safetensors", "adapter.json"
LONGEST = 2**24
"""Bytes of the longest file of settings that is read; those of a thousand layers have 2**17."""


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
        "layers": list(layers),
        "turned": [name for name, layer in layers.items() if is_turned(layer.base)],
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
    sidecar = read_object(there / SIDECAR)
    format_ = sidecar.get("format")
    if type(format_) is int and format_ > FORMAT:
        raise InputError(f"{folder} has format {format_} but this workbench reads up to {FORMAT}")
    for key, (said, right) in ENTRIES.items():
        if not right(sidecar.get(key)):
            raise InputError(f"{folder} is damaged: {key} of {SIDECAR} is {short(sidecar.get(key))} but must be {said}")
    content = read_bytes(there / TENSORS)
    if hashlib.sha256(content).hexdigest() != sidecar["sha256"]:
        raise InputError(f"{folder} is damaged: the SHA-256 of {TENSORS} is not the one it was saved with")
    return sidecar, parse_tensors(content, there / TENSORS)


def _digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and 0 < len(v) <= 1000 for v in value)


def _small(value: object) -> bool:
    if isinstance(value, dict | list):
        return all(map(_small, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) <= 1e6


ENTRIES = {
    "format": (f"a whole number from 1 to {FORMAT}", lambda value: type(value) is int and value >= 1),
    "slug": ("the name of a system", lambda value: isinstance(value, str)),
    "targets": ("a list of patterns of at most 1000 characters", lambda value: bool(value) and _names(value)),
    "layers": ("a list of names of layers, or nothing", lambda value: value is None or _names(value)),
    "turned": ("a list of names of layers, or nothing", lambda value: value is None or _names(value)),
    "options": ("an object, no number in it above a million", lambda value: isinstance(value, dict) and _small(value)),
    "base_sha256": ("a SHA-256", _digest),
    "sha256": ("a SHA-256", _digest),
}
"""What the sidecar holds: key -> what it must be, in words and as a check."""


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file is.

    Raises:
        InputError: it cannot be read, is longer than `LONGEST`, or is something else.
    """
    try:
        value = json.loads(read_bytes(path, LONGEST))
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, a number of 5000 digits; nested too deep
        raise InputError(f"{path} is damaged or half-written: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {short(value)} but must hold an object")
    return value


def read_bytes(path: Path, longest: int | None = None) -> bytes:
    """The content of a plain file; an `InputError` where it is none, cannot be read or is longer than that."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is no file")
        if longest is not None and path.stat().st_size > longest:
            raise InputError(f"{path} has {path.stat().st_size} bytes but must have at most {longest}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; an `InputError` that names it where it is none."""
    try:
        return safetensors.load(content)
    # beside its own error the library lets through those of torch for kinds and shapes that torch has not
    except Exception as error:
        raise InputError(f"{path} is damaged or half-written: {error!r}") from error


def short(value: object) -> str:
    """A value from a file in an error message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


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
        for key, tensor in tensors_of(layer.base).items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
