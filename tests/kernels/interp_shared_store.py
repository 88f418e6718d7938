"""The Triton kernels of the shared store under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, shared_linear, shared_weight
from workbench.kernels.shared_store import triton as path

SEED, SCALE = torch.tensor(-0x0123456789ABCDEF), torch.tensor(0.37)
ops = torch.ops.workbench


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several programs and panels of small problems."""
    monkeypatch.setattr(path, "LINES", 16)
    monkeypatch.setattr(path, "ROWS", 16)
    monkeypatch.setattr(path, "BLOCK", 64)
    monkeypatch.setattr(path, "PANEL", 200)


@pytest.mark.parametrize(("m", "offset"), [(1, 5), (31, 0), (32, 126), (33, 5), (700, 2**40 + 3)])
def test_weights_are_those_of_the_reference_bit_for_bit(m, offset):
    memory = torch.randn(m)
    expected = shared_weight(memory, SEED, SCALE, (301,), offset=offset, backend="reference")
    assert torch.equal(shared_weight(memory, SEED, SCALE, (301,), offset=offset, backend="triton"), expected)
    assert dispatch.last_backend("shared_store") == "triton"


@pytest.mark.parametrize(("m", "offset"), [(31, 77), (100, 0)])
def test_sums_are_those_of_the_reference(m, offset):
    values = torch.randn(201)
    ours, theirs = (ops.shared_fold(values, SEED, SCALE, offset, m, name) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert torch.equal(ops.shared_fold(values, SEED, SCALE, offset, m, "triton"), ours)


@pytest.mark.parametrize(("n", "depth", "width", "m"), [(1, 1, 1, 1), (17, 33, 20, 66), (5, 20, 34, 20)])
def test_products_and_their_gradients(n, depth, width, m):
    x, memory, grad = torch.randn(n, depth), torch.randn(m), torch.randn(n, width)
    results = []
    for name in ("triton", "reference"):
        given = x.clone().requires_grad_(), memory.clone().requires_grad_()
        y = shared_linear(*given, SEED, SCALE, width, offset=11, backend=name)
        results.append([y, *torch.autograd.grad(y, given, grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_what_lies_behind_the_end_is_not_read_and_nothing_is_nothing():
    x = torch.full((40, 20), torch.nan)
    x[:3] = torch.randn(3, 20)
    memory = torch.full((90,), torch.nan)
    memory[:50] = torch.randn(50)
    y = shared_linear(x[:3], memory[:50], SEED, SCALE, 7, backend="triton")
    assert not y.isnan().any()
    assert shared_linear(x[:0], memory[:50], SEED, SCALE, 7, backend="triton").shape == (0, 7)
    assert shared_weight(memory[:50], SEED, SCALE, (0, 3), backend="triton").shape == (0, 3)
    assert not ops.shared_outer(torch.zeros(0, 3), torch.zeros(0, 2), SEED, SCALE, 0, 5, "triton").any()
    with pytest.raises(InputError, match=r"must be torch\.float32"):
        shared_weight(memory.double(), SEED, SCALE, (3,), backend="triton")


def test_registration():
    x, memory = torch.randn(3, 4, requires_grad=True), torch.randn(9, requires_grad=True)
    torch.library.opcheck(ops.shared_product.default, (x, memory, SEED, SCALE, 1, 5, False, "triton"))
    torch.library.opcheck(ops.shared_outer.default, (x, torch.randn(3, 2), SEED, SCALE, 1, 9, "triton"))
