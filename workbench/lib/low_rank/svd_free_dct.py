"""Low-rank optimisers without an SVD: the subspace is r columns of one cosine transform, those that fit the gradient.

Modoranu et al. 2025, "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models", later "FFT-based
Dynamic Subspace Selection for Low-Rank Adaptive Optimization of LLMs" (arXiv:2505.17967); public code:
IST-DASLab/ISTA-DASLab-Optimizers, `fft_low_rank`. Of a matrix that lies tall, G (n, m) with n >= m, and C (m, m) the
orthonormal cosine transform of the width m, the same for all layers:

    I = the r columns of S = G C of the largest norm,    Q = C[:, I],    g = S[:, I]       at each step

    DCT-AdamW   A = G + E;  a = A Q;  E <- A - a Q^T                                       error feedback, optional
                m, v: columns that are chosen again stay, new ones begin with zeros        m <- m Q_old^T Q_new
                Adam's step u of a;  W <- (1 - lr wd) W - lr u Q^T
    Trion       M <- M + G;  b = M Q, Q chosen for M;  M <- M - (1 - mu) b Q^T             only what is used decays
                W <- (1 - lr wd) W - lr s(O, I) NewtonSchulz(b) Q^T

What is kept of a matrix: 2 n r numbers and r integers by DCT-AdamW, n m numbers and r integers by Trion; the error
takes n m numbers more, or n m bytes or half bytes and two numbers a row. C is kept once for each width, by no layer.

The released code differs: `norm=1` and `remap=False` are its defaults. It then leaves the columns in the order of their
scores, so that even a set that stays may change places under moments that do not. It has one C for all layers, of the
first one's width; its product without an FFT is with the transpose, `basis="dct-3"`; and with `update_gap` above 1 it
chooses one step earlier, from the second time on.

Both take other projections too: "svd", "random", and "power", which is akin to Dion's.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels.column_adam import column_adam
from workbench.kernels.dct import dct2_rows, dct_basis
from workbench.kernels.newton_schulz import newton_schulz
from workbench.lib.core.optim.matrix import Group, MatrixOptimizer, State
from workbench.lib.core.optim.projected import ProjectedAdamW, check_rank
from workbench.lib.core.optim.projectors import ColumnSelector, Projector, check_width, make_projector, tall

METHOD = Method(
    slug="svd-free-dct",
    title="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (DCT-AdamW, Trion)",
    family="low_rank",
    year=2025,
    paper="arXiv:2505.17967",
    claim="Choosing columns of a fixed cosine transform instead of an SVD keeps the quality of low-rank optimisers, "
    "faster and with less memory.",
    objects=("DCTAdamW", "Trion", "ColumnSelector", "dct_basis", "dct2_rows"),
    kind="optimiser",
)

__all__ = ["METHOD", "ColumnSelector", "DCTAdamW", "Trion", "dct2_rows", "dct_basis", "example"]

EF_BITS = (None, 8, 4)

#: Factor of a step of NewtonSchulz(b), by the sides of the matrix (O, I).
SCALES: dict[str, Callable[[int, int], float]] = {
    "jordan": lambda o, i: sqrt(max(1, o / i)),
    "rms": lambda o, i: 0.2 * sqrt(max(o, i)),
    "spectral": lambda o, i: sqrt(o / i),
    "none": lambda o, i: 1.0,
}


def example() -> Callable[..., torch.optim.Optimizer]:
    """DCT-AdamW of rank 4 with its error kept in bytes."""
    return partial(DCTAdamW, lr=0.05, rank=4, error_feedback=True, ef_bits=8)


class DCTAdamW(ProjectedAdamW):
    """AdamW in a subspace of cosines, chosen anew at each step.

    Args:
        params, lr, rank, betas, eps, weight_decay: see `ProjectedAdamW`; so is the rest that is not named here.
        norm, basis: which columns fit, and of which matrix, see `ColumnSelector`.
        error_feedback: add to each gradient what the projection left of those before.
        ef_bits: of a number of the error: 8 or 4, evenly between the ends of its row; None keeps it as it is.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        rank: int = 128,
        update_gap: int = 1,
        error_feedback: bool = False,
        ef_bits: int | None = None,
        remap: bool = True,
        norm: int = 2,
        basis: str = "dct",
        projector: str = "dct",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        own = {"norm": norm, "basis": basis, "error_feedback": error_feedback, "ef_bits": ef_bits}
        super().__init__(params, lr, rank, projector, update_gap, 1.0, remap, betas, eps, weight_decay, **own)

    def check(self, group: Group, shape: torch.Size) -> None:
        super().check(group, shape)
        if group["ef_bits"] not in EF_BITS:
            raise InputError(f"ef_bits is {group['ef_bits']} but must be one of {EF_BITS}")
        if group["ef_bits"] is not None and not group["error_feedback"]:
            raise InputError(
                f"ef_bits is {group['ef_bits']} but error_feedback is False, and there is no error to keep"
            )

    def fresh(self, shape: torch.Size, group: Group, **where: Any) -> State:
        return super().fresh(shape, group, **where) | self._packed(torch.zeros(_lying(shape), **where), group)

    def counted(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """As `ProjectedAdamW.counted`; all in one operator where a choice of cosines is all there is."""
        new = int(state["step"]) % group["update_gap"] == 0
        if not new or group["error_feedback"] or (group["projector"], group["basis"]) != ("dct", "dct"):
            return super().counted(grad, state, group)
        how = {key: group[key] for key in ("norm", "remap", "betas", "eps")}
        moments = state["exp_avg"], state["exp_avg_sq"], state["index"]
        return column_adam(grad, *moments, step=int(state["step"]) + 1, **how)

    def subspace(self, grad: Tensor, state: State, group: Group) -> Tensor:
        if not group["error_feedback"]:
            return super().subspace(grad, state, group)
        total = grad + self.error(state, group, grad.shape[-1])
        low = super().subspace(total, state, group)
        state |= self._packed(total.sub_(self.projector(group).lift(low, state, grad.shape[-1])), group)
        return low

    def error(self, state: State, group: Group, m: int) -> Tensor:
        """E (*stack, n, m), what the projections have left until now."""
        if group["ef_bits"] is None:
            return state["error"]
        return unpack(state["error"], state["error_low"], state["error_step"], group["ef_bits"], m)

    def _packed(self, error: Tensor, group: Group) -> State:
        if not group["error_feedback"]:
            return {}
        if group["ef_bits"] is None:
            return {"error": error}
        return dict(zip(("error", "error_low", "error_step"), pack(error, group["ef_bits"]), strict=True))


class Trion(MatrixOptimizer):
    """Momentum whose best r columns are orthogonalised: Dion with cosines and Newton-Schulz. All else has AdamW's step.

    With `rank` the whole width it is Muon without Nesterov's step.

    Args:
        params, lr, weight_decay, betas, eps: see `MatrixOptimizer`.
        rank: r, at most the smaller side of every matrix.
        momentum: mu; what is not selected does not decay.
        ns_steps: of Newton-Schulz.
        scale: of the step, one of `SCALES`.
        projector, norm, basis: see `ProjectedAdamW`; chosen anew at each step.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        rank: int = 128,
        momentum: float = 0.95,
        ns_steps: int = 5,
        scale: str = "jordan",
        projector: str = "dct",
        norm: int = 2,
        basis: str = "dct",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        own = {"rank": rank, "momentum": momentum, "ns_steps": ns_steps, "scale": scale}
        own |= {"projector": projector, "norm": norm, "basis": basis}
        super().__init__(params, lr, weight_decay, betas, eps, **own)

    def check(self, group: Group, shape: torch.Size) -> None:
        check_rank(group["rank"], shape)
        if not 0 <= group["momentum"] <= 1:
            raise InputError(f"momentum is {group['momentum']} but must be from 0 to 1")
        if group["ns_steps"] < 1:
            raise InputError(f"ns_steps is {group['ns_steps']} but must be at least 1")
        if group["scale"] not in SCALES:
            raise unknown("scale", group["scale"], SCALES)
        check_width(self.projector(group), shape)

    def projector(self, group: Group) -> Projector:
        return make_projector(group["projector"], group["rank"], group["norm"], group["basis"])

    def fresh(self, shape: torch.Size, group: Group, **where: Any) -> State:
        (*stack, _, m) = lying = _lying(shape)
        return {"momentum": torch.zeros(lying, **where)} | self.projector(group).fresh(tuple(stack), m, **where)

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        lying, projector = tall(grad), self.projector(group)
        m = lying.shape[-1]
        momentum = state["momentum"].add_(lying)
        new, low = projector.refresh(momentum, state)
        state |= new
        momentum.sub_(projector.lift(low, state, m), alpha=1 - group["momentum"])
        out = projector.lift(newton_schulz(low, steps=group["ns_steps"]), state, m)
        out.mul_(SCALES[group["scale"]](*grad.shape[-2:]))
        return out if lying is grad else out.mT


def pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every row as whole numbers of 8 or 4 bits between its smallest and its largest entry.

    Returns:
        codes uint8 (*batch, m), or two to a byte (*batch, ceil(m / 2)); low and step (*batch, 1), for which
        x = low + step * code, at most step / 2 off.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((x - low) / torch.where(step > 0, step, 1)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, low, step


def unpack(codes: Tensor, low: Tensor, step: Tensor, bits: int, m: int) -> Tensor:
    """The rows (*batch, m) that `pack` has packed."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :m]
    return torch.addcmul(low, codes.to(step.dtype), step)


def _lying(shape: torch.Size) -> tuple[int, ...]:
    """(*stack, n, m) of a matrix (*stack, O, I)."""
    *stack, o, i = shape
    return (*stack, max(o, i), min(o, i))
