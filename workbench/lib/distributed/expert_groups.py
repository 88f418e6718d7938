"""Experts on some ranks, data on all: the groups of Z-code M3, its gradients, and states that are shared out.

    groups = ExpertGroups(world=4, ep=2)         # ep groups [0, 1] [2, 3]: all experts; edp groups [0, 2] [1, 3]
    model = ...                                  # the whole model, the same on every rank
    together = ExpertData(model, groups)         # now with this rank's experts only
    train(model, Shares(task), replace(config, clip=math.inf), [together], optimizer=ZeroAdamW(together, lr=1e-3))

or all of it, on every rank: train_together(model, task, config, ep=2, zero=True).

Rank r is the r % P-th of its expert-parallel group of P ranks that stand side by side. Tokens travel within it, and the
gradients of an expert are summed over its expert-data group, the ranks r, r + P, ... that have the same experts, those
of all else over all ranks. Both are divided by the number of all ranks, for that many shares make the batch: an expert
has fewer copies, but the tokens of P ranks reached each of them. The norm by which gradients are clipped is that of the
whole model: experts count once, over the expert-parallel group.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.dispatcher import TokenDispatcher
from workbench.lib.core.distributed.gradients import GradientSet, clip_gradients, reduce_gradients
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Routing
from workbench.lib.core.task import Batch, Task
from workbench.lib.core.train import Hook, State, TrainConfig, train


class ExpertGroups:
    """Which ranks share out the experts, and which have the same.

    Args:
        ep: P, ranks of an expert-parallel group; divides `world`.

    Attributes:
        grid: the axes "ep", the faster one, and "edp".
    """

    def __init__(self, world: int, ep: int):
        self.world, self.ep = world, ep
        self.grid = RankGrid.filled(world, {"ep": ep, "edp": None})

    @property
    def expert_parallel(self) -> list[list[int]]:
        """{g P, ..., g P + P - 1}: each has all experts once."""
        return self.grid.groups("ep")

    @property
    def expert_data(self) -> list[list[int]]:
        """{i, i + P, ...}: all of a group have the same experts."""
        return self.grid.groups("edp")

    def experts_of(self, rank: int, n_experts: int) -> range:
        """The experts of a rank, of E that P divides."""
        if n_experts < 1 or n_experts % self.ep:
            raise InputError(f"n_experts is {n_experts} but must be a multiple of ep = {self.ep}")
        n = n_experts // self.ep
        first = self.grid.coords(rank)["ep"] * n
        return range(first, first + n)


class OwnExperts(GLUExperts):
    """A rank's experts of a bank, called with the rank's tokens as the whole bank would be.

    Attributes:
        n_experts: E, of all ranks of the group.
    """

    def __init__(self, bank: GLUExperts, experts: range, group: Any):
        nn.Module.__init__(self)
        self.n_experts, self.dispatcher = bank.n_experts, TokenDispatcher(bank.n_experts, group)
        for name, whole in bank.named_parameters():
            mine = whole.detach()[experts.start : experts.stop].clone()
            setattr(self, name, nn.Parameter(mine, whole.requires_grad))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        sent = self.dispatcher.dispatch(x, routing)
        return self.dispatcher.combine(super().forward(sent.rows, sent.routing), sent)


class ExpertData(Hook):
    """The model on this rank, with its own experts, and how its gradients become those of the whole batch.

    A hook: before each update the gradients of all ranks are added up and clipped.

    Args:
        model: the whole one, the same on every rank; changed in place. With a capacity each rank has places of its own.
        max_norm: of the whole model's gradient.

    Attributes:
        shared, experts: the parameters that all ranks have, and those of this rank's experts.

    Raises:
        InputError: there is no MoE layer, or one has other experts than `GLUExperts`, or not a multiple of P.
    """

    def __init__(self, model: nn.Module, groups: ExpertGroups, max_norm: float = 1.0):
        layers = moe_layers(model)
        wrong = [name for name, layer in layers.items() if type(layer.experts) is not GLUExperts]
        if wrong or not layers:
            raise InputError(f"model must have MoE layers of GLUExperts alone, but {wrong[0] if wrong else 'has none'}")
        self.groups, self.max_norm, self.rank = groups, max_norm, dist.get_rank()
        self.edp, ep = groups.grid.process_group("edp"), groups.grid.process_group("ep")
        for layer in layers.values():
            layer.experts = OwnExperts(layer.experts, groups.experts_of(self.rank, layer.n_experts), ep)
        self.experts = [p for layer in layers.values() for p in layer.experts.parameters()]
        own = set(self.experts)
        self.shared = [p for p in model.parameters() if p not in own]
        self.sets = [
            GradientSet(self.shared, copies=dist.group.WORLD),
            GradientSet(self.experts, copies=self.edp, parts=ep),
        ]

    def before_update(self, state: State) -> None:
        if state.config.clip != math.inf:
            raise InputError(f"clip is {state.config.clip} but must be inf: a rank's own gradient is a part of the sum")
        reduce_gradients(self.sets, ranks=self.groups.world)
        state.grad_norm = float(clip_gradients(self.sets, self.max_norm))

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of the whole model, those of experts from the ranks that have them; all ranks must ask."""
        group, own, found = self.sets[1].parts, set(self.experts), {}
        for name, p in model.named_parameters():
            found[name] = _gathered(p, group) if p in own else p.detach()
        return found


