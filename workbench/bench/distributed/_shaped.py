"""One look at the shaped link: its rate, what trainings wait for on it, and what dispatching takes."""

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

from workbench.bench.core import BOTH, FORWARD, OURS
from workbench.bench.distributed import _ranks
from workbench.lib.core.budget import count_params
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.distributed.shaped import call_shaped, loopback_seconds

MBIT, WORLD = 100, 2
DDP, ALL_REDUCE = "torch/ddp", "torch/all_reduce"

SHAPE = {"d_model": 128, "d_hidden": 256, "n_layers": 4, "seq_len": 64, "batch_size": 8, "steps": 8}
QUICK_SHAPE = SHAPE | {"d_model": 32, "d_hidden": 32, "seq_len": 32, "steps": 4}
_PARTS = {"kind": "streaming", "mix": 0.5, "codec": True}
#: What is trained: the first is ours, the next two its peers; all but DDP, which no model predicts, are held to theirs.
ARMS = (
    _PARTS | {"count": 4, "sync_every": 28, "delay": 1, "steps": 28, "warm": 28},
    {"kind": "ddp", "steps": 4},
    {"kind": "all-reduce", "steps": 4},
    _PARTS | {"count": 1, "sync_every": 10, "delay": 0, "codec": False, "steps": 20, "warm": 10},
    _PARTS | {"count": 1, "sync_every": 4, "delay": 0, "steps": 16, "warm": 4},
    _PARTS | {"count": 4, "sync_every": 8, "delay": 1, "codec": False, "steps": 24, "warm": 8},
    _PARTS | {"count": 2, "sync_every": 4, "delay": 0, "codec": False, "steps": 16, "warm": 4},
    _PARTS | {"count": 4, "sync_every": 12, "delay": 2, "codec": False, "steps": 24, "warm": 12},
)
SIZES = (262_144, 524_288, 1_048_576, 2_097_152)
"""Bytes of messages that the link is calibrated by: all well above what the bucket of its shaping lets pass at once."""
DISPATCH = {"tokens": 1024, "dim": 256, "n_experts": 8, "top_k": 2}


@dataclass(frozen=True)
class Seen:
    """What was measured.

    Attributes:
        rate: bytes a second that a socket has.
        sizes, gathers: bytes of a message from each of two ranks, and seconds until all have both.
        params: numbers of the network that was trained.
        trained: seconds a step of each of `ARMS`, and of the same steps alone, the slower rank's.
        dispatched: direction -> seconds, and bytes of both ranks together.
    """

    rate: float
    sizes: tuple[int, ...]
    gathers: list[float]
    params: int
    trained: list[dict[str, float]]
    dispatched: dict[str, tuple[float, float]]

    def exposed(self, arm: int) -> float:
        """Seconds a step that an arm takes longer than alone."""
        return self.trained[arm]["seconds"] - self.trained[arm]["alone"]

    def rows(self) -> list[dict[str, Any]]:
        """As of `workbench.bench.core.timed`. The limit of training is the same without any exchange."""
        names = (OURS, DDP, ALL_REDUCE)
        case = f"a step, N={self.params} {WORLD} processes {MBIT} Mbit/s"
        exposed = case.replace("a step", "exposed communication of a step")
        found = []
        for arm, name in enumerate(names):
            peers = [(other, at) for at, other in enumerate(names) if at != arm]
            spent = self.trained[arm]["seconds"]
            over = {other: self.trained[at]["seconds"] / spent for other, at in peers}
            found.append(_row(case, BOTH, name, spent, spent / self.trained[arm]["alone"], over))
        for arm, name in enumerate(names):
            waited = max(self.exposed(arm), 0.0)
            over = {other: self.exposed(at) / max(waited, 1e-9) for at, other in enumerate(names) if at != arm}
            found.append(_row(exposed, BOTH, name, waited, None, over))
        d = DISPATCH
        text = f"dispatch and combine, N={d['tokens']} D={d['dim']} E={d['n_experts']} K={d['top_k']}"
        for direction, (seconds, n_bytes) in self.dispatched.items():
            limit = seconds / (n_bytes / self.rate)
            found.append(_row(f"{text} {WORLD} processes {MBIT} Mbit/s", direction, OURS, seconds, limit, {}))
        return found

    def link_table(self) -> list[dict[str, Any]]:
        """The rate of the socket, and that of what all-gathers bring through the one medium."""
        found = [{"what": "socket", "bytes": SOCKET, "ms": 1000 * SOCKET / self.rate, "Mbit/s": 8e-6 * self.rate}]
        for size, seconds in zip(self.sizes, self.gathers, strict=True):
            rate = 8e-6 * WORLD * size / seconds
            found.append({"what": "all-gather", "bytes": size, "ms": 1000 * seconds, "Mbit/s": rate})
        return [{key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
                for row in found]  # fmt: skip


SOCKET = 2_000_000
"""Bytes that the rate is measured by."""


@cache
def seen(quick: bool = False) -> Seen:
    """The measurement, made once in a process. An `InputError` where the link cannot be shaped."""
    return call_shaped(_look, quick, mbit=MBIT, timeout=300)


def _look(quick: bool) -> Seen:
    """Inside the namespace."""
    shape, rounds = (QUICK_SHAPE, 3) if quick else (SHAPE, 3)
    rate = SOCKET / statistics.median(loopback_seconds(SOCKET) for _ in range(3))
    gathers = [max(each) for each in zip(*run_processes(_ranks.gathers, WORLD, SIZES, rounds), strict=True)]
    both = run_processes(_ranks.trainings, WORLD, shape, ARMS, timeout=200)
    trained = [{key: max(rank[key] for rank in ranks) for key in ranks[0]} for ranks in zip(*both, strict=True)]
    ranks = run_processes(_ranks.dispatches, WORLD, *DISPATCH.values(), rounds)
    dispatched = {
        direction: (max(rank[direction][0] for rank in ranks), sum(rank[direction][1] for rank in ranks))
        for direction in (FORWARD, BOTH)
    }
    return Seen(rate, SIZES, gathers, count_params(_ranks.network(shape)), trained, dispatched)


def _row(case: str, direction: str, name: str, seconds: float, limit: float | None, over: dict) -> dict[str, Any]:
    return {
        "case": case,
        "threads": 1,
        "direction": direction,
        "implementation": name,
        "median_s": seconds,
        "ratio_to_limit": limit,
        "speedup_over": over,
    }
