"""Checkpoints that several processes write together and any number reads, by torch.distributed.checkpoint (DCP).

Each rank writes what it has into a safetensors file of its own, nothing twice and nothing pickled; rank 0 adds the
sidecar and seals the folder, as `lib.core.checkpoint` does for one process. Tensors have the names of the whole model
and lie in it where their offsets say: what 2 processes have written 4 read, or one, and what one has written they do.

What DCP does in silence is refused: it casts a tensor to the type of the one that it is read into, a float to a whole
number included.
"""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from workbench.errors import InputError
from workbench.lib.core import sidecar
from workbench.lib.core.distributed.layouts import Processes, led
from workbench.lib.core.sidecar import Checkpoint, Found
from workbench.sealed import sealed_folder, sweep

EXTRA = "::"
"""What the names of a caller's tensors begin with, so that none is taken for one of the model."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    replicas: Processes,
    lr_scale: float = 1.0,
    controls: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint of a model in a layout; every rank calls it. Otherwise as `checkpoint.save`.

    Args:
        controls, extra: those of rank 0 count.

    Raises:
        OSError: on every rank, where one of them could not write; the checkpoints of earlier steps are untouched.
    """
    target = Path(folder) / f"step-{step:08d}"
    parameters = replicas.parameters(model)
    state, optimizer_json = sidecar.flatten(optimizer, sidecar.names_of(parameters, optimizer))
    tensors = _placed(_tensors(model, parameters) | state, parameters, replicas)
    if replicas.rank == 0:
        tensors |= {f"{EXTRA}{name}": tensor for name, tensor in (extra or {}).items()}
    with ExitStack() as stack:

        def begin() -> Path:
            sweep(target.parent)
            return stack.enter_context(sealed_folder(target))

        def seal() -> None:
            own = {"world": replicas.world, "layout": replicas.layout}
            sidecar.add_sidecar(unfinished, step, model, optimizer_json, lr_scale, controls, own)
            sidecar.forget_after(target.parent, step)
            stack.close()
            sidecar.keep_newest(target.parent)

        unfinished = led(begin)
        try:
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True))
        except CheckpointException as error:
            raise OSError(f"checkpoint {target} cannot be written: {_why(error)}") from error
        led(seal)
    return target


def load(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, replicas: Processes
) -> Checkpoint | None:
    """Put the newest undamaged checkpoint of `folder` into a model in a layout and its optimizer; every rank calls it.

    It may be of any number of processes in this layout, or of one. Otherwise as `checkpoint.load`.

    Raises:
        InputError: all checkpoints are damaged, or the checkpoint is of another layout or does not fit.
    """
    found = led(lambda: sidecar.newest(folder))
    if found is None:
        return None
    layout = found.content.get("processes", {}).get("layout", replicas.layout)
    if layout != replicas.layout:
        raise InputError(
            f"checkpoint {found.path} is of the layout {layout!r} but this training is of the layout "
            f"{replicas.layout!r}: it goes on in its own, or in one process"
        )
    return found.read(read(found, model, optimizer, replicas))


def read(
    found: Found, model: nn.Module, optimizer: torch.optim.Optimizer | None, replicas: Processes | None = None
) -> dict[str, Tensor]:
    """Put a checkpoint into a model and an optimizer, in a layout or in one process; what else is in it, by name.

    Raises:
        InputError: it has other tensors than the model, or tensors of other types or shapes.
    """
    try:
        there = HuggingFaceStorageReader(str(found.path)).read_metadata().state_dict_metadata
        parameters = dict(model.named_parameters()) if replicas is None else replicas.parameters(model)
        tensors = _tensors(model, parameters)
        more = {name: torch.zeros(its.size, dtype=its.properties.dtype) for name, its in there.items()}
        more = {name: tensor for name, tensor in more.items() if name not in tensors}
        extra = {name: more.pop(name) for name in _extra(found, there)}
        state = {name: more.pop(name) for name in list(more) if "::" in name}
        if more:
            raise ValueError(f"it has {min(more)!r}, which the model has not")
        if optimizer is None:
            state = {}
        for name in state:
            of = parameters[name.rpartition("::")[0]]
            if state[name].shape == _placed({name: of}, parameters, replicas)[name].shape:
                state[name] = torch.zeros_like(of)
        wanted = _placed(tensors | state, parameters, replicas) | extra
        _check(wanted, there)
        if optimizer is not None:
            names = sidecar.names_of(parameters, optimizer)
            moments = sidecar.unflatten(optimizer, names, state, found.content["optimizer"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant in one process
            reader = HuggingFaceStorageReader(str(found.path))
            dcp.load(wanted, storage_reader=reader, no_dist=replicas is None)
        sidecar.restore_routers(model, found.content["routers"])
        if optimizer is not None:
            optimizer.load_state_dict(moments)
    except (SafetensorError, CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        why = _why(error) if isinstance(error, CheckpointException) else error
        raise InputError(f"checkpoint {found.path} does not fit this model: {why}") from error
    return {name.removeprefix(EXTRA): tensor for name, tensor in extra.items()}


def _tensors(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters, and the buffers that are kept, by name; one that is shared under its first."""
    found = {name: parameter.detach() for name, parameter in parameters.items()}
    for at, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{at}.{name}".lstrip(".")] = buffer
    return found


def _placed(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], replicas: Processes | None
) -> dict[str, Tensor]:
    """Each as a part of the whole one, where it is of the shape of a parameter and this rank has a part of that."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        of = parameters.get(name.rpartition("::")[0] or name)
        if replicas is not None and of is not None and tensor.shape == of.shape:
            found[name] = replicas.as_whole(of, tensor)
    return found


def _extra(found: Found, there: Mapping[str, Any]) -> list[str]:
    """The names of the caller's tensors: one process has a file for them."""
    if "processes" in found.content:
        return [name for name in there if name.startswith(EXTRA)]
    with safe_open(found.path / sidecar.EXTRA, "pt") as file:
        return list(file.keys())


def _check(wanted: Mapping[str, Tensor], there: Mapping[str, Any]) -> None:
    """ValueError where a tensor is not there, or is of another type or shape."""
    for name, tensor in wanted.items():
        if name not in there:
            raise ValueError(f"it has no {name!r}")
        its, own = (there[name].properties.dtype, tuple(there[name].size)), (tensor.dtype, tuple(tensor.shape))
        if its != own:
            raise ValueError(f"its {name!r} is {its[0]} {list(its[1])} but must be {own[0]} {list(own[1])}")


def _why(error: CheckpointException) -> str:
    """What went wrong first, and on which rank."""
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure}"
