"""Arrays as typed bytes: what a run stores for a tensor, and back.

- A series keeps one dtype and one shape for all its steps, so a blob is the elements alone, little-endian, C order.
- Bytes are shuffled by significance (all lowest bytes, then all second ones, ...) before zlib level 1. Counts kept as
  uint32 then cost what their values need, and sorted spectra share their exponent bytes.
- A blob is stored compressed only when that is smaller, so its length says which of the two it is.
"""

import zlib
from math import prod

import numpy as np

from workbench.errors import InputError

KINDS = "biuf"  # bool, integers, floats: what numpy, parquet and a reader in another language all agree on
SMALLEST = 96  # bytes; below this zlib costs time and saves nothing
DENSEST = 1100  # bytes out of one byte; zlib reaches 1032


def typed(name: str, array: object) -> np.ndarray:
    """``array`` as a little-endian C-ordered numpy array of a storable dtype; InputError for any other kind."""
    array = np.asarray(array)
    if array.dtype.kind not in KINDS:
        raise InputError(f"tensor {name!r} has dtype {array.dtype} but must be bool, integer or floating point")
    little = array.dtype.newbyteorder("<")
    return np.asarray(array, dtype=little, order="C")


def encode(array: np.ndarray) -> bytes:
    """The bytes of an array from ``typed``."""
    if array.nbytes < SMALLEST:
        return array.tobytes()
    planes = array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    packed = zlib.compress(planes.tobytes(), 1)
    return packed if len(packed) < array.nbytes else array.tobytes()


def decode(blobs: list[bytes], dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array (len(blobs), *shape) of blobs from ``encode``; ValueError where a blob is not what was written."""
    kind = np.dtype(dtype)
    n_items = prod(shape)
    n_bytes = n_items * kind.itemsize
    if blobs and n_bytes > DENSEST * min(map(len, blobs)):  # before memory for it is asked for
        raise ValueError(f"a stored array has {min(map(len, blobs))} bytes, too few for {dtype} {shape}")
    out = np.empty((len(blobs), n_items, kind.itemsize), dtype=np.uint8)
    for row, blob in zip(out, blobs, strict=True):
        if len(blob) == n_bytes:
            row[:] = np.frombuffer(blob, np.uint8).reshape(n_items, kind.itemsize)
            continue
        try:
            planes = zlib.decompressobj().decompress(blob, n_bytes + 1)  # not all that a strange one unfolds to
        except zlib.error as error:
            raise ValueError(f"a stored array cannot be decompressed ({error})") from error
        if len(planes) != n_bytes:
            raise ValueError(f"a stored array has {len(planes)} bytes but {dtype} {shape} needs {n_bytes}")
        row[:] = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, n_items).T
    return out.reshape(-1).view(kind).reshape(len(blobs), *shape)
