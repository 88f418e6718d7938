"""Chunks that belong to one rank each and are wanted on some: a sparse all-gather, and its adjoint.

    held = sparse_all_gather(own, owner, placement, group)          # (held, P) from (owned, P)
    sums = sparse_reduce_scatter(grads, owner, placement, group)    # (owned, P) from (held, P)

Experts are chunks of P numbers. `owner[e]` is the rank that keeps chunk e, and `placement[d, e]` says that rank d is to
have it; an owner always does. Chunks lie in the order of their numbers on every rank. A rank sends, in one all-to-all,

    P sum over d of |placement[d] among its own|, its own copies left out,

and as much comes back in gradients: <gather(w), g> = <w, scatter(g)>. Everything placed is an all-gather, nothing
beyond the owners' no message at all. The gradient of each function is the other one.

Tensor letters: D ranks, E experts, P numbers of a chunk.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.distributed.rows import Group, all_to_all, ranks_of


def check_placement(owner: Int64[Tensor, " experts"], placement: Bool[Tensor, "ranks experts"]) -> None:
    """Raise `InputError` unless every expert has an owner, which has it."""
    ranks, experts = placement.shape
    if owner.shape != (experts,) or not bool(((owner >= 0) & (owner < ranks)).all()):
        raise InputError(
            f"owner is {owner.tolist()} but must name one of {ranks} ranks for each of {experts} experts of placement"
        )
    if not bool(placement[owner, torch.arange(experts)].all()):
        lacking = [e for e in range(experts) if not placement[owner[e], e]]
        raise InputError(f"placement takes experts {lacking} from their owners but an owner always has its own")


def transfers(owner: Int64[Tensor, " experts"], placement: Bool[Tensor, "ranks experts"]) -> int:
    """Chunks that a gather sends: copies beyond the owners' own."""
    check_placement(owner, placement)
    return int(placement.sum()) - len(owner)


def owned(owner: Int64[Tensor, " experts"], rank: int) -> Int64[Tensor, " owned"]:
    """The experts of a rank, in order."""
    return (owner == rank).nonzero().flatten()


def held(placement: Bool[Tensor, "ranks experts"], rank: int) -> Int64[Tensor, " held"]:
    """The experts that a rank is to have, in order."""
    return placement[rank].nonzero().flatten()


def sparse_all_gather(
    own: Float[Tensor, "owned chunk"],
    owner: Int64[Tensor, " experts"],
    placement: Bool[Tensor, "ranks experts"],
    group: Group,
) -> Float[Tensor, "held chunk"]:
    """The chunks that this rank is to have, of whoever owns them; see the module's docstring.

    Raises:
        InputError: plans that do not fit each other, or the rows or ranks that are here.
    """
    plan = _Plan.of(owner, placement, group)
    if len(own) != len(plan.mine):
        raise InputError(f"own has {len(own)} rows but rank {plan.rank} owns {len(plan.mine)} experts")
    return _Gather.apply(own, plan, group)


def sparse_reduce_scatter(
    grads: Float[Tensor, "held chunk"],
    owner: Int64[Tensor, " experts"],
    placement: Bool[Tensor, "ranks experts"],
    group: Group,
) -> Float[Tensor, "owned chunk"]:
    """For each expert of this rank the sum over those that have it, added in the order of the ranks, its own first."""
    plan = _Plan.of(owner, placement, group)
    if len(grads) != len(plan.wanted):
        raise InputError(f"grads has {len(grads)} rows but rank {plan.rank} has {len(plan.wanted)} experts placed")
    return _Scatter.apply(grads, plan, group)


class _Plan:
    """Which rows go where, as one rank sees it.

    Attributes:
        mine, wanted: experts that this rank owns and is to have.
        give: rows of `mine`, once for each other rank that wants them, rank by rank; `given` how many for each.
        come: places in `wanted` of what comes, rank by rank; `taken` how many from each.
        stay, kept: rows of `mine`, and their places in `wanted`, that need not travel.
    """

    def __init__(self, owner: Tensor, placement: Tensor, rank: int):
        ranks, experts = placement.shape
        self.rank = rank
        self.mine, self.wanted = owned(owner, rank), held(placement, rank)
        row, place = torch.full((experts,), -1), torch.full((experts,), -1)
        row[self.mine] = torch.arange(len(self.mine))
        place[self.wanted] = torch.arange(len(self.wanted))
        give = [self.mine[placement[d, self.mine]] if d != rank else self.mine[:0] for d in range(ranks)]
        come = [self.wanted[owner[self.wanted] == d] if d != rank else self.wanted[:0] for d in range(ranks)]
        self.given, self.taken = [len(part) for part in give], [len(part) for part in come]
        self.give, self.come = row[torch.cat(give)], place[torch.cat(come)]
        self.stay, self.kept = row[self.mine], place[self.mine]

    @classmethod
    def of(cls, owner: Tensor, placement: Tensor, group: Group) -> "_Plan":
        check_placement(owner, placement)
        if len(placement) != ranks_of(group):
            raise InputError(f"placement is of {len(placement)} ranks but the group has {ranks_of(group)}")
        return cls(owner, placement, 0 if group is None else group.rank())

    def gather(self, own: Tensor, group: Group) -> Tensor:
        out = own.new_empty(len(self.wanted), *own.shape[1:])
        out[self.kept] = own[self.stay]
        out[self.come] = all_to_all(own[self.give], self.given, self.taken, group)
        return out

    def scatter(self, grads: Tensor, group: Group) -> Tensor:
        out = grads[self.kept]
        return out.index_add_(0, self.give, all_to_all(grads[self.come], self.taken, self.given, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, plan: _Plan, group: Group) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return plan.gather(own.detach(), group)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grads, ctx.plan, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: Tensor, plan: _Plan, group: Group) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return plan.scatter(grads.detach().contiguous(), group)

    @staticmethod
    def backward(ctx: Any, own: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(own, ctx.plan, ctx.group), None, None
