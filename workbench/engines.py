"""Where pieces of work that do not need each other are done: in processes of this machine, or on a cluster.

    with Workers(4, "dask", "tcp://head:8786").open(len(pieces)) as crew:
        for piece, made in crew.each(work, pieces): ...

`loky` is processes of this machine. `dask` and `ray` are clusters of those names: the one that answers at an address,
or one of this machine that lives as long as the crew. What is sent there is one call, a function of a file and its
arguments; what happens around it, such as keeping its result, happens here. A call has one thread wherever it is made,
and calls nobody else to help: it gives the same bits on each engine.

A worker that dies costs the call that it was making and no other. The call is made again, `ATTEMPTS` times in all.

Each engine is used by its futures. Its backend of joblib is not, for that of Ray gives nothing before all is done, that
of loky gives up every call when one worker dies, and that of Dask takes no number of jobs.
"""

import asyncio
import hashlib
import logging
import os
import platform
import queue
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from workbench.attached import attach
from workbench.errors import InputError, WorkerLostError, unknown
from workbench.imports import COMPILED, PACKAGE

ATTEMPTS = 3
PATIENCE = 10.0
"""Seconds in which a cluster has to answer."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")

Piece = TypeVar("Piece", bound=tuple)
Made = TypeVar("Made")


class Engine(Protocol):
    """Calls that run elsewhere. `submit` may be asked by several threads at once.

    Attributes:
        size: how many calls run at the same time.
        deaths: the errors that say that a worker died.
        closed: whether it has ended.
    """

    size: int
    closed: bool
    deaths: tuple[type[Exception], ...]

    def submit(self, function: Callable, *args: Any) -> Future:
        """Raises RuntimeError once it has ended."""

    def close(self) -> None:
        """End at once; calls that are being made raise."""


@dataclass(frozen=True)
class Workers:
    """Which workers are wanted.

    Attributes:
        jobs: calls at the same time; None for one on each core of this machine, or what a cluster has.
        engine: "loky", "dask" or "ray".
        address: of a cluster that is there; None for one of this machine.

    Raises:
        InputError: no such engine, fewer than one job, or an address where there is no cluster.
    """

    jobs: int | None = None
    engine: str = "loky"
    address: str | None = None

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.jobs is not None and self.jobs < 1:
            raise InputError(f"jobs is {self.jobs} but must be at least 1")
        if self.address is not None and self.engine == "loky":
            raise InputError(f"address is {self.address!r} but engine loky is this machine: take dask or ray")

    @contextmanager
    def open(self, pieces: int) -> Iterator["Crew"]:
        """The workers, until the block ends; then no process of theirs is left on this machine.

        Args:
            pieces: of work, and no more workers are started than there are. Of none, or of one on this machine, none.

        Raises:
            InputError: the package of the engine is missing, or no cluster answers at the address.
        """
        size = min(self.jobs or pieces, pieces)
        if self.jobs is None and self.address is None and pieces > 1:
            from joblib import cpu_count  # heavy enough to wait for a study

            size = min(cpu_count(), pieces)
        if pieces == 0 or (self.engine == "loky" and size == 1):
            yield Crew(None)
            return
        engine = ENGINES[self.engine](None if self.jobs is None and self.address is not None else size, self.address)
        try:
            yield Crew(engine, None if self.address is None else code())
        finally:
            engine.close()


@dataclass(frozen=True)
class Crew:
    """Workers that are there; without an engine this process is the only one.

    Attributes:
        code: what `code()` has to be where a call is made; None where it cannot be another.
    """

    engine: Engine | None
    code: str | None = None

    def call(self, function: Callable[..., Made], *args: Any) -> Made:
        """`function(*args)`, made by a worker.

        Args:
            function: of a module that the worker can import; it and what it takes and gives can be pickled.

        Raises:
            WorkerLostError: the worker died, `ATTEMPTS` times.
            InputError: the worker has another workbench, or another version of Python or torch.
        """
        if self.engine is None:
            return alone(function, *args)
        for _ in range(ATTEMPTS):
            try:
                return self.engine.submit(_elsewhere, self.code, function, *args).result()
            except self.engine.deaths as error:
                if self.engine.closed:  # it did not die, it was ended
                    raise
                died = error
        raise WorkerLostError(f"the worker died {ATTEMPTS} times (out of memory?): {type(died).__name__}") from died

    def each(self, work: Callable[..., Made], pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Made]]:
        """`work(*piece)` of all pieces, as they are done; `work` runs here, and leaves to `call` what is heavy.

        An error ends all of it. Only of lost workers the others' work is waited for, and then the first is raised.
        """
        if self.engine is None:
            yield from ((piece, work(*piece)) for piece in pieces)
            return
        lost = []
        pool = ThreadPoolExecutor(self.engine.size, thread_name_prefix="workbench-crew")
        running = {pool.submit(work, *piece): piece for piece in pieces}
        try:
            for done in as_completed(running):
                try:
                    made = done.result()
                except WorkerLostError as error:
                    lost.append((running[done], error))
                else:
                    yield running[done], made
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not all(one.done() for one in running):
                self.engine.close()  # or the threads would wait for calls that nobody wants any more
            pool.shutdown()
        if lost:
            piece, error = lost[0]
            more = f", and {len(lost) - 1} more" * (len(lost) > 1)
            raise WorkerLostError(f"{', '.join(map(str, piece))}: {error}{more}; what the others made is there")


def _elsewhere(code_here: str | None, function: Callable[..., Made], *args: Any) -> Made:
    if code_here is not None and code() != code_here:
        raise InputError(
            f"a worker on {socket.gethostname()} has another workbench, Python or torch than this machine: "
            f"install the same there, its code is {code()} and not {code_here}"
        )
    return alone(function, *args)


@cache
def code() -> str:
    """Digest of this workbench and of what its numbers depend on, 16 hexadecimal digits."""
    found = hashlib.sha256(f"{version('torch')} {version('numpy')} {platform.python_version()}".encode())
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", *COMPILED)):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def alone(function: Callable[..., Made], *args: Any) -> Made:
    """`function(*args)` with one thread and no helpers, whatever its libraries would take by themselves."""
    from joblib import parallel_config
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), parallel_config("sequential"):
        return function(*args)


class _Ending:
    """Of an engine: a call is submitted before the end, so that the end finds it, or not at all.

    One that came in between would be waited for by its thread, and called off by nobody.
    """

    def __init__(self):
        self.closed, self._lock = False, threading.Lock()

    @contextmanager
    def _submitting(self) -> Iterator[None]:
        with self._lock:
            if self.closed:
                raise RuntimeError("the workers have ended")
            yield

    def _end(self) -> None:
        with self._lock:
            self.closed = True


class Loky(_Ending):
    """Processes of this machine, an executor each: one that dies breaks its own."""

    def __init__(self, jobs: int, address: None):
        from joblib.externals.loky.process_executor import BrokenProcessPool

        super().__init__()
        self.size, self.deaths = jobs, (BrokenProcessPool,)
        self._all, self._idle = [], queue.SimpleQueue()

    def submit(self, function: Callable, *args: Any) -> Future:
        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        def free(done: Future) -> None:
            if done.cancelled() or not isinstance(done.exception(), BrokenProcessPool):
                self._idle.put(executor)

        with self._submitting():
            try:
                executor = self._idle.get_nowait()
            except queue.Empty:
                # Workers end with this process: killed, it would leave them for minutes, with what their calls hold.
                ended = {"initializer": attach, "initargs": (os.getpid(),)}
                executor = ProcessPoolExecutor(1, env=ONE_THREAD, **ended)
                self._all.append(executor)
            future = executor.submit(function, *args)
        future.add_done_callback(free)
        return future

    def close(self) -> None:
        from joblib.externals.loky.backend.utils import kill_process_tree

        self._end()
        for executor in self._all:
            # by itself, and then told that it is broken: with kill_workers=True its thread may fail over a new call
            for process in list(executor._processes.values()):
                kill_process_tree(process)
            executor.shutdown()


class Dask(_Ending):
    """A cluster of Dask."""

    def __init__(self, jobs: int | None, address: str | None):
        with _package("dask", "distributed"):
            import dask
            from dask.distributed import Client, LocalCluster
            from distributed.scheduler import KilledWorker
        super().__init__()
        self.deaths, self._cluster = (KilledWorker,), None
        if address is None:
            # who may reach a scheduler may run code as who started it: certificates of its own, and this machine alone
            quiet = {"silence_logs": logging.CRITICAL}  # what calls raise is told as that
            apart = {"security": True, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
            # Dask itself gives the call to another worker, so often
            with dask.config.set({"distributed.scheduler.allowed-failures": ATTEMPTS - 1}), _deaf():
                self._cluster = LocalCluster(n_workers=jobs, threads_per_worker=1, **apart, **quiet)
        else:
            reach(address, r"(tcp|tls)://HOST:PORT", r"(?:(?:tcp|tls)://)?(\[?[^/\]]+\]?):(\d+)")
            _ask_dask(address)
        try:
            self._client = Client(self._cluster or address, timeout=PATIENCE, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise InputError(f"address is {address!r} but no scheduler of Dask answers there: {error}") from None
        if not (threads := self._client.nthreads()):
            self.close()
            raise InputError(f"address is {address!r} but its cluster has no workers")
        self.size, self._pending = jobs or sum(threads.values()), set()

    def submit(self, function: Callable, *args: Any) -> "_OfDask":
        with self._submitting():
            future = self._client.submit(function, *args, pure=False)
            self._pending.add(future)
        return _OfDask(future, self._pending)

    def close(self) -> None:
        self._end()
        with suppress(Exception):  # of a cluster that is gone nothing need be called off
            self._client.cancel(list(self._pending), force=True)
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


@contextmanager
def _deaf() -> Iterator[None]:
    """Threads and processes that start in the block do not hear Ctrl-C: this process does, and ends them.

    A terminal tells all of them, and each worker would print where it was.
    """
    resource_tracker.ensure_running()  # whoever starts it hears Ctrl-C again, and so do its later children
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ask_dask(address: str) -> None:
    """Refuse an address where no scheduler answers in time: its client waits for ever for the first word."""
    from distributed.core import rpc
    from distributed.security import Security

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return (await there.identity())["type"]

    try:  # in a thread of its own, for a notebook has a loop in this one
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(lambda: asyncio.run(asyncio.wait_for(ask(), PATIENCE))).result()
    except Exception as error:  # another service answers in many ways
        said = str(error) or type(error).__name__
        raise InputError(f"address is {address!r} but no scheduler of Dask answers there: {said}") from None
    if found != "Scheduler":
        raise InputError(f"address is {address!r} but must be that of a scheduler of Dask: a {found} answers there")


def _ask_ray(address: str, place: tuple[str, int]) -> None:
    """Refuse an address where nobody speaks HTTP/2, as a cluster of Ray does: its client would try for minutes."""
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    try:
        with socket.create_connection(place, PATIENCE) as there:
            there.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
            head = there.recv(len(settings), socket.MSG_WAITALL)
    except OSError as error:
        raise InputError(f"address is {address!r} but no cluster of Ray answers there: {error}") from None
    if head[3:4] != settings[3:4]:
        raise InputError(f"address is {address!r} but no cluster of Ray answers there: another service does")


@dataclass(frozen=True)
class _OfDask:
    future: Any
    pending: set

    def result(self) -> Any:
        try:
            return self.future.result()
        finally:
            self.pending.discard(self.future)


class Ray(_Ending):
    """A cluster of Ray."""

    def __init__(self, jobs: int | None, address: str | None):
        if "ray" not in sys.modules:  # it reads these once
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
            if address is None:  # it listens on all addresses of the machine: to those who have the token
                os.environ.setdefault("RAY_AUTH_MODE", "token")
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with _package("ray"):
            import ray
            from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
        super().__init__()
        self._ray, self.deaths = ray, (WorkerCrashedError, NodeDiedError, OutOfMemoryError)
        self._own = not ray.is_initialized()
        if self._own:
            plain = {"log_to_driver": False, "logging_level": logging.ERROR}
            if address is None:
                local = {"num_cpus": jobs, "_node_ip_address": "127.0.0.1"}
                try:
                    ray.init(include_dashboard=False, **local, **plain)
                except Exception as error:
                    ray.shutdown()  # what of it has started
                    raise InputError(f"engine is 'ray' but no cluster starts on this machine: {error}") from error
            else:
                place = reach(address, "HOST:PORT or ray://HOST:PORT", r"(?:ray://)?(\[?[^/\]]+\]?):(\d+)")
                _ask_ray(address, place)
                try:
                    ray.init(address, **plain)
                except Exception as error:  # it says so in many ways
                    raise InputError(f"address is {address!r} but no cluster of Ray answers there: {error}") from None
        self.size = jobs or int(ray.cluster_resources().get("CPU", 0))
        if not self.size:
            self.close()
            raise InputError(f"address is {address!r} but its cluster has no workers")
        self._remote, self._pending = ray.remote(num_cpus=1, max_retries=0)(_made_by_ray), {}

    def submit(self, function: Callable, *args: Any) -> Future:
        with self._submitting():
            reference = self._remote.remote(function, args)
            future = reference.future()
            self._pending[future] = reference
        future.add_done_callback(lambda done: self._pending.pop(done, None))
        return future

    def close(self) -> None:
        self._end()
        for future, reference in list(self._pending.items()):
            with suppress(Exception):  # it may have ended by itself
                self._ray.cancel(reference, force=True)
            future.cancel()  # or who waits for it would wait for ever once Ray has gone
        if self._own:
            self._ray.shutdown()


def _made_by_ray(function: Callable, args: tuple) -> Any:
    return function(*args)


ENGINES = {"loky": Loky, "dask": Dask, "ray": Ray}

HERE = Workers(1)
EVERY_CORE = Workers()


@contextmanager
def _package(*names: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"engine {names[0]} needs {' and '.join(names)}: pip install 'workbench[engines]' ({error})"
        ) from error


def reach(address: str, form: str, pattern: str) -> tuple[str, int]:
    """Host and port; an address of another form, or where nobody listens, is refused: clients would try for minutes."""
    match = re.fullmatch(pattern, address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise InputError(f"address is {address!r} but must be {form}")
    place = match[1].strip("[]"), int(match[2])
    try:
        socket.create_connection(place, PATIENCE).close()
    except OSError as error:
        raise InputError(f"address is {address!r} but nobody answers there: {error.strerror or error}") from None
    return place
