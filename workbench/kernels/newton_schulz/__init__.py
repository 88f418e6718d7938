"""Newton-Schulz: the nearest matrix with orthonormal rows or columns, approximately, by products alone (as Muon does).

Paths: "reference", "cpu" and "triton", each a module with

    newton_schulz(x, steps, coefficients) -> like x

x (B, n, m) contiguous, n <= m, which stays as it is. What is written between products is of the type of x on all
paths, sums are as wide as the device's own products have them; so the paths agree up to rounding.
"""

import math
from collections.abc import Sequence
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al. (2024), as torch.optim.Muon has them
CEILING = 1.2025  # the quintic's maximum on [0, 1]; it maps [0, CEILING] into itself


def newton_schulz(
    x: Float[Tensor, "*batch rows columns"],
    *,
    steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS,
    normalise: bool = True,
    backend: str | None = None,
) -> Float[Tensor, "*batch rows columns"]:
    """U p(...p(S)) V^T for x = U S V^T, with p(s) = a s + b s^3 + c s^5 applied `steps` times to S / ||S||_F.

    At the defaults singular values of at least 0.003 ||x||_F land in [0.68, 1.203], smaller ones are made at most 485
    times as large, and none passes `CEILING`. It costs `steps` times 2 n^2 m + n^3 multiplications, n <= m.

    Args:
        x: matrices. Their scale does not matter, however small or large; a matrix of zeros stays one. One that holds
            NaN or infinity becomes NaN.
        steps: at least 1.
        coefficients: (a, b, c).
        normalise: False takes the singular values as they are, not over the norm: for steps that follow others.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        As x, and of its type, in which the products are made as well. Not differentiable: it is for optimisers.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(x, steps, coefficients)
    chosen = dispatch.choose("newton_schulz", backend, x.device, BACKENDS, x.dtype)
    if chosen == "triton" and x.dtype == torch.float64:
        if backend is not None:
            raise InputError("backend is 'triton' but x is torch.float64; it must be float32, bfloat16 or float16")
        chosen = "reference"
    given = x.detach(), steps, [float(value) for value in coefficients], normalise, chosen
    return (_run if dispatch.unseen(x) else _forward)(*given)


def _run(x: Tensor, steps: int, coefficients: Sequence[float], normalise: bool, backend: str) -> Tensor:
    _check(x, steps, coefficients)
    dispatch.admit("newton_schulz", backend, x.device, BACKENDS, x.dtype)
    dispatch.begin("newton_schulz", backend)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    path = import_module(f"{__name__}.{backend}")
    start = _normalised(wide).to(x.dtype) if normalise else wide.contiguous()
    out = path.newton_schulz(start, steps, coefficients)
    out = out.view(*x.shape[:-2], *wide.shape[-2:])
    return (out.mT if tall else out).contiguous()


_forward = torch.library.custom_op("workbench::newton_schulz", _run, mutates_args=())


@_forward.register_fake
def _(x, steps, coefficients, normalise, backend):
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.workbench.newton_schulz)
def _flops(x, steps, *_, **__) -> int:
    """A Gram matrix, its square, and their product with x, `steps` times."""
    n, m = sorted(x[-2:])
    return 2 * math.prod(x[:-2]) * steps * (2 * n * n * m + n**3)


def _normalised(x: Tensor) -> Tensor:
    """x over its Frobenius norm, contiguous; 0 where x is 0. The square of no tiny or huge number is taken."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    room = x.abs()  # written over below: new memory takes as long as all the arithmetic
    largest = room.amax((-2, -1), keepdim=True)  # torch's aminmax of one dimension takes ten times as long
    x = torch.div(x, largest.masked_fill_(largest == 0, 1), out=room)
    return x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=1)).contiguous()


def _check(x: Tensor, steps: int, coefficients: Sequence[float]) -> None:
    if x.ndim < 2 or x.dtype not in DTYPES:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be matrices (..., rows, columns) in one of "
            f"{', '.join(map(str, DTYPES))}"
        )
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r} but must be a whole number, at least 1")
    if len(coefficients) != 3:
        raise InputError(f"coefficients are {tuple(coefficients)} but must be three numbers (a, b, c)")
