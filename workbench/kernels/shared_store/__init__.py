"""Weights that are looked up in one small array, and products with them: a weight is formed where it is multiplied.

Virtual weight i of a model, i >= 0, that has m stored numbers M is (RandomFold, Desai and Shrivastava 2023,
"In defense of parameter sharing for model-compression", arXiv:2310.11611)

    theta_i = scale * g_i * M[(u_c + i mod m) mod m],    c = i div m

so that every m weights in a row are the array once, turned by u_c and with signs g_i, and neighbours lie beside each
other in it. Both are functions of the seed, made by the generator of `random_basis` (Philox-4x32-10): g_i is -1 where
bit i mod 128 of its block i div 128 is set, u_c is the first 63 bits of its block 2**62 + c, mod m. No index is kept.

A matrix is its rows one after the other from number `offset` on. Paths: "reference", "native" (float32; without a C
compiler the reference runs) and "triton", each a module with

    expand(memory, seed, scale, offset, numel) -> (numel,)           fold(values, seed, scale, offset, m) -> (m,)
    product(x, memory, seed, scale, offset, width, transposed)       outer(grad, x, seed, scale, offset, m) -> (m,)

where fold is the transpose of expand, product is x W^T of W (width, K) for x (N, K), or x W of W (K, width) where
transposed, and outer folds grad^T x. memory (m,), float32 or float64 as all tensors but the seed () int64; scale ().
"""

from collections.abc import Sequence
from importlib import import_module
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.errors import InputError
from workbench.kernels import dispatch

__all__ = ["LAST", "shared_linear", "shared_weight"]

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")
LAST = 2**62
"""Weights have numbers below this one."""


