"""Hecate: experts always fully sharded, and copied for one step where the load is (Zhai et al. 2025).

"Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism" (arXiv:2502.02581), no
public code; from the abstract, with plans that are reconstructions (`hecate_plans`). In each step and layer

    1. from the loads of the last steps, which ranks are to have which experts     `plan_placement`, within a budget
    2. a sparse all-gather of these, beside what comes before the layer            `sparse_shards`
    3. tokens go to the nearest of those that have their expert, evenly            `dispatch_plan`
    4. gradients return by the adjoint, a sparse reduce-scatter, to the one owner, which alone has optimizer states

and in a slow loop owners themselves are planned anew (`plan_sharding`, `FSSDPExperts.reshard`). Whatever the plans,
outputs and gradients are those of one process; they decide only who computes what, and how many bytes travel. What that
saves in time is simulated by `hecate_sim`.

Tensor letters: D ranks, E experts, P numbers of an expert, n rows of this rank, H width.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.kernels.moe_mlp import moe_mlp
from workbench.lib.core.distributed.rows import Group, all_to_all, of_each, ranks_of
from workbench.lib.core.experts import GLUExperts, plan_of, score_of
from workbench.lib.core.routing import Routing
from workbench.lib.distributed.hecate_plans import WINDOW, dispatch_plan, even_owners, plan_placement, plan_sharding
from workbench.lib.distributed.hecate_sim import HecateSim, simulate
from workbench.lib.distributed.sparse_shards import (
    held,
    owned,
    sparse_all_gather,
    sparse_reduce_scatter,
    transfers,
)

__all__ = [
    "FSSDPExperts", "HecateSim", "dispatch_plan", "plan_placement", "plan_sharding", "simulate", "sparse_all_gather",
    "sparse_reduce_scatter",
]  # fmt: skip

METHOD = Method(
    slug="hecate",
    title="Hecate: Fully Sharded Sparse Data Parallelism for Mixture-of-Experts Training",
    family="distributed",
    year=2025,
    paper="arXiv:2502.02581",
    claim="Materialising only the experts worth having, from always sharded parameters, removes the stragglers of "
    "skewed expert loads.",
    objects=(
        "FSSDPExperts", "sparse_all_gather", "sparse_reduce_scatter", "plan_sharding", "plan_placement",
        "dispatch_plan", "HecateSim", "simulate",
    ),
    kind="simulator",
)  # fmt: skip

STATES = ("exp_avg", "exp_avg_sq")


def example() -> Callable[[int], dict[str, Any]]:
    """The steps of a drawn cluster under every policy."""
    return HecateSim.example


class FSSDPExperts(nn.Module):
    """The experts that this rank owns of a bank, and copies of others for the length of a layer.

    Called with the rows of this rank and their routing as the whole bank would be. What is trained is `chunks`, (owned,
    P), the experts of this rank flat; every other number of it is on another rank.

    Args:
        bank: the whole bank, the same on each rank.
        group: D ranks; None: this process has them all.
        owner: (E,); None: E / D experts each, in order.
        budget: chunks that may travel for a step.
        memory: copies that a rank may have beside its own.
        rematerialise: copies are let go after the forward pass and gathered again for the backward pass.

    Attributes:
        owner, placement: in force.
        loads: the last `WINDOW` steps' counts (D, E) of tokens, by rank and expert.
        sent: chunks that the last gather sent, of all ranks.
    """

    def __init__(
        self,
        bank: GLUExperts,
        group: Group = None,
        owner: Int64[Tensor, " experts"] | None = None,
        budget: int = 0,
        memory: int = 0,
        rematerialise: bool = False,
    ):
        super().__init__()
        if type(bank) is not GLUExperts:
            raise InputError(f"bank is {type(bank).__name__} but must be GLUExperts, whose experts are chunks")
        self.group, self.world = group, ranks_of(group)
        self.rank = 0 if group is None else group.rank()
        self.n_experts, self.budget, self.memory, self.rematerialise = bank.n_experts, budget, memory, rematerialise
        self._gate_up, self._down = bank.gate_up.shape[1:], bank.down.shape[1:]
        self.owner = even_owners(1, bank.n_experts, self.world)[0] if owner is None else owner.clone()
        self.placement = plan_placement(torch.zeros(self.n_experts), self.owner, self.world, 0, 0)
        self.loads: deque[Tensor] = deque(maxlen=WINDOW)
        self.sent = 0
        whole = torch.cat([bank.gate_up.detach().flatten(1), bank.down.detach().flatten(1)], 1)
        self.chunks = nn.Parameter(whole[owned(self.owner, self.rank)].clone())

    def plan(self) -> Bool[Tensor, "ranks experts"]:
        """Decide who has what in the next steps, by the loads of the last ones; called between steps, on every rank."""
        if self.loads:
            mean = torch.stack(list(self.loads)).double().mean(0)
            self.placement = plan_placement(mean.sum(0), self.owner, self.world, self.budget, self.memory, origin=mean)
        return self.placement

    def forward(self, x: Float[Tensor, "n dim"], routing: Routing) -> Float[Tensor, "n dim"]:
        served = routing.served()
        counts = torch.stack(of_each(served.counts, self.group))
        if self.training:
            self.loads.append(counts)
        plan = dispatch_plan(counts, self.placement)
        self.sent = transfers(self.owner, self.placement)
        order = self._order(served, plan[self.rank])
        give, take = plan[self.rank].sum(0).tolist(), plan[:, :, self.rank].sum(1).tolist()
        rows = all_to_all(x[served.token[order]], give, take, self.group)
        here = held(self.placement, self.rank)
        come = plan[:, here, self.rank]  # (D, held): rows of each held expert, by the rank they come from
        expert = torch.arange(len(here)).repeat(self.world).repeat_interleave(come.flatten())
        owner, placement = self.owner, self.placement  # of this step, whatever is planned before its backward pass

        def compute(chunks: Tensor, rows: Tensor) -> Tensor:
            weights = sparse_all_gather(chunks, owner, placement, self.group)
            return self._experts(weights, rows, expert)

        if self.rematerialise and torch.is_grad_enabled():
            y = checkpoint(compute, self.chunks, rows, use_reentrant=False)
        else:
            y = compute(self.chunks, rows)
        y = all_to_all(y, take, give, self.group)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        weighted = y[back] * served.weight.to(y.dtype)[:, None]
        return y.new_zeros(x.shape).index_add(0, served.token, weighted)

    def _order(self, served: Routing, mine: Int64[Tensor, "experts ranks"]) -> Int64[Tensor, " pairs"]:
        """The order in which pairs are sent: by the rank that they go to, then by expert."""
        by_expert = torch.argsort(served.expert, stable=True)
        targets = torch.arange(self.world).repeat(self.n_experts).repeat_interleave(mine.flatten())
        return by_expert[torch.argsort(targets, stable=True)]

    def _experts(
        self, weights: Float[Tensor, "held chunk"], rows: Float[Tensor, "rows dim"], expert: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows dim"]:
        if not len(rows) or not len(weights):  # nothing to compute, but a gradient of zeros for those who wait for it
            return rows + 0 * weights.sum()
        split = self._gate_up.numel()
        gate_up, down = weights[:, :split].unflatten(1, self._gate_up), weights[:, split:].unflatten(1, self._down)
        routing = Routing.fixed(expert[:, None], rows.new_ones(len(rows), 1), len(weights))
        return moe_mlp(rows, gate_up.contiguous(), down.contiguous(), plan_of(routing), score_of(routing, rows))

    @torch.no_grad()
    def reshard(self, owner: Int64[Tensor, " experts"], optimizer: torch.optim.Optimizer | None = None) -> int:
        """Move chunks, and what AdamW keeps of them, to new owners; the chunks that moved. Called on every rank.

        Raises:
            InputError: an owner that is none, or an optimizer that keeps something else.
        """
        if owner.shape != (self.n_experts,) or not bool(((owner >= 0) & (owner < self.world)).all()):
            raise InputError(f"owner is {owner.tolist()} but must name one of {self.world} ranks for each expert")
        state: Mapping[str, Any] = {} if optimizer is None else optimizer.state.get(self.chunks, {})
        if other := [k for k, v in state.items() if k not in STATES and torch.as_tensor(v).ndim]:
            raise InputError(f"optimizer keeps {', '.join(other)} of each chunk but must keep {' and '.join(STATES)}")
        moved = self._moved(self.chunks.detach(), owner)
        for key in STATES:
            if key in state:
                state[key] = self._moved(state[key], owner)
        self.chunks.data, self.chunks.grad = moved, None
        count = int((owner != self.owner).sum())
        self.owner = owner.clone()
        self.placement = plan_placement(torch.zeros(self.n_experts), self.owner, self.world, 0, 0)
        return count

    def _moved(self, own: Tensor, owner: Tensor) -> Tensor:
        mine, theirs = owned(self.owner, self.rank), owned(owner, self.rank)
        order = torch.argsort(owner[mine], stable=True)
        give = torch.bincount(owner[mine], minlength=self.world).tolist()
        take = torch.bincount(self.owner[theirs], minlength=self.world).tolist()
        come = all_to_all(own[order], give, take, self.group)  # by the rank it comes from, then by expert
        out = torch.empty_like(come)
        out[torch.argsort(self.owner[theirs], stable=True)] = come
        return out
