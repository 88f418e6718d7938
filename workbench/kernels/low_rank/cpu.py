"""The CPU path of `low_rank`: the pairs in expert order, each row gathered once a direction.

Where every expert has a few rows, a product for each of them costs more in calls than in operations. Then all experts
are made equally long, and one batched product serves them all: the list of an expert is filled up with its own last
row, at score 0. Otherwise the experts come one after the other, so that their rows are in the cache for the products
that use them. The formulas are those of `reference`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.kernels.gather_sum.cpu import gather_sum
from workbench.kernels.low_rank.order import quick, split, unpack
from workbench.kernels.low_rank.reference import inner, weighted
from workbench.kernels.memory import fresh, scratch
from workbench.kernels.plan import RoutePlan

LONGEST = 64  # rows of an expert up to which lists are filled up
FILLED = 2  # times the pairs that there are rows when they are


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`."""
    n_experts, width = b.shape[:2]
    order = quick(expert, x.shape[0], n_experts, tok_offs, top_k)
    index = torch.from_numpy(order)
    lists = _filled(order, expert.shape[0])
    if lists is not None:
        u = torch.bmm(lists.take(x), a.transpose(1, 2))
        y = torch.bmm(weighted(u, lists.score(score)), b.transpose(1, 2))
        out = lists.sum(y, x.shape[0], tok_offs, top_k)
        return out, x.new_empty(0), index if save else index[:0].clone()
    plan = unpack(index, x.shape[0], expert.shape[0], n_experts, tok_offs, top_k)
    by_expert = score[plan.order]
    (y, buffer) = scratch(((plan.n_pairs, width), x.dtype), ((_most(plan), x.shape[1]), x.dtype))
    for e, start, end in _groups(plan):
        xg = torch.index_select(x, 0, plan.tok[start:end], out=buffer[: end - start])
        torch.mm(weighted(xg @ a[e].T, by_expert[start:end]), b[e].T, out=y[start:end])
    return _sum_plan(y, plan), x.new_empty(0), index if save else index[:0].clone()


def backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    a: Tensor,
    b: Tensor,
    score: Tensor,
    expert: Tensor,
    index: Tensor,
    tok_offs: Tensor | None,
    top_k: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`, of what is wanted."""
    n_experts, width = b.shape[:2]
    lists = _filled(index.numpy(), expert.shape[0])
    if lists is not None:
        xg, dout = lists.take(x), lists.take(grad)
        s = lists.score(score) * lists.there
        u, dv = torch.bmm(xg, a.transpose(1, 2)), torch.bmm(dout, b)
        du = weighted(dv, s)
        dx = lists.sum(torch.bmm(du, a), x.shape[0], tok_offs, top_k) if needs[0] else None
        da = torch.bmm(du.transpose(1, 2), xg) if needs[1] else None
        db = dscore = None
        if needs[2]:
            db = torch.bmm(weighted(u, s).transpose(1, 2), dout).transpose(1, 2).contiguous()
        if needs[3]:
            dscore = inner(u, dv).flatten().index_select(0, lists.places).to(score.dtype)
        return dx, da, db, dscore
    plan = unpack(index, x.shape[0], expert.shape[0], n_experts, tok_offs, top_k)
    da, db = fresh(a.shape, a.dtype), fresh(b.shape, b.dtype)
    for e in (plan.offs.diff() == 0).nonzero().flatten().tolist():  # nobody writes its gradient below
        da[e].zero_()
        db[e].zero_()
    by_expert = score[plan.order]
    ds = by_expert.new_empty(plan.n_pairs)
    most = _most(plan)
    dx, xs, douts = scratch(
        ((plan.n_pairs, x.shape[1]), x.dtype), ((most, x.shape[1]), x.dtype), ((most, width), x.dtype)
    )
    for e, start, end in _groups(plan):
        tok, s = plan.tok[start:end], by_expert[start:end]
        xg = torch.index_select(x, 0, tok, out=xs[: end - start])
        dout = torch.index_select(grad, 0, tok, out=douts[: end - start])
        u, dv = xg @ a[e].T, dout @ b[e]
        du = weighted(dv, s)
        if needs[0]:
            torch.mm(du, a[e], out=dx[start:end])
        if needs[1]:
            torch.mm(du.T, xg, out=da[e])
        if needs[2]:
            db[e] = torch.mm(weighted(u, s).T, dout).T  # the faster way round
        if needs[3]:
            ds[start:end] = inner(u, dv)
    return _sum_plan(dx, plan) if needs[0] else None, da, db, ds[plan.inv]


class Lists(NamedTuple):
    """The experts' lists of pairs, all C long.

    Attributes:
        rows: (E C,) token of each place.
        pairs: (E C,) pair of each place.
        there: (E, C) False where an expert's last pair stands once more.
        places: (P,) place of each pair.
    """

    rows: Tensor
    pairs: Tensor
    there: Tensor
    places: Tensor

    def score(self, score: Tensor) -> Tensor:
        """(E, C) also where a pair stands once more."""
        return score.index_select(0, self.pairs).view(self.there.shape)

    def take(self, x: Tensor) -> Tensor:
        """(E, C, width)"""
        return x.index_select(0, self.rows).view(*self.there.shape, x.shape[1])

    def sum(self, y: Tensor, n_tokens: int, tok_offs: Tensor | None, top_k: int | None) -> Tensor:
        """(N, width) sum of the rows of each token's pairs, y (E, C, width)."""
        tok_offs = None if tok_offs is None else tok_offs.to(torch.int32)
        if top_k == 1:
            return y.flatten(0, 1).index_select(0, self.places)
        places = self.places.to(torch.int32)
        # as grouped rows; the list of pairs, of which only the length is asked for, may be any
        plan = RoutePlan(places, places, self.rows, places, tok_offs, n_tokens, y.shape[0], top_k)
        return gather_sum(y.flatten(0, 1), plan, None)


def _filled(index: np.ndarray, n_pairs: int) -> Lists | None:
    """The lists, None where they are better left as they are: with an expert that has no row to repeat, or too many."""
    order, inv, tok, offs = split(index, n_pairs)
    counts = np.diff(offs)
    longest, n_experts = int(counts.max()), len(counts)
    if longest > LONGEST or longest * n_experts > FILLED * n_pairs or not counts.all():
        return None
    step = np.arange(longest, dtype=np.int32)
    there = step < counts[:, None]
    grid = np.minimum(offs[:-1, None] + step, offs[1:, None] - 1).ravel()
    places = there.ravel().nonzero()[0][inv]
    rows, pairs = torch.from_numpy(tok[grid]), torch.from_numpy(order[grid])
    return Lists(rows, pairs, torch.from_numpy(there), torch.from_numpy(places))


def _sum_plan(y: Tensor, plan: RoutePlan) -> Tensor:
    return y.index_select(0, plan.inv) if plan.top_k == 1 else gather_sum(y, plan, None)


def _most(plan: RoutePlan) -> int:
    return int(plan.offs.diff().max())


def _groups(plan: RoutePlan) -> list[tuple[int, int, int]]:
    """An expert, its first grouped row, and the end of its rows, of each that has any."""
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(plan.offs.tolist())) if end > start]
