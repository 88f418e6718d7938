"""One level of the two-dimensional Haar wavelet transform, orthonormal, and its inverse, which is its adjoint.

Paths: "reference", "native" (float32) and "triton", each a module with

    haar_dwt2(x) -> y       (planes, C, H, W) -> (planes, 4 C, H / 2, W / 2)
    haar_idwt2(y) -> x      back

contiguous. Of a cell a b / c d of a channel come one number of each sub-band:

    LL = (a + b + c + d) / 2      LH = (a + b - c - d) / 2
    HL = (a - b + c - d) / 2      HH = (a - b - c + d) / 2

The sub-bands follow each other, C channels each: LL, LH, HL, HH are cA, cH, cV, cD of PyWavelets. All paths make the
same sums of the same pairs, in float32 or wider, so they agree to the last bit.
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


def haar_dwt2(
    x: Float[Tensor, "*batch channels height width"], *, backend: str | None = None
) -> Float[Tensor, "*batch bands half_height half_width"]:
    """The four sub-bands of every channel at half the size; energy is kept, and its gradient is `haar_idwt2`.

    Args:
        x: height and width even.
        backend: one of `BACKENDS`; None chooses by device and type.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check(x, False)
    return _forward(x, False, dispatch.choose("haar", backend, x.device, BACKENDS, x.dtype, NATIVE))


def haar_idwt2(
    y: Float[Tensor, "*batch bands half_height half_width"], *, backend: str | None = None
) -> Float[Tensor, "*batch channels height width"]:
    """The channels whose sub-bands these are, at twice the size: the inverse of `haar_dwt2`, and its adjoint.

    Args:
        y: as many channels as four sub-bands have, LL, LH, HL, HH one after the other.

    Raises:
        InputError: as `haar_dwt2`.
    """
    _check(y, True)
    return _forward(y, True, dispatch.choose("haar", backend, y.device, BACKENDS, y.dtype, NATIVE))


@torch.library.custom_op("workbench::haar", mutates_args=())
def _forward(x: Tensor, inverse: bool, backend: str) -> Tensor:
    _check(x, inverse)
    dispatch.admit("haar", backend, x.device, BACKENDS, x.dtype)
    chosen = dispatch.begin("haar", backend, NATIVE)
    path = import_module(f"{__name__}.{'reference' if chosen == 'cpu' else chosen}")
    shape = _shape(x, inverse)
    if not x.numel():
        return x.new_empty(shape)
    planes = x.contiguous().view(-1, *x.shape[-3:])
    return (path.haar_idwt2 if inverse else path.haar_dwt2)(planes).view(shape)


@_forward.register_fake
def _(x, inverse, backend):
    return x.new_empty(_shape(x, inverse))


def _shape(x: Tensor, inverse: bool) -> tuple[int, ...]:
    *batch, channels, height, width = x.shape
    return (
        (*batch, channels // 4, 2 * height, 2 * width) if inverse else (*batch, 4 * channels, height // 2, width // 2)
    )


def _setup(ctx, inputs, output) -> None:
    _, ctx.inverse, ctx.backend = inputs


def _grads(ctx, grad):
    return _forward(grad, not ctx.inverse, ctx.backend), None, None


_forward.register_autograd(_grads, setup_context=_setup)


def _check(x: Tensor, inverse: bool) -> None:
    name = "y" if inverse else "x"
    if not x.is_floating_point() or x.dtype.itemsize == 1 or x.ndim < 3:
        raise InputError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)} but must be floating point, of two bytes at least, with "
            "dimensions channels, height, width at its end"
        )
    if inverse and x.shape[-3] % 4:
        raise InputError(f"y has {x.shape[-3]} channels but must have a multiple of 4: as many in each sub-band")
    if not inverse and (x.shape[-2] % 2 or x.shape[-1] % 2):
        raise InputError(f"x is {x.shape[-2]} x {x.shape[-1]} but its height and width must be even")
