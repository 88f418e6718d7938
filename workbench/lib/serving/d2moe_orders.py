"""In which order the planes of a layer's experts are read (2504.15299).

A layer's router says which experts are wanted, by how many tokens and in how many bits: its jobs. One channel reads
what is missing of them, one after the other, while one processor computes those that are there. The orders:

    fifo          as the requests came
    whole         hottest expert first, all bits of it, whatever was asked for
    johnson       what loads faster than it computes, by loading time; then the rest, by falling computing time
    hebf          hottest expert first, the bits that were asked for
    progressive   the base planes of all first, hottest first, and then plane by plane; an expert computes with what is
                  there of it when its turn comes, with fewer bits than asked for if need be

Johnson's rule is the best order there is for a layer whose planes all fit.

An expert is (layer, number); "level" is how many bits of it are there, 0 or from the base upwards.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations

from jaxtyping import Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel, RateTable

Expert = tuple[int, int]
BRUTE = 7  # jobs of which every order is tried


@dataclass(frozen=True)
class Job:
    """An expert that a step wants: by `tokens` tokens, with `bits` bits, the most that one of them asks for."""

    expert: Expert
    tokens: int
    bits: int


@dataclass(frozen=True)
class BitTrace:
    """What was wanted, step by step and layer by layer; a layer's jobs are in the order in which requests came.

    Attributes:
        steps: of a step its layers, of a layer its jobs.
        requests: tokens a step makes.
        source: where it comes from, in words.
    """

    steps: tuple[tuple[tuple[Job, ...], ...], ...]
    requests: int
    source: str

    def __post_init__(self):
        if not self.steps or not any(layer for step in self.steps for layer in step):
            raise InputError("steps is empty but must hold at least one step with a job")
        if self.requests < 1:
            raise InputError(f"requests is {self.requests} but must be at least 1")
        for step in self.steps:
            for layer, jobs in enumerate(step):
                experts = [job.expert for job in jobs]
                if len({*experts}) < len(experts) or any(expert[0] != layer for expert in experts):
                    raise InputError(
                        f"layer {layer} has jobs of {experts} but must have each expert once, of this layer"
                    )
                if least := [job for job in jobs if not job.tokens >= 1]:
                    raise InputError(f"tokens is {least[0].tokens} of {least[0]} but must be at least 1")

    def jobs(self) -> Iterable[Job]:
        return (job for step in self.steps for layer in step for job in layer)

    def mean_bits(self) -> float:
        """Of what is loaded: over jobs, not over tokens."""
        bits = [job.bits for job in self.jobs()]
        return sum(bits) / len(bits)


def bit_trace(
    experts: Int64[Tensor, "steps requests layers k"], bits: Int64[Tensor, "steps requests layers k"], source: str
) -> BitTrace:
    """The trace of requests that go on in step, from the experts of each token and the bits that it asks for.

    Raises:
        InputError: shapes that differ, or no token at all.
    """
    if experts.ndim != 4 or experts.shape != bits.shape:
        raise InputError(
            f"experts and bits have shapes {tuple(experts.shape)} and {tuple(bits.shape)} but must both be "
            "(steps, requests, layers, k)"
        )
    steps = []
    for own, wanted in zip(experts.tolist(), bits.tolist(), strict=True):
        layers = []
        for layer in range(experts.shape[2]):
            found: dict[int, tuple[int, int]] = {}
            for request, widths in zip(own, wanted, strict=True):
                for expert, width in zip(request[layer], widths[layer], strict=True):
                    tokens, most = found.get(expert, (0, 0))
                    found[expert] = (tokens + 1, max(most, width))
            layers.append(tuple(Job((layer, expert), *both) for expert, both in found.items()))
        steps.append(tuple(layers))
    return BitTrace(tuple(steps), experts.shape[1], source)


@dataclass(frozen=True)
class PlaneCosts:
    """What an expert weighs and takes.

    Attributes:
        sizes: level -> bytes that are there at it; the lowest is the base.
        read: seconds of reading n bytes.
        compute: level -> seconds of an expert by its tokens.
        dense: seconds of what a layer does before its router has spoken (attention).
        basis: "simulated, calibrated by ...".
    """

    sizes: Mapping[int, int]
    read: LinkModel
    compute: Mapping[int, RateTable]
    dense: float
    basis: str

    def __post_init__(self):
        levels = sorted(self.sizes)
        sizes = [self.sizes[level] for level in levels]
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)) or levels != [*range(levels[0], levels[-1] + 1)]:
            raise InputError(
                f"sizes is {dict(self.sizes)} but must have more bytes for each further bit, and no bit left out"
            )
        if missing := [level for level in self.sizes if level not in self.compute]:
            raise InputError(f"compute has no times for level {missing[0]} but must have them for every level of sizes")
        if not (math.isfinite(self.dense) and self.dense >= 0):
            raise InputError(f"dense is {self.dense} but must be a finite number of at least 0")

    @property
    def base(self) -> int:
        return min(self.sizes)

    @property
    def top(self) -> int:
        return max(self.sizes)

    def bytes_at(self, level: int) -> int:
        """Bytes of an expert at a level; none at 0."""
        return self.sizes[level] if level else 0

    def to_dict(self) -> dict:
        """All but the basis, as plain values."""
        return {
            "sizes": {str(level): size for level, size in self.sizes.items()},
            "read": asdict(self.read),
            "compute": {str(level): table.to_dict() for level, table in self.compute.items()},
            "dense": self.dense,
        }

    @classmethod
    def from_dict(cls, found: Mapping, basis: str) -> "PlaneCosts":
        """The inverse of `to_dict`."""
        sizes = {int(level): size for level, size in found["sizes"].items()}
        compute = {int(level): RateTable.from_dict(table) for level, table in found["compute"].items()}
        return cls(sizes, LinkModel(**found["read"]), compute, found["dense"], basis)

    def load_seconds(self, job: Job, level: int) -> float:
        """Of what is missing of a job whose expert is at a level."""
        return self.read.seconds(max(0, self.bytes_at(job.bits) - self.bytes_at(level)))

    def compute_seconds(self, tokens: int, level: int) -> float:
        return self.compute[level].seconds(tokens)


Load = tuple[Expert, int]
"""An expert, and the level up to which it is read."""
Resident = Mapping[Expert, int]
"""Expert -> its level; what is not in it is at 0."""
Order = Callable[[Sequence[Job], Resident, PlaneCosts], list[Load]]


def fifo_order(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Load]:
    return [(job.expert, job.bits) for job in jobs if resident.get(job.expert, 0) < job.bits]


def hebf_order(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Load]:
    """The most tokens first; of as many, the fewest missing bytes."""
    return fifo_order(_hottest(jobs, resident, costs), resident, costs)


def progressive_order(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Load]:
    """The base of all that have none, hottest first; then the further planes one by one, hottest first."""
    hottest = _hottest(jobs, resident, costs)
    base = [(job.expert, costs.base) for job in hottest if resident.get(job.expert, 0) < costs.base]
    return base + [
        (job.expert, level)
        for job in hottest
        for level in sorted(costs.sizes)
        if max(costs.base, resident.get(job.expert, 0)) < level <= job.bits
    ]


def johnson_order(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Load]:
    """Johnson's rule for two machines in line (1954): the least makespan of jobs that each load and then compute."""
    times = {job: _times(job, resident, costs) for job in jobs}
    first = sorted((job for job in jobs if times[job][0] <= times[job][1]), key=lambda job: times[job][0])
    last = sorted((job for job in jobs if times[job][0] > times[job][1]), key=lambda job: -times[job][1])
    return fifo_order([*first, *last], resident, costs)


