"""A merged model written to a safetensors file as it is made, a piece at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.merge.merger import Merger, merged_pieces
from workbench.lib.core.merge.sources import DTYPES
from workbench.lib.core.merge.vectors import PIECE, TaskVectors
from workbench.sealed import sealed_file

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
CODES = {dtype: code for code, dtype in DTYPES.items()}


@torch.no_grad()
def write_merged(
    vectors: TaskVectors, merger: Merger, path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Merge into a safetensors file, which is at `path` whole or not at all.

    In memory are a piece of every model and what is computed of them, tens of megabytes for five experts however large
    their tensors are; or what a rule on matrices or on whole vectors takes. Tied tensors are stored once, as
    safetensors has them.

    Raises:
        InputError: as `merge`; or the base has a tensor of a type that the format has not.
        OSError: the disk is full or not writable; what was at `path` still is.
    """
    specs = stored_specs(vectors)
    with sealed_file(path) as unfinished:
        write_tensors(unfinished, specs, in_order(vectors, merger, specs), metadata)
    return Path(path)


def stored_specs(vectors: TaskVectors) -> Specs:
    """The tensors that a file of the merged model has, in the base's order: (shape, dtype) by name."""
    specs = {name: spec for name, spec in vectors.base.specs.items() if name not in vectors.base.ties}
    unknown = [f"{name} as {dtype}" for name, (_, dtype) in specs.items() if dtype not in CODES]
    if unknown:
        raise InputError(f"{vectors.base.label} has {', '.join(unknown[:8])}, which a safetensors file cannot have")
    return specs


def write_tensors(path: Path, specs: Specs, pieces: Iterator[Tensor], metadata: Mapping[str, str] | None) -> None:
    """A safetensors file of these tensors, whose weights are the next of the flat pieces, in order."""
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            piece = next(pieces)
            end -= file.write(piece.contiguous().view(torch.uint8).cpu().numpy().data)


@torch.no_grad()
def in_order(vectors: TaskVectors, merger: Merger, specs: Specs) -> Iterator[Tensor]:
    """All tensors of the merged model in flat pieces, in the order of `specs`."""
    merged = merged_pieces(vectors, merger)
    for name, (shape, _) in specs.items():
        size = math.prod(shape)
        if name not in vectors.shapes:
            yield from (vectors.base.read(name, start, start + PIECE) for start in range(0, size, PIECE))
            continue
        done = 0
        while done < size:
            place, piece = next(merged)
            assert (place.name, place.start) == (name, done), f"{type(merger).__name__} merges out of order"
            done = place.stop
            yield piece
