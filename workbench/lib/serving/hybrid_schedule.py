"""Which experts of a layer run on the device and which on the CPU, and what takes how long (for `hybrimoe`).

Letters: E experts, n tokens of an expert.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from workbench.errors import InputError, unknown
from workbench.lib.core.simulation.fits import fitted

MODES = ("greedy", "fixed", "device", "optimal")
"""Greedy; cached ones on the device and the others on the CPU; all on the device; the best of all assignments."""
DEVICE, CPU, LINK = "device", "cpu", "link"
MOST = 14
"""Experts of which all assignments are tried."""


def _check(**values: float) -> None:
    for name, value in values.items():
        if math.isnan(value) or value < 0:
            raise InputError(f"{name} is {value} but must be at least 0 seconds")


@dataclass(frozen=True)
class Rate:
    """Seconds of a processor for experts of n tokens each: first + sum of (expert + token n).

    Attributes:
        first: once, for the first expert of a layer.
        expert: for each expert.
        token: for each token of each.
    """

    first: float
    expert: float
    token: float

    def __post_init__(self):
        _check(first=self.first, expert=self.expert, token=self.token)

    def seconds(self, counts: Sequence[int]) -> float:
        """Experts of so many tokens each, one after the other; none take no time."""
        return self.first + sum(self.expert + self.token * n for n in counts) if counts else 0.0

    @classmethod
    def fit(cls, samples: Sequence[tuple[Sequence[int], float]]) -> "Rate":
        """Least squares of relative errors, no number negative.

        Args:
            samples: (tokens of each expert of a layer, seconds).

        Raises:
            InputError: the samples do not tell the three numbers apart: some must have one expert and some several,
                of few tokens and of many.
        """
        rows = np.array([[1.0, len(counts), sum(counts)] for counts, _ in samples]).reshape(-1, 3)
        times = np.array([seconds for _, seconds in samples], dtype=float)
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise InputError("samples must have finite seconds above 0")
        if np.linalg.matrix_rank(rows) < 3:
            raise InputError(
                f"samples has {len(rows)} rows that do not tell first, expert and token apart: some must have one "
                "expert and some several, of few tokens and of many"
            )
        return cls(*fitted(rows, times))


@dataclass(frozen=True)
class CostModel:
    """What takes how long.

    Attributes:
        cpu, device: experts on either.
        transfer: seconds of bringing one expert to the device; infinite where there is no way.
        dense: seconds of the device on a layer before its experts are known, such as attention.
        shared: seconds of the device on a layer's shared experts, before any other.
    """

    cpu: Rate
    device: Rate
    transfer: float
    dense: float = 0.0
    shared: float = 0.0

    def __post_init__(self):
        _check(transfer=self.transfer, dense=self.dense, shared=self.shared)

    @classmethod
    def fit(cls, samples: Mapping[str, Sequence]) -> "CostModel":
        """From measured times.

        Args:
            samples: "cpu" and "device" as `Rate.fit` takes them; "transfer" and "dense", seconds of each time, of which
                the median counts. "dense" may be absent.
        """
        import statistics

        for name in ("cpu", "device", "transfer"):
            if not samples.get(name):
                raise InputError(f"samples has no {name!r} but must have cpu, device and transfer")
        times = (statistics.median(samples[name]) if samples.get(name) else 0.0 for name in ("transfer", "dense"))
        return cls(Rate.fit(samples["cpu"]), Rate.fit(samples["device"]), *times)


PUBLIC = CostModel(cpu=Rate(0.79e-3, 0.0, 1e-3), device=Rate(0.0, 0.5e-3, 0.0), transfer=0.41791e-3)
"""The constants in the public code, which says of them that they need to be tested."""


@dataclass(frozen=True)
class LayerPlan:
    """Who does what of a layer, in seconds from when its router has decided.

    Attributes:
        device, cpu: experts in the order in which they run there.
        transfers: experts that are brought over for this layer, in order.
        spans: (resource, expert, start, end) of all this.
        seconds: until all is done.
        link_free: when the link has nothing more to do for this layer.
    """

    device: tuple[int, ...]
    cpu: tuple[int, ...]
    transfers: tuple[int, ...]
    spans: tuple[tuple[str, int, float, float], ...]
    seconds: float
    link_free: float


def schedule_layer(
    counts: Mapping[int, int],
    cached: Collection[int],
    cost: CostModel,
    mode: str = "greedy",
    *,
    arriving: Mapping[int, float] | None = None,
    link_free: float = 0.0,
) -> LayerPlan:
    """Divide the experts of a layer between device and CPU.

    The greedy schedule looks at both ends of one list: cached experts, those on their way, the others, each by falling
    tokens. The device would take the first, the CPU the last; whoever were done earlier takes it, and so on. So the
    device has the larger experts and the CPU the smaller ones, and cached ones in the end. The best schedule is found
    of all assignments, each in the best order, which is the same one by Johnson's rule: all transfers take as long, so
    what the device is longest about comes first.

    Args:
        counts: tokens of each active expert, at least 1.
        cached: experts that the device has; others than active ones are no matter.
        mode: one of `MODES`.
        arriving: experts that are on their way already, and when they will be there.
        link_free: when the link is free for another.

    Raises:
        InputError: no such mode, an expert without tokens, a moment before 0, or too many to try all assignments.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    for expert, n in counts.items():
        if not n >= 1:
            raise InputError(f"counts has {n} for expert {expert} but must have at least 1 token for each")
    arriving = arriving or {}
    _check(link_free=link_free, **{f"arriving[{expert}]": when for expert, when in arriving.items()})

    def rank(expert: int) -> tuple:
        first = 0 if expert in cached else 1 if expert in arriving else 2
        return (first, arriving[expert] if first == 1 else 0.0, -counts[expert], expert)

    order = sorted(counts, key=rank)
    ready = [0.0 if expert in cached else arriving.get(expert) for expert in order]
    tokens = [counts[expert] for expert in order]
    if mode == "greedy":
        chosen = [*range(_split(tokens, ready, cost, link_free)[0])]
    elif mode == "fixed":
        chosen = [at for at, expert in enumerate(order) if expert in cached]
    elif mode == "device":
        chosen = [*range(len(order))]
    else:
        chosen = _best(tokens, ready, cost, link_free)
    return _plan(order, tokens, ready, cost, link_free, chosen)


