"""The fast Walsh-Hadamard transform of the last dimension, not normalised: H x, where H H = 2^n.

Paths: "reference", "native" (float32) and "triton", each a module with

    walsh_hadamard(x) -> H x

x (rows, 2^n) contiguous. All paths make the same sums of the same pairs, in float32 or wider, so they agree to the last
bit.
"""

from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "native", "triton")
NATIVE = Path(__file__).with_name("native.c")


def walsh_hadamard(x: Float[Tensor, "*batch length"], *, backend: str | None = None) -> Float[Tensor, "*batch length"]:
    """H x over the last dimension, of 2^n numbers, in Sylvester's order: H_ij = (-1)^(ones in the binary i & j).

    H is symmetric, so the gradient is H of the gradient; H H x = 2^n x. n 2^n sums of pairs, in float32 or wider.

    Args:
        x: its last dimension is a power of two, at least 1.
        backend: one of `BACKENDS`; None chooses by device and type.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(x)
    return _forward(x, dispatch.choose("walsh_hadamard", backend, x.device, BACKENDS, x.dtype, NATIVE))


@torch.library.custom_op("workbench::walsh_hadamard", mutates_args=())
def _forward(x: Tensor, backend: str) -> Tensor:
    _check(x)
    dispatch.admit("walsh_hadamard", backend, x.device, BACKENDS, x.dtype)
    chosen = dispatch.begin("walsh_hadamard", backend, NATIVE)
    path = import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")
    rows = x.contiguous().view(-1, x.shape[-1])
    return path.walsh_hadamard(rows).view(x.shape)


@_forward.register_fake
def _(x, backend):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, ctx.backend = inputs


def _grads(ctx, grad):
    return _forward(grad, ctx.backend), None


_forward.register_autograd(_grads, setup_context=_setup)


def _check(x: Tensor) -> None:
    length = x.shape[-1] if x.ndim else 0
    if not x.is_floating_point() or x.dtype.itemsize == 1 or length < 1 or length & (length - 1):
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be floating point, of two bytes at least, its last "
            "dimension a power of two"
        )
