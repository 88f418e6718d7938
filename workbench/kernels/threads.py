"""Work in several threads of one core each, for problems that fall apart into many small independent ones.

torch runs one operator at a time and splits it over its threads. For a product of a few hundred rows most of the gain
is lost to the hand-over, and element-wise operators up to 32,768 elements are not split at all. Here every thread takes
whole problems instead. Inside such a thread torch's operators must not start threads of their own; OpenMP and MKL,
which the builds of torch for x86 use, can be told so for one thread alone. Other builds take one problem after the
other, and split operators as ever.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")

_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None  # with its process: a fork has none of the threads
_here = threading.local()  # `count`: how many threads there were before `confined`


def available() -> int:
    """How many threads `share` can use: as many as torch is set to, 1 where they cannot be confined."""
    if _controls() is None:
        return 1
    return getattr(_here, "count", None) or torch.get_num_threads()


@contextmanager
def confined() -> Iterator[None]:
    """torch's operators called inside use the calling thread alone; `share` has as many threads as ever.

    After an operator that used several threads, those of OpenMP wait for the next one in a loop that takes a core for
    some milliseconds each: one that `share` has given to a thread of its own.
    """
    if _controls() is None or hasattr(_here, "count"):
        yield
        return
    _here.count = torch.get_num_threads()
    _confine()
    try:
        yield
    finally:
        set_openmp, set_mkl = _controls()
        set_openmp(_here.count)
        set_mkl(0)  # as many as are set for all threads
        del _here.count


def share(items: Iterable[Item], work: Callable[[int, Item], None], threads: int) -> None:
    """Call `work(thread, item)` for every item, in `threads` threads numbered from 0 that take the next item in turn.

    Gradients are off inside. The first exception is raised here, once all threads have ended.
    """
    queue = iter(items)
    turn = threading.Lock()

    def run(thread: int) -> None:
        _confine()
        with torch.no_grad():
            while True:
                with turn:
                    item = next(queue, queue)
                if item is queue:
                    return
                work(thread, item)

    futures = [_executor().submit(run, thread) for thread in range(threads)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid():
            _pool = os.getpid(), ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="workbench-kernels")
        return _pool[1]


def _confine() -> None:
    """torch's operators called from this thread use this thread alone."""
    torch.get_num_threads()  # makes torch set the thread up first: it would undo what follows
    set_openmp, set_mkl = _controls()
    set_openmp(1)
    set_mkl(1)


@functools.cache
def _controls() -> tuple[Callable[[int], object], Callable[[int], object]] | None:
    """The functions that set OpenMP's and MKL's number of threads for the calling thread only, None without them."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
