"""What is kept of the planes of experts while their layers are served, and how long it all takes (2504.15299).

A schedule is decided as it goes on (`LayerRun`), in an order of `d2moe_orders`, by the same code where time is
simulated (`D2Sim`) and where it passes (`d2moe_executor`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.engine import Engine, Resource, Task
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.serving.d2moe_orders import (
    BitTrace,
    Expert,
    Job,
    Order,
    PlaneCosts,
    fifo_order,
    hebf_order,
    johnson_order,
    progressive_order,
)


@dataclass(frozen=True)
class Policy:
    """An order of reading; `whole` reads all bits whatever was asked for, `progressive` computes with what is there."""

    order: Order
    whole: bool = False
    progressive: bool = False


POLICIES = {
    "fifo": Policy(fifo_order),
    "whole": Policy(hebf_order, whole=True),
    "johnson": Policy(johnson_order),
    "hebf": Policy(hebf_order),
    "progressive": Policy(progressive_order, progressive=True),
}


class PlaneCache:
    """The planes that are there, never more bytes of them than the budget; what is being read counts from its start.

    Where room is wanted, the coldest expert loses its top plane, then its next, and its base last. How hot an expert is
    is a moving average of its tokens in the steps before.

    Attributes:
        used, peak: bytes now, and the most there ever were.
        dropped: planes that were given up.

    Args:
        budget: bytes; at least those of one whole expert.
        decay: of the moving average, from 0 to below 1.
        drop: called as drop(expert, level) for each plane that goes.
    """

    def __init__(
        self,
        budget: int,
        costs: PlaneCosts,
        decay: float = 0.9,
        drop: Callable[[Expert, int], None] | None = None,
    ):
        if not budget >= costs.bytes_at(costs.top):
            raise InputError(
                f"budget is {budget} bytes but must hold at least one whole expert, {costs.bytes_at(costs.top)}"
            )
        if not 0 <= decay < 1:
            raise InputError(f"decay is {decay} but must be at least 0 and below 1")
        self.budget, self.costs, self.decay, self._drop = budget, costs, decay, drop
        self.levels: dict[Expert, int] = {}
        self.heat: dict[Expert, float] = {}
        self.used = self.peak = self.dropped = 0
        self._coming: tuple[Expert, int] | None = None

    def level(self, expert: Expert) -> int:
        """Bits of it that can be used."""
        return self.levels.get(expert, 0)

    def make_room(self, n_bytes: int, needed: Mapping[Expert, int]) -> bool:
        """Give up planes until so many bytes are free, but none that is needed; whether they are.

        Args:
            needed: expert -> the level below which it must not fall.
        """
        while self.used + n_bytes > self.budget:
            free = [expert for expert in self.levels if self.level(expert) > needed.get(expert, 0)]
            if self._coming is not None:  # what is there of it is the first part of what comes
                free = [expert for expert in free if expert != self._coming[0]]
            if not free:
                return False
            self._give_up(min(free, key=lambda expert: (self.heat.get(expert, 0.0), expert)))
        return True

    def begin(self, expert: Expert, level: int) -> int:
        """Room is taken for the planes up to a level, which are about to be read: how many bytes.

        Raises:
            InputError: there is no room, or something is being read already.
        """
        size = self.costs.bytes_at(level) - self.costs.bytes_at(self.level(expert))
        if self._coming is not None or size <= 0 or self.used + size > self.budget:
            raise InputError(
                f"level is {level} but {size} bytes for it must be above 0 and fit into {self.budget - self.used}, "
                "with nothing else on its way"
            )
        self._coming = (expert, level)
        self.used += size
        self.peak = max(self.peak, self.used)
        return size

    def finish(self) -> None:
        """What was being read is there."""
        expert, level = self._coming
        self.levels[expert], self._coming = level, None

    def observe(self, layer: int, tokens: Mapping[int, int]) -> None:
        """A step is over in which the experts of a layer had so many tokens; the others had none."""
        for expert in {expert for expert in self.heat if expert[0] == layer} | {(layer, one) for one in tokens}:
            self.heat[expert] = self.decay * self.heat.get(expert, 0.0) + (1 - self.decay) * tokens.get(expert[1], 0)

    def _give_up(self, expert: Expert) -> None:
        level = self.levels[expert]
        below = level - 1 if level > self.costs.base else 0
        self.used -= self.costs.bytes_at(level) - self.costs.bytes_at(below)
        self.dropped += 1
        if below:
            self.levels[expert] = below
        else:
            del self.levels[expert]
        if self._drop is not None:
            self._drop(expert, level)


class LayerRun:
    """One layer of one step while it is served: what is read next, and what computes next.

    Both are asked for when the channel, or the processor, has nothing to do; first the processor.
    """

    def __init__(self, jobs: Sequence[Job], cache: PlaneCache, policy: Policy):
        if policy.whole:
            jobs = [Job(job.expert, job.tokens, cache.costs.top) for job in jobs]
        self.cache, self.policy = cache, policy
        self.loads = policy.order(jobs, cache.levels, cache.costs)
        place = {expert: at for at, (expert, _) in reversed([*enumerate(self.loads)])}
        # those that are whole already compute first, then as they are read
        self.waiting = sorted(jobs, key=lambda job: place.get(job.expert, -1))
        self.needed = {job.expert: job.bits for job in jobs}  # of jobs that have not computed
        self.running: Job | None = None

    @property
    def over(self) -> bool:
        return not self.needed

    def next_job(self) -> tuple[Job, int] | None:
        """The first job whose planes are there, and the level at which it computes."""
        job = self._ready()
        if job is None:
            return None
        self.waiting.remove(job)
        self.running = job
        return job, min(job.bits, self.cache.level(job.expert))

    def done(self) -> None:
        """The job that ran has computed: its planes are needed no more in this step."""
        del self.needed[self.running.expert]
        self.running = None

    def next_load(self) -> tuple[Expert, int, int] | None:
        """(expert, level that is there, level up to which it is read); room for it is taken."""
        waiting = {job.expert for job in self.waiting}
        while self.loads:
            expert, level = self.loads[0]
            there = self.cache.level(expert)
            if expert not in waiting or there >= level:  # it began with what there was
                self.loads.pop(0)
                continue
            size = self.cache.costs.bytes_at(level) - self.cache.costs.bytes_at(there)
            if not self._room(size, expert):
                return None
            self.loads.pop(0)
            self.cache.begin(expert, level)
            return expert, there, level
        return None

    def _ready(self) -> Job | None:
        def enough(job: Job) -> int:
            return self.cache.costs.base if self.policy.progressive else job.bits

        return next((job for job in self.waiting if self.cache.level(job.expert) >= enough(job)), None)

    def _room(self, size: int, expert: Expert) -> bool:
        kept = {one: min(level, self.cache.level(one)) for one, level in self.needed.items()}
        if self.cache.make_room(size, kept):
            return True
        if self.running is not None or self._ready() is not None:
            return False  # there will be when that has computed
        # parts of experts that cannot compute as they are: those that are read last go first
        for job in reversed(self.waiting):
            if job.expert != expert:
                kept[job.expert] = 0
                if self.cache.make_room(size, kept):
                    return True
        raise AssertionError("one whole expert fits into every budget")


@dataclass(frozen=True)
class Served:
    """What serving a trace came to.

    Attributes:
        seconds: until the last job had computed.
        tokens: made in all.
        bubbles: part of that time in which the processor had nothing to do.
        peak_bytes: the most that was there of experts, what was being read included.
        read_bytes: in all.
        bits_wanted, bits_used: means over the tokens of all jobs.
        jobs: (step, expert, tokens, level at which it computed), in the order in which they computed.
    """

    timeline: Timeline
    seconds: float
    tokens: int
    bubbles: float
    peak_bytes: int
    read_bytes: int
    bits_wanted: float
    bits_used: float
    jobs: tuple[tuple[int, Expert, int, int], ...] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict:
        """The numbers, as plain values."""
        names = ("seconds", "tokens", "tokens_per_second", "bubbles", "peak_bytes", "read_bytes", "bits_wanted")
        return {name: getattr(self, name) for name in (*names, "bits_used")}


def served(timeline: Timeline, trace: BitTrace, cache: PlaneCache, jobs: list, read: int) -> Served:
    """The numbers of a run, of its timeline with the resources "compute" and "disk"."""
    events = timeline.on("compute")
    seconds = max(event.end for event in events)
    asked = [(job.tokens, job.bits) for job in trace.jobs()]
    wanted = sum(tokens * bits for tokens, bits in asked) / sum(tokens for tokens, _ in asked)
    used = sum(tokens * level for _, _, tokens, level in jobs) / sum(tokens for _, _, tokens, _ in jobs)
    bubbles = 1 - sum(event.seconds for event in events) / seconds
    return Served(
        timeline, seconds, len(trace.steps) * trace.requests, bubbles, cache.peak, read, wanted, used, tuple(jobs)
    )


class D2Sim:
    """Serves a trace in simulated time.

    Args:
        policy: one of `POLICIES`.
        budget: bytes that experts may take, see `PlaneCache`.

    Raises:
        InputError: an unknown policy, a budget below one expert, or bits that have no size.
    """

    DISK, COMPUTE = Resource("disk"), Resource("compute")

    def __init__(self, trace: BitTrace, costs: PlaneCosts, policy: str, budget: int, decay: float = 0.9):
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
        check_bits(trace, costs)
        self.trace, self.costs, self.policy = trace, costs, POLICIES[policy]
        self.new_cache = partial(PlaneCache, budget, costs, decay)
        self.new_cache()  # refuses what is no budget

    def run(self) -> Served:
        """From the beginning, with nothing read, and the same every time."""
        engine, cache, costs = Engine(self.costs.basis), self.new_cache(), self.costs
        jobs, read, loading, computing = [], 0, None, None
        for at, step in enumerate(self.trace.steps):
            for layer, wanted in enumerate(step):
                if costs.dense:
                    dense = Task(f"{at}.{layer} dense", self.COMPUTE, costs.dense, group="dense")
                    engine.submit([dense])
                    engine.advance(engine.now + costs.dense)
                    if loading is not None and loading.end <= engine.now:
                        cache.finish()
                        loading = None
                run = LayerRun(wanted, cache, self.policy)
                while not run.over:
                    if computing is None and (found := run.next_job()) is not None:
                        job, level = found
                        jobs.append((at, job.expert, job.tokens, level))
                        name = f"{at}.{layer} expert {job.expert[1]}, {level} bits"
                        computing = Task(name, self.COMPUTE, costs.compute_seconds(job.tokens, level), group="experts")
                        engine.submit([computing])
                    if loading is None and (found := run.next_load()) is not None:
                        expert, there, level = found
                        size = costs.bytes_at(level) - costs.bytes_at(there)
                        read += size
                        name = f"{at}.{layer} expert {expert[1]}, {there} to {level} bits"
                        loading = Task(name, self.DISK, costs.read.seconds(size), group="base" if not there else "more")
                        engine.submit([loading])
                    engine.advance(engine.now)
                    engine.advance(min(task.end for task in (loading, computing) if task is not None))
                    if loading is not None and loading.end <= engine.now:
                        cache.finish()
                        loading = None
                    if computing is not None and computing.end <= engine.now:
                        run.done()
                        computing = None
                cache.observe(layer, {job.expert[1]: job.tokens for job in wanted})
        return served(engine.run(), self.trace, cache, jobs, read)


def check_bits(trace: BitTrace, costs: PlaneCosts) -> None:
    """Raise `InputError` where a job asks for bits that experts have no level of."""
    for job in trace.jobs():
        if job.bits not in costs.sizes:
            raise unknown("bits of a job", job.bits, sorted(costs.sizes))
