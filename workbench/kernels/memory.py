"""Memory for the CPU paths: scratch buffers that are kept between calls, and large results on large pages. And meters.

A fresh tensor of tens of megabytes costs more than writing it: the C library takes it from the system anew each time,
and the system clears it page by page, 4 KiB at once. For results that must be fresh (gradients), Linux is asked for
pages of 2 MiB, where it grants them on request. For what nobody sees after the call, one buffer a thread is kept.
"""

import ctypes
import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

KEPT_BYTES = 512 * 2**20  # a larger scratch buffer is freed after the call
HUGE_PAGE = 2 * 2**20
MADV_HUGEPAGE = 14  # of <sys/mman.h>
ALIGNMENT = 64  # bytes: a cache line, and the widest vector

_threads = threading.local()


def scratch(*wanted: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """Uninitialised CPU tensors of the given shapes and types, for use until the next call in this thread.

    They lie in one buffer, which is kept for the next call and freed with its thread, or by `release`. So nothing may
    be returned or saved that shares memory with them.
    """
    sizes = [-(-_product(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in wanted]
    buffer = getattr(_threads, "buffer", None)
    if buffer is None or buffer.numel() < sum(sizes):
        _threads.buffer = None  # freed before the larger one is taken
        buffer = fresh((sum(sizes),), torch.uint8)
        if sum(sizes) <= KEPT_BYTES:
            _threads.buffer = buffer
    parts, start = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        n_bytes = _product(shape) * dtype.itemsize
        parts.append(buffer[start : start + n_bytes].view(dtype).view(shape))
        start += size
    return parts


class Workspace:
    """Named scratch tensors of one type: `workspace(name, *shape)` has whatever was left in it."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.buffers = dtype, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = _product(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = None  # freed before the larger one is taken
            self.buffers[name] = fresh((size,), self.dtype)
        return self.buffers[name][:size].view(shape)

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


@contextmanager
def workspaces(count: int, dtype: torch.dtype) -> Iterator[list[Workspace]]:
    """One for each of `count` workers of the calling thread, kept as the buffer of `scratch` is."""
    kept = _threads.__dict__.pop("workspaces", {})  # nobody else uses them meanwhile
    mine = kept.setdefault(dtype, [])
    mine += [Workspace(dtype) for _ in range(count - len(mine))]
    yield mine[:count]
    if sum(space.n_bytes for spaces in kept.values() for space in spaces) <= KEPT_BYTES:
        _threads.workspaces = kept


def release() -> None:
    """Free this thread's scratch buffer and workspaces."""
    _threads.buffer = None
    _threads.workspaces = {}


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, on large pages where it is large and the system has them on request."""
    return on_large_pages(torch.empty(shape, dtype=dtype))


def on_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, a CPU tensor that nothing has been written to."""
    madvise = _madvise() if tensor.nbytes >= HUGE_PAGE else None
    if madvise is not None:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (tensor.data_ptr() + tensor.numel() * tensor.itemsize) // HUGE_PAGE * HUGE_PAGE
        if end > first:
            madvise(first, end - first, MADV_HUGEPAGE)  # advice: a refusal changes nothing but the speed
    return tensor


def saved_bytes(call: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `call()`: of distinct storages, but those of `exclude`.

    A tensor that is saved twice, or as a view of another one, counts once. Weights are often excluded: they are there
    anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, torch.UntypedStorage] = {}  # held here, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes of memory that this process needs during `call()` beyond what it has before; None where nobody says.

    Linux keeps the most that was resident and lets a process start that anew. What the C library keeps of memory that
    was freed is given back first, where it can be (glibc): the call would use it again, and seem to need none.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()  # what is freed during the call must not be from before
    _trim()
    try:
        reset.write_text("5")
        before = _resident(status, "VmHWM")
        call()
        return _resident(status, "VmHWM") - before
    except (OSError, StopIteration):
        return None


def _resident(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


@functools.cache
def _madvise():
    """The C library's madvise, None on systems that have not this kind of advice."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
