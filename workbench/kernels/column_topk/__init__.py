"""The k columns of a matrix of the largest norm, and what is in them.

Paths: "reference" and "triton", each a module with

    column_norms(x, norm) -> (B, m) sum |x| or sum x^2 over the rows
    gather_columns(x, index) -> (B, n, k)

x (B, n, m) contiguous, index (B, k) int32. Sums are in float32 or wider.
"""

from importlib import import_module
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "triton")
SAFE = 1e-20  # below this the sum of squares of a column that is a millionth as long may be 0 in float32


def column_topk(
    x: Float[Tensor, "*batch n m"], k: int, *, norm: int = 2, backend: str | None = None
) -> tuple[Int[Tensor, "*batch k"], Float[Tensor, "*batch n k"]]:
    """The k columns of the largest norm, in ascending order.

    Args:
        x: matrices. What is not finite in one may be chosen from it before what is.
        k: from 1 to m.
        norm: 1 or 2.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        index (*batch, k) int32, and the columns. Not differentiable: it is for optimisers.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(x, k, norm)
    chosen = dispatch.choose("column_topk", backend, x.device, BACKENDS)
    return (_choose if dispatch.unseen(x) else _forward)(x.detach(), k, norm, chosen)


def gather_columns(
    x: Float[Tensor, "*batch n m"], index: Int[Tensor, "*batch k"], *, backend: str | None = None
) -> Float[Tensor, "*batch n k"]:
    """The columns `index` of matrices, which are not checked to be there. Arguments as in `column_topk`."""
    _check(x, index.shape[-1], 1)
    if index.shape[:-1] != x.shape[:-2]:
        raise InputError(f"index has shape {tuple(index.shape)} but must have a row a matrix of x {tuple(x.shape)}")
    chosen = dispatch.choose("gather_columns", backend, x.device, BACKENDS)
    return (_take if dispatch.unseen(x) else _gather)(x.detach(), index.int(), chosen)


def _choose(x: Tensor, k: int, norm: int, backend: str) -> tuple[Tensor, Tensor]:
    _check(x, k, norm)
    dispatch.admit("column_topk", backend, x.device, BACKENDS, x.dtype)
    path = import_module(f"{__name__}.{dispatch.begin('column_topk', backend)}")
    *batch, n, m = x.shape
    flat = x.contiguous().view(-1, n, m)
    index = _norms(path, flat, norm).topk(k, dim=-1).indices.sort(dim=-1).values.int()
    return index.view(*batch, k), path.gather_columns(flat, index).view(*batch, n, k)


_forward = torch.library.custom_op("workbench::column_topk", _choose, mutates_args=())


@_forward.register_fake
def _(x, k, norm, backend):
    *batch, n, _ = x.shape
    return x.new_empty((*batch, k), dtype=torch.int32), x.new_empty((*batch, n, k))


def _take(x: Tensor, index: Tensor, backend: str) -> Tensor:
    dispatch.admit("gather_columns", backend, x.device, BACKENDS, x.dtype)
    path = import_module(f"{__name__}.{dispatch.begin('gather_columns', backend)}")
    *batch, n, m = x.shape
    k = index.shape[-1]
    return path.gather_columns(x.contiguous().view(-1, n, m), index.contiguous().view(-1, k)).view(*batch, n, k)


_gather = torch.library.custom_op("workbench::gather_columns", _take, mutates_args=())


@_gather.register_fake
def _(x, index, backend):
    return x.new_empty((*x.shape[:-1], index.shape[-1]))


def in_range(x: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
    """Matrices over a power of two that brings the largest entry of each to 1/2 .. 1, without rounding; 0 stays."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    least, most = wide.flatten(-2).aminmax(dim=-1)
    largest = torch.maximum(most, -least).double()
    power = (torch.frexp(largest).mantissa / largest).nan_to_num(1.0)  # of zeros, and of what is not finite, 1
    power = power.clamp(max=2.0 ** (126 if wide.dtype == torch.float32 else 1022))
    return wide * power.to(wide.dtype)[..., None, None]


def _norms(path: ModuleType, x: Tensor, norm: int) -> Tensor:
    """The order of a matrix's columns: sums over the rows, of the matrix in range where their squares leave it."""
    if x.device.type != "cpu":  # no waiting for a GPU to know
        return path.column_norms(in_range(x), norm)
    norms = path.column_norms(x, norm)
    largest = norms.amax(-1)
    return norms if bool(((largest > SAFE) & largest.isfinite()).all()) else path.column_norms(in_range(x), norm)


def _check(x: Tensor, k: int, norm: int) -> None:
    if not x.is_floating_point() or x.dtype.itemsize == 1 or x.ndim < 2 or 0 in x.shape:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be floating point, of two bytes at least, and hold "
            "matrices of at least one row and column"
        )
    if not 1 <= k <= x.shape[-1]:
        raise InputError(f"k is {k} but must be from 1 to {x.shape[-1]}, the columns of x")
    if norm not in (1, 2):
        raise InputError(f"norm is {norm} but must be 1 or 2")
