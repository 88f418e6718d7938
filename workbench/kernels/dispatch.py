"""Which path an operator takes, and the record of the one it took.

An operator has up to five paths: "reference" (plain torch, the meaning), "cpu" (fast on a processor, in torch),
"native" (faster there, in C, for float32, where there is a C compiler), "grouped_mm" (torch's own grouped product) and
"triton" (a GPU; or a processor under Triton's interpreter, TRITON_INTERPRET=1). Device and type decide unless
`backend=` does. A path that was asked for and cannot do the job is an error: nothing falls back in silence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from workbench.errors import InputError, unknown
from workbench.kernels import native

_last: dict[str, str] = {}
_recordings: list[list[tuple[str, str]]] = []


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    available: tuple[str, ...],
    dtype: torch.dtype | None = None,
    source: Path | None = None,
) -> str:
    """The path of operator `op` for tensors on `device`: `backend` if it can run there, else what suits the device.

    An operator with a native path tells the type of its tensors and the C file. No compiler is looked for unless
    "native" is asked for: `begin` does that when the path runs.

    Raises:
        InputError: `backend` is not one of `available`, or cannot run on `device` or for `dtype`.
    """
    if backend is None:
        if device.type == "cpu" and dtype == torch.float32 and "native" in available:
            return "native"
        fitting = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        return fitting if fitting in available else "reference"
    admit(op, backend, device, available, dtype)
    if backend == "native" and not torch.compiler.is_compiling() and (obstacle := native.obstacle(source)) is not None:
        raise InputError(f"backend is 'native' but {op} cannot use it: {obstacle}")
    if backend == "triton" and find_spec("triton") is None:
        raise InputError(f"backend is 'triton' but {op} cannot use it: the package triton is not installed")
    return backend


def admit(
    op: str, backend: str, device: torch.device, available: tuple[str, ...], dtype: torch.dtype | None = None
) -> None:
    """Raise `InputError` unless `backend` is one of `available` and takes tensors on `device` and of `dtype`.

    What the registered operators ask too: they can be called by their names in torch, past `choose`.
    """
    if backend not in available:
        raise unknown(f"backend of {op}", backend, available)
    if backend in ("cpu", "native") and device.type not in ("cpu", "meta"):
        raise InputError(f"backend is {backend!r} but {op} got tensors on {device}; they must be on the CPU")
    if backend == "native" and dtype != torch.float32:
        raise InputError(f"backend is 'native' but {op} got tensors of {dtype}; they must be torch.float32")
    if backend == "triton" and device.type != "cuda" and not (device.type in ("cpu", "meta") and interpreting()):
        raise InputError(
            f"backend is 'triton' but {op} got tensors on {device}; they must be on a GPU, or on the CPU in a process "
            "started with TRITON_INTERPRET=1"
        )


def unseen(x: Tensor) -> bool:
    """Whether nobody looks on as an operator runs: no autograd, transform, compiler, mode or subclass of tensors.

    What torch has registered may then be called as the function it was made of, without the 40 us that finding out
    takes it: as long as the work of an optimiser on a small matrix.
    """
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not transformed()
    )


def transformed() -> bool:
    """Whether torch.func or a forward-mode derivative is at work: tensors may then be wrapped, and have no storage."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def no_tangents(op: str, **tensors: Tensor | None) -> None:
    """Raise `InputError` where a tensor has a forward-mode tangent: torch would drop it, and the derivative be zero."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise InputError(f"{name} has a forward-mode tangent but {op} has derivatives in backward mode only")


def interpreting() -> bool:
    """True in a process in which Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def begin(op: str, backend: str, source: Path | None = None) -> str:
    """Called by an operator whose path begins to run: the path that does, which is recorded.

    It is `backend`, but "cpu" for a "native" that cannot be built here from `source`.
    """
    if backend == "native" and native.obstacle(source) is not None:
        backend = "cpu"
    _last[op] = backend
    for seen in _recordings:
        seen.append((op, backend))
    return backend


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
