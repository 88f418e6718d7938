"""What a step of a plan takes on a cluster: passes on stages, messages on links, event by event. Simulated.

    cluster = frontier_cluster()                      # or cluster_of(Hardware.read("mine.json"))
    report = StepSimulator(cluster).run(GPT["175B"], ParallelPlan(tp=4, pp=16, dp=16, accum=64))
    report.seconds, report.share, report.bubble, report.parts, report.memory
    report.timeline()                                 # the pipeline as events

A pass takes as long as its products and its passes over memory, and the all-reduces over tp within it, which wait for
nobody. A message between stages goes through a link of its own for each pair and direction, beside what is computed;
a stage waits for what it needs. After its last pass a stage sums gradients over dp and updates its part.

`StepSimulator.run` follows the fixed orders of `frontier_schedules`; the same passes as tasks of the event engine end
at the same moments, which is where `timeline` has them from. Units are seconds and bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from workbench.lib.core.simulation.engine import Resource, Task, run
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.distributed.folding_model import Cluster
from workbench.lib.distributed.frontier_memory import Memory, largest, shard, stage_params
from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import Pass, orders
from workbench.lib.distributed.frontier_work import Reckoned, Work


@dataclass(frozen=True)
class StepReport:
    """What a step takes. `parts`: seconds of the stage that is done last, by what they go to; they sum to `seconds`.

    Attributes:
        bubble: the share of the pipeline's time that stages stand still, of all of them.
        share: of the devices' peak, by the FLOPs that the model needs (what is computed twice counts once).
        memory: of the stage that needs most.
        limit: bytes that a device has for it.
    """

    plan: ParallelPlan
    config: DenseConfig
    basis: str
    parts: dict[str, float]
    bubble: float
    share: float
    memory: Memory
    limit: float
    pipe: "Pipe"

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    def timeline(self) -> Timeline:
        """The passes and messages of the pipeline, by the event engine."""
        return self.pipe.timeline(self.basis)


@dataclass(frozen=True)
class Pipe:
    """Passes of known length on stages that wait for each other.

    Attributes:
        seconds: chunk -> of a pass (forward, backward).
        message: seconds of a message to the next stage.
    """

    plan: ParallelPlan
    seconds: tuple[tuple[float, float], ...]
    message: float = 0.0

    @cached_property
    def ends(self) -> list[float]:
        """When each stage is done with its last pass.

        Stages are taken in turn, each as far as what it waits for has come; in the orders of `frontier_schedules` one
        of them can always go on.
        """
        pp, message = self.plan.pp, self.message
        lanes = _lanes(self.plan.schedule, pp, self.plan.accum, self.plan.interleave)
        spent = [self.seconds[chunk][backward] for chunk in range(self.plan.chunks) for backward in (0, 1)]
        at, now, free = [0] * pp, [0.0] * pp, [0.0] * (2 * pp)  # links forward, then links backward
        come: list[float | None] = [None] * (len(spent) * self.plan.accum)
        turn = list(range(pp))
        while turn:
            waiting, before = [], at.copy()
            for stage in turn:
                lane, i, clock = lanes[stage], at[stage], now[stage]
                while i < len(lane):
                    kind, waits, gives, link = lane[i]
                    if waits >= 0:
                        moment = come[waits]
                        if moment is None:
                            break
                        clock = max(clock, moment)
                    clock += spent[kind]
                    if gives >= 0:
                        come[gives] = clock
                        if message:
                            come[gives] = free[link] = max(clock, free[link]) + message
                    i += 1
                if i < len(lane):
                    waiting.append(stage)
                at[stage], now[stage] = i, clock
            if len(waiting) == len(turn) and at == before:
                raise RuntimeError(f"the stages of plan {self.plan} wait for one another")
            turn = waiting
        return now

    @property
    def busy(self) -> list[float]:
        """Seconds of work on each stage."""
        per = [self.plan.accum * sum(both) for both in self.seconds]
        return [sum(per[stage :: self.plan.pp]) for stage in range(self.plan.pp)]

    @property
    def bubble(self) -> float:
        """The share of the time until the last stage is done that stages stand still."""
        whole = max(self.ends) * self.plan.pp
        return max(0.0, 1 - sum(self.busy) / whole) if whole else 0.0

    def timeline(self, basis: str) -> Timeline:
        """The same by the event engine; stages and links take what is next in the order of each."""
        plan = self.plan
        chunks, pp, lanes = plan.chunks, plan.pp, orders(plan)
        made: dict[Pass, Task] = {}
        tasks, sends = [], []
        for stage, lane in enumerate(lanes):
            for work in lane:
                seconds = self.seconds[work.chunk][work.backward]
                group = ("backward" if work.backward else "forward") + (
                    f", chunk {work.chunk // pp}" if plan.interleave > 1 else ""
                )
                task = Task(str(work), Resource(f"stage {stage}", in_order=True), seconds, group=group)
                made[work] = task
                tasks.append(task)
        for stage, lane in enumerate(lanes):
            for work in lane:
                after = work.after(chunks)
                if after is None:
                    continue
                if not self.message:
                    made[after].after = [*made[after].after, made[work]]
                    continue
                link = Resource(f"link {stage} to {after.chunk % pp}", in_order=True)
                send = Task(f"{work}, sent", link, self.message, after=[made[work]], group="message")
                made[after].after = [*made[after].after, send]
                sends.append(send)
        return run([*tasks, *sends], basis)


@cache
def _lanes(schedule: str, pp: int, m: int, v: int) -> list[list[tuple[int, int, int, int]]]:
    """`orders` in numbers: what a pass is, which of all it waits for (its own number, once what it needs has come) and
    lets go on, -1 for none, and its link."""
    plan = ParallelPlan(pp=pp, accum=m, interleave=v, schedule=schedule)

    def number(work: Pass | None) -> int:
        return -1 if work is None else (2 * work.chunk + work.backward) * m + work.micro

    return [
        [
            (
                2 * work.chunk + work.backward,
                number(work) if work.before(plan.chunks) else -1,
                number(after := work.after(plan.chunks)),
                # between two stages both directions of chunks wrap round: a pair has one link each way
                _link(stage, after.chunk % pp, pp) if after else 0,
            )
            for work in lane
        ]
        for stage, lane in enumerate(orders(plan))
    ]


def _link(here: int, there: int, pp: int) -> int:
    return here if there == (here + 1) % pp else pp + here


@dataclass(frozen=True)
class StepSimulator:
    """Steps on a cluster.

    Args:
        work: seconds of a rank's own work; None: by the cluster's roofline.
    """

    cluster: Cluster
    work: Work | None = None

    def run(self, config: DenseConfig, plan: ParallelPlan) -> StepReport:
        """A step, whether it fits in memory or not.

        Raises:
            InputError: the plan does not fit the model.
        """
        plan.check(config)
        spent = self._spent(config, plan)
        pipe = Pipe(plan, tuple(self._passes(spent, config, plan)), self._message(config, plan))
        ends, m, tied = list(pipe.ends), plan.accum, self._tied(config, plan)
        if plan.pp > 1:  # both are done before either goes on
            ends[0] = ends[-1] = max(ends[0], ends[-1]) + tied
        after = [self._after(config, plan, stage) for stage in range(plan.pp)]
        last = max(range(plan.pp), key=lambda stage: ends[stage] + sum(after[stage].values()))
        first, final, per = last == 0, last == plan.pp - 1, m * (config.layers // plan.pp)
        parts = {
            "layers": per * (spent["forward"] + spent["backward"]),
            "recompute": per * spent["again"],
            "tp": per * spent["layer tp"] + m * (first * spent["embed tp"] + final * spent["out tp"]),
            "ends": m * (first * spent["embedding"] + final * spent["output"]),
            "tied": tied if first or final else 0.0,
        }
        parts["waiting"] = max(0.0, ends[last] - sum(parts.values()))
        parts |= after[last]
        seconds, devices = sum(parts.values()), plan.world
        share = config.flops(plan.batch) / (seconds * devices * self.cluster.peak_flops)
        used, limit = largest(config, plan), self.cluster.memory_bytes
        return StepReport(plan, config, self.cluster.basis, parts, pipe.bubble, share, used, limit, pipe)

    def bound(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """A share of the peak that a plan cannot exceed: that of a step in which no stage ever waits."""
        plan.check(config)
        pipe = Pipe(plan, tuple(self._passes(self._spent(config, plan), config, plan)))
        spent = [busy + sum(self._after(config, plan, stage).values()) for stage, busy in enumerate(pipe.busy)]
        return config.flops(plan.batch) / (max(spent) * plan.world * self.cluster.peak_flops)

    def fits(self, config: DenseConfig, plan: ParallelPlan) -> bool:
        """Whether it fits in memory."""
        return largest(config, plan).total <= self.cluster.memory_bytes

    def _tied(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """The first and the last stage sum the gradient of the embedding, which both have."""
        if plan.pp == 1:
            return 0.0
        pair = ((plan.tp * plan.dp * (plan.pp - 1), 2),)
        return 2 * self.cluster.gather(config.vocab * config.dim // plan.tp * config.width, pair)

    def _spent(self, config: DenseConfig, plan: ParallelPlan) -> dict[str, float]:
        """Seconds of a micro-batch: of a layer, of the ends, and of what goes over tp."""
        work = self.work if self.work is not None else Reckoned(self.cluster.compute)
        rows, tp = plan.micro_batch * config.time, plan.axes["tp"]

        def reduced(numbers: int) -> float:
            return 2 * self.cluster.gather(config.width * numbers, tp)

        row = reduced(rows * config.dim)
        forward = work.layer(config, plan)
        return {
            "forward": forward,
            "backward": work.layer_backward(config, plan),
            "again": forward if plan.recompute else 0.0,
            "layer tp": (6 if plan.recompute else 4) * row,
            "embedding": work.embedding(config, plan),
            "output": work.output(config, plan),
            "embed tp": row,
            "out tp": row + reduced(rows) + reduced(2 * rows),
        }

    def _passes(
        self, spent: dict[str, float], config: DenseConfig, plan: ParallelPlan
    ) -> Iterator[tuple[float, float]]:
        """(forward, backward) of each chunk; of the ends a third is forward."""
        layers, tp = config.layers // plan.chunks, spent["layer tp"] / (6 if plan.recompute else 4)
        there = spent["forward"] + 2 * tp
        back = spent["backward"] + spent["again"] + (4 if plan.recompute else 2) * tp
        for chunk in range(plan.chunks):
            ends = (chunk == 0) * (spent["embedding"] + spent["embed tp"])
            ends += (chunk == plan.chunks - 1) * (spent["output"] + spent["out tp"])
            yield layers * there + ends / 3, layers * back + 2 * ends / 3

    def _message(self, config: DenseConfig, plan: ParallelPlan) -> float:
        """Between two stages, of one device; the others of its node have links of their own."""
        if plan.pp == 1:
            return 0.0
        near = plan.tp * plan.dp < self.cluster.devices_per_node
        link = self.cluster.node if near else self.cluster.network
        return link.seconds(config.width * plan.micro_batch * config.time * config.dim)

    def _after(self, config: DenseConfig, plan: ParallelPlan, stage: int) -> dict[str, float]:
        """What a stage does after its passes. All gradients go round once and sums or weights once more: a ring's
        all-reduce, or its two halves with the optimiser in between."""
        n = stage_params(config, plan, stage)
        gathered = self.cluster.gather(config.width * n, plan.axes["dp"])
        work = self.work if self.work is not None else Reckoned(self.cluster.compute)
        return {"dp": 2 * gathered, "update": work.update(shard(n, plan))}
