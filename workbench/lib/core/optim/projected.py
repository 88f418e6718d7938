"""AdamW with its moments in a subspace of low rank: what GaLore and DCT-AdamW share.

Of a matrix that lies tall, G (n, m) with n >= m, and with Q (m, r) chosen anew every `update_gap` steps:

    g = G Q
    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  u = m_hat / (sqrt(v_hat) + eps)
    W <- (1 - lr weight_decay) W - lr scale u Q^T

With `remap` the moments are turned into the new subspace when it changes, m Q_old^T Q_new and |v Q_old^T Q_new|;
without it they stay as they are, although their columns mean others then.

State of a matrix: two moments (n, r), in float32 or wider, and what the projector keeps.
"""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.column_adam.reference import adam
from workbench.lib.core.optim.matrix import Group, MatrixOptimizer, State
from workbench.lib.core.optim.projectors import Projector, check_width, make_projector, tall


class ProjectedAdamW(MatrixOptimizer):
    """AdamW of projected gradients. All else than matrices has AdamW's own step.

    Args:
        params, lr, weight_decay, betas, eps: see `MatrixOptimizer`.
        rank: r, at most the smaller side of every matrix.
        projector: one of `PROJECTORS`.
        update_gap: steps from one choice of the subspace to the next; the first step chooses.
        scale: factor of the step of a matrix.
        remap: turn the moments with the subspace.
        norm, basis: of the projector "dct", see `ColumnSelector`.
        options: further ones of a subclass.

    Raises:
        InputError: names the option that does not fit, or the parameter that has less than `rank` rows or columns.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        rank: int,
        projector: str,
        update_gap: int,
        scale: float,
        remap: bool,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        norm: int = 2,
        basis: str = "dct",
        **options: Any,
    ):
        own = {"rank": rank, "projector": projector, "update_gap": update_gap, "scale": scale, "remap": remap}
        own |= {"norm": norm, "basis": basis}
        super().__init__(params, lr, weight_decay, betas, eps, **own, **options)

    def check(self, group: Group, shape: torch.Size) -> None:
        check_rank(group["rank"], shape)
        if group["update_gap"] < 1:
            raise InputError(f"update_gap is {group['update_gap']} but must be at least 1")
        check_width(self.projector(group), shape)

    def projector(self, group: Group) -> Projector:
        return make_projector(group["projector"], group["rank"], group["norm"], group["basis"])

    def fresh(self, shape: torch.Size, group: Group, **where: Any) -> State:
        (*stack, o, i), rank = shape, group["rank"]
        n, m = max(o, i), min(o, i)
        moments = {key: torch.zeros(*stack, n, rank, **where) for key in ("exp_avg", "exp_avg_sq")}
        return moments | self.projector(group).fresh(tuple(stack), m, **where)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        lying = tall(grad)
        out = self.projector(group).lift(self.counted(lying, state, group), state, lying.shape[-1])
        if group["scale"] != 1:
            out.mul_(group["scale"])
        return out if lying is grad else out.mT

    def counted(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """u (*stack, n, r), in the subspace of this step; counts `grad` (*stack, n, m) into the moments."""
        return self.adam(self.subspace(grad, state, group), state, group)

    def subspace(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """g (*stack, n, r), in the subspace of this step, which may be a new one."""
        projector, made = self.projector(group), int(state["step"])
        if made % group["update_gap"]:
            return projector.project(grad, state)
        new, low = projector.refresh(grad, state)
        if group["remap"] and made:
            first, second = projector.remap([state["exp_avg"], state["exp_avg_sq"]], state, new)
            state |= {"exp_avg": first, "exp_avg_sq": second.abs_()}
        state |= new
        return low

    def adam(self, low: Tensor, state: State, group: Group) -> Tensor:
        """u (*stack, n, r); counts `low` into the moments."""
        return adam(low, state["exp_avg"], state["exp_avg_sq"], int(state["step"]) + 1, *group["betas"], group["eps"])


def check_rank(rank: int, shape: torch.Size) -> None:
    """Raise `InputError` unless a rank is one of a matrix (*stack, O, I)."""
    if not isinstance(rank, Integral) or not 1 <= rank <= min(shape[-2:]):
        raise InputError(
            f"rank is {rank!r} but must be from 1 to {min(shape[-2:])}, the smaller side of a matrix {tuple(shape)}, "
            'and whole; a group may have another rank, or "matrix": False'
        )
