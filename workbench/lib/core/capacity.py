"""Places an expert has: how many, who gets them, and the table that brings tokens to their places and back.

A gate with capacity is any router and a `Capacity`, which writes `Routing.kept`; what is dropped stays in the routing,
so that losses count it, observers see it, and the live views show it. `MoELayer` takes one as its `capacity_factor`:

    layer = MoELayer(LinearRouter(D, E, top_k=1), experts, capacity_factor=Capacity(1.0, "random"))

Without a layer, between processes for instance, the same by hand (`x` are this rank's tokens):

    routing = router(x, context)
    routing.kept = keep(routing, capacity, "position")
    rows = encode(x, routing, capacity)         # (E, C, D): expert e's tokens in rows[e], zeros where a place is free
    y = decode(expert(rows), routing)           # (N, D): weighted sums; zero for a token that was dropped

Tensor letters: N tokens, D model width, E experts, C places of each, P routed pairs, K active experts.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int64, Num
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.routing import Routing

POLICIES = ("probability", "position", "random")


def capacity_of(pairs: int, n_experts: int, factor: float, minimum: int = 1) -> int:
    """C = max(minimum, ceil(factor * pairs / n_experts)), with the decimal that was written as the factor.

    In floats 1.1 * 100 / 10 is 11.000000000000002, which would be 12 places.

    Args:
        pairs: routed (token, expert) pairs: K N where each token has K experts.
    """
    return max(minimum, math.ceil(Fraction(str(factor)) * pairs / n_experts))


def keep(
    routing: Routing,
    capacity: int,
    policy: str = "probability",
    generator: torch.Generator | None = None,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Bool[Tensor, " pairs"]:
    """Which pairs get one of the `capacity` places of their expert: min(C, its pairs) of each.

    Args:
        policy: "probability", those of the highest combine weight, of equal ones the first; "position", the first of
            the batch, so that who comes late is dropped for that alone; "random", random token selection (Kim et al.
            2021, 2109.10465): any, each with probability min(1, C / pairs) wherever it stands.
        generator: of "random"; None for torch's global one.
        mask: False for tokens that get no place, such as padding.
    """
    if policy not in POLICIES:
        raise unknown("policy", policy, POLICIES)
    expert = routing.expert
    if policy == "probability":
        priority = routing.weight.detach()
    elif policy == "random":  # in double precision, where no two are the same
        priority = torch.rand(len(expert), generator=generator, device=expert.device, dtype=torch.float64)
    else:
        priority = None
    if mask is None:
        return first(expert, routing.n_experts, capacity, priority)
    wanted = mask[routing.token]
    mine = first(expert[wanted], routing.n_experts, capacity, None if priority is None else priority[wanted])
    return torch.zeros_like(wanted).masked_scatter(wanted, mine)


def first(
    expert: Int64[Tensor, " pairs"], n_experts: int, capacity: int, priority: Num[Tensor, " pairs"] | None = None
) -> Bool[Tensor, " pairs"]:
    """True for the C pairs of each expert that are of highest priority; of equal ones, and without any, the first."""
    if capacity < 0:
        raise InputError(f"capacity is {capacity} but must be at least 0")
    order = torch.arange(len(expert), device=expert.device) if priority is None else _descending(priority)
    order = order[torch.argsort(expert[order], stable=True)]  # by expert, the first to be served first
    return torch.empty_like(expert, dtype=torch.bool).scatter_(0, order, _rank(expert, n_experts) < capacity)


def slots(routing: Routing, capacity: int) -> Int64[Tensor, " pairs"]:
    """The place of each pair in a table of E C places: e C + its number among the kept pairs of expert e, in order.

    A dropped pair has the place E C, the scratch slot after all others.

    Raises:
        InputError: an expert has more pairs than places.
    """
    expert, n_experts = routing.expert, routing.n_experts
    served = slice(None) if routing.kept is None else routing.kept
    mine = expert[served]
    most = int(torch.bincount(mine, minlength=n_experts).max())
    if most > capacity:
        raise InputError(f"capacity is {capacity} but an expert has {most} pairs: set routing.kept by `keep`")
    order = torch.argsort(mine, stable=True)
    number = torch.empty_like(mine).scatter_(0, order, _rank(mine, n_experts))
    found = torch.full_like(expert, n_experts * capacity)
    found[served] = mine * capacity + number
    return found


def encode(x: Float[Tensor, "tokens dim"], routing: Routing, capacity: int) -> Float[Tensor, "experts capacity dim"]:
    """The tokens of each expert in its places, zeros in those that are free."""
    n_experts = routing.n_experts
    table = x.new_zeros(n_experts * capacity + 1, x.shape[1])
    table = table.index_put((slots(routing, capacity),), x[routing.token])
    return table[:-1].view(n_experts, capacity, x.shape[1])


def decode(y: Float[Tensor, "experts capacity dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
    """The weighted sum of what the experts say of each token in their places; zero for a token without any."""
    n_experts, capacity, dim = y.shape
    table = torch.cat([y.reshape(n_experts * capacity, dim), y.new_zeros(1, dim)])
    rows = table[slots(routing, capacity)] * routing.weight.to(y.dtype)[:, None]
    if routing.top_k is not None:
        return rows.view(routing.n_tokens, routing.top_k, dim).sum(1)
    return y.new_zeros(routing.n_tokens, dim).index_add(0, routing.token, rows)


@dataclass(frozen=True)
class Capacity:
    """A limit on the pairs that an expert serves of a batch: see `capacity_of` and `keep`.

    Attributes:
        factor: fair shares of the pairs that an expert has places for; above 0.
        policy: who gets them, of `POLICIES`. In evaluation mode what is random is drawn from a seed that the choices
            give, so that a batch is served alike whenever it comes.
        minimum: places there are at least.
        evaluation: the factor in evaluation mode, None for the same one.
    """

    factor: float
    policy: str = "probability"
    minimum: int = 1
    evaluation: float | None = None

    def __post_init__(self):
        for name, value in (("capacity_factor", self.factor), ("evaluation", self._factor(training=False))):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value} but must be above 0 and finite")
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        if self.minimum < 1:
            raise InputError(f"minimum is {self.minimum} but must be at least 1")

    def places(self, routing: Routing, training: bool = True) -> int:
        """C for the pairs of a routing."""
        return capacity_of(routing.expert.numel(), routing.n_experts, self._factor(training), self.minimum)

    def kept(self, routing: Routing, training: bool = True) -> Bool[Tensor, " pairs"]:
        """Which pairs are served."""
        generator = None if training or self.policy != "random" else _seeded_by(routing.expert)
        return keep(routing, self.places(routing, training), self.policy, generator)

    def _factor(self, training: bool) -> float:
        return self.factor if training or self.evaluation is None else self.evaluation


def _descending(priority: Tensor) -> Tensor:
    return torch.argsort(priority, descending=True, stable=True)


def _seeded_by(expert: Tensor) -> torch.Generator:
    seed = (expert * torch.arange(1, len(expert) + 1, device=expert.device)).sum()
    return torch.Generator(expert.device).manual_seed(int(seed))


def _rank(expert: Tensor, n_experts: int) -> Tensor:
    """(P,) the number of each pair within its expert, for pairs that are sorted by expert."""
    counts = torch.bincount(expert, minlength=n_experts)
    start = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(expert))
    return torch.arange(len(expert), device=expert.device) - start
