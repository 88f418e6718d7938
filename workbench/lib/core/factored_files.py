"""Models whose matrices are factors, on disk: a folder that is there whole or not at all.

    factored.safetensors    all tensors; of a matrix X.weight in factors X.u (O, r) and X.v (r, I)
    factored.json           the rank of each, how they were chosen, the SHA-256 of the tensors
    config.json, ...        of a folder of transformers, whatever was beside the weights

    model = workbench.load_factored("folder")             # of transformers: the model's class is in its config
    model = workbench.load_factored("folder", model)      # of a file: a model with those layers

The file of tensors has a name of its own, for `from_pretrained` would draw what it does not find, with no more than a
warning. `merge_back(model).save_pretrained(...)` writes a folder that it reads.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import torch as safetensors
from torch import Tensor, nn

from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.files import parse_tensors, read_bytes, read_object
from workbench.lib.core.adapt.matrix import is_turned
from workbench.lib.core.factored import LowRankLinear, find_linears, replace_linears, truncated
from workbench.lib.core.merge.files import check_new, open_model, weights_among
from workbench.sealed import sealed_folder, whole

FORMAT = 1
TENSORS, SIDECAR, CONFIG = "factored.safetensors", "factored.json", "config.json"
GENERATION = "generation_config.json"
NO_LAYERS = ("*emb*", "*wte*", "*wpe*", "*lm_head*", "*router*", "*gate", "*norm*", "*ln_*")
"""Names of matrices of a file that are mostly no linear layers, or no ones to compress."""


@dataclass(frozen=True)
class Dense:
    """A model as it was read.

    Attributes:
        path: a folder or a file.
        state: its tensors; one that has several names, by the first.
        matrices: name of each linear layer -> whether its weight lies as (I, O).
        bytes: of its files of weights.
    """

    path: Path
    state: Mapping[str, Tensor]
    matrices: Mapping[str, bool]
    bytes: int

    @property
    def loads(self) -> str:
        """What `load_factored` is given beside the folder."""
        return "" if self.path.is_dir() else ", model"

    def weight(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """The weight of a layer."""
        weight = self.state[f"{name}.weight"]
        return weight.T if self.matrices[name] else weight

    def weights(self) -> Iterator[tuple[str, Float[Tensor, "d_out d_in"]]]:
        """Name and weight of each layer."""
        return ((name, self.weight(name)) for name in self.matrices)


def open_dense(path: str | Path, targets: Sequence[str] | None = None) -> Dense:
    """A model's tensors, and which of them are matrices of linear layers.

    Args:
        path: a folder of transformers, whose model is made to see which layers are linear; or a safetensors file.
        targets: patterns over the names of layers; None for all linear ones but the output's, of a file for all
            matrices but `NO_LAYERS`.

    Raises:
        InputError: it is neither, or damaged, or of a class that transformers has not; targets that match nothing.
    """
    path = Path(path)
    source = open_model(path)
    files = {source.file(name) for name in source.specs}
    size = sum(file.stat().st_size for file in files)
    if path.is_dir():
        kind, _ = _architecture(path)
        with torch.random.fork_rng(devices=[]), _without_bars():
            model, info = kind.from_pretrained(path, dtype="auto", local_files_only=True, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{path} lacks {len(missing)} tensors of a {kind.__name__}, {missing[0]} the first")
        linears, _ = find_linears(model, targets or "*")
        if targets is None:  # what is all tokens wide stays, as an embedding does
            linears = {name: layer for name, layer in linears.items() if layer is not model.get_output_embeddings()}
        return Dense(path, _once(model), {name: is_turned(layer) for name, layer in linears.items()}, size)
    state = {name: source.whole(name) for name in source.specs}
    allowed = [
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.numel() and tensor.is_floating_point()
    ]
    if targets is None:
        matrices = [name for name in allowed if not any(fnmatchcase(name.lower(), no) for no in NO_LAYERS)]
    else:
        matrices = []
        for pattern in targets:
            if not (found := [name for name in allowed if fnmatchcase(name, pattern)]):
                raise unknown("targets", pattern, allowed)
            matrices += [name for name in found if name not in matrices]
    if not matrices:
        raise InputError(f"{path} has no matrix called like that of a linear layer; --targets names them")
    return Dense(path, state, dict.fromkeys(matrices, False), size)


def write_factored(
    model: Dense,
    ranks: Mapping[str, int],
    folder: str | Path,
    how: Mapping[str, Any],
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> dict[str, Any]:
    """Write a model with these layers in factors to a new folder.

    Args:
        ranks: of those that become factors, by name.
        how: what is said of it, for the sidecar.
        progress: called with the layers that are done and the next one.

    Returns:
        "files", the names in the folder; "params_before", "params"; "bytes_before", "bytes" of the files of weights.

    Raises:
        InputError: something is at `folder`.
        OSError: the disk is full or not writable; then nothing is at `folder`.
    """
    folder, state, done = check_new(folder), {}, 0
    for name, tensor in model.state.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in ranks:
            state[name] = tensor
            continue
        progress(done, layer)
        u, v = truncated(model.weight(layer), ranks[layer])
        state |= {f"{layer}.u": u.contiguous(), f"{layer}.v": v.contiguous()}
        done += 1
    content = safetensors.save(state)
    sidecar = {"format": FORMAT, "layers": dict(ranks), "sha256": hashlib.sha256(content).hexdigest(), **how}
    with sealed_folder(folder) as unfinished:
        if model.path.is_dir():
            shutil.copytree(model.path, unfinished, dirs_exist_ok=True, ignore=_of_weights)
        (unfinished / TENSORS).write_bytes(content)
        (unfinished / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
    before, after = (sum(t.numel() for t in tensors.values()) for tensors in (model.state, state))
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    sizes = {"bytes_before": model.bytes, "bytes": len(content)}
    return {"files": files, "params_before": before, "params": after, **sizes}


def load_factored(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that a folder of factors holds, in evaluation mode.

    Args:
        model: one with the dense layers that were there, changed in place; needed where the folder has no config of
            transformers.

    Raises:
        InputError: the folder holds none, a damaged one or one of a newer format, or does not fit the model.
    """
    folder, there = Path(folder), whole(folder)
    if not (there / SIDECAR).is_file():
        raise InputError(f"folder is {str(folder)!r} but must hold factors ({SIDECAR}, {TENSORS})")
    sidecar, content = read_object(there / SIDECAR), read_bytes(there / TENSORS)
    if type(sidecar.get("format")) is int and sidecar["format"] > FORMAT:
        raise InputError(f"{folder} has format {sidecar['format']} but this workbench reads up to {FORMAT}")
    layers = sidecar.get("layers")
    if not isinstance(layers, dict) or not all(type(rank) is int and rank > 0 for rank in layers.values()):
        raise InputError(f"{folder} is damaged: layers of {SIDECAR} must be names with their ranks")
    if hashlib.sha256(content).hexdigest() != sidecar.get("sha256"):
        raise InputError(f"{folder} is damaged: the SHA-256 of {TENSORS} is not the one it was saved with")
    state = parse_tensors(content, there / TENSORS)
    if model is None:
        kind, config = _architecture(there)
        with torch.random.fork_rng(devices=[]):
            model = kind(config)
        if model.can_generate() and (there / GENERATION).is_file():
            model.generation_config = type(model.generation_config).from_dict(read_object(there / GENERATION))
    _fill(model, layers, state, folder)
    return model.eval()


