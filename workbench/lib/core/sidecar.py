"""What a checkpoint says beside its tensors: its sidecar, which folder is the newest whole one, what an optimizer and
routers keep.

One process (`checkpoint`) and several (`distributed.checkpoints`) write the same folders by it, and read each other's.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.observe import routed_layers

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


def add_sidecar(
    unfinished: Path,
    step: int,
    model: nn.Module,
    optimizer_json: Mapping[str, Any],
    lr_scale: float,
    controls: Mapping[str, Any] | None,
    processes: Mapping[str, Any] | None = None,
) -> None:
    """Write the sidecar into the folder of a checkpoint, when all else is in it."""
    content = {
        "format": FORMAT,
        "step": step,
        "lr_scale": lr_scale,
        "controls": dict(controls or {}),
        "routers": router_settings(model),
        "optimizer": optimizer_json,
        "torch_version": torch.__version__,
        "files": {path.name: _file_digest(path) for path in sorted(unfinished.iterdir())},
    }
    if processes is not None:
        content["processes"] = dict(processes)
    sealed = {"content": content, "sha256": _digest(content)}
    (unfinished / SIDECAR).write_text(json.dumps(sealed, indent=1))


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of a training that then went back to before this step."""
    for path in _checkpoints(folder):
        if _step(path) > step:
            shutil.rmtree(path)


def keep_newest(folder: Path) -> None:
    """Remove all checkpoints but the newest `KEEP`."""
    for old in _checkpoints(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


class Found(NamedTuple):
    """A checkpoint that is whole: its folder, the content of its sidecar, and why newer ones were passed over."""

    path: Path
    content: dict[str, Any]
    skipped: tuple[str, ...]

    def read(self, extra: dict[str, Tensor]) -> Checkpoint:
        """What it says, when its tensors have been read."""
        own = {key: self.content[key] for key in ("step", "lr_scale", "controls", "torch_version")}
        return Checkpoint(path=self.path, extra=extra, skipped=self.skipped, **own)


def newest(folder: str | Path) -> Found | None:
    """The newest undamaged checkpoint of a folder; None where there is none, InputError where all are damaged."""
    skipped = []
    for path in _checkpoints(Path(folder)):
        try:
            return Found(path, _verified(path), tuple(skipped))
        except (OSError, ValueError) as error:
            skipped.append(f"{path.name}: {error}")
    if skipped:
        raise InputError(f"no checkpoint in {folder} can be used: {'; '.join(skipped)}")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 where it has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _verified(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's sidecar; ValueError or OSError where anything is amiss."""
    try:
        sealed = _told(json.loads((path / SIDECAR).read_bytes()), content=dict, sha256=str)
        content = sealed["content"]
        if sealed["sha256"] != _digest(content):
            raise ValueError(f"{SIDECAR} is damaged")
        _check_content(content)
    except RecursionError:
        raise ValueError(f"{SIDECAR} is nested too deeply") from None
    if content["step"] != _step(path):
        raise ValueError(f"{SIDECAR} is of step {content['step']}")
    for name, digest in content["files"].items():
        if _file_digest(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    if more := {part.name for part in path.glob("*.safetensors")} - content["files"].keys():
        raise ValueError(f"{min(more)} is none of its files")
    return content


def _check_content(content: dict[str, Any]) -> None:
    """ValueError unless it is what `save` writes: a digest says no more than that who wrote it made one."""
    if _told(content, format=int)["format"] > FORMAT:
        raise ValueError(f"format {content['format']} is newer than {FORMAT}")
    _told(content, step=int, lr_scale=float, controls=dict, torch_version=str, routers=dict, optimizer=dict, files=dict)
    if "processes" in content:
        _told(_told(content, processes=dict)["processes"], world=int, layout=str)
        if not all(re.fullmatch(r"shard-\d+-model-\d+-of-\d+\.safetensors", name) for name in content["files"]):
            raise ValueError(f"{SIDECAR} lists other files than the shards of processes")
    elif content["files"].keys() != {MODEL, OPTIMIZER, EXTRA}:
        raise ValueError(f"{SIDECAR} lists other files than {MODEL}, {OPTIMIZER} and {EXTRA}")
    for router in content["routers"].values():
        for coefficient in _told(router, top_k=(int, NoneType), coefficients=dict)["coefficients"].values():
            _told({"coefficient": coefficient}, coefficient=float)
    stored = _told(content["optimizer"], groups=list, values=dict)
    plain = list(stored["values"].values())
    for group in stored["groups"]:
        _told(group, names=list, options=dict)
        for value in group["options"].values():
            plain += value if isinstance(value, list) else [value]  # JSON has no tuples
    for value in plain:
        _told({"value": value}, value=(float, bool, str, NoneType))


def _told(value: Any, /, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The value, if it is a dict with these keys and their values are of these types; a float is any finite number."""
    if not isinstance(value, dict) or not kinds.keys() <= value.keys():
        raise ValueError(f"{SIDECAR} has no {', '.join(kinds)} where they must be")
    for name, kind in kinds.items():
        found, allowed = value[name], kind if isinstance(kind, tuple) else (kind,)
        number = float in allowed and type(found) in (int, float) and abs(found) <= sys.float_info.max
        if not number and (type(found) is float or type(found) not in allowed):
            raise ValueError(f"{SIDECAR} has {str(found)[:60]!r} for {name}")
    return value


def names_of(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters of each group of the optimizer."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    try:
        return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise InputError("the optimizer holds a parameter that the model has not") from None


def flatten(optimizer: torch.optim.Optimizer, names: list[list[str]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
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


def unflatten(
    optimizer: torch.optim.Optimizer, names: list[list[str]], tensors: dict[str, Tensor], stored: dict[str, Any]
) -> dict[str, Any]:
    """The `state_dict` that `flatten` took apart."""
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


def router_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What may change of each router while it trains, by the name of its layer: "top_k" and "coefficients"."""
    return {
        name: {"top_k": layer.router.top_k, "coefficients": dict(layer.router.coefficients)}
        for name, layer in routed_layers(model).items()
    }


def restore_routers(model: nn.Module, settings: Mapping[str, dict[str, Any]]) -> None:
    """Put back what `router_settings` gave; ValueError where the model has other layers, or routers of other kinds."""
    layers = routed_layers(model)
    if layers.keys() != settings.keys():
        raise ValueError("it has other mixture-of-experts layers")
    for name, layer in layers.items():
        top_k = settings[name]["top_k"]
        if (top_k is None) != (layer.router.top_k is None):
            raise ValueError(f"{name} has a router of another kind")
        if top_k != layer.router.top_k:
            layer.router.set_top_k(top_k)
    for name, layer in layers.items():
        layer.router.coefficients.clear()
        layer.router.coefficients.update(settings[name]["coefficients"])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
