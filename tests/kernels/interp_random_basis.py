"""The Triton kernels of `random_basis` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.kernels import dispatch, random_basis, random_basis_adjoint
from workbench.kernels.random_basis import triton as path
from workbench.kernels.random_basis import uniform

SEED = torch.tensor(-0x0123456789ABCDEF)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks and parts of small problems."""
    monkeypatch.setattr(path, "BLOCK", 64)
    monkeypatch.setattr(path, "FEWEST", 2)


@pytest.mark.parametrize("start", [0, 4, 5, 2**34 + 3, 2**63 - 300])
@pytest.mark.parametrize("size", [1, 4, 63, 64, 66, 200])
def test_the_numbers_are_those_of_the_reference_bit_for_bit(start, size):
    expected = uniform(SEED, start, size, backend="reference")
    assert torch.equal(uniform(SEED, start, size, backend="triton"), expected)
    assert dispatch.last_backend("random_basis") == "triton"


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("shape", [(5, 3), (4, 8), (10, 13), (132,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_products_are_those_of_the_stored_basis(start, shape, dtype):
    k, generator = 7, torch.Generator().manual_seed(0)
    c = torch.randn(k, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    basis = uniform(SEED, start, k * x.numel(), torch.float64).view(k, *shape)
    made = random_basis(c, SEED, shape, start=start, backend="triton")
    found = random_basis_adjoint(x, SEED, k, start=start, backend="triton")
    step = torch.finfo(dtype).eps / 2
    assert made.dtype == found.dtype == dtype and found.shape == (k,)
    off = (made.double() - torch.tensordot(c.double(), basis, 1)).abs().max()
    assert off <= step * (k + 1) * c.abs().sum()
    off = (found.double() - basis.view(k, -1) @ x.double().flatten()).abs().max()
    assert off <= step * (x.numel() + 1) * x.abs().sum()
    assert torch.equal(made, random_basis(c, SEED, shape, start=start, backend="triton"))


def test_tensors_and_elements_are_split_where_there_are_few_of_the_other():
    assert path._per(100, 4096) > 100 and path._per(512, 8) == 4 and path._per(3, 1) == 2
    c, x = torch.randn(5), torch.randn(300)
    for programs in (1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(path, "PROGRAMS", programs)
            made, found = path.mix(c, SEED, 300, 3), path.products(x, SEED, 5, 3)
        assert torch.allclose(made, random_basis(c, SEED, (300,), start=3, backend="reference"), atol=1e-5)
        assert torch.allclose(found, random_basis_adjoint(x, SEED, 5, start=3, backend="reference"), atol=1e-4)


def test_nothing_to_sum():
    assert torch.equal(random_basis(torch.empty(0), SEED, (2, 3), backend="triton"), torch.zeros(2, 3))
    assert random_basis(torch.randn(3), SEED, (0, 3), backend="triton").shape == (0, 3)
    assert torch.equal(random_basis_adjoint(torch.empty(0, 3), SEED, 4, backend="triton"), torch.zeros(4))


def test_what_lies_behind_the_end_is_not_read():
    x = torch.full((200,), float("nan"))
    x[:70] = torch.randn(70)
    assert not random_basis_adjoint(x[:70], SEED, 3, backend="triton").isnan().any()


def test_gradients_and_registration():
    c, x = torch.randn(5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(random_basis(c, SEED, (3, 4), backend=name).square().sum(), c)[0]
        for name in ("triton", "reference")
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    torch.library.opcheck(torch.ops.workbench.random_basis.default, (c, SEED, [3, 4], 1, "triton"))
    torch.library.opcheck(torch.ops.workbench.random_basis_adjoint.default, (x, SEED, 5, 1, "triton"))
