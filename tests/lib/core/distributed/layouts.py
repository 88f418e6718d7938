"""What the tests of layouts and their checkpoints run in processes: a small language model of experts, trained."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.distributed import checkpoints
from workbench.lib.core.distributed.layouts import LAYOUTS, Processes
from workbench.lib.core.distributed.waiting import waited
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.replicas import ALONE
from workbench.lib.core.train import make_optimizer, steps
from workbench.live.recipe import Recipe

SMALL = {
    "domains": ["docs", "names"],
    "cap": 8192,
    "seq_len": 16,
    "batch_size": 8,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_experts": 4,
    "d_hidden": 8,
    "z_loss": 0.001,
    "steps": 4,
    "lr": 0.01,
    "warmup": 2,
    "eval_every": 4,
}
ROUTED = {
    "linear": {"router": "linear", "bias_rate": 0.01, "d_shared": 8},
    "recurrent": {"router": "recurrent"},  # one cell in all blocks
    "hash": {"router": "hash", "z_loss": 0.0},
}


def trained(layout: str | None, double: bool = True, **values) -> dict:
    """Losses, norms and weights of a training, in one of the layouts or by itself."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    model, task, config = Recipe.from_dict(SMALL | values).build()
    replicas = {} if layout is None else {"replicas": Processes(model, layout)}
    found = [(s.loss, s.aux, s.grad_norm, s.metrics) for s in steps(model, task, config, **replicas)]
    if layout is None:
        weights = {name: p.detach() for name, p in model.named_parameters()}
    else:
        own = replicas["replicas"].parameters(model)
        weights = {name: replicas["replicas"].whole(p, p).clone() for name, p in own.items()}
    weights |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    if layout == "sharded":
        world = dist.get_world_size()
        assert all(p.to_local().numel() < p.numel() for p in own.values() if p.shape[0] >= world)
    return {"steps": found, "weights": weights}


def all_layouts(names: list[str]) -> dict[tuple[str, str], dict]:
    """By router (or "float32", of the first) and layout; on rank 0 the weights as well."""
    values = {name: {**ROUTED.get(name, {}), "double": name != "float32"} for name in names}
    found = {(name, layout): trained(layout, **values[name]) for name in names for layout in LAYOUTS}
    return found if dist.get_rank() == 0 else {key: value["steps"] for key, value in found.items()}


def traffic() -> dict[str, dict[str, float]]:
    """Bytes by collective of one step in each layout, and what of it was waiting."""
    found = {}
    torch.set_default_dtype(torch.float32)
    for layout in LAYOUTS:
        model, task, config = Recipe.from_dict(SMALL).build()
        sizes = {"all": 0, "experts": 0}
        for name, p in model.named_parameters():
            sizes["experts" if ".experts." in name else "all"] += p.numel() * 4
        made = steps(model, task, config, replicas=Processes(model, layout))
        with counted() as sent, waited() as waiting:
            next(made)
        found[layout] = {kind: one.bytes for kind, one in sent.of.items()} | {"waited": waiting.seconds, **sizes}
    return found


def refused() -> dict[str, str]:
    """What is said of models and numbers that cannot be shared out."""
    torch.set_default_dtype(torch.float32)
    cases = {
        "capacity": ({"capacity_factor": 1.0}, "data"),
        "expert choice": ({"router": "expert-choice", "z_loss": 0.0}, "data"),
        "experts": ({"n_experts": 3, "top_k": 1}, "experts"),
        "layout": ({}, "pipeline"),
        "batch": ({"batch_size": 3}, "data"),
    }
    found = {}
    for case, (values, layout) in cases.items():
        model, task, config = Recipe.from_dict(SMALL | values).build()
        try:
            next(steps(model, task, config, replicas=Processes(model, layout)))
        except InputError as error:
            found[case] = str(error)
    return found


