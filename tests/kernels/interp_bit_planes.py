"""The Triton kernels of the bit planes under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.kernels import dequantise_planes, dispatch, pack_planes, unpack_planes
from workbench.kernels.bit_planes import triton


def check(codes, bits, dtype=torch.float32, group=16):
    cols, generator = codes.shape[-1], torch.Generator().manual_seed(1)
    planes = pack_planes(codes, bits, backend="triton")
    assert dispatch.last_backend("pack_planes") == "triton"
    assert torch.equal(planes, pack_planes(codes, bits, backend="reference"))
    shape = (*codes.shape[:-1], -(-cols // group))
    scale, offset = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    for level in {1, bits - 1 or 1, bits}:
        part = planes[..., :level, :, :]
        assert torch.equal(unpack_planes(part, cols, backend="triton"), codes >> (bits - level))
        ours, exact = (
            dequantise_planes(part, scale, offset, cols, group, backend=backend) for backend in ("triton", "reference")
        )
        # the interpreter cuts a bfloat16 off where a GPU rounds it
        tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        assert torch.allclose(ours, exact, rtol=tolerance, atol=0)


def codes_of(*shape, bits):
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_reference(dtype):
    check(codes_of(2, 3, 37, bits=8), 8, dtype)


def test_the_edges_of_the_stretches(monkeypatch):
    monkeypatch.setattr(triton, "BYTES", 2)
    for rows, cols, bits in ((1, 1, 1), (2, 16, 3), (3, 17, 4), (1, 33, 5)):
        check(codes_of(rows, cols, bits=bits), bits, group=5)


def test_registration():
    codes = codes_of(3, 9, bits=4)
    torch.library.opcheck(torch.ops.workbench.pack_planes.default, (codes, 4, "triton"))
