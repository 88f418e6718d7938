"""Experts on some ranks, data on all: the groups of Z-code M3, its gradients, and states that are shared out.

    groups = ExpertGroups(world=4, ep=2)         # ep groups [0, 1] [2, 3]: all experts; edp groups [0, 2] [1, 3]
    model = ...                                  # the whole model, the same on every rank
    together = ExpertData(model, groups)         # now with this rank's experts only
    train(model, task, config, optimizer=ZeroAdamW(together, lr=1e-3), replicas=together)

or all of it, on every rank: train_together(model, task, config, ep=2, zero=True).

Rank r is the r % P-th of its expert-parallel group of P ranks that stand side by side. Tokens travel within it, and the
gradients of an expert are summed over its expert-data group, the ranks r, r + P, ... that have the same experts, those
of all else over all ranks. Both are divided by the number of all ranks, for that many shares make the batch: an expert
has fewer copies, but the tokens of P ranks reached each of them. The norm by which gradients are clipped is that of the
whole model: experts count once, over the expert-parallel group.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.experts import split_experts
from workbench.lib.core.distributed.gradients import GradientSet, clip_gradients, reduce_gradients
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.distributed.rows import of_each
from workbench.lib.core.distributed.shares import Ranks
from workbench.lib.core.task import Task
from workbench.lib.core.train import TrainConfig, train


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


class ExpertData(Ranks):
    """The model on this rank, with its own experts, and how its gradients become those of the whole batch.

    The norm by which they are clipped is that of the whole model's gradient.

    Args:
        model: the whole one, the same on every rank; changed in place. With a capacity each rank has places of its own,
            and a balance loss is of each rank's own tokens.

    Attributes:
        shared, experts: the trained parameters that all ranks have, and those of this rank's experts.

    Raises:
        InputError: there is no MoE layer, or one has other experts than `GLUExperts`, or not a multiple of P.
    """

    def __init__(self, model: nn.Module, groups: ExpertGroups):
        super().__init__()
        self.groups = groups
        self.edp, ep = groups.grid.process_group("edp"), groups.grid.process_group("ep")
        self._split = set(split_experts(model, ep))
        trained = [p for p in model.parameters() if p.requires_grad]
        self.experts = [p for p in trained if p in self._split]
        self.shared = [p for p in trained if p not in self._split]
        self.sets = [
            GradientSet(self.shared, copies=dist.group.WORLD),
            GradientSet(self.experts, copies=self.edp, parts=ep),
        ]

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        reduce_gradients(self.sets, ranks=self.world)
        return float(clip_gradients(self.sets, max_norm))

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of the whole model, those of experts from the ranks that have them; all ranks must ask."""
        group, found = self.sets[1].parts, {}
        for name, p in model.named_parameters():
            found[name] = torch.cat(of_each(p, group)) if p in self._split else p.detach()
        return found


class ZeroAdamW(torch.optim.Optimizer):
    """AdamW whose states are shared out: the shared parameters' over all ranks, an expert's over those that have it.

    ZeRO, stage 1. Of each group of parameters a rank keeps one part of equal length, in single precision, with its
    moments; after the step the parts are gathered. AdamW goes element by element, so that this changes no number.

    Args:
        together: whose gradients are those of the whole batch by the time of the step.
        options: of `torch.optim.AdamW`; read from the groups at each step.

    Raises:
        InputError: at a step, a parameter has no gradient on any rank: in one row with the others it would decay.
    """

    def __init__(self, together: ExpertData, **options: Any):
        kinds = [(together.shared, dist.group.WORLD), (together.experts, together.edp)]
        kinds = [(params, owners) for params, owners in kinds if params]  # all of a kind may be frozen
        self._owners = [owners for _, owners in kinds]
        self._parts = [
            nn.Parameter(_flat(params, owners.size()).chunk(owners.size())[owners.rank()].clone())
            for params, owners in kinds
        ]
        self._adamw = torch.optim.AdamW([{"params": [part]} for part in self._parts], **options)
        super().__init__([{"params": params} for params, _ in kinds], self._adamw.defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group, part, owners in zip(self.param_groups, self._parts, self._owners, strict=True):
            if without := [p for p in group["params"] if p.grad is None]:
                raise InputError(
                    f"a parameter of shape {tuple(without[0].shape)} has no gradient but must have one, or be frozen "
                    "before the ranks are made"
                )
            gradients = _flat([p.grad for p in group["params"]], owners.size())
            part.grad = gradients.chunk(owners.size())[owners.rank()]
        self._tell()
        self._adamw.step()
        for part in self._parts:
            part.grad = None
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """As AdamW has it, of the "parts" of this rank, which are in it: every rank keeps its own."""
        self._tell()
        return self._adamw.state_dict() | {"parts": [part.detach() for part in self._parts]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, on every rank at once: the weights are those of the parts.

        Raises:
            InputError: it is of no `ZeroAdamW`, or of other parameters or another number of ranks.
        """
        found = [tuple(part.shape) for part in state_dict.get("parts", ())]
        if found != [tuple(part.shape) for part in self._parts]:
            wanted = [tuple(part.shape) for part in self._parts]
            raise InputError(f"state_dict has parts of shapes {found} but must have {wanted}: those of this rank")
        self._adamw.load_state_dict(deepcopy({name: state_dict[name] for name in ("state", "param_groups")}))
        for part, kept in zip(self._parts, state_dict["parts"], strict=True):
            part.copy_(kept)
        for mine, its in zip(self.param_groups, self._adamw.param_groups, strict=True):
            mine.update({name: value for name, value in its.items() if name != "params"})
        self._give_back()

    def _tell(self) -> None:
        """The settings of the groups, to whom makes the step."""
        for mine, its in zip(self.param_groups, self._adamw.param_groups, strict=True):
            its.update({name: value for name, value in mine.items() if name != "params"})

    def _give_back(self) -> None:
        """The weights of all parts."""
        for group, part, owners in zip(self.param_groups, self._parts, self._owners, strict=True):
            whole = torch.cat(of_each(part, owners))
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
    together = ExpertData(model, ExpertGroups(dist.get_world_size(), ep))
    if zero:
        optimizer = ZeroAdamW(together, **options)
    else:
        optimizer = torch.optim.AdamW([{"params": together.shared}, {"params": together.experts}], **options)
    train(model, task, config, optimizer=optimizer, replicas=together)
    return together.whole(model)


def _flat(tensors: list[Tensor], parts: int) -> Tensor:
    """All of them in a row, of single precision at least, filled up so that `parts` divides its length."""
    wide = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    flat = torch.cat([t.detach().reshape(-1).to(wide) for t in tensors])
    return nn.functional.pad(flat, (0, -len(flat) % parts))
