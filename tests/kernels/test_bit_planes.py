"""Bit planes on the CPU: exact in both directions, nested, their bytes by formula, weights at every level."""

from itertools import pairwise

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dequantise_planes, dispatch, pack_planes, plane_bytes, unpack_planes
from workbench.kernels.bit_planes import BACKENDS

CPU = [backend for backend in BACKENDS if backend != "triton"]


def codes_of(*shape: int, bits: int = 8, seed: int = 0) -> torch.Tensor:
    made = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    made.view(-1)[0] = 2**bits - 1
    return made


@pytest.mark.parametrize("backend", CPU)
def test_by_hand(backend):
    """Columns 0 and 9 hold binary 110 and 011: bits 0 and, in the second byte, 1."""
    codes = torch.zeros(1, 10, dtype=torch.uint8)
    codes[0, 0], codes[0, 9] = 0b110, 0b011
    planes = pack_planes(codes, 3, backend=backend)
    assert planes.tolist() == [[[1, 0]], [[1, 2]], [[0, 2]]]
    assert dispatch.last_backend("pack_planes") == backend
    half = torch.tensor([[0.5, 2.0]])
    made = dequantise_planes(planes[:2], half, torch.tensor([[1.0, -1.0]]), 10, 8, backend=backend)
    assert made.tolist() == [[1 + 0.5 * 0b11, *[1.0] * 7, -1.0, -1 + 2 * 0b01]]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 17), (2, 4, 31), (2, 3, 2, 64)])
def test_every_prefix_is_the_code_shifted(backend, bits, shape):
    codes = codes_of(*shape, bits=bits)
    planes = pack_planes(codes, bits, backend=backend)
    assert planes.numel() == codes[..., 0, 0].numel() * plane_bytes(*shape[-2:], bits)
    levels = [unpack_planes(planes[..., : b + 1, :, :], shape[-1], backend=backend) for b in range(bits)]
    assert torch.equal(levels[-1], codes)
    for low, high in pairwise(levels):
        assert torch.equal(low, high >> 1)
    assert torch.equal(planes, pack_planes(codes, bits, backend="reference"))


def test_bytes_are_those_of_the_formula():
    planes = pack_planes(codes_of(6, 100), 8)
    size = [plane_bytes(6, 100, b) for b in range(1, 9)]
    assert size == [planes[:b].numel() for b in range(1, 9)] == [b * 6 * 13 for b in range(1, 9)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cols", "group"), [(64, 16), (70, 16), (5, 64), (9, 1)])
def test_weights_are_the_same_on_every_path(dtype, cols, group):
    planes, generator = pack_planes(codes_of(2, 7, cols)), torch.Generator().manual_seed(1)
    groups = -(-cols // group)
    scale, offset = (torch.randn(2, 7, groups, generator=generator).to(dtype) for _ in range(2))
    for bits in (1, 4, 8):
        made = [dequantise_planes(planes[:, :bits], scale, offset, cols, group, backend=backend) for backend in CPU]
        assert all(torch.equal(made[0], other) and other.dtype == dtype for other in made)
        codes = unpack_planes(planes[:, :bits], cols)
        column = cols - 1
        exact = offset[..., column // group].double() + scale[..., column // group].double() * codes[..., column]
        assert torch.allclose(made[0][..., column].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_views_that_start_anywhere():
    codes = codes_of(5, 41)
    for view in (codes.T, codes[1:, 3:27], codes.view(-1)[3:19].view(2, 8), codes.view(-1)[3:195].view(4, 48)):
        assert torch.equal(unpack_planes(pack_planes(view), view.shape[-1]), view)


def test_registration_and_compilation():
    codes, group = codes_of(3, 5, 20, bits=4), 8
    planes, scale = pack_planes(codes, 4), torch.rand(3, 5, 3)
    for backend in CPU:
        torch.library.opcheck(torch.ops.workbench.pack_planes.default, (codes, 4, backend))
        torch.library.opcheck(torch.ops.workbench.unpack_planes.default, (planes, 20, backend))
        torch.library.opcheck(torch.ops.workbench.dequantise_planes.default, (planes, scale, scale, 20, group, backend))
    compiled = torch.compile(
        lambda codes: dequantise_planes(pack_planes(codes, 4)[:, :3], scale, scale, 20, group),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(codes), dequantise_planes(planes[:, :3], scale, scale, 20, group))


PLANES = torch.zeros(2, 3, 1, dtype=torch.uint8)
SCALE = torch.zeros(3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_planes(torch.zeros(3, 4)), "codes are torch.float32"),
        (lambda: pack_planes(torch.zeros(0, 4, dtype=torch.uint8)), "a row and a column at least"),
        (lambda: pack_planes(torch.zeros(4, dtype=torch.uint8)), r"of shape \(4,\)"),
        (lambda: pack_planes(torch.zeros(3, 4, dtype=torch.uint8), 9), "bits is 9 but must be from 1 to 8"),
        (lambda: pack_planes(torch.full((3, 4), 8, dtype=torch.uint8), 3), "codes hold 8 but must be below 8"),
        (lambda: torch.ops.workbench.pack_planes(torch.full((3, 4), 8, dtype=torch.uint8), 3, "cpu"), "codes hold 8"),
        (lambda: unpack_planes(PLANES, 9), "cols is 9 but must fill the 1 bytes"),
        (lambda: unpack_planes(PLANES.expand(9, 2, 3, 1).transpose(0, 1), 8), "of 1 to 8 bits"),
        (lambda: unpack_planes(PLANES, 8, backend="native"), "backend of unpack_planes 'native' is unknown"),
        (lambda: dequantise_planes(PLANES, SCALE, SCALE, 8, 0), "group is 0"),
        (lambda: dequantise_planes(PLANES, SCALE, SCALE, 8, 4), r"but must have \(3, 2\)"),
        (lambda: dequantise_planes(PLANES, SCALE, SCALE.double(), 8, 8), "of one floating type"),
        (lambda: dequantise_planes(PLANES, SCALE.int(), SCALE.int(), 8, 8), "of one floating type"),
        (lambda: dequantise_planes(PLANES, SCALE.to("meta"), SCALE, 8, 8), "but scale on meta"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
