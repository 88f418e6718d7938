"""Runs a function in several processes that talk by gloo, and leaves none of them, however it ends.

    losses = run_processes(train, 4, config)      # train(config) on ranks 0 to 3; what each returned, by rank

The function must be one that other processes can import by its name: of a module, not of a script or a notebook.
Within it, torch.distributed is set up: `dist.get_rank()`, `dist.get_world_size()`, and all collectives on the CPU.
The first call pays the imports, seconds; later ones fork from a server that has them, in a fraction of a second.
"""

import ctypes
import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from workbench.errors import InputError

MOST = 64
"""Processes that may be asked for: more on one machine measure its scheduler only."""

LONGEST = 86_400.0
"""Seconds that may be waited for an end: a day."""

START = 120.0
"""Seconds in which all processes must have started. A busy machine is slow."""

PRELOADED = (
    __name__,
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch._dynamo",  # the first functional collective asks for it
)
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(PRELOADED))


class RankError(RuntimeError):
    """A rank raised, died or did not come to its end. The message names it, with its traceback.

    Attributes:
        rank: the one that is the cause, as far as that can be told.
    """

    def __init__(self, rank: int, message: str):
        super().__init__(rank, message)  # both, for it to be pickled
        self.rank, self.message = rank, message

    def __str__(self) -> str:
        return self.message


def run_processes(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks.

    Args:
        function, args: and what is returned, are pickled; tensors are copied.
        world: number of processes, 1 to 64, one thread each.
        timeout: seconds from when all have started to when all must have ended, a day at most.

    Raises:
        InputError: a world or a timeout that is none, or a function that other processes cannot import.
        RankError: a rank raised, died, or had not returned in time. All processes have been ended.
    """
    if isinstance(world, bool) or not isinstance(world, int) or not 1 <= world <= MOST:
        raise InputError(f"world is {world!r} but must be a whole number of processes, 1 to {MOST}")
    if not 0 < timeout <= LONGEST:
        raise InputError(f"timeout is {timeout!r} but must be a number of seconds above 0, at most {LONGEST:g}")
    if getattr(function, "__module__", None) == "__main__":
        raise InputError(f"function {function.__name__!r} is of __main__ but must be of a module that can be imported")
    try:
        job = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"function is {function!r} but must be picklable with its arguments: {error}") from error
    with TemporaryDirectory(prefix="workbench-ranks-") as folder:
        ranks = _Ranks(Path(folder))
        try:
            ranks.start(world, job)
            ranks.wait("up", START, "start")
            ranks.wait("done", timeout, "end")
            return [pickle.loads(value) for _, value in sorted(ranks.done.items())]
        finally:
            ranks.end()


class _Ranks:
    """The processes of one call, as their parent sees them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[Any] = []
        self.pipes: list[connection.Connection] = []
        self.up: dict[int, None] = {}
        self.done: dict[int, bytes] = {}

    def start(self, world: int, job: bytes) -> None:
        for rank in range(world):
            mine, its = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(its, str(self.folder), rank, world, job, dict(os.environ)), daemon=True
            )
            self.pipes.append(mine)
            with _without_main():
                process.start()
            self.processes.append(process)
            its.close()  # so that the end of the process is the end of the pipe

    def wait(self, what: str, seconds: float, verb: str) -> None:
        """Until each rank has said that it is "up" or "done"."""
        said = getattr(self, what)
        deadline = time.monotonic() + seconds
        while len(said) < len(self.pipes):
            open_ones = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in self.done}
            ready = connection.wait(list(open_ones), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self.late([rank for rank in range(len(self.pipes)) if rank not in said], seconds, verb)
            failed = [words for pipe in ready if (words := self.hear(open_ones[pipe])) is not None]
            if failed:
                raise self.failure(failed)

    def hear(self, rank: int) -> tuple[int, float, int, str] | None:
        """Takes in what a rank says. Of one that failed: kind and time, by which causes are sorted, itself and why."""
        try:
            kind, at, value = self.pipes[rank].recv()
        except (EOFError, OSError):
            self.processes[rank].join(5)
            code = self.processes[rank].exitcode
            how = (
                f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
            )
            return 1, time.monotonic(), rank, f"{how} without a word"
        if kind != "failed":
            getattr(self, kind)[rank] = value
            return None
        # what a rank's own code raised comes before what gloo says of peers that are gone
        return 2 if "gloo" in value.rpartition("\n  ")[2] else 0, at, rank, f"raised\n{value}"

    def failure(self, failed: list[tuple[int, float, int, str]]) -> RankError:
        known = {rank for _, _, rank, _ in failed}
        others = {pipe: r for r, pipe in enumerate(self.pipes) if r not in known and r not in self.done}
        until = time.monotonic() + 0.3  # the others fail of it, or are the cause and heard later
        while others and (ready := connection.wait(list(others), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                words = self.hear(rank := others[pipe])
                if words is not None:
                    failed.append(words)
                if words is not None or rank in self.done:
                    del others[pipe]
        (_, _, rank, why), *then = sorted(failed)
        last = "".join(f"\nthen rank {other} {words.strip().splitlines()[-1].strip()}" for _, _, other, words in then)
        return RankError(rank, f"rank {rank} of {len(self.pipes)} {why.rstrip()}{last}")

    def late(self, ranks: list[int], seconds: float, verb: str) -> RankError:
        """Where each of the ranks is that had not come: first those that are not waiting for the others."""
        found = [(words.count("torch/distributed/") > 0, rank, words) for rank in ranks for words in [self.where(rank)]]
        said = "\n".join(
            f"rank {rank} {'waits in' if waits else 'is at'}\n{words}" for waits, rank, words in sorted(found)
        )
        many = f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}"
        return RankError(
            sorted(found)[0][1], f"{many} of {len(self.pipes)} did not {verb} within {seconds:g} seconds:\n{said}"
        )

    def where(self, rank: int) -> str:
        """The innermost frames of a rank's stack, which it writes down when signalled."""
        path = self.folder / f"{rank}.stack"
        if path.exists():  # or the signal would end it
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
            for _ in range(50):
                if (text := path.read_text()).count("\n") > 1:
                    return "\n".join(text.splitlines()[1:9])
                time.sleep(0.02)
        return "  (a place it does not tell)"

    def end(self) -> None:
        for process in self.processes:
            if len(self.done) == len(self.pipes):
                process.join(1)
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keeps multiprocessing from running the caller's script again in each process: what runs there is of a module, and
    a script would have to be guarded by `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _rank(pipe: Any, folder: str, rank: int, world: int, job: bytes, environment: dict[str, str]) -> None:
    """The life of one process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the server, nor that its parent
    os.environ.clear()
    os.environ.update(environment)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:  # what a machine calls itself may have no address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    try:
        stack = Path(folder, f"{rank}.new")
        faulthandler.register(signal.SIGUSR1, file=os.open(stack, os.O_CREAT | os.O_WRONLY), all_threads=False)
        stack.rename(stack.with_suffix(".stack"))  # from now on it may be signalled
        torch.set_num_threads(1)
        pipe.send(("up", time.monotonic(), None))
        # it is the parent that knows when it is too late, and says of whom
        patience = timedelta(seconds=LONGEST)
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world, timeout=patience
        )
        function, args = pickle.loads(job)
        value = pickle.dumps(function(*args))
        dist.barrier()  # or the first to leave would close what others still read
        pipe.send(("done", time.monotonic(), value))
    except BaseException:
        pipe.send(("failed", time.monotonic(), traceback.format_exc()))
    os._exit(0)