def _begun(layout: str | None, double: bool = True, **values) -> tuple:
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    model, task, config = Recipe.from_dict(SMALL | {"eval_every": 0, "bias_rate": 0.01} | values).build()
    replicas = ALONE if layout is None else Processes(model, layout)
    return model, task, config, make_optimizer(model, config), replicas


def _whole(model, replicas) -> dict:
    parameters = dict(model.named_parameters()) if replicas is ALONE else replicas.parameters(model)
    whole = (lambda of, tensor: tensor.detach()) if replicas is ALONE else replicas.whole
    found = {name: whole(p, p).clone() for name, p in parameters.items()}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def stopped(layout: str | None, folder: Path) -> dict:
    """Trains 2 of 4 steps, writes a checkpoint and goes on; the weights in the end."""
    model, task, config, optimizer, replicas = _begun(layout)
    made = steps(model, task, config, optimizer=optimizer, replicas=replicas)
    next(made), next(made)
    extra = {"seen": torch.arange(3) + replicas.rank}  # that of rank 0 counts
    kept = {"lr_scale": 0.5, "controls": {"top_k": None}, "extra": extra}
    if layout is None:
        checkpoint.save(folder, 2, model, optimizer, **kept)
    else:
        checkpoints.save(folder, 2, model, optimizer, replicas=replicas, **kept)
    for _ in made:
        pass
    return _whole(model, replicas)


def resumed(layout: str | None, folder: Path) -> dict:
    """Goes on from the checkpoint after 2 steps; the weights in the end."""
    model, task, config, optimizer, replicas = _begun(layout, seed=1)  # other weights, which the checkpoint replaces
    if layout is None:
        found = checkpoint.load(folder, model, optimizer)
    else:
        found = checkpoints.load(folder, model, optimizer, replicas=replicas)
    assert (found.step, found.lr_scale, found.controls) == (2, 0.5, {"top_k": None})
    assert found.extra["seen"].tolist() == [0, 1, 2]
    for _ in steps(model, task, replace(config, seed=0), optimizer=optimizer, start=2, replicas=replicas):
        pass
    return _whole(model, replicas)


def each(folders: dict[str, Path], names: list[str]) -> dict[tuple[str, str], dict]:
    """What "stopped" and "resumed", one after the other, give in each layout with its folder."""
    made = {"stopped": stopped, "resumed": resumed}
    return {(layout, name): made[name](layout, folder) for layout, folder in folders.items() for name in names}


def misfits(folder: Path) -> dict[str, str]:
    """What is said of checkpoints in the layout "data" that do not fit."""
    cases = {"layout": ("sharded", {}), "dtype": ("data", {"double": False}), "shape": ("data", {"d_hidden": 16})}
    cases["layers"] = ("data", {"n_layers": 3})
    found = {}
    for case, (layout, values) in cases.items():
        model, _, _, optimizer, replicas = _begun(layout, **values)
        try:
            checkpoints.load(folder, model, optimizer, replicas=replicas)
        except InputError as error:
            found[case] = str(error)
    return found


def into_one_without_positions(layout: None, folder: Path) -> None:
    """One process reads a checkpoint into a model that lacks a parameter."""
    model, *_ = _begun(layout)
    del model.position
    checkpoint.load(folder, model)


def killed_while_writing(folder: Path, who: int) -> None:
    """A whole checkpoint, and a second one in which a rank dies before it has written."""
    model, _, _, optimizer, replicas = _begun("sharded")
    checkpoints.save(folder, 1, model, optimizer, replicas=replicas)
    if replicas.rank == who:
        HuggingFaceStorageWriter.write_data = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(folder, 2, model, optimizer, replicas=replicas)


def full_disk(folder: Path) -> str:
    """What every rank says where one cannot write."""
    model, _, _, optimizer, replicas = _begun("experts")
    checkpoints.save(folder, 1, model, optimizer, replicas=replicas)

    def no_room(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    if replicas.rank == 1:
        HuggingFaceStorageWriter.write_data = no_room
    try:
        checkpoints.save(folder, 2, model, optimizer, replicas=replicas)
    except OSError as error:
        return str(error)
