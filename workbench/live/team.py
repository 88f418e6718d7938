"""Several processes that train one run: how they meet, what they agree on, and what is said when one is gone.

torchrun starts them and tells each its place; `launch` does the same for one machine. Rank 0 leads: it alone writes the
run, takes commands and looks into the model, of which it keeps a whole copy. Before each step all agree on the settings
and on whether to wait or to stop, so that a command, or a signal to any of them, holds from the same step everywhere.

A rank that dies closes its connections, and what the others wait for fails at once; one that hangs, or never comes, is
waited for as long as the patience lasts. What is recorded then names it, and the run goes on from its checkpoint.
"""

import copy
import ctypes
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from workbench.errors import InputError
from workbench.lib.core import sidecar
from workbench.lib.core.distributed.layouts import Processes, led
from workbench.lib.core.distributed.waiting import waited
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.train import Hook, State, make_optimizer
from workbench.live.control import Controls
from workbench.live.hooks import SETTINGS
from workbench.live.records import RANK_LOAD, RANK_SECONDS, RANK_SENT, RANK_WAITING
from workbench.live.store import RunStopped
from workbench.live.watch import Watch

PATIENCE = 300.0
"""Seconds that a process waits for the others: a step, its probes and its checkpoint, on a machine that is busy."""

GRACE = 2.0  # seconds in which those that survive a death say so
LAST_WORDS = 20.0  # seconds in which rank 0 has said and recorded why the run ends


class RankLost(RunStopped):
    """A process that trains the run with this one has died, or does not answer."""


