"""The native path: `native.c` takes a vector of channels through all steps, their states in registers and the cache.

x, delta and z are read where they are, if channels or steps lie side by side; threads take channels. Gradients of b and
c are sums over all channels: first of each of `GROUPS` groups, then of these in order, so that no result depends on the
threads.
"""

import ctypes
from ctypes import c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from workbench.kernels import native, threads
from workbench.kernels.memory import fresh

SOURCE = Path(__file__).with_name("native.c")
GROUPS = 8
WORTH = 2**19  # states of all steps together from which on a second thread gains more than it takes to start
PIECES = 4  # that a thread takes one after the other


class Cube(ctypes.Structure):
    """`cube` of native.c."""

    _fields_ = (("at", c_void_p), *((name, c_long) for name in ("batch", "channel", "step")))

    @classmethod
    def of(cls, tensor: Tensor) -> "Cube":
        return cls(tensor.data_ptr(), *tensor.stride())


class Job(ctypes.Structure):
    """`job` of native.c."""

    _fields_ = (
        *((name, c_long) for name in ("batch", "channels", "states", "steps", "span", "groups")),
        *((name, Cube) for name in ("x", "delta", "z", "y", "grad", "dx", "d_delta", "dz")),
        *((name, c_void_p) for name in ("a", "b", "c", "d", "first", "last", "kept")),
        *((name, c_void_p) for name in ("da", "db", "dc", "dd", "d_first")),
    )


def forward(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, state: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    from workbench.kernels.selective_scan import kept_shape

    first, y = state.transpose(1, 2).contiguous(), torch.empty_like(x)
    last, kept = torch.empty_like(first), fresh(kept_shape(x, a) if save else (0,), a.dtype)
    cubes = {"x": _near(x), "delta": _near(delta), "z": _near(z), "y": y}
    given = {"a": a, "b": b, "c": c, "d": d, "first": first, "last": last} | ({"kept": kept} if save else {})
    _run("forward", cubes, given, x.shape[0] * -(-x.shape[1] // _library().lanes()))
    return y, last.transpose(1, 2).contiguous(), kept


def backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """As `reference.backward`."""
    (batch, channels, steps), states = x.shape, a.shape[1]
    cubes = {"x": _near(x), "delta": _near(delta), "z": _near(z), "grad": _near(grad)}
    found = {"dx": torch.empty_like(x), "d_delta": torch.empty_like(delta), "dz": torch.empty_like(z)}
    last = grad_last.transpose(1, 2).contiguous()
    lanes = _library().lanes()
    span = lanes * -(-channels // (lanes * GROUPS))  # channels of a group: whole blocks
    groups = -(-channels // span) if channels else 0
    da, first = torch.empty_like(last), torch.empty_like(last)
    db, dc = (fresh((groups, batch, states, steps), a.dtype) for _ in range(2))
    dd = a.new_empty(batch, channels)
    given = {"a": a, "b": b, "c": c, "d": d, "last": last, "kept": kept}
    given |= {"da": da, "db": db, "dc": dc, "dd": dd, "d_first": first}
    _run("backward", cubes | found, given, batch * groups, span=span, groups=groups)
    db, dc, da, dd = (_sum(parts) for parts in (db, dc, da, dd))
    grads = *found.values(), da.T.contiguous(), db, dc, dd, first.transpose(1, 2).contiguous()
    dx, d_delta, dz, da, db, dc, dd, first = grads
    return dx, d_delta, da, db, dc, dd, dz, first


def _near(tensor: Tensor) -> Tensor:
    """The tensor, copied where neither its channels nor its steps lie side by side."""
    return tensor if 1 in tensor.stride()[1:] else tensor.contiguous()


def _sum(parts: Tensor) -> Tensor:
    """In their order, whatever the number of threads."""
    out = torch.zeros(parts.shape[1:], dtype=parts.dtype)
    for part in parts:
        out += part
    return out


def _run(name: str, cubes: dict[str, Tensor], given: dict[str, Tensor], items: int, **of_groups: int) -> None:
    """A function of native.c, its items in pieces that threads take; the tensors by their names in a `Job`."""
    a, x = given["a"], cubes["x"]
    given = {key: tensor.contiguous() for key, tensor in given.items()}
    job = Job(batch=x.shape[0], channels=a.shape[0], states=a.shape[1], steps=x.shape[2], **of_groups)
    for key, tensor in cubes.items():
        setattr(job, key, Cube.of(tensor))
    for key, tensor in given.items():
        setattr(job, key, tensor.data_ptr())
    function = getattr(_library(), name)
    failed = []

    def work(_: int, piece: range) -> None:
        if function(job, piece.start, piece.stop):
            failed.append(piece)

    count = min(threads.available(), items) if x.numel() * a.shape[1] >= WORTH else 1
    if count > 1:
        pieces = min(items, PIECES * count)
        threads.share([range(items * i // pieces, items * (i + 1) // pieces) for i in range(pieces)], work, count)
    else:
        work(0, range(items))
    if failed:
        raise MemoryError(f"selective_scan found no memory for the scratch of {name}")


@cache
def _library() -> ctypes.CDLL:
    library = native.library(SOURCE)
    library.lanes.argtypes, library.lanes.restype = (), c_long
    for function in (library.forward, library.backward):
        function.argtypes = ctypes.POINTER(Job), c_long, c_long
    return library
