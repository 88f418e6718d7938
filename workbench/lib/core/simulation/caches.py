"""What a small fast memory keeps of many experts: four rules of what is forgotten first, under one protocol.

    cache = MRS(capacity=4, n_experts=16, top=8)
    cache.observe(probabilities)                   # of a step's router, before its experts are used
    missing = [expert for expert in chosen if expert not in cache]
    cache.use(chosen)                              # one step more
    for expert in missing:
        gone = cache.admit(expert, protected=chosen)

A cache is that of one layer; keys are experts. Rules differ in `worth` alone: what is worth least is forgotten, of
what is worth the same the first. `Belady` knows the future: in `replay`, which brings in all that is missing, it misses
as seldom as can be, so it is the bound that the others are held to.

Letters: E experts.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from workbench.errors import InputError


class Cache:
    """At most `capacity` experts of a layer; a subclass says what each is `worth`.

    Attributes:
        capacity: places, at least 1.
        step: how often `use` was called.
        resident: the experts that are in it, in the order in which they came.
    """

    def __init__(self, capacity: int):
        if not (capacity >= 1 and capacity % 1 == 0):
            raise InputError(f"capacity is {capacity} but must be a whole number of at least 1 expert")
        self.capacity = capacity
        self.step = 0
        self.resident: dict[int, None] = {}

    def __contains__(self, expert: int) -> bool:
        return expert in self.resident

    def __len__(self) -> int:
        return len(self.resident)

    def worth(self, expert: int) -> tuple[float, ...]:
        """What is smallest is forgotten first."""
        raise NotImplementedError

    def observe(self, scores: Sequence[float]) -> None:
        """The router's scores of a step, (E,); most rules have no use for them."""

    def use(self, experts: Iterable[int]) -> None:
        """These experts are used at this step, whether they are here or not."""
        self.step += 1

    def evict(self, protected: Collection[int] = ()) -> int:
        """Forget the expert that is worth least of those not protected.

        Raises:
            InputError: there is none.
        """
        free = [expert for expert in self.resident if expert not in protected]
        if not free:
            raise InputError(f"protected holds all {len(self)} experts of the cache but must leave one to forget")
        gone = min(free, key=lambda expert: (*self.worth(expert), expert))
        del self.resident[gone]
        return gone

    def admit(self, expert: int, protected: Collection[int] = ()) -> int | None:
        """Take an expert in, and say which one was forgotten for it, if any. One that is here stays as it is.

        Raises:
            InputError: the cache is full and all that is in it is protected.
        """
        if expert in self.resident:
            return None
        gone = self.evict(protected) if len(self) == self.capacity else None
        self.resident[expert] = None
        return gone


class LRU(Cache):
    """Forgets what was used longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._last: dict[int, int] = {}

    def use(self, experts: Iterable[int]) -> None:
        self._last.update(dict.fromkeys(experts, self.step))
        super().use(experts)

    def worth(self, expert: int) -> tuple[float, ...]:
        return (self._last.get(expert, -1),)


class LFU(LRU):
    """Forgets what was used least often, counted since the beginning; of equals what was used longest ago."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._count: dict[int, int] = defaultdict(int)

    def use(self, experts: Iterable[int]) -> None:
        experts = [*experts]
        for expert in experts:
            self._count[expert] += 1
        super().use(experts)

    def worth(self, expert: int) -> tuple[float, ...]:
        return (self._count[expert], *super().worth(expert))


class MRS(Cache):
    """Forgets the expert of the least recent score ("minus recent score", 2504.05897).

    S <- alpha TopP(s) + (1 - alpha) S at each step, of the router's scores s; TopP leaves the `top` largest and makes
    the others 0. So an expert that was nearly chosen counts, which no rule of what was used can know.

    Args:
        n_experts: E.
        top: how many scores count: twice the active experts, in the public code.
        alpha: above 0 and at most 1.
    """

    def __init__(self, capacity: int, n_experts: int, top: int, alpha: float = 0.5):
        super().__init__(capacity)
        if not 1 <= top <= n_experts:
            raise InputError(f"top is {top} but must be from 1 to n_experts = {n_experts}")
        if not 0 < alpha <= 1:
            raise InputError(f"alpha is {alpha} but must be above 0 and at most 1")
        self.top, self.alpha = top, alpha
        self.scores = [0.0] * n_experts

    def observe(self, scores: Sequence[float]) -> None:
        if len(scores) != len(self.scores):
            raise InputError(f"scores has {len(scores)} values but must have one for each of {len(self.scores)}")
        if not all(map(math.isfinite, scores)):
            raise InputError(f"scores is {[*scores]} but must hold finite numbers")
        order = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
        counted = {*order[: self.top]}
        self.scores = [
            (1 - self.alpha) * old + (self.alpha * float(scores[expert]) if expert in counted else 0.0)
            for expert, old in enumerate(self.scores)
        ]

    def worth(self, expert: int) -> tuple[float, ...]:
        return (self.scores[expert],)


class Belady(Cache):
    """Forgets what is needed again last of all: no rule, for it is told the future (Belady 1966).

    Args:
        future: the experts of every step that will be used, from the first.
    """

    def __init__(self, capacity: int, future: Iterable[Collection[int]]):
        super().__init__(capacity)
        self._uses: dict[int, list[int]] = defaultdict(list)
        for step, experts in enumerate(future):
            for expert in experts:
                self._uses[expert].append(step)

    def worth(self, expert: int) -> tuple[float, ...]:
        uses = self._uses[expert]
        at = bisect_left(uses, self.step)
        return (-uses[at] if at < len(uses) else float("-inf"),)


@dataclass(frozen=True)
class Replay:
    """How a cache has fared: experts asked for, found there (`hits`), and forgotten (`evictions`)."""

    requests: int
    hits: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests


def replay(cache: Cache, steps: Sequence[Collection[int]], scores: Sequence[Sequence[float]] | None = None) -> Replay:
    """Ask a cache for the experts of each step; what is missing is brought in, and no expert of a step goes for it.

    Args:
        steps: the experts of each, no more than the capacity.
        scores: the router's, of each step, for a rule that needs them.

    Raises:
        InputError: no step has an expert, or one needs more than there are places: what is brought in would then be the
            replay's choice and not the rule's; or scores are not of as many steps.
    """
    if not any(len(experts) for experts in steps):
        raise InputError("steps is empty but must hold at least one with an expert")
    if scores is not None and len(scores) != len(steps):
        raise InputError(f"scores has {len(scores)} steps but must have {len(steps)}, as steps has")
    requests = hits = evictions = 0
    for index, experts in enumerate(steps):
        needed = {*experts}
        if len(needed) > cache.capacity:
            raise InputError(f"step {index} needs {len(needed)} experts but capacity is {cache.capacity}")
        if scores is not None:
            cache.observe(scores[index])
        missing = sorted(expert for expert in needed if expert not in cache)
        cache.use(needed)
        evictions += sum(cache.admit(expert, needed) is not None for expert in missing)
        requests, hits = requests + len(needed), hits + len(needed) - len(missing)
    return Replay(requests, hits, evictions)
