"""HybriMoE's decisions carried out: two threads that compute, a slow link, the same outputs whatever is decided.

    with HybridExecutor(banks, mixers, offload, link=ThrottledLink(1e9), slower=8) as executor:
        run = executor.run(trace, inputs)
    run.outputs, run.metrics, run.timeline

The "device" is a thread with memory of its own, into which the link copies weights; the "CPU" is a thread that works on
the host's weights and does everything `slower` times, so that it is that much slower. What is decided is decided by the
same `Offload` that a simulation asks, on what the clock says at that moment.

Letters: R prompts, T time, D width, L layers, E experts, K active experts, n tokens of a pass.
"""

import copy
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.simulation.executor import Executor, Job, ThrottledLink
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.core.simulation.traces import RouterTrace
from workbench.lib.serving.hybrid_schedule import CPU, DEVICE, LINK
from workbench.lib.serving.hybrimoe import Metrics, Offload, Step, passes


@dataclass(frozen=True, eq=False)
class Executed:
    """What a run gave.

    Attributes:
        outputs: (R, T, D).
        layers: of each layer of each pass: its tokens by expert, seconds before and after its router had decided.
    """

    outputs: Float[Tensor, "prompts time dim"]
    metrics: Metrics
    timeline: Timeline
    layers: Sequence[tuple[Sequence[int], float, float]]


