"""Tokens brought to the ranks that hold their experts, and back: by all-to-all, or by gathering all rows.

    dispatcher = TokenDispatcher(n_experts=8, ep=grid.process_group("ep"), etp=grid.process_group("etp"))
    sent = dispatcher.dispatch(x, router(x, context))           # x (n, H): this rank's rows
    y = dispatcher.combine(bank(sent.rows, sent.routing), sent) # (n, H); the bank has this rank's experts only

Rank i of the group ep holds the experts i E / r to (i + 1) E / r; the ranks of etp hold slices of the same experts, of
which every slice makes a part of each output. Everything has gradients, of the rows and of the routing's weights.

Tensor letters: n rows of this rank, R rows that its experts get, H width, E experts, L of them here, P routed pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.distributed.grids import divisors
from workbench.lib.core.distributed.rows import Group, all_to_all, gathered, ranks_of, sizes_of, summed
from workbench.lib.core.routing import Routing

FORMS = ("alltoall", "allgather")


@dataclass
class Dispatched:
    """What the experts of a rank get, and what it takes to bring their outputs back.

    Attributes:
        rows: (R, H) in the order of this rank's experts, of one expert in the order of ranks and tokens.
        counts: (L,) rows of each of this rank's experts.
        routing: each row to its expert, 0 to L - 1, with weight 1: the weights count where rows are combined.
        given: this rank's own decision, with `kept` where there is a capacity.
    """

    rows: Float[Tensor, "rows dim"]
    counts: Int64[Tensor, " local"]
    routing: Routing
    given: Routing
    back: dict[str, Any]


class TokenDispatcher:
    """Dispatches tokens to experts on other ranks and combines what comes back.

    Args:
        n_experts: E, a multiple of the ranks of `ep`.
        ep: group of the ranks that hold the experts, E / r each, in order; None: all are here.
        etp: group of the ranks that hold slices of the same experts; None: they are whole.
        form: "alltoall" sends each row to its experts; "allgather" every row to every rank, which is more bytes but
            for large K no more messages. They compute the same.
        capacity: places that an expert has; None: every pair is served. What is dropped is marked in `given.kept`.
        sequence: group of the ranks that split a sequence, in its order: the places are those of the whole sequence,
            so that what is kept does not depend on the split. None: each rank has places of its own.
    """

    def __init__(
        self,
        n_experts: int,
        ep: Group = None,
        etp: Group = None,
        *,
        form: str = "alltoall",
        capacity: Capacity | None = None,
        sequence: Group = None,
    ):
        if n_experts < 1 or n_experts % ranks_of(ep):
            fit = ", ".join(map(str, divisors(n_experts)))
            raise InputError(
                f"{n_experts} experts do not divide evenly over {ranks_of(ep)} ranks of ep: sizes that fit are {fit}"
            )
        if form not in FORMS:
            raise unknown("form", form, FORMS)
        if sequence is not None and capacity is None:
            raise InputError("sequence is a group but there is no capacity to share over it")
        if sequence is not None and capacity.policy == "random":
            raise InputError(
                "capacity.policy is 'random', which ranks would draw differently: 'probability' or 'position' "
                "with a sequence that is split"
            )
        self.n_experts, self.ep, self.etp, self.form = n_experts, ep, etp, form
        self.capacity, self.sequence = capacity, sequence
        self.n_local = n_experts // ranks_of(ep)

    def dispatch(self, x: Float[Tensor, "n dim"], routing: Routing, training: bool = True) -> Dispatched:
        """The rows that this rank's experts are to compute.

        Args:
            training: whether the capacity is that of training or of evaluation.
        """
        if routing.n_experts != self.n_experts or routing.n_tokens != len(x):
            raise InputError(
                f"routing is of {routing.n_tokens} tokens and {routing.n_experts} experts but must be of {len(x)} and "
                f"{self.n_experts}"
            )
        if self.capacity is not None:
            routing.kept = self.kept(routing, training)
        served = routing.served()
        return self._to_owners(x, routing, served) if self.form == "alltoall" else self._to_all(x, routing, served)

    def combine(self, y: Float[Tensor, "rows dim"], sent: Dispatched) -> Float[Tensor, "n dim"]:
        """(n, H) the weighted sums of what the experts say of this rank's rows; zero for a row that was dropped."""
        if y.shape[0] != sent.rows.shape[0]:
            raise InputError(f"y has {y.shape[0]} rows but must have one for each of {sent.rows.shape[0]} dispatched")
        return self._from_owners(y, sent) if self.form == "alltoall" else self._from_all(y, sent)

    def kept(self, routing: Routing, training: bool = True) -> Bool[Tensor, " pairs"]:
        """Which pairs find a place, of this rank's tokens or of the sequence's."""
        if self.sequence is None:
            return self.capacity.kept(routing, training)
        with torch.no_grad():
            sizes = sizes_of(routing.expert.numel(), self.sequence)
            expert = gathered(routing.expert, sizes, self.sequence)
            weight = gathered(routing.weight.detach(), sizes, self.sequence)
        whole = Routing.fixed(expert[:, None], weight[:, None], self.n_experts)  # a pair a row
        return self.capacity.kept(whole, training).split(sizes)[self.sequence.rank()]

    def _to_owners(self, x: Tensor, given: Routing, served: Routing) -> Dispatched:
        order = torch.argsort(served.expert, stable=True)
        come = self._counts(served.counts)  # (etp, ep, L)
        mine = 0 if self.etp is None else self.etp.rank()
        give = served.counts.view(-1, self.n_local).sum(1).tolist()
        take, parts = come[mine].sum(1).tolist(), come.sum((1, 2)).tolist()
        rows = gathered(all_to_all(x[served.token[order]], give, take, self.ep), parts, self.etp)
        by_expert, routing = self._sorted(come)
        back = {"served": served, "order": order, "give": give, "take": take, "parts": parts, "by_expert": by_expert}
        return Dispatched(rows[by_expert], come.sum((0, 1)), routing, given, back)

    def _from_owners(self, y: Tensor, sent: Dispatched) -> Tensor:
        at = sent.back
        served, order = at["served"], at["order"]
        y = summed(y[_inverse(at["by_expert"])], at["parts"], self.etp)
        y = all_to_all(y, at["take"], at["give"], self.ep)[_inverse(order)]  # (P, H) in the order of the pairs
        return _weighted_sums(y, served)

    def _counts(self, counts: Int64[Tensor, " experts"]) -> Int64[Tensor, "slices owners local"]:
        """Rows that come for each of this rank's experts from each rank of ep, for every slice of etp."""
        rows = counts.view(-1, self.n_local)
        come = all_to_all(rows, [1] * len(rows), [1] * len(rows), self.ep)
        r = ranks_of(self.etp)
        return gathered(come[None], [1] * r, self.etp)

    def _sorted(self, come: Int64[Tensor, "slices owners local"]) -> tuple[Tensor, Routing]:
        """From (slice, owner, expert) order to that of the experts, and the experts of the rows then."""
        expert = torch.arange(self.n_local).repeat(come.shape[0] * come.shape[1]).repeat_interleave(come.flatten())
        order = torch.argsort(expert, stable=True)
        return order, self._routing(expert[order])

    def _routing(self, expert: Int64[Tensor, " rows"]) -> Routing:
        return Routing.fixed(expert[:, None], torch.ones(len(expert), 1), self.n_local)

    def _to_all(self, x: Tensor, given: Routing, served: Routing) -> Dispatched:
        rows, pairs = [], []
        token, expert, weight = served.token, served.expert, served.weight
        for group in (self.ep, self.etp):
            rows.append(sizes_of(len(x), group))
            pairs.append(sizes_of(len(expert), group))
            start = sum(rows[-1][: 0 if group is None else group.rank()])
            x = gathered(x, rows[-1], group)
            token, expert, weight = (gathered(part, pairs[-1], group) for part in (token + start, expert, weight))
        first = (0 if self.ep is None else self.ep.rank()) * self.n_local
        here = ((expert >= first) & (expert < first + self.n_local)).nonzero().squeeze(1)
        here = here[torch.argsort(expert[here], stable=True)]
        routing = self._routing(expert[here] - first)
        back = {"token": token[here], "weight": weight[here], "rows": rows, "all": len(x)}
        return Dispatched(x[token[here]], routing.counts, routing, given, back)

    def _from_all(self, y: Tensor, sent: Dispatched) -> Tensor:
        at = sent.back
        y = y.new_zeros(at["all"], y.shape[1]).index_add(0, at["token"], y * at["weight"].to(y.dtype)[:, None])
        return summed(summed(y, at["rows"][1], self.etp), at["rows"][0], self.ep)


def _inverse(order: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _weighted_sums(y: Float[Tensor, "pairs dim"], routing: Routing) -> Float[Tensor, "n dim"]:
    rows = y * routing.weight.to(y.dtype)[:, None]
    if routing.top_k is not None:
        return rows.view(routing.n_tokens, routing.top_k, y.shape[1]).sum(1)
    return y.new_zeros(routing.n_tokens, y.shape[1]).index_add(0, routing.token, rows)
