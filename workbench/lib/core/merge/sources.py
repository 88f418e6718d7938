"""Where the tensors of a model are read from, a slice at a time: a state dict, a module, or safetensors files."""

import json
import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workbench.errors import InputError

#: safetensors' names of types -> torch's, of all that a model's weights come in
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source:
    """The tensors of one model.

    Attributes:
        label: what messages call it.
        specs: name -> (shape, dtype), in the model's order.
        ties: name -> the name before it whose memory it shares.
        model: the module they are of, where one was given.
    """

    label: str
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ties: Mapping[str, str] = {}
    model: nn.Module | None = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The entries start to stop of the flattened tensor, in its own dtype, (stop - start,)."""
        raise NotImplementedError

    def alike(self, name: str) -> list[str]:
        """All names of the tensor, `name` first."""
        first = self.ties.get(name, name)
        return [name, *(other for other in self.specs if other != name and self.ties.get(other, other) == first)]

    def whole(self, name: str) -> Tensor:
        """The tensor in its shape; it may share the source's memory."""
        return self.read(name).view(self.specs[name][0])


class Held(Source):
    """A state dict, or what `state_dict()` of a module holds."""

    def __init__(self, given: Any, label: str):
        self.label = label
        if isinstance(given, nn.Module):
            self.model, given = given, given.state_dict()
        wrong = [f"{name!r} is {problem}" for name, value in given.items() if (problem := _problem(name, value))]
        if wrong:
            raise InputError(f"{label} must hold tensors by name, but {', '.join(wrong[:8])}")
        first: dict[tuple, str] = {}
        self.tensors, self.ties = {}, {}
        for name, value in given.items():
            self.tensors[name] = value.detach().contiguous()  # a slice of what is not would be a copy of it all
            key = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
            if value.numel() and (twin := first.setdefault(key, name)) != name:
                self.ties[name] = twin
        self.specs = {name: (tuple(value.shape), value.dtype) for name, value in self.tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop]


class Stored(Source):
    """A safetensors file, or a folder of them; nothing but the asked slice is ever in memory."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.label = str(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} is a folder without a safetensors file")
        self.specs, self._places = {}, {}
        for name, spec, place in chain.from_iterable(map(_entries, files)):
            if name in self.specs:
                raise InputError(f"{path} has {name} twice, in {self._places[name][0].name} and {place[0].name}")
            self.specs[name], self._places[name] = spec, place

    def file(self, name: str) -> Path:
        """The file that the tensor is in."""
        return self._places[name][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape, dtype = self.specs[name]
        start, stop, _ = slice(start, stop).indices(math.prod(shape))
        if stop <= start:
            return torch.empty(0, dtype=dtype)
        path, offset = self._places[name]
        data = bytearray((stop - start) * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(offset + start * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise InputError(f"{path} ends before {name} does")
        return torch.frombuffer(data, dtype=dtype)


def open_source(given: Any, label: str) -> Source:
    """A state dict, a module, or the path of a safetensors file or of a folder of them, as a `Source`.

    Raises:
        InputError: it is none of these, is damaged, or does not exist.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, Mapping | nn.Module):
        return Held(given, label)
    if isinstance(given, str | Path):
        return Stored(given)
    raise InputError(
        f"{label} is a {type(given).__name__} but must be a state dict, a module, or the path of safetensors files"
    )


def _problem(name: object, value: object) -> str | None:
    """Why it cannot be read as a tensor with a name."""
    if not isinstance(name, str):
        return "no name"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.device.type == "meta":
        return "on the meta device, without values"
    return None if value.layout == torch.strided else f"{value.layout}"


def _entries(path: Path):
    """(name, (shape, dtype), (path, offset of its bytes)) of every tensor, in the order of the file's data."""
    try:
        with safe_open(path, "pt"):  # checks the header, and that the file is as long as it says
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path} has {name} as {entry['dtype']}, which cannot be read; allowed: {', '.join(DTYPES)}"
            )
        yield name, (tuple(entry["shape"]), DTYPES[entry["dtype"]]), (path, 8 + size + entry["data_offsets"][0])
