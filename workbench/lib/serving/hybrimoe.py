"""HybriMoE: experts on the device or on the CPU, decided layer by layer by trying it on paper (2504.05897).

    cost = CostModel(cpu=Rate(0.79e-3, 0, 1e-3), device=Rate(0, 0.5e-3, 0), transfer=0.418e-3)
    plan = schedule_layer({3: 1, 7: 1, 9: 1}, cached={3}, cost=cost)     # tokens of each expert -> LayerPlan
    run = HybridSim(trace, cost, Offload.of(trace, cost, capacity=8)).run()
    run.metrics.token_seconds, run.timeline

All experts lie in the host's memory, and some of each layer also in the device's. An expert runs on the device, if need
be after a transfer, or on the CPU where it lies. Three parts are new: (i) a greedy schedule over device, CPU and link;
(ii) experts of the next layers are fetched while the link is idle, those first whose presence shortens what is foreseen
most; (iii) the cache forgets by recent scores of the router (`caches.MRS`).

The public code (PKU-SEC-Lab/HybriMoE) schedules as here but in decoding alone, with one token an expert; of a prompt it
sends all to the device. It fetches the best recent scores of one next layer ("score") and not by gain ("impact"), and
does not protect what the layer at hand needs from being forgotten. Ours is: an expert that is still on its way when its
layer begins is no hit, but the schedule knows when it comes; gains are weighed by the probability that a gate ahead
gives; a nearer layer is served before a farther one.

Letters: L layers, E experts, K active experts, n tokens of an expert.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.caches import LFU, LRU, MRS, Belady, Cache
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.timeline import Event, Timeline
from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov
from workbench.lib.core.simulation.workload import Simulation, Workload
from workbench.lib.serving.hybrid_schedule import (
    CPU,
    DEVICE,
    LINK,
    MODES,
    PUBLIC,
    CostModel,
    LayerPlan,
    Rate,
    foreseen_seconds,
    schedule_layer,
)

METHOD = Method(
    slug="hybrimoe",
    title="HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference",
    family="serving",
    year=2025,
    paper="arXiv:2504.05897",
    claim="Greedy scheduling over both processors, prefetching by simulated gain and a score-based cache beat fixed "
    "mapping and LRU.",
    objects=("HybridSim", "schedule_layer", "CostModel", "Offload", "simulate"),
    kind="simulator",
)

PREFETCHES = ("none", "score", "impact")
CACHES = ("lru", "lfu", "mrs", "belady")


@dataclass(frozen=True)
class Step:
    """What a layer's routers say of one pass.

    Attributes:
        counts: tokens of each active expert.
        scores: the router's softmax, the mean over the tokens, (E,).
        ahead: the same of the next layers, nearest first, as their gates say of this layer's state.
    """

    counts: Mapping[int, int]
    scores: Sequence[float]
    ahead: tuple[tuple[Mapping[int, int], Sequence[float]], ...] = ()


@lru_cache(maxsize=4)
def passes(trace: RouterTrace) -> list[list[list[Step]]]:
    """The passes of every prompt: the prompt at once, if there is one, then each generated token; a `Step` a layer."""
    rows = []
    chosen = trace.chosen()
    ahead = None if trace.ahead is None else (trace.ahead, trace.ahead.topk(trace.top_k).indices)
    for row in range(len(trace.probs)):
        cuts = [(t, t + 1) for t in range(trace.prompt, chosen.shape[1])]
        cuts = [(0, trace.prompt), *cuts] if trace.prompt else cuts
        rows.append([[_step(trace, chosen, ahead, row, at, layer) for layer in range(trace.n_layers)] for at in cuts])
    return rows


def _step(trace: RouterTrace, chosen, ahead, row: int, at: tuple[int, int], layer: int) -> Step:
    tokens = slice(*at)
    later = ()
    if ahead is not None:
        away = range(min(ahead[0].shape[3], trace.n_layers - 1 - layer))
        later = tuple(
            (_counted(ahead[1][row, tokens, layer, d]), ahead[0][row, tokens, layer, d].mean(0).tolist()) for d in away
        )
    return Step(_counted(chosen[row, tokens, layer]), trace.probs[row, tokens, layer].mean(0).tolist(), later)


def _counted(experts) -> dict[int, int]:
    found: dict[int, int] = {}
    for expert in experts.flatten().tolist():
        found[expert] = found.get(expert, 0) + 1
    return found


def new_cache(rule: str, capacity: int, trace: RouterTrace, future: Iterable[Collection[int]]) -> Cache:
    """An empty cache for a layer of a trace; `future`, the experts of each step, is told to "belady" alone."""
    if rule not in CACHES:
        raise unknown("cache", rule, CACHES)
    if rule == "mrs":
        return MRS(capacity, trace.n_experts, min(2 * trace.top_k, trace.n_experts))
    return Belady(capacity, future) if rule == "belady" else {"lru": LRU, "lfu": LFU}[rule](capacity)


class Offload:
    """What is decided: where experts run, what is fetched beforehand, what is forgotten. It knows no clock.

    Args:
        caches: one for each layer.
        mode: of `schedule_layer`.
        prefetch: "none", "score" or "impact".
        lookahead: layers ahead that are fetched for; "score" knows of one.
    """

    def __init__(
        self,
        cost: CostModel,
        caches: Sequence[Cache],
        mode: str = "greedy",
        prefetch: str = "impact",
        lookahead: int = 3,
    ):
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if prefetch not in PREFETCHES:
            raise unknown("prefetch", prefetch, PREFETCHES)
        if lookahead < 1:
            raise InputError(f"lookahead is {lookahead} but must be at least 1")
        if prefetch == "score" and not all(isinstance(cache, MRS) for cache in caches):
            raise InputError("prefetch is 'score' but the caches keep no scores: they must be MRS")
        self.cost, self.caches, self.mode, self.prefetch = cost, list(caches), mode, prefetch
        self.lookahead = 1 if prefetch == "score" else lookahead

    @classmethod
    def of(
        cls,
        trace: RouterTrace,
        cost: CostModel,
        capacity: int,
        cache: str = "mrs",
        mode: str = "greedy",
        prefetch: str = "impact",
        lookahead: int = 3,
    ) -> "Offload":
        """For a trace: `capacity` experts of each layer, at first those that the prompts ask for most, without prompts
        the first.

        Raises:
            InputError: a capacity that is not from 1 to E, or another word than there is.
        """
        if not 1 <= capacity <= trace.n_experts:
            raise InputError(f"capacity is {capacity} but must be from 1 to the {trace.n_experts} experts of a layer")
        chosen, caches = trace.chosen(), []
        for layer in range(trace.n_layers):
            made = new_cache(cache, capacity, trace, (step[layer].counts for row in passes(trace) for step in row))
            asked = chosen[:, : trace.prompt, layer].flatten().bincount(minlength=trace.n_experts)
            for expert in asked.sort(descending=True, stable=True).indices[:capacity].tolist():
                made.admit(expert)
            caches.append(made)
        return cls(cost, caches, mode, prefetch, lookahead)

    def plan(self, layer: int, step: Step, flight: Mapping[int, float], link_free: float) -> LayerPlan:
        """Schedule a layer, and take what it brings over into the cache, where that has room for it.

        Args:
            flight: experts of this layer that are on their way, which the cache has already, and when they arrive.
            link_free: when the link is free.
        """
        cache = self.caches[layer]
        cache.observe(step.scores)
        here = {expert for expert in cache.resident if expert not in flight}
        late = {expert: when for expert, when in flight.items() if expert in step.counts}
        plan = schedule_layer(step.counts, here, self.cost, self.mode, arriving=late, link_free=link_free)
        cache.use(step.counts)
        for expert in plan.transfers:
            self.take(layer, expert, {*step.counts, *flight})
        return plan

    def take(self, layer: int, expert: int, protected: Collection[int]) -> bool:
        """Take an expert in if something may be forgotten for it; otherwise it passes through and is not kept."""
        cache = self.caches[layer]
        if len(cache) == cache.capacity and protected >= cache.resident.keys():
            return False
        cache.admit(expert, protected)
        return True

    def fetch(self, layer: int, step: Step) -> tuple[int, int] | None:
        """The layer and expert worth fetching while `layer` is at work, now in its cache; None if nothing is."""
        if self.prefetch == "none" or math.isinf(self.cost.transfer):  # it would never come
            return None
        for away, (counts, scores) in enumerate(step.ahead[: self.lookahead], 1):
            cache = self.caches[layer + away]
            if self.prefetch == "score":
                scores = cache.scores
                order = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
                counts = dict.fromkeys(order[: len(counts)], 1)
            worth = self._gains(counts, scores, cache)
            for _, expert in sorted((-gain, expert) for expert, gain in worth.items() if gain > 0):
                if self.take(layer + away, expert, counts.keys()):
                    return layer + away, expert
        return None

    def _gains(self, counts: Mapping[int, int], scores: Sequence[float], cache: Cache) -> dict[int, float]:
        missing = [expert for expert in counts if expert not in cache]
        if self.prefetch == "score":
            return {expert: scores[expert] for expert in missing}
        here = sorted((n for expert, n in counts.items() if expert in cache), reverse=True)
        gone = sorted((counts[expert] for expert in missing), reverse=True)
        now = foreseen_seconds(tuple(here), tuple(gone), self.cost)
        gains = {}
        for expert in missing:
            n = counts[expert]
            left = gone.copy()
            left.remove(n)
            then = foreseen_seconds(tuple(sorted([*here, n], reverse=True)), tuple(left), self.cost)
            gains[expert] = (now - then) * scores[expert]
        return gains


@dataclass(frozen=True)
class Metrics:
    """What a run comes to.

    Attributes:
        token_seconds: of a generated token, the mean; the time between tokens.
        first_token_seconds: of a prompt, the mean; 0 where the trace has no prompts.
        hit_rate: the share of generated tokens' experts that the device had when their router decided.
        busy: the part of the whole time that each resource works.
        transfers, fetches: experts brought over for the layer at hand, and beforehand.
        late: of these, those that came after their layer's router had decided, and were asked for.
    """

    token_seconds: float
    first_token_seconds: float
    hit_rate: float
    busy: Mapping[str, float] = field(default_factory=dict)
    transfers: int = 0
    fetches: int = 0
    late: int = 0


@dataclass(frozen=True)
class HybridRun:
    """The metrics of a run and, where it was recorded, its timeline."""

    metrics: Metrics
    timeline: Timeline | None


class HybridSim:
    """Runs a trace by an `Offload` on simulated time: one device, one CPU, one link, each does one thing at a time.

    A layer begins with `dense` work on the device; then its router has decided, and its experts are planned. From the
    end of its transfers to the decision of the next layer's router the link is free to fetch beforehand. A fetch that
    has begun is not broken off, so what a layer needs waits at most for the rest of one.

    Args:
        record: keep every event. `basis` says what the times rest on.
    """

    def __init__(self, trace: RouterTrace, cost: CostModel, offload: Offload, *, record: bool = False, basis: str = ""):
        if len(offload.caches) != trace.n_layers:
            raise InputError(f"offload has {len(offload.caches)} caches but the trace has {trace.n_layers} layers")
        self.rows, self.cost, self._offload = passes(trace), cost, offload
        self.has_prompt, self.record, self.basis = bool(trace.prompt), record, basis or "simulated"

    def run(self) -> HybridRun:
        """From the beginning, and the same every time: the `Offload` that was given stays as it is.

        Raises:
            InputError: a layer would never end, for what the mode decides takes infinitely long.
        """
        self.offload = copy.deepcopy(self._offload)
        self.now = self.link_free = 0.0
        self.flight: tuple[int, int, float] | None = None  # layer, expert and arrival of a fetch
        self.events: list[Event] = []
        self.work = dict.fromkeys((DEVICE, CPU, LINK), 0.0)
        self.tally = dict.fromkeys(("hits", "asked", "transfers", "fetches", "late"), 0)
        first, rest = [], []
        for number, row in enumerate(self.rows):
            for at, steps in enumerate(row):
                began = self.now
                decoding = not self.has_prompt or at > 0
                for layer, step in enumerate(steps):
                    self._layer(f"{number}.{at}.{layer}", layer, step, decoding)
                (rest if decoding else first).append(self.now - began)
        self.work[LINK] -= max(0.0, self.link_free - self.now)  # a last fetch goes on when all is said
        busy = {name: spent / self.now if self.now else 0.0 for name, spent in self.work.items()}
        metrics = Metrics(
            sum(rest) / len(rest),
            sum(first) / len(first) if first else 0.0,
            self.tally["hits"] / self.tally["asked"],
            busy,
            *(self.tally[name] for name in ("transfers", "fetches", "late")),
        )
        timeline = Timeline(tuple(self.events), self.basis, (DEVICE, CPU, LINK)) if self.record else None
        return HybridRun(metrics, timeline)

    def _layer(self, name: str, layer: int, step: Step, decoding: bool) -> None:
        cost, offload = self.cost, self.offload
        self._spent(DEVICE, f"dense {name}", self.now, self.now + cost.dense, "dense")
        self.now += cost.dense
        flight = {}
        if self.flight is not None and self.flight[2] > self.now:
            if self.flight[0] == layer:
                flight = {self.flight[1]: self.flight[2] - self.now}
                self.tally["late"] += self.flight[1] in step.counts
        else:
            self.flight = None
        if decoding:
            here = offload.caches[layer]
            self.tally["asked"] += len(step.counts)
            self.tally["hits"] += sum(expert in here and expert not in flight for expert in step.counts)
        plan = offload.plan(layer, step, flight, max(0.0, self.link_free - self.now))
        if math.isinf(plan.seconds):
            raise InputError(f"cost has an infinite time that mode {offload.mode!r} cannot do without: {cost}")
        self.tally["transfers"] += len(plan.transfers)
        if cost.shared:
            self._spent(DEVICE, f"shared {name}", self.now, self.now + cost.shared, "shared")
        for resource, expert, start, end in plan.spans:
            group = "transfer" if resource == LINK else "expert"
            self._spent(resource, f"{group} {name}.{expert}", self.now + start, self.now + end, group)
        self.link_free = self.now + plan.link_free
        end = self.now + plan.seconds
        while self.link_free < end + cost.dense and (found := offload.fetch(layer, step)) is not None:
            arrival = self.link_free + cost.transfer
            self._spent(LINK, f"fetch {name}.{found[0]}.{found[1]}", self.link_free, arrival, "fetch")
            self.flight, self.link_free = (*found, arrival), arrival
            self.tally["fetches"] += 1
        self.now = end

    def _spent(self, resource: str, name: str, start: float, end: float, group: str) -> None:
        self.work[resource] += end - start
        if self.record and end > start:
            self.events.append(Event(name, resource, start, end, group))


def simulate(hardware: Hardware, workload: Workload) -> Simulation:
    """A workload on a machine by its numbers: HybriMoE, what it is compared with, and the cache that knows the future.

    An expert takes the time to read its weights and that to multiply, in the memory and by the processor where it runs.
    What a layer does before its experts is taken to cost the device as much as one expert of one token.
    """
    hardware.need("device", "host", "link")
    size, trace = workload.expert_bytes, workload.trace
    needed = size * trace.n_layers * trace.n_experts
    if hardware.host.memory_bytes < needed:
        raise InputError(
            f"hardware {hardware.name!r}: host: memory_bytes is {hardware.host.memory_bytes:,.0f} but must hold all "
            f"experts, {needed:,.0f} bytes"
        )
    cpu, device = (
        Rate(0.0, size / part.memory_bandwidth, workload.expert_flops / part.flops)
        for part in (hardware.host, hardware.device)
    )
    transfer = hardware.link.latency_seconds + size / hardware.link.bandwidth
    cost = CostModel(cpu, device, transfer, dense=device.seconds([1]))
    capacity = workload.capacity
    arms = {
        "hybrimoe": {},
        "fixed mapping": {"cache": "lru", "mode": "fixed", "prefetch": "none"},
        "device alone, LRU": {"cache": "lru", "mode": "device", "prefetch": "none"},
        "hybrimoe, cache that knows the future": {"cache": "belady"},
    }
    rows, timeline = [], None
    for name, how in arms.items():
        run = HybridSim(
            trace, cost, Offload.of(trace, cost, capacity, **how), record=not rows, basis=hardware.label
        ).run()
        timeline = timeline or run.timeline
        found = run.metrics
        row = {"token_seconds": found.token_seconds, "first_token_seconds": found.first_token_seconds}
        rows.append(
            {"policy": name} | row | {"hit_rate": found.hit_rate} | {f"{k}_busy": v for k, v in found.busy.items()}
        )
    since = timeline.makespan - 3 * rows[0]["token_seconds"]
    shown = timeline.between(since, timeline.makespan) if 0 < since < timeline.makespan else timeline
    return Simulation(METHOD.slug, hardware.label, f"{workload}, {capacity} of a layer's experts", rows, shown)


def example() -> Callable[[int], Metrics]:
    def simulate_small(seed: int) -> Metrics:
        trace = zipf_markov(seed, prompts=2, prompt=4, generated=8, layers=3, experts=8, top_k=2)
        return HybridSim(trace, PUBLIC, Offload.of(trace, PUBLIC, capacity=4)).run().metrics

    return simulate_small
