"""Which path an operator takes, and the record of the one it took.

An operator has up to four paths: "reference" (plain torch, the meaning), "cpu" (fast on a processor), "grouped_mm"
(torch's own grouped product) and "triton" (a GPU; or a processor under Triton's interpreter, TRITON_INTERPRET=1).
The device decides unless `backend=` does. A path that was asked for and cannot do the job is an error: nothing falls
back in silence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from workbench.errors import InputError, unknown

_last: dict[str, str] = {}
_recordings: list[list[tuple[str, str]]] = []


def choose(op: str, backend: str | None, device: torch.device, available: tuple[str, ...]) -> str:
    """The path of operator `op` for tensors on `device`: `backend` if it can run there, else what suits the device.

    Raises:
        InputError: `backend` is not one of `available`, or cannot run on `device`.
    """
    if backend is None:
        fitting = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        return fitting if fitting in available else "reference"
    if backend not in available:
        raise unknown(f"backend of {op}", backend, available)
    if backend == "cpu" and device.type not in ("cpu", "meta"):
        raise InputError(f"backend is 'cpu' but {op} got tensors on {device}; they must be on the CPU")
    if backend == "triton":
        if find_spec("triton") is None:
            raise InputError(f"backend is 'triton' but {op} cannot use it: the package triton is not installed")
        if device.type != "cuda" and not (device.type in ("cpu", "meta") and interpreting()):
            raise InputError(
                f"backend is 'triton' but {op} got tensors on {device}; they must be on a GPU, or on the CPU in a "
                "process started with TRITON_INTERPRET=1"
            )
    return backend


def interpreting() -> bool:
    """True in a process in which Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def record(op: str, backend: str) -> None:
    """Called by an operator when a path has begun to run."""
    _last[op] = backend
    for seen in _recordings:
        seen.append((op, backend))


def last_backend(op: str) -> str | None:
    """The path that operator `op` ran last in this process, forward or backward; None if it has not run."""
    return _last.get(op)


@contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """Collects (operator, path) of every run inside the block, in order; a backward is `"<operator>.backward"`."""
    seen: list[tuple[str, str]] = []
    _recordings.append(seen)
    try:
        yield seen
    finally:
        _recordings[:] = [other for other in _recordings if other is not seen]
