"""Checkpoints: weights and optimizer as safetensors with a JSON sidecar, written so that a crash costs the last one at
most.

- A checkpoint is a folder `step-00000120`, after 120 optimizer steps. It is written as `workbench.sealed` does it: a
  folder of that name is complete, or was damaged later.
- The sidecar holds the SHA-256 of every file and of itself; `load` passes over a damaged checkpoint to the one before.
- Nothing is unpickled.
- What several processes have written together (`distributed.checkpoints`) is read here as well.

The training loop draws all randomness from (seed, step), so no generator is kept. Settings that are no parameters and
may change while training (top_k and the coefficients of every router) are kept and restored.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core import sidecar
from workbench.lib.core.sidecar import EXTRA, MODEL, OPTIMIZER, Checkpoint
from workbench.sealed import sealed_folder, sweep


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    lr_scale: float = 1.0,
    controls: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint into `folder`, keep the newest two, and return its path.

    Args:
        folder: where checkpoints of this training lie; made if it is not there.
        step: optimizer steps made so far.
        controls, extra: anything else to be restored: plain JSON values, and tensors.

    Raises:
        OSError: the disk is full or not writable; the checkpoints of earlier steps are untouched.
    """
    folder = Path(folder)
    sweep(folder)
    target = folder / f"step-{step:08d}"
    try:
        with sealed_folder(target) as unfinished:
            names = sidecar.names_of(dict(model.named_parameters()), optimizer)
            tensors, optimizer_json = sidecar.flatten(optimizer, names)
            save_model(model, str(unfinished / MODEL))  # stores a shared parameter once
            save_file(tensors, unfinished / OPTIMIZER)
            save_file({name: tensor.contiguous() for name, tensor in (extra or {}).items()}, unfinished / EXTRA)
            sidecar.add_sidecar(unfinished, step, model, optimizer_json, lr_scale, controls)
            sidecar.forget_after(folder, step)
    except SafetensorError as error:
        raise OSError(f"checkpoint {target} cannot be written: {error}") from error
    sidecar.keep_newest(folder)
    return target


def load(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Checkpoint | None:
    """Put the newest undamaged checkpoint of `folder` into `model` and `optimizer`; None where there is none at all.

    Raises:
        InputError: all checkpoints are damaged, or the checkpoint does not fit the model or the optimizer.
    """
    found = sidecar.newest(folder)
    if found is None:
        return None
    if "processes" in found.content:
        from workbench.lib.core.distributed.checkpoints import read  # torch.distributed is only wanted here

        return found.read(read(found, model, optimizer))
    path, content = found.path, found.content
    try:
        extra, state = load_file(path / EXTRA), None
        if optimizer is not None:
            names = sidecar.names_of(dict(model.named_parameters()), optimizer)
            state = sidecar.unflatten(optimizer, names, load_file(path / OPTIMIZER), content["optimizer"])
        sidecar.restore_routers(model, content["routers"])
        load_model(model, str(path / MODEL))
        if optimizer is not None:
            optimizer.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint {path} does not fit this model: {error}") from error
    return found.read(extra)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of all parameters and persistent buffers: equal iff bit-equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