def _split(tokens: Sequence[int], ready: Sequence[float | None], cost: CostModel, link: float) -> tuple[int, float]:
    """How many from the front the device has, and the seconds; `ready` is None of what has to be brought over."""
    front, back, on_device, on_cpu = 0, len(tokens) - 1, cost.shared, 0.0
    device, cpu = cost.device, cost.cpu
    while front <= back:
        there = ready[front]
        start = on_device if front else on_device + device.first
        if there is None:
            there = link + cost.transfer
        done = max(start, there) + device.expert + device.token * tokens[front]
        other = on_cpu + cpu.expert + cpu.token * tokens[back] + (cpu.first if back == len(tokens) - 1 else 0.0)
        if done <= other:
            on_device = done
            if ready[front] is None:
                link = there
            front += 1
        else:
            on_cpu = other
            back -= 1
    return front, max(on_device, on_cpu)


def _best(tokens: Sequence[int], ready: Sequence[float | None], cost: CostModel, link: float) -> list[int]:
    """The assignment of the least seconds; of equals the one with most on the device."""
    if len(tokens) > MOST:
        raise InputError(f"counts has {len(tokens)} experts but mode 'optimal' tries at most {MOST}")
    device, cpu = cost.device, cost.cpu
    on_cpu = [cpu.expert + cpu.token * n for n in tokens]
    on_device = [device.expert + device.token * n for n in tokens]
    best, found = math.inf, tuple(range(len(tokens)))
    for size in reversed(range(len(tokens) + 1)):
        for chosen in combinations(range(len(tokens)), size):
            clock, moved = cost.shared + (device.first if chosen else 0.0), link
            for at in chosen:
                if ready[at] is None:
                    moved += cost.transfer
                there = moved if ready[at] is None else ready[at]
                clock = max(clock, there) + on_device[at]
            rest = [seconds for at, seconds in enumerate(on_cpu) if at not in chosen]
            seconds = max(clock, cpu.first + sum(rest) if rest else 0.0)
            if seconds < best:
                best, found = seconds, chosen
    return [*found]


def _plan(
    order: Sequence[int],
    tokens: Sequence[int],
    ready: Sequence[float | None],
    cost: CostModel,
    link: float,
    chosen: Sequence[int],
) -> LayerPlan:
    """The plan in which the device has the `chosen` places of the order and the CPU the others, from the back."""
    spans, transfers = [], []
    on_device, on_cpu = cost.shared, 0.0
    for nth, at in enumerate(chosen):
        there = ready[at]
        if there is None:
            there = link + cost.transfer
            spans.append((LINK, order[at], link, there))
            transfers.append(order[at])
            link = there
        start = max(on_device if nth else on_device + cost.device.first, there)
        on_device = start + cost.device.expert + cost.device.token * tokens[at]
        spans.append((DEVICE, order[at], start, on_device))
    taken = set(chosen)
    rest = [at for at in reversed(range(len(order))) if at not in taken]
    for nth, at in enumerate(rest):
        start = on_cpu if nth else cost.cpu.first
        on_cpu = start + cost.cpu.expert + cost.cpu.token * tokens[at]
        spans.append((CPU, order[at], start, on_cpu))
    placed = [tuple(order[at] for at in places) for places in (chosen, rest)]
    return LayerPlan(*placed, tuple(transfers), tuple(spans), max(on_device, on_cpu), link)


@lru_cache(maxsize=1 << 18)
def foreseen_seconds(cached: tuple[int, ...], missing: tuple[int, ...], cost: CostModel) -> float:
    """Of the greedy schedule with nothing on its way, from tokens by falling number; known by heart once asked."""
    return _split([*cached, *missing], [0.0] * len(cached) + [None] * len(missing), cost, 0.0)[1]
