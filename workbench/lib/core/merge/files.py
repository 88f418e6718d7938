"""Merges from files to files: models as Hugging Face lays them out, and adapters of the base, none of them ever whole
in memory.

    vectors = open_models("base", ["expert", "lora-folder"])
    write_model(vectors, make_merger("average", {}), "base", "merged")     # a folder that transformers loads

The result has the base's files of tensors, with the same tensors in the same order, and a copy of everything else that
belongs to the base: configuration, tokenizer, code. It is written aside, flushed and put in place whole.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.adapt.files import SIDECAR, read_object
from workbench.lib.core.adapt.peft import CONFIG
from workbench.lib.core.merge.adapters import LowRankDeltas, check_base, read_deltas
from workbench.lib.core.merge.merger import Merger
from workbench.lib.core.merge.sinks import in_order, stored_specs, write_tensors
from workbench.lib.core.merge.sources import Source, Stored, open_source
from workbench.lib.core.merge.vectors import TaskVectors, check_list
from workbench.sealed import sealed_folder

PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
WEIGHTS = PICKLED | {".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot"}
"""Ends of the names of files that hold a model's weights: those of the base are not copied."""

Report = Callable[[int, int, str], None]


class Added(Source):
    """The base with an adapter's updates added: as an expert, what the adapter changed. Computed slice by slice."""

    def __init__(self, base: Source, deltas: LowRankDeltas, label: str):
        self.label, self.base, self.specs, self.ties = label, base, base.specs, base.ties
        self.updates = deltas.placed({name: shape for name, (shape, _) in base.specs.items()})
        if tied := [name for name in self.updates if len(base.alike(name)) > 1]:
            raise InputError(f"{label} adapts {', '.join(tied)}, which the base has tied to other weights")
        check_base(deltas, base, label)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """In float32 or better where there is an update, so that none is lost in the base's type."""
        here = self.base.read(name, start, stop)
        if name not in self.updates:
            return here
        update = self.updates[name].rows(start, stop).to(here.device)
        return here.to(torch.promote_types(update.dtype, here.dtype)) + update


def open_models(
    base: Any,
    experts: Sequence[Any],
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> TaskVectors:
    """What experts changed of a base, be they files or in memory.

    Args:
        base: a safetensors file, or a folder of them; or as `TaskVectors` takes it.
        experts: the same, or LoRA folders, as `read_deltas` takes them.

    Raises:
        InputError: all that is wrong with any of them.
    """
    check_list(experts)
    found, wrong = {}, []
    for label, given in {"base": base, **{f"experts[{i}]": expert for i, expert in enumerate(experts)}}.items():
        try:
            path = Path(given) if isinstance(given, str | Path) else None
            adapter = path is not None and label != "base" and is_adapter(path)
            found[label] = path if adapter else open_source(given, label) if path is None else open_model(path)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("; ".join(wrong))
    source = found.pop("base")
    try:
        adapters = [path for path in found.values() if isinstance(path, Path)]
        deltas = iter(read_deltas(adapters, source.model) if adapters else [])
    except InputError as error:
        deltas, wrong = iter([]), [str(error)]
    for label, one in found.items():
        try:
            if isinstance(one, Path) and (update := next(deltas, None)) is not None:
                found[label] = Added(source, update, str(one))
        except InputError as error:
            wrong.append(str(error))
    models = [one for one in found.values() if isinstance(one, Source)]
    try:
        vectors = TaskVectors(source, models, include, exclude) if models else None
    except InputError as error:
        wrong.append(str(error))
    if wrong:
        raise InputError("; ".join(wrong))
    return vectors


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, of peft or our own."""
    return (path / CONFIG).is_file() or (path / SIDECAR).is_file()


def open_model(path: Path) -> Stored:
    """A safetensors file, or a folder of them, with everything that its index names.

    Raises:
        InputError: there is none, it is damaged, or a file of it is missing; or it is a pickle, which is not opened.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if is_adapter(path):
        raise InputError(f"{path} is an adapter but must be a model: a safetensors file or a folder of them")
    if path.is_file() and path.suffix != ".safetensors":
        raise InputError(f"{path} is no safetensors file, and no other is opened: a pickle may run what it likes")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        more = f", only {', '.join(pickles)}: a pickle may run what it likes and is not opened" if pickles else ""
        raise InputError(f"{path} has no safetensors file{more}")
    model = Stored(path)
    for index in path.glob("*.safetensors.index.json"):
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict):
            raise InputError(f"{index} has no weight_map")
        if missing := sorted({str(file) for file in named.values() if not (path / str(file)).is_file()}):
            raise InputError(f"{path} lacks {', '.join(missing)}, which its index names")
        if missing := [name for name in named if name not in model.specs]:
            raise InputError(f"{path} lacks {len(missing)} tensors that its index names, {missing[0]} the first")
    return model


def write_model(
    vectors: TaskVectors,
    merger: Merger,
    base: str | Path,
    folder: str | Path,
    progress: Report = lambda done, total, now: None,
) -> list[Path]:
    """Merge into a new folder, laid out as the base is, which is there whole or not at all.

    Args:
        vectors: as `open_models` gives them for `base`.
        progress: called with the weights that are merged, all of them, and what they are.

    Returns:
        The files that were written, tensors first.

    Raises:
        InputError: something is at `folder`, or as `merge`.
        OSError: the disk is full or not writable; then nothing is at `folder`.
    """
    base, folder, source = Path(base), check_new(folder), vectors.base
    if not isinstance(source, Stored):
        raise InputError(f"base is {source.label} but must be read from files to be written as they are")
    specs, files = stored_specs(vectors), {}
    for name, spec in specs.items():
        files.setdefault(source.file(name), {})[name] = spec
    pieces = _told(in_order(vectors, merger, specs), sum(math.prod(shape) for shape, _ in specs.values()), progress)
    with sealed_folder(folder) as unfinished:
        for file, inside in files.items():
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            write_tensors(unfinished / file.name, inside, pieces, metadata)
        if base.is_dir():
            shutil.copytree(base, unfinished, dirs_exist_ok=True, ignore=weights_among)
        written = [file.name for file in files]
        written += sorted(
            path.relative_to(unfinished).as_posix()
            for path in unfinished.rglob("*")
            if path.is_file() and path.name not in written
        )
    return [folder / name for name in written]


def check_new(folder: str | Path) -> Path:
    """The path, at which nothing is yet; an `InputError` where something is."""
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"folder is {str(folder)!r} but must be new: something is there")
    return folder


def weights_among(folder: str, names: list[str]) -> list[str]:
    """The names in a folder that are hidden or of files of weights, as `shutil.copytree` wants to know them."""
    return [name for name in names if name.startswith(".") or Path(name).suffix in WEIGHTS]


def _told(pieces: Iterator[Tensor], total: int, progress: Report) -> Iterator[Tensor]:
    done = 0
    for piece in pieces:
        done += piece.numel()
        progress(done, total, "weights")
        yield piece