class HybridExecutor:
    """A stack of layers of experts on a device that cannot hold them: x + mixer(x), then x + experts(norm x).

    A context manager. Routers are those of a trace, so that what is run is what was simulated.

    Args:
        banks: the experts of each layer, in the host's memory.
        mixers: what the device does in each layer before its experts, (n, D) -> (n, D).
        offload: what decides; a copy of it is used up.
        slower: how many times the CPU does its work.
    """

    def __init__(
        self,
        banks: Sequence[GLUExperts],
        mixers: Sequence[nn.Module],
        offload: Offload,
        link: ThrottledLink,
        slower: int,
    ):
        if not len(banks) == len(mixers) == len(offload.caches):
            raise InputError(
                f"banks, mixers and caches are {len(banks)}, {len(mixers)}, {len(offload.caches)} but must be as many"
            )
        if slower < 1:
            raise InputError(f"slower is {slower} but must be at least 1")
        self.mixers, self.link, self.slower = list(mixers), link, slower
        self.offload = copy.deepcopy(offload)
        self._lock = threading.RLock()  # of all that is decided: the link decides what it fetches
        self._turn = 0  # the layer at work, counted: what was decided for another fetches no more
        self._flight: tuple[int, int, float, Job] | None = None
        self._next: Job | None = None
        self._weights = [(bank.gate_up.detach(), bank.down.detach()) for bank in banks]
        self._memory, self._slots = [], []
        for pair, cache in zip(self._weights, self.offload.caches, strict=True):
            places = cache.capacity + len(pair[0])  # some for what passes through and is not kept
            self._memory.append([torch.zeros(places, *part.shape[1:], dtype=part.dtype) for part in pair])
            self._slots.append({expert: at for at, expert in enumerate(cache.resident)})
            for there, here in zip(self._memory[-1], pair, strict=True):
                there[: len(cache)] = here[[*cache.resident]]

    def __enter__(self) -> "HybridExecutor":
        self.executor = Executor((DEVICE, CPU, LINK), "measured on this machine")
        self.executor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._turn += 1
        self.executor.__exit__(*error)

    @torch.no_grad()
    def run(self, trace: RouterTrace, inputs: Float[Tensor, "prompts time dim"]) -> Executed:
        """Every pass of the trace, one after the other.

        Raises:
            InputError: inputs or a trace of another shape than there are tokens, layers or experts.
        """
        sizes = (len(self._weights), len(self._weights[0][0]))
        if trace.probs.shape[2:] != sizes:
            raise InputError(f"trace has {tuple(trace.probs.shape[2:])} layers and experts but must have {sizes}")
        if inputs.ndim != 3 or inputs.shape[:2] != trace.probs.shape[:2]:
            raise InputError(
                f"inputs has shape {tuple(inputs.shape)} but must be {tuple(trace.probs.shape[:2])} tokens of the trace"
            )
        chosen, weights = routed(trace)
        outputs, first, rest, layers = torch.empty_like(inputs), [], [], []
        self.tally = dict.fromkeys(("hits", "asked", "transfers", "fetches", "late"), 0)
        for row, steps_of_row in enumerate(passes(trace)):
            at = 0
            for steps in steps_of_row:
                end = at + (trace.prompt if at < trace.prompt else 1)
                began, x = time.perf_counter(), inputs[row, at:end]
                for layer, step in enumerate(steps):
                    part = (row, slice(at, end), layer)
                    x, spent = self._layer(layer, step, x, chosen[part], weights[part], at >= trace.prompt)
                    layers.append(([*step.counts.values()], *spent))
                (first if at < trace.prompt else rest).append(time.perf_counter() - began)
                outputs[row, at:end], at = x, end
        timeline, tally = self.executor.timeline(), self.tally
        times = (sum(rest) / len(rest), sum(first) / len(first) if first else 0.0, tally["hits"] / tally["asked"])
        metrics = Metrics(*times, timeline.busy_shares(), tally["transfers"], tally["fetches"], tally["late"])
        return Executed(outputs, metrics, timeline, layers)

    def _layer(
        self, layer: int, step: Step, x: Tensor, chosen: Tensor, weights: Tensor, decoding: bool
    ) -> tuple[Tensor, tuple[float, float]]:
        """The layer's output, and the seconds before and after its router had decided."""
        began = time.perf_counter()
        x = x + self.executor.submit("dense", DEVICE, lambda: self.mixers[layer](x), group="dense").result()
        state = F.rms_norm(x, x.shape[-1:])
        rows = {expert: (chosen == expert).any(1).nonzero().squeeze(1) for expert in step.counts}
        gate = time.perf_counter()
        with self._lock:
            self._turn += 1
            jobs = self._decided(layer, step, {expert: state[own] for expert, own in rows.items()}, gate, decoding)
        y = torch.zeros_like(x)
        for expert in sorted(jobs):  # in one order, so that sums are the same whatever was planned
            weight = (weights * (chosen == expert)).sum(1)[rows[expert], None]
            y.index_add_(0, rows[expert], jobs[expert].result() * weight)
        return x + y, (gate - began, time.perf_counter() - gate)

    def _decided(
        self, layer: int, step: Step, states: Mapping[int, Tensor], gate: float, decoding: bool
    ) -> dict[int, Job]:
        """Plan the layer and give everyone his work: the job of each expert."""
        cache, flight, ready, wait = self.offload.caches[layer], {}, {}, 0.0
        if self._flight is not None:
            wait = max(0.0, self._flight[2] - gate)
            if self._flight[0] == layer:
                flight, ready = {self._flight[1]: wait}, {self._flight[1]: self._flight[3]}
                self.tally["late"] += self._flight[1] in step.counts
        if decoding:
            self.tally["asked"] += len(step.counts)
            self.tally["hits"] += sum(expert in cache and expert not in flight for expert in step.counts)
        plan = self.offload.plan(layer, step, flight, wait)
        places = {}
        for nth, expert in enumerate(plan.transfers):
            places[expert] = self._place(layer, expert) if expert in cache else cache.capacity + nth
            ready[expert] = self._submit("transfer", LINK, layer, expert, (self._copy, layer, expert, places[expert]))
        self.tally["transfers"] += len(plan.transfers)
        jobs = {}
        for expert in plan.device:
            place = places[expert] if expert in places else self._slots[layer][expert]
            work = (_expert, states[expert], *(part[place] for part in self._memory[layer]), 1)
            jobs[expert] = self._submit("expert", DEVICE, layer, expert, work, ready.get(expert))
        for expert in plan.cpu:
            work = (_expert, states[expert], *(part[expert] for part in self._weights[layer]), self.slower)
            jobs[expert] = self._submit("expert", CPU, layer, expert, work)
        if self.offload.prefetch != "none":
            last = ready[plan.transfers[-1]] if plan.transfers else None
            self._next = self._submit("fetch", LINK, layer, None, (self._fetch, self._turn, layer, step), last)
        return jobs

    def _submit(
        self, group: str, resource: str, layer: int, expert: int | None, work: tuple, after: Job | None = None
    ) -> Job:
        name = f"{group} {layer}" if expert is None else f"{group} {layer}.{expert}"
        return self.executor.submit(name, resource, partial(*work), [] if after is None else [after], group)

    def _fetch(self, turn: int, layer: int, step: Step) -> None:
        """On the link: bring over what is worth most, then look again, until the next layer's router has decided."""
        with self._lock:
            found = self.offload.fetch(layer, step) if turn == self._turn else None
            if found is None:
                return
            place = self._place(*found)
            self._flight = (*found, time.perf_counter() + self.offload.cost.transfer, self._next)
            self.tally["fetches"] += 1
        self._copy(*found, place)
        with self._lock:
            self._flight = None
            if turn == self._turn:
                self._next = self._submit("fetch", LINK, layer, None, (self._fetch, turn, layer, step))

    def _place(self, layer: int, expert: int) -> int:
        """Where in the device's memory an expert goes that its cache has just taken in."""
        slots, cache = self._slots[layer], self.offload.caches[layer]
        for gone in [other for other in slots if other not in cache]:
            del slots[gone]
        taken = {*slots.values()}
        slots[expert] = next(at for at in range(cache.capacity) if at not in taken)
        return slots[expert]

    def _copy(self, layer: int, expert: int, place: int) -> None:
        for there, here in zip(self._memory[layer], self._weights[layer], strict=True):
            self.link.copy(there[place], here[expert])


def routed(
    trace: RouterTrace,
) -> tuple[Int64[Tensor, "prompts time layers k"], Float[Tensor, "prompts time layers k"]]:
    """The experts of each token and their weights, of sum 1."""
    probs, chosen = trace.probs.topk(trace.top_k)
    return chosen, probs / probs.sum(-1, keepdim=True)


def _expert(x: Tensor, gate_up: Tensor, down: Tensor, times: int) -> Tensor:
    for _ in range(times):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down)
    return y
