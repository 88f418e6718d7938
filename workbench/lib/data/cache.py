"""Parsed data on disk: one safetensors file a key, made again whenever it is absent, damaged or out of date.

The cache is a convenience and never a condition: where it cannot be written, the data are parsed every time.
"""

import contextlib
import json
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workbench.paths import home
from workbench.sealed import sealed_file

Parsed = tuple[dict[str, Tensor], dict]
"""Tensors by name, and a manifest that JSON can hold."""


def cached(name: str, raw: str, build: Callable[[], Parsed]) -> Parsed:
    """The result of `build()`, taken from the cache where it was made before from the same input by the same code.

    Args:
        name: of what is cached; the file's name begins with it.
        raw: a text that identifies the input (a digest, a version and the options that matter).
        build: makes the tensors and their manifest.
    """
    key = sha256(f"{code_version()}\n{raw}".encode()).hexdigest()[:24]
    path = home() / "data" / "cache" / f"{name}-{key}.safetensors"
    found = read(path)
    if found is None:
        found = build()
        with contextlib.suppress(OSError):  # a full disk or a read-only home costs time, not the result
            write(path, *found)
    return found


def read(path: Path) -> Parsed | None:
    """A cache file, or None where it is absent or is not, byte for byte, what was written."""
    try:
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:header])["__metadata__"]
        if sha256(content[header:]).hexdigest() != metadata["sha256"]:
            return None
        return load(content), json.loads(metadata["manifest"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, tensors: dict[str, Tensor], manifest: dict) -> None:
    """Write a cache file so that a reader sees the whole of it or nothing."""
    plain = save(tensors)
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    content = save(tensors, {"manifest": json.dumps(manifest), "sha256": sha256(body).hexdigest()})
    with sealed_file(path) as unfinished:
        unfinished.write_bytes(content)


@cache
def code_version() -> str:
    """A digest of the source of this package: what other code has parsed is never read again."""
    value = sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        value.update(path.read_bytes())
    return value.hexdigest()