def optimal_order(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Load]:
    """The best of all orders, each tried.

    Raises:
        InputError: more than `BRUTE` jobs.
    """
    if len(jobs) > BRUTE:
        raise InputError(f"jobs has {len(jobs)} but every order is tried of at most {BRUTE}")
    best = min(permutations(jobs), key=lambda order: makespan(order, resident, costs))
    return fifo_order(best, resident, costs)


def makespan(order: Sequence[Job], resident: Resident, costs: PlaneCosts) -> float:
    """Seconds until all jobs have computed that load in this order and compute as soon as they can, if all fit."""
    read = done = 0.0
    for load, compute in sorted((_times(job, resident, costs) for job in order), key=lambda times: times[0] > 0):
        read += load
        done = max(read, done) + compute
    return done


def _times(job: Job, resident: Resident, costs: PlaneCosts) -> tuple[float, float]:
    load = costs.load_seconds(job, resident.get(job.expert, 0))
    return load, costs.compute_seconds(job.tokens, job.bits)


def _hottest(jobs: Sequence[Job], resident: Resident, costs: PlaneCosts) -> list[Job]:
    def missing(job: Job) -> int:
        return costs.bytes_at(job.bits) - costs.bytes_at(resident.get(job.expert, 0))

    return sorted(jobs, key=lambda job: (-job.tokens, missing(job)))