def shared_weight(
    memory: Float[Tensor, " m"],
    seed: Int64[Tensor, ""],
    scale: Float[Tensor, ""],
    shape: Sequence[int],
    *,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The weights `offset` and following in `shape`; differentiable in the memory, any number of times.

    Args:
        memory: the stored numbers.
        seed: any 64 bits, on the same device.
        scale: of all these weights, on the same device and of the same type. It gets no gradient.
        backend: one of `BACKENDS`; None chooses by device.

    Returns:
        In the type of the memory; the same bits on every path.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    wide = _vector(memory)
    scale = scale.to(wide.dtype)
    _check(wide, seed, scale, len(wide), offset, shape)
    chosen = _chosen(backend, wide)
    return _expand(wide, seed, scale, offset, prod(shape), chosen).view(list(shape)).to(memory.dtype)


def shared_linear(
    x: Float[Tensor, "*batch in"],
    memory: Float[Tensor, " m"],
    seed: Int64[Tensor, ""],
    scale: Float[Tensor, ""],
    width: int,
    *,
    offset: int = 0,
    backend: str | None = None,
) -> Float[Tensor, "*batch width"]:
    """x W^T for the matrix W (width, in) that begins at weight `offset`; differentiable, any number of times.

    W is never there as a whole: some of its rows at a time are formed, and formed again in the backward pass, which
    keeps x alone. Arguments and errors are those of `shared_weight`.

    Returns:
        In the type of x, computed in float32 or wider.
    """
    if x.ndim < 1 or not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        raise InputError(f"x is {x.dtype} of shape {tuple(x.shape)} but must be floating point, (..., in)")
    kind = torch.promote_types(_vector(memory).dtype, x.dtype)
    rows, wide, scale = x.reshape(prod(x.shape[:-1]), x.shape[-1]).to(kind), memory.to(kind), scale.to(kind)
    _check(wide, seed, scale, len(wide), offset, (width, x.shape[-1]))
    chosen = _chosen(backend, wide)
    return _product(rows, wide, seed, scale, offset, width, False, chosen).view(*x.shape[:-1], width).to(x.dtype)


@torch.library.custom_op("workbench::shared_expand", mutates_args=())
def _expand(memory: Tensor, seed: Tensor, scale: Tensor, offset: int, numel: int, backend: str) -> Tensor:
    _check(memory, seed, scale, _size(memory), offset, (numel,))
    return _path(backend, memory).expand(memory.contiguous(), seed, scale, offset, numel)


@_expand.register_fake
def _(memory, seed, scale, offset, numel, backend):
    return memory.new_empty(numel)


@torch.library.custom_op("workbench::shared_fold", mutates_args=())
def _fold(values: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int, backend: str) -> Tensor:
    _check(values, seed, scale, m, offset, values.shape)
    return _path(backend, values).fold(values.contiguous(), seed, scale, offset, m)


@_fold.register_fake
def _(values, seed, scale, offset, m, backend):
    return values.new_empty(m)


@torch.library.custom_op("workbench::shared_product", mutates_args=())
def _product(
    x: Tensor, memory: Tensor, seed: Tensor, scale: Tensor, offset: int, width: int, transposed: bool, backend: str
) -> Tensor:
    _check(memory, seed, scale, _size(memory), offset, (width, _depth("x", x, memory)))
    return _path(backend, memory).product(x.contiguous(), memory.contiguous(), seed, scale, offset, width, transposed)


@_product.register_fake
def _(x, memory, seed, scale, offset, width, transposed, backend):
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("workbench::shared_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, seed: Tensor, scale: Tensor, offset: int, m: int, backend: str) -> Tensor:
    _check(x, seed, scale, m, offset, (_depth("grad", grad, x), _depth("x", x, x)))
    if len(grad) != len(x):
        raise InputError(f"grad has {len(grad)} rows but must have {len(x)}, as x")
    return _path(backend, x).outer(grad.contiguous(), x.contiguous(), seed, scale, offset, m)


@_outer.register_fake
def _(grad, x, seed, scale, offset, m, backend):
    return x.new_empty(m)


# Each operator is linear in its tensors, and the gradients of each are the others.


def _expand_grads(ctx, grad):
    seed, scale = ctx.saved_tensors
    return _fold(grad, seed, scale, ctx.offset, ctx.size, ctx.backend), *[None] * 5


def _fold_grads(ctx, grad):
    seed, scale = ctx.saved_tensors
    return _expand(grad, seed, scale, ctx.offset, ctx.size, ctx.backend), *[None] * 5


def _keep(ctx, inputs, output) -> None:
    given, seed, scale, ctx.offset, _, ctx.backend = inputs
    ctx.size = given.numel()
    ctx.save_for_backward(seed, scale)


def _product_grads(ctx, grad):
    x, memory, seed, scale = ctx.saved_tensors
    left, right = (x, grad) if ctx.transposed else (grad, x)
    of_x = of_memory = None
    if ctx.needs_input_grad[0]:
        of_x = _product(grad, memory, seed, scale, ctx.offset, x.shape[1], not ctx.transposed, ctx.backend)
    if ctx.needs_input_grad[1]:
        of_memory = _outer(left, right, seed, scale, ctx.offset, len(memory), ctx.backend)
    return of_x, of_memory, *[None] * 6


def _keep_product(ctx, inputs, output) -> None:
    x, memory, seed, scale, ctx.offset, _, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(x, memory, seed, scale)


def _outer_grads(ctx, by):
    grad, x, seed, scale = ctx.saved_tensors
    of_grad = _product(x, by, seed, scale, ctx.offset, grad.shape[1], False, ctx.backend)
    of_x = _product(grad, by, seed, scale, ctx.offset, x.shape[1], True, ctx.backend)
    return of_grad, of_x, *[None] * 5


def _keep_outer(ctx, inputs, output) -> None:
    grad, x, seed, scale, ctx.offset, _, ctx.backend = inputs
    ctx.save_for_backward(grad, x, seed, scale)


_expand.register_autograd(_expand_grads, setup_context=_keep)
_fold.register_autograd(_fold_grads, setup_context=_keep)
_product.register_autograd(_product_grads, setup_context=_keep_product)
_outer.register_autograd(_outer_grads, setup_context=_keep_outer)


@register_flop_formula(torch.ops.workbench.shared_product)
def _product_flops(x, memory, seed, scale, offset, width, *_, **__) -> int:
    return 2 * x[0] * x[1] * width


@register_flop_formula(torch.ops.workbench.shared_outer)
def _outer_flops(grad, x, *_, **__) -> int:
    return 2 * x[0] * x[1] * grad[1]


def _chosen(backend: str | None, wide: Tensor) -> str:
    if backend is None and wide.is_cuda and wide.dtype == torch.float64:
        return "reference"
    return dispatch.choose("shared_store", backend, wide.device, BACKENDS, wide.dtype, NATIVE)


def _path(backend: str, given: Tensor):
    dispatch.admit("shared_store", backend, given.device, BACKENDS, given.dtype)
    if backend == "triton" and given.dtype != torch.float32:
        raise InputError(
            f"backend is 'triton' but shared_store got tensors of {given.dtype}; they must be torch.float32"
        )
    chosen = dispatch.begin("shared_store", backend, NATIVE)
    return import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")


def _vector(memory: Tensor) -> Tensor:
    """The array in float32 or wider."""
    if not memory.dtype.is_floating_point or memory.dtype.itemsize == 1:
        raise InputError(f"memory is {memory.dtype} but must be floating point, of two bytes at least")
    _size(memory)
    return memory.to(torch.promote_types(memory.dtype, torch.float32))


def _size(memory: Tensor) -> int:
    if memory.ndim != 1:
        raise InputError(f"memory is of shape {tuple(memory.shape)} but must be (m,)")
    return len(memory)


def _depth(name: str, x: Tensor, like: Tensor) -> int:
    if x.ndim != 2 or x.dtype != like.dtype or x.device != like.device:
        raise InputError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device} but must be a {like.dtype} matrix on "
            f"{like.device}"
        )
    return x.shape[1]


def _check(given: Tensor, seed: Tensor, scale: Tensor, m: int, offset: int, shape: Sequence[int]) -> None:
    if given.dtype not in (torch.float32, torch.float64):
        raise InputError(f"memory is {given.dtype} but must be torch.float32 or torch.float64")
    for name, tensor, dtype in (("seed", seed, torch.int64), ("scale", scale, given.dtype)):
        if tensor.dtype != dtype or tensor.ndim or tensor.device != given.device:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} but must be one {dtype} "
                f"number on {given.device}"
            )
    if m < 1:
        raise InputError(f"memory has {m} numbers but must have at least 1, (m,)")
    if offset < 0 or min(shape, default=0) < 0 or offset + prod(shape) > LAST:
        raise InputError(f"offset, shape are {offset}, {tuple(shape)} but must be weights from 0 to 2**62 - 1")