class Team:
    """The processes that train one run, as one of them sees them; made by `join`.

    Attributes:
        rank, world: which this is, of how many.
        replicas, whole: once `spread`: how the model is laid out; on rank 0 a whole copy of it, None elsewhere.
        stopped_by: the rank that was told to stop, where it was not this one.
    """

    def __init__(self, rank: int, world: int, store: dist.Store, patience: float, device: torch.device):
        self.rank, self.world, self.patience, self.device = rank, world, patience, device
        self.replicas: Processes | None = None
        self.whole: nn.Module | None = None
        self.stopped_by: int | None = None
        self._store = store

    @property
    def leads(self) -> bool:
        """Whether this process writes the run."""
        return self.rank == 0

    def led(self, function: Callable[[], Any]) -> Any:
        """What a function returns, or raises, on rank 0, everywhere."""
        return led(function)

    def silent(self, folder: Path) -> "Silent":
        """What one that does not lead has in place of a `RunWriter`."""
        return Silent(folder)

    def spread(self, state: State, layout: str) -> None:
        """Lay out the model of a training that begins, with a new optimizer."""
        state.model.to(self.device)
        self.whole = copy.deepcopy(state.model) if self.leads else None
        self.replicas = state.replicas = Processes(state.model, layout)
        state.optimizer = make_optimizer(state.model, state.config)
        self._trained = state.model

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the whole copy up to date; every process calls it."""
        own = dict(self.whole.named_parameters()) if self.leads else {}
        for name, parameter in self.replicas.parameters(self._trained).items():
            whole = self.replicas.whole(parameter, parameter)
            if self.leads:
                own[name].copy_(whole)
        if self.leads:
            for mine, its in zip(self.whole.buffers(), self._trained.buffers(), strict=True):
                mine.copy_(its)
            sidecar.restore_routers(self.whole, sidecar.router_settings(self._trained))

    def fetch_gradients(self) -> None:
        """Give the whole copy the gradients that are there; every process calls it."""
        own = dict(self.whole.named_parameters()) if self.leads else {}
        for name, parameter in self.replicas.parameters(self._trained).items():
            if parameter.grad is not None:
                whole = self.replicas.whole(parameter, parameter.grad)
                if self.leads:
                    own[name].grad = whole.clone()

    def agree(self, controls: Controls, wait: bool) -> bool:
        """See `control.Agree`: settings and waiting are those of rank 0, and any may stop all."""
        settings = [getattr(controls, name) for name in SETTINGS] if self.leads else [None] * len(SETTINGS)
        told = [controls.stop * (self.rank + 1), wait and self.leads]
        told += [-math.inf if value is None else value for value in settings]
        agreed = torch.tensor(told, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        stop, wait, *settings = agreed.tolist()
        if stop and not controls.stop:
            controls.stop, self.stopped_by = True, int(stop) - 1
        if not self.leads:
            for name, value in zip(SETTINGS, settings, strict=True):
                whole = int if name == "top_k" else float
                setattr(controls, name, None if value == -math.inf else whole(value))
        return bool(wait) and not controls.stop

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, by rank, on rank 0; nothing elsewhere."""
        found = [None] * self.world if self.leads else None
        dist.gather_object(value, found)
        return found or []

    def lost(self, error: Exception) -> RankLost | None:
        """What an error means where it comes from a process that is gone; None where it is this one's own.

        Either way it is left in the store, for those that wait for this process.
        """
        with suppress(RuntimeError):  # the store went with rank 0
            self._store.set(f"left/{self.rank}", " ".join(str(error).split())[:300])
        if not _is_of_others(error):
            return None
        others = [rank for rank in range(self.world) if rank != self.rank]
        deadline, gone, silent = time.monotonic() + GRACE, [], others
        with suppress(RuntimeError):
            while time.monotonic() < deadline and not gone:
                silent = [rank for rank in others if not self._store.check([f"left/{rank}"])]
                gone = [rank for rank in silent if not _runs(*self._store.get(f"came/{rank}").decode().split())]
                time.sleep(0.05)
        if gone or silent:
            who = _ranks(gone or silent, self.world)
            what = "died" if gone else f"did not answer within {self.patience:g} seconds"
            return RankLost(f"{who} {what}; the run goes on from its last checkpoint when it is resumed")
        with suppress(RuntimeError):
            words = "; ".join(f"rank {rank}: {self._store.get(f'left/{rank}').decode()}" for rank in others)
            return RankLost(f"the processes have lost each other; {words}")
        return RankLost(f"the processes have lost each other: {error}")

    def leave(self, status: int) -> NoReturn:
        """End this process after an error, rank 0 first: who has started them ends all when one has ended.

        The interpreter's own end would wait for what gloo still has under way with a process that is gone.
        """
        self.hear_out()
        _end(status)

    def hear_out(self) -> None:
        """Wait, a while, until rank 0 has said and recorded why the run ends; called there, it has."""
        deadline = time.monotonic() + LAST_WORDS
        with suppress(RuntimeError):
            if self.leads:
                self._store.set("said", "")
            while not self._store.check(["said"]) and time.monotonic() < deadline:
                if not _runs(*self._store.get("came/0").decode().split()):
                    break
                time.sleep(0.05)

    def close(self) -> NoReturn:
        """End this process in order, once all are here: nobody closes a connection that another still reads."""
        dist.barrier()
        with suppress(RuntimeError):  # the store goes with rank 0
            self._store.set(f"through/{self.rank}", "")
            self._store.wait([f"through/{rank}" for rank in range(self.world)], timedelta(seconds=LAST_WORDS))
        dist.destroy_process_group()
        _end(0)


class Silent:
    """What a process has in place of a `RunWriter` that does not lead: it takes everything, and writes nothing."""

    def __init__(self, folder: Path):
        self.folder, self.last_step = folder, -1

    def commands(self) -> list:
        return []

    def _nothing(self, *args: Any, **named: Any) -> None:
        """The call of a method of `RunWriter`."""

    scalars = tensors = commit = event = set_meta = status = truncate = answer = _nothing


class Shares(Hook):
    """Hands what each process has counted of a step to rank 0, which records it: its load, bytes and waiting.

    The routing of the whole batch is put together there, and the whole copy of the model is brought up to date where it
    is looked at. It comes after the commands and before the recorder.
    """

    def __init__(self, team: Team, probes: Watch, first: int):
        self.team, self.probes, self.first = team, probes, first
        self._counting = ExitStack()

    def _due(self, step: int, *kinds: str) -> bool:
        return any(self.probes.cadence.due(kind, step) for kind in kinds)

    def before_step(self, state: State) -> None:
        if self._due(self.first + state.step, "routing", "structure"):
            self._sent = self._counting.enter_context(counted())
            self._waiting = self._counting.enter_context(waited())

    def before_update(self, state: State) -> None:
        self._counting.close()  # what a step sends is sent by now
        if self._due(self.first + state.step, "structure"):
            self.team.fetch_gradients()

    def after_step(self, state: State) -> None:
        step, routing = self.first + state.step, self.probes.routing
        if self._due(step, "routing", "structure"):
            scalars = {RANK_SECONDS.name(f"{self.team.rank}"): state.seconds}
            scalars[RANK_WAITING.name(f"{self.team.rank}")] = self._waiting.seconds
            for kind, sent in self._sent.of.items():
                scalars[RANK_SENT.name(f"{self.team.rank}", kind)] = sent.bytes
            loads = {RANK_LOAD.name(f"{self.team.rank}", layer): load for layer, load in routing.loads().items()}
            found = self.team.gathered((scalars, loads, routing.hand_over()))
            for numbers, arrays, _ in found:
                self.probes.writer.scalars(step, numbers)
                self.probes.writer.tensors(step, arrays)
            routing.take_over([counts for *_, counts in found])
        if self._due(step, "structure", "conflict") or self._due(step + 1, "structure"):
            self.team.refresh()

    def close(self) -> None:
        """Count no more, wherever the step has ended."""
        self._counting.close()


