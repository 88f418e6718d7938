"""The same schedule in real time: planes are read from a file at a bandwidth, while another thread computes.

    executor = D2Executor(banks, "experts.planes", bandwidth=100e6)
    costs = executor.calibrate()
    executor.run(trace, costs, "hebf", budget=4_000_000).served.seconds     # really
    D2Sim(trace, costs, "hebf", budget=4_000_000).run().seconds            # and predicted

The file is mapped and read through a token bucket: what the system keeps of it in memory would come at any speed
otherwise. Each level of an expert is one stretch of it, the base first, so that what is missing is always one read.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.executor import ThrottledLink
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.core.simulation.timeline import Event, Timeline
from workbench.lib.serving.d2moe_code import NestedWeight, dequantised
from workbench.lib.serving.d2moe_orders import BitTrace, Expert, Job, PlaneCosts
from workbench.lib.serving.d2moe_schedule import POLICIES, LayerRun, PlaneCache, Policy, Served, check_bits, served


@dataclass(frozen=True)
class NestedBank:
    """The experts of a layer as nested codes: gate_up (E, 2H, D), gate first, and down (E, D, H)."""

    gate_up: NestedWeight
    down: NestedWeight

    @property
    def n_experts(self) -> int:
        return len(self.gate_up.planes)

    @property
    def levels(self) -> range:
        return self.gate_up.levels

    def nbytes(self, level: int) -> int:
        """Bytes of one expert at a level."""
        return self.gate_up.nbytes(level) + self.down.nbytes(level)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(n, D) of one expert's tokens (n, D)."""
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


@dataclass(frozen=True)
class Ran:
    """What really happened: the numbers, and what each job (as in `served.jobs`) computed, if it was asked for."""

    served: Served
    outputs: tuple[Tensor, ...] = field(repr=False)


