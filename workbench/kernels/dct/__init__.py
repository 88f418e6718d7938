"""The orthonormal cosine transform of the last dimension, type 2, and its inverse, type 3.

    y = x C,  C_jk = sqrt(2 / m) cos(pi k (2 j + 1) / (2 m)),  column 0 divided by sqrt(2);  C^T C = I

Paths: "reference" and "triton", the product with C, and "cpu", that or an FFT by what is faster at the size; each a
module with

    dct_rows(x, inverse) -> x C, or x C^T

x (rows, m) contiguous. Added in float32 or wider.
"""

from functools import lru_cache
from importlib import import_module
from math import pi

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "cpu", "triton")


def dct2_rows(x: Float[Tensor, "*batch m"], *, backend: str | None = None) -> Float[Tensor, "*batch m"]:
    """x C: the cosine transform of every row, `scipy.fft.dct(x, type=2, norm="ortho")`.

    Args:
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    return _transform(x, False, backend)


def dct3_rows(x: Float[Tensor, "*batch m"], *, backend: str | None = None) -> Float[Tensor, "*batch m"]:
    """x C^T: the inverse of `dct2_rows`, with its arguments."""
    return _transform(x, True, backend)


@lru_cache(maxsize=16)
def dct_basis(m: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, "m m"]:
    """C (m, m), whose columns are the cosine vectors. It is kept: one for each width, not to be changed."""
    if m < 1:
        raise InputError(f"m is {m} but must be at least 1")
    with torch.inference_mode(False):
        j, k = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
        # The angle is a multiple of pi / 2m, reduced before it is rounded.
        angle = ((2 * j + 1) * k) % (4 * m) * (pi / (2 * m))
        basis = angle.cos() * (2 / m) ** 0.5
        basis[:, 0] = m**-0.5
        return basis.to(device, dtype)


def _transform(x: Tensor, inverse: bool, backend: str | None) -> Tensor:
    _check(x)
    chosen = dispatch.choose("dct_rows", backend, x.device, BACKENDS)
    return (_run if dispatch.unseen(x) else _forward)(x, inverse, chosen)


def _run(x: Tensor, inverse: bool, backend: str) -> Tensor:
    _check(x)
    dispatch.admit("dct_rows", backend, x.device, BACKENDS, x.dtype)
    path = import_module(f"{__name__}.{dispatch.begin('dct_rows', backend)}")
    return path.dct_rows(x.contiguous().view(-1, x.shape[-1]), inverse).view(x.shape)


_forward = torch.library.custom_op("workbench::dct_rows", _run, mutates_args=())


@_forward.register_fake
def _(x, inverse, backend):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, ctx.inverse, ctx.backend = inputs


def _grads(ctx, grad):
    return _forward(grad, not ctx.inverse, ctx.backend), None, None


_forward.register_autograd(_grads, setup_context=_setup)


def _check(x: Tensor) -> None:
    if not x.is_floating_point() or x.dtype.itemsize == 1 or x.ndim < 1 or x.shape[-1] < 1:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be floating point, of two bytes at least, its last "
            "dimension at least 1"
        )
