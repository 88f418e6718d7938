"""A step of Adam in the r columns of the cosine transform in which a gradient has the largest norm.

    S = G C,    I = the r columns of the largest norm,    g = S[:, I]
    m, v: columns that were chosen before stay, new ones begin with zeros
    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2,    u = m_hat / (sqrt(v_hat) + eps)

Paths: "reference", of the operators `dct2_rows` and `column_topk`, and "native", in C, for one process of one matrix
after the other: what comes from the FFT is read twice, once for the norms and once where it is chosen, and S is never
written. Each is a module with

    column_adam(grad, exp_avg, exp_avg_sq, index, norm, remap, step, beta1, beta2, eps) -> u

grad (*batch, n, m) contiguous. Where there is no C compiler, "native" is the reference.
"""

from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "native")
NATIVE = Path(__file__).with_name("native.c")


def column_adam(
    grad: Float[Tensor, "*batch n m"],
    exp_avg: Float[Tensor, "*batch n r"],
    exp_avg_sq: Float[Tensor, "*batch n r"],
    index: Int[Tensor, "*batch r"],
    *,
    step: int,
    norm: int = 2,
    remap: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    backend: str | None = None,
) -> Float[Tensor, "*batch n r"]:
    """u, in the columns that are chosen for `grad`; moments and `index` (int32, ascending) become those after the step.

    Args:
        step: the number of this step, from 1; at the first one there is nothing to remap.
        norm: 1 or 2, by which the columns are chosen.
        remap: False leaves the moments where they are, although their columns are others now.
        backend: one of `BACKENDS`; None chooses by device and type.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    chosen = dispatch.choose("column_adam", backend, grad.device, BACKENDS, grad.dtype, NATIVE)
    run = _run if dispatch.unseen(grad) else _step
    return run(grad.detach(), exp_avg, exp_avg_sq, index, norm, remap, step, *map(float, (*betas, eps)), chosen)


def _run(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    norm: int,
    remap: bool,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str,
) -> Tensor:
    _check(grad, exp_avg, exp_avg_sq, index, norm, step, (beta1, beta2), eps)
    dispatch.admit("column_adam", backend, grad.device, BACKENDS, grad.dtype)
    chosen = dispatch.begin("column_adam", backend, NATIVE)
    path = import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")
    return path.column_adam(grad.contiguous(), exp_avg, exp_avg_sq, index, norm, remap, step, beta1, beta2, eps)


_step = torch.library.custom_op("workbench::column_adam", _run, mutates_args=("exp_avg", "exp_avg_sq", "index"))


@_step.register_fake
def _(grad, exp_avg, *_):
    return torch.empty_like(exp_avg)


def _check(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    index: Tensor,
    norm: int,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if grad.dtype not in (torch.float32, torch.float64) or grad.ndim < 2 or 0 in grad.shape:
        raise InputError(
            f"grad is {grad.dtype} of shape {tuple(grad.shape)} but must be torch.float32 or torch.float64, and hold "
            "matrices of at least one row and column"
        )
    *batch, n, m = grad.shape
    r = index.shape[-1] if index.ndim else 0
    if index.shape != (*batch, r) or index.dtype != torch.int32 or not 1 <= r <= m:
        raise InputError(
            f"index is {index.dtype} of shape {tuple(index.shape)} but must be torch.int32 and {(*batch, 'r')}, r from "
            f"1 to {m}, for grad {tuple(grad.shape)}"
        )
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != (*batch, n, r) or moment.dtype != grad.dtype:
            raise InputError(
                f"{name} is {moment.dtype} of shape {tuple(moment.shape)} but must be {grad.dtype} and {(*batch, n, r)}"
            )
    for name, part in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("index", index)):
        if not part.is_contiguous() or part.device != grad.device:
            raise InputError(f"{name} must be contiguous and on {grad.device}, because it is changed where it lies")
    if norm not in (1, 2):
        raise InputError(f"norm is {norm} but must be 1 or 2")
    if not 1 <= step < 2**53:
        raise InputError(f"step is {step} but must be at least 1")
    if not all(0 <= beta < 1 for beta in betas) or not 0 <= eps < float("inf"):
        raise InputError(f"betas, eps are {betas}, {eps} but must be from 0 to below 1, and finite and at least 0")
