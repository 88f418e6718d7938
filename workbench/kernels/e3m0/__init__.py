"""Four bits a number: a sign and three bits of exponent (E3M0), with a scale for each block of numbers.

    level: 0, 1/4, 1/2, 1, 2, 4, 8, 16 for the exponents 0 .. 7      scale of a block: its largest magnitude / 16

A number is the nearest level times its scale; halfway, the smaller one. From a quarter of the scale on it is at most a
third off. Two codes are a byte, the first of them its lower half: n numbers are ceil(n / 2) + 4 ceil(n / block) bytes.

Paths: "reference", "cpu" and "triton", each a module with

    e3m0_pack(x, block) -> codes, scales        e3m0_unpack(codes, scales, n, block) -> x

x (n,) contiguous float32. All paths agree to the last bit: magnitudes are compared as integers, and no sum is made.
"""

from importlib import import_module

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels import dispatch

BACKENDS = ("reference", "cpu", "triton")
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
SMALLEST = 2.0**-123
"""Scales below it are zero: a third of an eighth of it is still a normal number, and the same everywhere."""


def e3m0_pack(
    x: Float[Tensor, " n"], block: int = 128, *, backend: str | None = None
) -> tuple[UInt8[Tensor, " bytes"], Float32[Tensor, " blocks"]]:
    """The codes and scales of the numbers of `x`, rounded to float32 before.

    A block with a number that is not finite has such a scale, and is unpacked as NaN throughout. What is unpacked is
    packed as it was.

    Args:
        block: numbers that share a scale, one of `BLOCKS`.
        backend: one of `BACKENDS`; None chooses by device.

    Raises:
        InputError: names the argument that does not fit, or the backend that cannot do this.
    """
    _check_pack(x, block)
    return _pack(x, block, dispatch.choose("e3m0_pack", backend, x.device, BACKENDS))


def e3m0_unpack(
    codes: UInt8[Tensor, " bytes"],
    scales: Float32[Tensor, " blocks"],
    n: int,
    block: int = 128,
    *,
    backend: str | None = None,
) -> Float32[Tensor, " n"]:
    """The n numbers that `e3m0_pack` made `codes` and `scales` of, in float32. Arguments and errors as there."""
    _check_unpack(codes, scales, n, block)
    return _unpack(codes, scales, n, block, dispatch.choose("e3m0_unpack", backend, codes.device, BACKENDS))


def sizes(n: int, block: int) -> tuple[int, int]:
    """(bytes of codes, number of scales) of n numbers."""
    return (n + 1) // 2, (n + block - 1) // block


@torch.library.custom_op("workbench::e3m0_pack", mutates_args=())
def _pack(x: Tensor, block: int, backend: str) -> tuple[Tensor, Tensor]:
    _check_pack(x, block)
    dispatch.admit("e3m0_pack", backend, x.device, BACKENDS)
    dispatch.begin("e3m0_pack", backend)
    return import_module(f"{__name__}.{backend}").e3m0_pack(x.to(torch.float32).contiguous(), block)


@_pack.register_fake
def _(x, block, backend):
    n_bytes, n_scales = sizes(x.shape[0], block)
    return x.new_empty(n_bytes, dtype=torch.uint8), x.new_empty(n_scales, dtype=torch.float32)


@torch.library.custom_op("workbench::e3m0_unpack", mutates_args=())
def _unpack(codes: Tensor, scales: Tensor, n: int, block: int, backend: str) -> Tensor:
    _check_unpack(codes, scales, n, block)
    dispatch.admit("e3m0_unpack", backend, codes.device, BACKENDS)
    dispatch.begin("e3m0_unpack", backend)
    path = import_module(f"{__name__}.{backend}")
    return path.e3m0_unpack(codes.contiguous(), scales.contiguous(), n, block)


@_unpack.register_fake
def _(codes, scales, n, block, backend):
    return scales.new_empty(n)


def _check_block(block: int) -> None:
    if block not in BLOCKS:
        raise InputError(f"block is {block} but must be one of {', '.join(map(str, BLOCKS))}")


def _check_pack(x: Tensor, block: int) -> None:
    _check_block(block)
    if not x.is_floating_point() or x.dtype.itemsize == 1 or x.ndim != 1:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)} but must be floating point, of two bytes at least, and of one "
            "dimension"
        )


def _check_unpack(codes: Tensor, scales: Tensor, n: int, block: int) -> None:
    _check_block(block)
    if n < 0:
        raise InputError(f"n is {n} but must be at least 0")
    n_bytes, n_scales = sizes(n, block)
    for name, tensor, dtype, length in (
        ("codes", codes, torch.uint8, n_bytes),
        ("scales", scales, torch.float32, n_scales),
    ):
        if tensor.dtype != dtype or tensor.shape != (length,):
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} but must be {dtype} of shape ({length},), as "
                f"{n} numbers in blocks of {block} have it"
            )
    if scales.device != codes.device:
        raise InputError(f"scales is on {scales.device} but must be where codes is, on {codes.device}")