class D2Executor:
    """Serves traces from a file of planes.

    Args:
        banks: of each layer, all with the same shapes and levels.
        path: of the file, which is written.
        bandwidth: bytes/s at which it is read.

    Raises:
        InputError: banks that differ, or a bandwidth that is not above 0.
    """

    def __init__(self, banks: Sequence[NestedBank], path: str | Path, bandwidth: float):
        if not banks or len({(bank.n_experts, bank.levels, bank.nbytes(bank.levels[-1])) for bank in banks}) > 1:
            raise InputError("banks must be one or more layers of the same number, size and levels of experts")
        self.banks, self.levels = list(banks), banks[0].levels
        self.sizes = {level: banks[0].nbytes(level) for level in self.levels}
        self.link = ThrottledLink(bandwidth)
        whole = self.sizes[self.levels[-1]]
        self._start = {
            (layer, expert): whole * (layer * bank.n_experts + expert)
            for layer, bank in enumerate(banks)
            for expert in range(bank.n_experts)
        }
        with Path(path).open("wb") as file:
            for layer, expert in self._start:
                for level in self.levels:
                    for part in self._parts((layer, expert), level):
                        file.write(part.numpy().tobytes())
        self._file = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))

    def _parts(self, expert: Expert, level: int) -> list[Tensor]:
        """What a level has beyond the one below it: of both matrices the planes, low and scale."""
        layer, number = expert
        found = []
        for nested in (self.banks[layer].gate_up[number], self.banks[layer].down[number]):
            at = level - nested.base
            found += [nested.plane(level), nested.low[at], nested.scale[at]]
        return found

    def weights(self, expert: Expert, level: int, held: dict[int, Tensor]) -> list[Tensor]:
        """gate_up (2H, D) and down (D, H) of an expert, of the bytes that were read of it, by level."""
        layer, number = expert
        planes: tuple[list[Tensor], list[Tensor]] = ([], [])
        for each in range(self.levels[0], level + 1):
            shapes = [part.shape for part in self._parts(expert, each)]
            dtypes = [torch.uint8, torch.float16, torch.float16] * 2
            sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
            split = held[each].split(sizes)
            parts = [
                part.clone().view(dtype).view(shape) for part, dtype, shape in zip(split, dtypes, shapes, strict=True)
            ]
            planes[0].append(parts[0])
            planes[1].append(parts[3])
        made = []
        for nested, own, scales in (
            (self.banks[layer].gate_up, planes[0], parts[1:3]),
            (self.banks[layer].down, planes[1], parts[4:6]),
        ):
            unit = nested.unit[number]
            made.append(dequantised(torch.cat(own), *scales, unit, nested.cols, nested.group))
        return made

    def inputs(self, step: int, job: Job) -> Float[Tensor, "tokens dim"]:
        """What a job's tokens are: drawn, for time does not depend on them; the same each time."""
        layer, number = job.expert
        draw = torch.Generator().manual_seed(step * len(self._start) + layer * self.banks[0].n_experts + number)
        return torch.randn(job.tokens, self.banks[0].gate_up.cols, generator=draw)

    def run(self, trace: BitTrace, costs: PlaneCosts, policy: str, budget: int, keep: bool = False) -> Ran:
        """Serve a trace.

        Args:
            costs: what the order of reading is decided by; of `calibrate`.
            policy, budget: as of `D2Sim`.
            keep: the outputs of all jobs.

        Raises:
            InputError: as `D2Sim`, or an expert that no bank has.
        """
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        if strange := [job.expert for job in trace.jobs() if job.expert not in self._start]:
            raise InputError(f"trace wants expert {strange[0]} but there are {len(self._start)}, by (layer, number)")
        if costs.sizes != self.sizes:
            raise InputError(f"costs have sizes {dict(costs.sizes)} but these experts have {self.sizes}")
        check_bits(trace, costs)
        with torch.no_grad():
            return _Serving(self, trace, costs, POLICIES[policy], budget, keep).run()

    def calibrate(
        self, tokens: Sequence[int] = (1, 2, 4, 8), basis: str = "this processor", repeats: int = 7
    ) -> PlaneCosts:
        """What reading and computing take here, medians of `repeats`: each while the other is at work, for they share a
        memory and an interpreter, and of one expert after the other, as they come to a cache that has not seen them.
        """
        if repeats < 5:
            raise InputError(f"repeats is {repeats} but must be at least 5")
        if len(self.levels) < 2:
            raise InputError(
                f"banks have codes of {self.levels[0]} bits alone but must have two levels to tell a read by"
            )
        experts = itertools.cycle(self._start)
        reads = {(there, level): [] for level in self.levels for there in (0, self.levels[0]) if there < level}
        enough, failed = threading.Event(), []

        def read() -> None:
            try:
                while not enough.is_set():
                    for (there, level), spent in reads.items():
                        start = time.perf_counter()
                        self._fetch(next(experts), there, level)
                        spent.append(time.perf_counter() - start)
            except BaseException as error:  # told to whoever calibrates
                failed.append(error)

        before, computed = torch.get_num_threads(), {(level, n): [] for level in self.levels for n in tokens}
        torch.set_num_threads(1)
        reader = threading.Thread(target=read, daemon=True)
        try:
            reader.start()
            while min(map(len, (*reads.values(), *computed.values()))) < repeats and reader.is_alive():
                for (level, n), spent in computed.items():
                    expert = next(experts)
                    held = self._split(self._stretch(expert, 0, level), 0, level)
                    x = torch.zeros(n, self.banks[0].gate_up.cols)
                    start = time.perf_counter()
                    swiglu(x, *self.weights(expert, level, held))
                    spent.append(time.perf_counter() - start)
        finally:
            enough.set()
            reader.join()
            torch.set_num_threads(before)
        if failed:
            raise failed[0]
        compute = {
            level: RateTable(tuple(tokens), tuple(statistics.median(computed[level, n]) for n in tokens))
            for level in self.levels
        }
        sizes = [self.sizes[level] - self.sizes.get(there, 0) for there, level in reads]
        link = LinkModel.fit(sizes, [statistics.median(spent) for spent in reads.values()])
        return PlaneCosts(self.sizes, link, compute, 0.0, f"simulated, calibrated by {basis}")

    def _fetch(self, expert: Expert, there: int, level: int) -> dict[int, Tensor]:
        """Read what is missing, and put the bytes of each level where they can be given up alone."""
        stretch = self._stretch(expert, there, level)
        target = torch.empty_like(stretch)
        self.link.copy(target, stretch)
        return self._split(target, there, level)

    def _stretch(self, expert: Expert, there: int, level: int) -> Tensor:
        """What a level has beyond a lower one, or beyond nothing, as the file has it."""
        start = self._start[expert]
        return self._file[start + self.sizes.get(there, 0) : start + self.sizes[level]]

    def _split(self, stretch: Tensor, there: int, level: int) -> dict[int, Tensor]:
        """A stretch by the levels in it."""
        new = [each for each in self.levels if there < each <= level]
        sizes = [self.sizes[each] - self.sizes.get(each - 1, 0) for each in new]
        return {each: part.clone() for each, part in zip(new, stretch.split(sizes), strict=True)}


