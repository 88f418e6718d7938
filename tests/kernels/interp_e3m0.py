"""The Triton kernels of `e3m0_pack` and `e3m0_unpack` under the interpreter; run by test_interpreter in a process."""

import pytest
import torch

from tests.draws import draw
from workbench.kernels import dispatch, e3m0_pack, e3m0_unpack
from workbench.kernels.e3m0 import BLOCKS, SMALLEST


def check(x, block):
    codes, scales = e3m0_pack(x, block, backend="triton")
    assert dispatch.last_backend("e3m0_pack") == "triton"
    expected = e3m0_pack(x, block, backend="reference")
    assert torch.equal(codes, expected[0]) and torch.equal(scales.nan_to_num(7.0), expected[1].nan_to_num(7.0))
    found = e3m0_unpack(codes, scales, len(x), block, backend="triton")
    assert dispatch.last_backend("e3m0_unpack") == "triton"
    exact = e3m0_unpack(codes, scales, len(x), block, backend="reference")
    assert torch.equal(found.nan_to_num(7.0), exact.nan_to_num(7.0))
    assert torch.equal(found.isnan() | found.signbit(), exact.isnan() | exact.signbit())


@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_reference_to_the_last_bit(block):
    for n in (0, 1, 17, 2047, 2048, 2049):  # the edges of a block, of a program
        check(draw(n) * 2 ** (4 * draw(n, seed=1)), block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_types_are_rounded_to_float32(dtype):
    check(draw(300, dtype=dtype), 64)


def test_zeros_numbers_too_small_and_what_is_no_number():
    x = draw(128)
    x[:16], x[20], x[40] = 0.0, torch.nan, torch.inf
    x[48:64] *= SMALLEST
    check(x, 16)


def test_registration():
    codes, scales = e3m0_pack(draw(50), 16, backend="triton")
    torch.library.opcheck(torch.ops.workbench.e3m0_pack.default, (draw(50), 16, "triton"))
    torch.library.opcheck(torch.ops.workbench.e3m0_unpack.default, (codes, scales, 50, 16, "triton"))
