"""Sums over a random basis that its seed alone is kept of, and products with it: each number is made where it is used.

Element n of basis tensor j is a function of the seed and of m = start + j * numel + n: word m % 4 of Philox-4x32-10
(Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") at the counter m // 4, its upper 24 bits taken to
[-1, 1). The generator is made of whole numbers and the last step is exact in float32, so that the numbers are the same
on every path and device, in whatever pieces they are asked for; torch's own generator is neither used nor moved.

Paths: "reference", "native" (float32; without a C compiler the reference runs) and "triton", each a module with

    mix(coefficients, seed, numel, start) -> out          products(x, seed, k, start) -> out

coefficients (k,), x (numel,), both float32 or float64, seed () int64, out (numel,) and (k,) in their type.
"""

from collections.abc import Sequence
from importlib import import_module
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.kernels.random_basis.reference import philox

__all__ = ["philox", "random_basis", "random_basis_adjoint", "uniform"]

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")


def random_basis(
    coefficients: Float[Tensor, " k"],
    seed: Int64[Tensor, ""],
    shape: Sequence[int],
    *,
    start: int = 0,
    backend: str | None = None,
) -> Tensor:
    """sum_j c_j G_j in `shape`, G_j from U[-1, 1); differentiable in the coefficients, any number of times.

    Args:
        coefficients: (k,), on the device where the sum is made.
        seed: any 64 bits, on that device.
        shape: of the G_j and of the result.
        start: where the first G_j begins in the numbers of the seed.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        In the type of the coefficients, summed in float32 or wider. Paths differ by the rounding of the sum, and the
        numbers that are summed are the same bit for bit.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check_kind("coefficients", coefficients.dtype)
    wide = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    _check_sum(wide, seed, shape, start)
    chosen = dispatch.choose("random_basis", backend, wide.device, BACKENDS, wide.dtype, NATIVE)
    return _mix(wide, seed, list(shape), start, chosen).to(coefficients.dtype)


def random_basis_adjoint(
    x: Float[Tensor, "..."], seed: Int64[Tensor, ""], k: int, *, start: int = 0, backend: str | None = None
) -> Float[Tensor, " k"]:
    """<G_j, x> for the k tensors G_j that `random_basis` sums in the shape of x; differentiable in x.

    Args and errors are those of `random_basis`.
    """
    _check_kind("x", x.dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    _check("x", wide, seed, x.shape, k, start)
    chosen = dispatch.choose("random_basis", backend, wide.device, BACKENDS, wide.dtype, NATIVE)
    return _products(wide, seed, k, start, chosen).to(x.dtype)


def uniform(
    seed: Int64[Tensor, ""],
    start: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Float[Tensor, " count"]:
    """Numbers `start`, `start + 1`, ... of a seed, from U[-1, 1), on the seed's device.

    They are made in float32, in which they are exact.
    """
    _check_kind("dtype", dtype)
    one = torch.ones(1, device=seed.device)
    return random_basis(one, seed, (count,), start=start, backend=backend).to(dtype)


@torch.library.custom_op("workbench::random_basis", mutates_args=())
def _mix(coefficients: Tensor, seed: Tensor, shape: Sequence[int], start: int, backend: str) -> Tensor:
    _check_sum(coefficients, seed, shape, start)
    out = _path(backend, coefficients).mix(coefficients.contiguous(), seed, prod(shape), start)
    return out.view(list(shape))


@_mix.register_fake
def _(coefficients, seed, shape, start, backend):
    return coefficients.new_empty(shape)


@torch.library.custom_op("workbench::random_basis_adjoint", mutates_args=())
def _products(x: Tensor, seed: Tensor, k: int, start: int, backend: str) -> Tensor:
    _check("x", x, seed, x.shape, k, start)
    return _path(backend, x).products(x.contiguous().view(-1), seed, k, start)


@_products.register_fake
def _(x, seed, k, start, backend):
    return x.new_empty(k)


def _keep(ctx, inputs, output) -> None:
    given, seed, *ctx.rest = inputs
    ctx.shape = given.shape
    ctx.save_for_backward(seed)


def _mix_grads(ctx, grad):
    _, start, backend = ctx.rest
    return _products(grad, *ctx.saved_tensors, ctx.shape[0], start, backend), None, None, None, None


def _products_grads(ctx, grad):
    _, start, backend = ctx.rest
    return _mix(grad, *ctx.saved_tensors, list(ctx.shape), start, backend), None, None, None, None


_mix.register_autograd(_mix_grads, setup_context=_keep)
_products.register_autograd(_products_grads, setup_context=_keep)


def _path(backend: str, given: Tensor):
    dispatch.admit("random_basis", backend, given.device, BACKENDS, given.dtype)
    chosen = dispatch.begin("random_basis", backend, NATIVE)
    return import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")


def _check_kind(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise InputError(f"{name} is {dtype} but must be floating point, of two bytes at least")


def _check_sum(coefficients: Tensor, seed: Tensor, shape: Sequence[int], start: int) -> None:
    if coefficients.ndim != 1:
        raise InputError(f"coefficients is of shape {tuple(coefficients.shape)} but must be (k,)")
    _check("coefficients", coefficients, seed, shape, len(coefficients), start)


def _check(name: str, given: Tensor, seed: Tensor, shape: Sequence[int], k: int, start: int) -> None:
    if given.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} is {given.dtype} but must be torch.float32 or torch.float64")
    if seed.dtype != torch.int64 or seed.ndim or seed.device != given.device:
        raise InputError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device} but must be one torch.int64 number on "
            f"{given.device}, as {name}"
        )
    if k < 0 or start < 0 or min(shape, default=0) < 0:
        raise InputError(f"k, start, shape are {k}, {start}, {tuple(shape)} but must not be negative")
    if start + k * prod(shape) >= 2**63:
        raise InputError(f"start, k, shape are {start}, {k}, {tuple(shape)}, which end past number 2**63 of a seed")