def join(patience: float = PATIENCE) -> Team | None:
    """Meet the processes that torchrun has started with this one; None where it is alone.

    Raises:
        InputError: the environment does not say which process this is.
        RankLost: not all were there within `patience` seconds.
    """
    world = _told("WORLD_SIZE", 1)
    if world == 1:
        return None
    if world < 1:
        raise InputError(f"WORLD_SIZE is {world} but must be at least 1")
    rank, port = _told("RANK"), _told("MASTER_PORT")
    if not 0 <= rank < world:
        raise InputError(f"RANK is {rank} but must be 0 to {world - 1}, of WORLD_SIZE processes")
    _end_with_parent()
    local = _told("LOCAL_WORLD_SIZE", world) == world
    if local and (loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])  # what a machine calls itself may have no address
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= _told("LOCAL_WORLD_SIZE", world):
        device = torch.device("cuda", _told("LOCAL_RANK", rank))
        torch.cuda.set_device(device)
    late, wait = [0], timedelta(seconds=patience)  # without rank 0 there is no store to ask who else is late
    try:
        store = _store(rank, port, wait)
        store.set(f"came/{rank}", f"{os.getpid()} {socket.gethostname()}")
        late = []
        try:
            store.wait([f"came/{other}" for other in range(world)], wait)
        except dist.DistStoreError:
            late = [other for other in range(world) if not store.check([f"came/{other}"])]
            raise
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=wait,
        )
    except RuntimeError as error:
        if not _is_of_others(error):
            raise
        if not late:  # who has waited longer, or died, takes its word along
            raise RankLost("another process has ended before all had met: nothing was begun") from error
        raise RankLost(f"{_ranks(late, world)} did not come within {patience:g} seconds: nothing was begun") from error
    return Team(rank, world, store, patience, device)


def _end(status: int) -> NoReturn:
    """End without what the interpreter and the libraries' threads do to each other at theirs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_of_others(error: Exception) -> bool:
    """Whether an error says that another process, or what it wrote, cannot be reached."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _store(rank: int, port: int, wait: timedelta) -> dist.Store:
    """Where the processes leave each other word: torchrun's own, or one that rank 0 has."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    leads = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(host, port, is_master=leads, timeout=wait, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"workbench/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _told(name: str, default: int | None = None) -> int:
    """A whole number of the environment."""
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise InputError(f"{name} is {value!r} but must be a whole number: start the processes with torchrun")
    return int(value)


def _end_with_parent() -> None:
    """Be asked to stop when whoever has started this process is gone, however that went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _runs(pid: str, host: str) -> bool:
    """Whether a process is there; of one on another machine that is not known."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # another's, or no /proc
        return True


def _ranks(ranks: Sequence[int], world: int) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {world}"


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` in so many processes on this machine; the exit status.

    Ended by a signal, it asks them to stop and waits for them; killed, it takes them along.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"workbench-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the trainers say what there is to say
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException:
        return 0
    except ChildFailedError as error:
        rank = min(error.failures)
        if error.failures[rank].exitcode < 0:  # else it, or rank 0 of another, has said why
            how = error.failures[rank].signal_name()
            print(
                f"workbench: error: rank {rank} of {processes} was ended by {how}; a run that was begun goes on from "
                "its last checkpoint when it is resumed",
                file=sys.stderr,
            )
        ended = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}  # whom the launcher ended
        return 2 if ended == {2} else 1
    finally:
        logging.disable(before)
    return 0
