"""In which order a stage of a pipeline does its work, and what comes before what: for the trainer and the simulator.

The order of a stage is fixed beforehand: `orders(plan)` has that of each. A forward pass of chunk s waits for that of
chunk s - 1, a backward pass for that of chunk s + 1, of the same micro-batch. Chunk c of stage p is s = c pp + p.
"""

from dataclasses import dataclass
from functools import cache

from workbench.lib.distributed.frontier_plans import ParallelPlan


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one chunk, `chunk` counted over all stages."""

    backward: bool
    chunk: int
    micro: int

    def __str__(self) -> str:
        return f"{'backward' if self.backward else 'forward'} {self.micro} of chunk {self.chunk}"

    def before(self, chunks: int) -> "Pass | None":
        """The pass of another chunk whose output this one needs; None for the first, and where forward turns back."""
        chunk = self.chunk + 1 if self.backward else self.chunk - 1
        return Pass(self.backward, chunk, self.micro) if 0 <= chunk < chunks else None

    def after(self, chunks: int) -> "Pass | None":
        """The pass of another chunk that needs this one's output."""
        chunk = self.chunk - 1 if self.backward else self.chunk + 1
        return Pass(self.backward, chunk, self.micro) if 0 <= chunk < chunks else None


def orders(plan: ParallelPlan) -> tuple[tuple[Pass, ...], ...]:
    """What each stage does, one after the other."""
    return tuple(_order(plan.schedule, plan.pp, plan.accum, plan.interleave, stage) for stage in range(plan.pp))


@cache
def _order(schedule: str, pp: int, m: int, v: int, stage: int) -> tuple[Pass, ...]:
    def passes(backward: bool) -> list[Pass]:
        """With chunks: pp micro-batches through the first of this stage's, the same ones through the next, and so on,
        backward from the last chunk."""
        found = []
        for k in range(m * v):
            group, within = divmod(k, pp * v)
            chunk = within // pp
            if backward:
                chunk = v - 1 - chunk
            found.append(Pass(backward, chunk * pp + stage, group * pp + within % pp))
        return found if v > 1 else [Pass(backward, stage, k) for k in range(m)]

    there, back = passes(False), passes(True)
    if schedule == "gpipe":
        return (*there, *back)
    ahead = pp - stage - 1 if v == 1 else 2 * (pp - stage - 1) + (v - 1) * pp
    ahead = min(ahead, m * v)
    found, left = there[:ahead], there[ahead:]
    for one, other in zip(left, back, strict=False):
        found += [one, other]
    return (*found, *back[len(left) :])


def in_flight(plan: ParallelPlan, stage: int) -> int:
    """The most forward passes of a stage, of one chunk each, whose backward pass is still to come."""
    return _in_flight(plan.schedule, plan.pp, plan.accum, plan.interleave, stage)


@cache
def _in_flight(schedule: str, pp: int, m: int, v: int, stage: int) -> int:
    now = most = 0
    for one in _order(schedule, pp, m, v, stage):
        now += -1 if one.backward else 1
        most = max(most, now)
    return most
