"""Checkpoints: weights and optimizer as safetensors with a JSON sidecar, written so that a crash costs the last one at
most.

- A checkpoint is a folder `step-00000120`, after 120 optimizer steps. It is written as `workbench.sealed` does it: a
  folder of that name is complete, or was damaged later.
- The sidecar holds the SHA-256 of every file and of itself; `load` passes over a damaged checkpoint to the one before.
- Nothing is unpickled.

The training loop draws all randomness from (seed, step), so no generator is kept. Settings that are no parameters and
may change while training (top_k and the coefficients of every router) are kept and restored.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.observe import routed_layers
from workbench.sealed import sealed_folder, sweep

FORMAT = 1
SIDECAR = "checkpoint.json"
MODEL, OPTIMIZER, EXTRA = "model.safetensors", "optimizer.safetensors", "extra.safetensors"
KEEP = 2
"""Checkpoints kept: the newest, and the one to fall back on."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says besides the weights and the optimizer's state, which `load` puts in their places.

    Attributes:
        path: its folder.
        step: optimizer steps made.
        lr_scale: factor on the scheduled learning rate.
        controls: the caller's settings, plain JSON values.
        extra: the caller's tensors.
        torch_version: the torch that wrote it; another one may round differently.
        skipped: newer checkpoints that are damaged, with the reason.
    """

    path: Path
    step: int
    lr_scale: float = 1.0
    controls: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    torch_version: str = ""
    skipped: tuple[str, ...] = ()


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
            tensors, optimizer_json = _flatten(optimizer, _names(model, optimizer))
            save_model(model, str(unfinished / MODEL))  # stores a shared parameter once
            save_file(tensors, unfinished / OPTIMIZER)
            save_file({name: tensor.contiguous() for name, tensor in (extra or {}).items()}, unfinished / EXTRA)
            content = {
                "format": FORMAT,
                "step": step,
                "lr_scale": lr_scale,
                "controls": dict(controls or {}),
                "routers": _router_settings(model),
                "optimizer": optimizer_json,
                "torch_version": torch.__version__,
                "files": {path.name: _file_digest(path) for path in sorted(unfinished.iterdir())},
            }
            sealed = {"content": content, "sha256": _digest(content)}
            (unfinished / SIDECAR).write_text(json.dumps(sealed, indent=1))
            for path in _checkpoints(folder):
                if _step(path) > step:  # of a training that then went back to before this step
                    shutil.rmtree(path)
    except SafetensorError as error:
        raise OSError(f"checkpoint {target} cannot be written: {error}") from error
    for old in _checkpoints(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Checkpoint | None:
    """Put the newest undamaged checkpoint of `folder` into `model` and `optimizer`; None where there is none at all.

    Raises:
        InputError: all checkpoints are damaged, or the checkpoint does not fit the model or the optimizer.
    """
    skipped = []
    for path in _checkpoints(Path(folder)):
        try:
            content = _verified(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(f"{path.name}: {error}")
            continue
        try:
            load_model(model, str(path / MODEL))
            if optimizer is not None:
                names = _names(model, optimizer)
                optimizer.load_state_dict(
                    _unflatten(optimizer, names, load_file(path / OPTIMIZER), content["optimizer"])
                )
            _restore_routers(model, content["routers"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"checkpoint {path} does not fit this model: {error}") from error
        return Checkpoint(
            path=path,
            step=content["step"],
            lr_scale=content["lr_scale"],
            controls=content["controls"],
            extra=load_file(path / EXTRA),
            torch_version=content["torch_version"],
            skipped=tuple(skipped),
        )
    if skipped:
        raise InputError(f"no checkpoint in {folder} can be used: {'; '.join(skipped)}")
    return None


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of all parameters and persistent buffers: equal iff bit-equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 where it has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _verified(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's sidecar; ValueError, KeyError, TypeError or OSError where anything is amiss."""
    sealed = json.loads((path / SIDECAR).read_text())
    content = sealed["content"]
    if sealed["sha256"] != _digest(content):
        raise ValueError(f"{SIDECAR} is damaged")
    if content["format"] > FORMAT:
        raise ValueError(f"format {content['format']} is newer than {FORMAT}")
    for name, digest in content["files"].items():
        if _file_digest(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    return content


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters of each group of the optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise InputError("the optimizer holds a parameter that the model has not") from None


def _flatten(optimizer: torch.optim.Optimizer, names: list[list[str]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named `parameter::key`, and the rest as JSON values."""
    groups = optimizer.state_dict()["param_groups"]
    flat = [name for group in names for name in group]
    tensors, values = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{flat[index]}::{key}"] = value.detach().contiguous()
            else:
                values[f"{flat[index]}::{key}"] = value
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return tensors, {
        "groups": [{"names": n, "options": o} for n, o in zip(names, options, strict=True)],
        "values": values,
    }


def _unflatten(
    optimizer: torch.optim.Optimizer, names: list[list[str]], tensors: dict[str, Tensor], stored: dict[str, Any]
) -> dict[str, Any]:
    """The `state_dict` that `_flatten` took apart."""
    if [group["names"] for group in stored["groups"]] != names:
        raise ValueError("the optimizer's groups hold other parameters")
    index = {name: i for i, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **stored["values"]}.items():
        parameter, _, key = name.rpartition("::")
        state.setdefault(index[parameter], {})[key] = value
    groups = []
    for now, then in zip(optimizer.state_dict()["param_groups"], stored["groups"], strict=True):
        # JSON has no tuples
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in then["options"].items()}
        groups.append({**options, "params": now["params"]})
    return {"state": state, "param_groups": groups}


def _router_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {"top_k": layer.router.top_k, "coefficients": dict(layer.router.coefficients)}
        for name, layer in routed_layers(model).items()
    }


def _restore_routers(model: nn.Module, settings: dict[str, dict[str, Any]]) -> None:
    layers = routed_layers(model)
    if layers.keys() != settings.keys():
        raise ValueError("it has other mixture-of-experts layers")
    for name, layer in layers.items():
        top_k, coefficients = settings[name]["top_k"], settings[name]["coefficients"]
        if top_k != layer.router.top_k:
            layer.router.set_top_k(top_k)
        layer.router.coefficients.clear()
        layer.router.coefficients.update(coefficients)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