def _fill(model: nn.Module, layers: Mapping[str, int], state: dict[str, Tensor], folder: Path) -> None:
    """Give a dense model the layers and tensors of a folder, or say all that does not fit."""
    linears, _ = find_linears(model)
    wrong = [f"{name} is no linear layer of the model" for name in layers if name not in linears]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, rank in layers.items():
        if name in linears:
            o, i = linears[name].weight.shape
            expected.pop(f"{name}.weight")
            expected |= {f"{name}.u": (o, rank), f"{name}.v": (rank, i)}
    tied = _tied(model, expected)
    mates = {name: names for names in tied for name in names}
    wrong += [
        f"{name} is missing"
        for name in expected
        if name == (names := mates.get(name, [name]))[0] and not any(mate in state for mate in names)
    ]
    wrong += [f"{name} has no place in the model" for name in state if name not in expected]
    wrong += [
        f"{name} is {tuple(state[name].shape)} but must be {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{folder} does not fit the model: {'; '.join(wrong[:8])}{more}")

    def make(layer: nn.Linear, name: str) -> LowRankLinear | None:
        return (
            LowRankLinear(layer.in_features, layer.out_features, layers[name], layer.bias) if name in layers else None
        )

    with torch.random.fork_rng(devices=[]):
        replace_linears(model, make)
    model.load_state_dict(state, strict=False, assign=True)
    for names in tied:  # an assigned tensor is tied to nothing
        (first, *others) = sorted(names, key=lambda name: name not in state)
        for name in others:
            if name not in state or torch.equal(state[name], state[first]):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, _tensor(model, first))
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def _architecture(folder: Path) -> tuple[type, Any]:
    """The class of transformers that a folder's config names, and the config."""
    import transformers

    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG} of transformers, so what the model is is not known: give a file")
    named = read_object(folder / CONFIG).get("architectures")
    kind = getattr(transformers, named[0], None) if isinstance(named, list) and named else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"{folder / CONFIG} has architectures {named!r}, of which transformers has no model")
    return kind, kind.config_class.from_pretrained(folder, local_files_only=True)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which are no part of ours."""
    from transformers.utils import logging

    there = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if there:
            logging.enable_progress_bar()


def _tied(model: nn.Module, expected: Mapping[str, Any]) -> list[list[str]]:
    """The names of each tensor of a model that has several of those expected."""
    names: dict[int, list[str]] = {}
    for found in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in found:
            if name in expected:
                names.setdefault(id(tensor), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, key = name.rpartition(".")
    return getattr(model.get_submodule(parent), key)


def _once(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, each by the first of its names."""
    seen: set[tuple] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride()
        if math.prod(tensor.shape) and key in seen:
            continue
        seen.add(key)
        found[name] = tensor.contiguous()
    return found


def _of_weights(folder: str, names: list[str]) -> list[str]:
    """What of a folder is not copied: weights, and the index of their files."""
    return weights_among(folder, names) + [name for name in names if name.endswith(".index.json")]