class _Serving:
    """One run: the channel has a thread of its own, and this one computes; a lock is around every decision."""

    def __init__(
        self, executor: D2Executor, trace: BitTrace, costs: PlaneCosts, policy: Policy, budget: int, keep: bool
    ):
        self.executor, self.trace, self.policy, self.keep = executor, trace, policy, keep
        self.held: dict[Expert, dict[int, Tensor]] = {expert: {} for expert in executor._start}
        self.cache = PlaneCache(budget, costs, drop=lambda expert, level: self.held[expert].pop(level))
        self.changed = threading.Condition()
        self.layer: LayerRun | None = None
        self.at, self.read, self.ended, self.error = 0, 0, False, None
        self.events: list[Event] = []
        layers = ((at, job) for at, step in enumerate(trace.steps) for layer in step for job in layer)
        self.inputs = {(at, job.expert): executor.inputs(at, job) for at, job in layers}

    def run(self) -> Ran:
        before, jobs, outputs = torch.get_num_threads(), [], []
        torch.set_num_threads(1)
        reader = threading.Thread(target=self._guarded, name="reader", daemon=True)
        self.epoch = time.perf_counter()
        try:
            reader.start()
            for at, step in enumerate(self.trace.steps):
                self.at = at
                for layer, wanted in enumerate(step):
                    self._serve(layer, wanted, jobs, outputs)
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()
            reader.join()
            torch.set_num_threads(before)
        timeline = Timeline(tuple(self.events), "measured", ("compute", "disk"))
        return Ran(served(timeline, self.trace, self.cache, jobs, self.read), tuple(outputs))

    def _serve(self, layer: int, wanted: Sequence[Job], jobs: list, outputs: list) -> None:
        with self.changed:
            self.layer = LayerRun(wanted, self.cache, self.policy)
            self.changed.notify_all()
        while not self.layer.over:
            with self.changed:
                while (found := self.layer.next_job()) is None and self.error is None:
                    self.changed.wait()
                if self.error is not None:
                    raise self.error
                job, level = found
                held = dict(self.held[job.expert])
            start = time.perf_counter()
            y = swiglu(self.inputs[self.at, job.expert], *self.executor.weights(job.expert, level, held))
            self._note(f"{self.at}.{layer} expert {job.expert[1]}, {level} bits", "compute", start, "experts")
            jobs.append((self.at, job.expert, job.tokens, level))
            if self.keep:
                outputs.append(y)
            with self.changed:
                self.layer.done()
                self.changed.notify_all()
        with self.changed:
            self.cache.observe(layer, {job.expert[1]: job.tokens for job in wanted})

    def _guarded(self) -> None:
        try:
            self._read()
        except BaseException as error:  # the thread that computes waits for this one: it is told
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def _read(self) -> None:
        while True:
            with self.changed:
                while not self.ended and (self.layer is None or (found := self.layer.next_load()) is None):
                    self.changed.wait()
                if self.ended:
                    return
            expert, there, level = found
            start = time.perf_counter()
            found = self.executor._fetch(expert, there, level)
            name = f"{self.at}.{expert[0]} expert {expert[1]}, {there} to {level} bits"
            self._note(name, "disk", start, "more" if there else "base")
            with self.changed:
                self.held[expert] |= found
                self.read += sum(part.numel() for part in found.values())
                self.cache.finish()
                self.changed.notify_all()

    def _note(self, name: str, resource: str, start: float, group: str) -> None:
        end = time.perf_counter()
        self.events.append(Event(name, resource, start - self.epoch, end - self.epoch, group))