class Shares:
    """A task whose training batches are this rank's rows of those of `task`, in the order of ranks."""

    def __init__(self, task: Task):
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        world, rank = dist.get_world_size(), dist.get_rank()
        if size % world:
            raise InputError(f"size is {size} rows but must be a multiple of the {world} ranks that share them out")
        whole, n = self.task.batch(split, size, generator, domain), size // world
        return Batch(*(part[rank * n : (rank + 1) * n] for part in (whole.inputs, whole.targets, whole.domain)))


class ZeroAdamW(torch.optim.Optimizer):
    """AdamW whose states are shared out: the shared parameters' over all ranks, an expert's over those that have it.

    ZeRO, stage 1. Of each group of parameters a rank keeps one part of equal length, in single precision, with its
    moments; after the step the parts are gathered. AdamW goes element by element, so that this changes no number.

    Args:
        together: whose gradients are those of the whole batch by the time of the step.
        options: of `torch.optim.AdamW`; read from the groups at each step.
    """

    def __init__(self, together: ExpertData, **options: Any):
        self._parts: list[nn.Parameter] = []
        self._owners = [dist.group.WORLD, together.edp]
        groups = [{"params": together.shared}, {"params": together.experts}]
        for params, owners in zip((together.shared, together.experts), self._owners, strict=True):
            flat = _flat(params, owners.size())
            self._parts.append(nn.Parameter(flat.chunk(owners.size())[owners.rank()].clone()))
        self._adamw = torch.optim.AdamW([{"params": [part]} for part in self._parts], **options)
        super().__init__(groups, self._adamw.defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group, part, owners in zip(self.param_groups, self._parts, self._owners, strict=True):
            gradients = _flat([p.grad for p in group["params"]], owners.size())
            part.grad = gradients.chunk(owners.size())[owners.rank()]
        for mine, its in zip(self.param_groups, self._adamw.param_groups, strict=True):
            its.update({name: value for name, value in mine.items() if name != "params"})
        self._adamw.step()
        for group, part, owners in zip(self.param_groups, self._parts, self._owners, strict=True):
            part.grad = None
            whole = _gathered(part, owners)
            sizes = [p.numel() for p in group["params"]]
            for p, values in zip(group["params"], whole[: sum(sizes)].split(sizes), strict=True):
                p.copy_(values.view_as(p))

    def state_bytes(self) -> int:
        """Bytes of the parts and their moments on this rank."""
        moments = [s[name] for s in self._adamw.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return sum(t.numel() * t.element_size() for t in (*self._parts, *moments))


def train_together(
    model: nn.Module, task: Task, config: TrainConfig, ep: int, zero: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Train a model on all ranks, each with 1 / `ep` of the experts and its share of the rows; the whole weights.

    Args:
        config: as of one process: `batch_size` is that of all ranks, `clip` of the whole gradient.
        zero: by `ZeroAdamW`; else by torch's AdamW.
        options: of AdamW.
    """
    together = ExpertData(model, ExpertGroups(dist.get_world_size(), ep), config.clip)
    if zero:
        optimizer = ZeroAdamW(together, **options)
    else:
        optimizer = torch.optim.AdamW([{"params": together.shared}, {"params": together.experts}], **options)
    train(model, Shares(task), replace(config, clip=math.inf), [together], optimizer=optimizer)
    return together.whole(model)


def _gathered(part: Tensor, group: Any) -> Tensor:
    """The parts of all ranks, one after the other."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.detach(), group=group)
    return torch.cat(parts)


def _flat(tensors: list[Tensor], parts: int) -> Tensor:
    """All of them in a row, of single precision at least, filled up so that `parts` divides its length."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([t.detach().reshape(-1).to(wide) for t in tensors])
    return nn.functional.pad(flat, (0, -len(flat) % parts))
