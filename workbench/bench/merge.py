"""Merges of eight models: TIES beside the functions of peft, fusion_bench and mergekit, PCB beside its form in tensors.

Everyone starts from the same differences (8, P), one vector a model, and keeps the largest 20 % of each. What is timed
of the peers is their functions on tensors and nothing around them; a peer that cannot be imported has no row. The
average writes to memory that is there, and its bound is a copy of as many bytes, of which half are read.

Beside the timings, "memory" has the most that each needs beyond its models, and "left_out" who has no row, and why: at
110 M parameters the models take 3.5 GB, and most of the others several times as much.
"""

from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from workbench.bench.core import FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels.memory import peak_bytes
from workbench.kernels.pcb_merge import pcb_merge
from workbench.kernels.trim_elect_merge import magnitude_threshold, trim_elect_merge

REPEATS = 3
MODELS = 8
KEPT = 0.2  # of each model
CLIPPED = 0.01  # at either end, by PCB
QUICK = (20_000,)
SIZES = (12_600_000, 110_000_000)  # parameters
MERGES = ("ties", "pcb", "average")
TENSORS, MEAN = "tensor form", "torch/mean"
#: times the models' bytes that have to be available, a little more than "memory" has
ROOM = {"peft/ties": 5, "fusion_bench/ties_merging": 6.5, "mergekit/ties": 4, TENSORS: 10, MEAN: 0.5}


def cases(quick: bool = False) -> list[Case]:
    return [
        Case(f"{merge} n={MODELS} P={size}", partial(_contestants, merge, size), (FORWARD,))
        for size in (QUICK if quick else SIZES)
        for merge in MERGES
    ]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """What each needs, and who is left out.

    Returns:
        {"memory": rows {case, implementation, peak_bytes: beyond the models, ratio_to_models}, "left_out": rows {case,
        implementation, reason}}.
    """
    memory, left_out = [], []
    for size in QUICK if quick else SIZES:
        problem = Problem(size)
        for merge in MERGES:
            case = f"{merge} n={MODELS} P={size}"
            for name, call in problem.contestants(merge).items():
                peak = None if name == LIMIT else peak_bytes(call)
                if peak is not None:
                    row = {"case": case, "implementation": name, "peak_bytes": peak}
                    memory.append(row | {"ratio_to_models": round(peak / problem.n_bytes, 2)})
            left_out += [{"case": case, "implementation": k, "reason": v} for k, v in problem.absent(merge).items()]
    return {"memory": memory, "left_out": left_out}


class Problem:
    """Differences of eight random models, and those who merge them."""

    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(0)
        self.size = size
        self.tau = torch.randn(MODELS, size, generator=generator).mul_(0.01)
        self.n_bytes = self.tau.nbytes

    def contestants(self, merge: str) -> Contestants:
        ours = {"ties": self.ties, "pcb": self.pcb, "average": self.average}[merge]
        return {**({LIMIT: self.copy()} if merge == "average" else {}), OURS: ours(), **self._others(merge)}

    def absent(self, merge: str) -> dict[str, str]:
        """Why others are not there."""
        return {name: found for name, found in self._found(merge).items() if isinstance(found, str)}

    def _others(self, merge: str) -> Contestants:
        return {name: found for name, found in self._found(merge).items() if not isinstance(found, str)}

    def _found(self, merge: str) -> dict:
        makers = {
            "ties": {"peft/ties": _peft, "fusion_bench/ties_merging": _fusion_bench, "mergekit/ties": _mergekit},
            "pcb": {TENSORS: _tensors},
            "average": {MEAN: lambda tau: partial(torch.mean, tau, 0)},
        }
        available, found = _available(), {}
        for name, make in makers[merge].items():
            wanted = ROOM[name] * self.n_bytes
            if available < wanted:
                found[name] = f"{available / 2**30:.1f} GiB of memory are available, {wanted / 2**30:.1f} are wanted"
                continue
            try:
                found[name] = make(self.tau)
            except ImportError as error:
                found[name] = f"not installed: {error}"
        return found

    def ties(self):
        k = int(KEPT * self.size)

        def once() -> Tensor:
            return trim_elect_merge(self.tau, thresholds=[magnitude_threshold(x, k) for x in self.tau])

        return once

    def pcb(self):
        return partial(pcb_merge, self.tau, **_ranks(self.size))

    def average(self):
        return partial(trim_elect_merge, self.tau, elect=None, out=torch.zeros(self.size))

    def copy(self):
        """As many bytes as an average reads and writes."""
        source = torch.ones((MODELS + 1) * self.size // 2)
        return partial(torch.zeros_like(source).copy_, source)


def _contestants(merge: str, size: int, direction: str) -> Contestants:
    return Problem(size).contestants(merge)


def _available() -> float:
    """Bytes of memory; without end where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return inf
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), inf)


def _ranks(size: int) -> dict:
    low = int(CLIPPED * size)
    return {"clip": (low, size - 1 - low), "drop": size - 1 - int(KEPT * size)}


def _tensors(tau: Tensor):
    return partial(pcb_merge, tau, **_ranks(tau.shape[1]), backend="reference")


def _peft(tau: Tensor):
    ties = import_module("peft.utils.merge_utils").ties
    return partial(ties, list(tau), torch.ones(MODELS), KEPT)


def _fusion_bench(tau: Tensor):
    ties = import_module("fusion_bench.method.ties_merging.ties_merging_utils").ties_merging

    def once() -> Tensor:
        with redirect_stdout(StringIO()):  # it prints
            return ties(tau, reset_thresh=KEPT, merge_func="mean")

    return once


def _mergekit(tau: Tensor):
    """What its method "ties" does with the differences of one tensor."""
    sparsify = import_module("mergekit.sparsify")
    get_mask = import_module("mergekit.merge_methods.generalized_task_arithmetic").get_mask

    def once() -> Tensor:
        kept, weights = torch.empty_like(tau), torch.ones(MODELS, 1)
        for to, x in zip(kept, tau, strict=True):
            to.copy_(sparsify.sparsify(x, KEPT, sparsify.SparsificationMethod.magnitude))
        kept *= weights
        mask = get_mask(kept, method="sum")
        divisor = (weights * mask).sum(0)
        divisor[divisor == 0] = 1
        return (kept * mask).sum(0).div_(divisor)

    return once
