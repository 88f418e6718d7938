"""The Haar transform on its CPU paths: PyWavelets' bands, energy, the inverse as adjoint, equal bits, registration."""

import numpy as np
import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, haar_dwt2, haar_idwt2, threads
from workbench.kernels.haar import native

PATHS = ("reference", "native")


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (16, 16)])
def test_bands_are_those_of_pywavelets(size):
    pywt = pytest.importorskip("pywt")
    x = draw(2, 3, *size, dtype=torch.float64)
    low, (lh, hl, hh) = pywt.dwt2(x.numpy(), "haar")  # even sizes: its modes at the border do not differ
    theirs = np.concatenate([low, lh, hl, hh], 1)
    assert np.abs(haar_dwt2(x).numpy() - theirs).max() < 1e-14
    back = pywt.idwt2((low, (lh, hl, hh)), "haar")
    assert np.abs(haar_idwt2(torch.tensor(theirs)).numpy() - back).max() < 1e-14


def test_energy_is_kept_and_the_inverse_is_one_on_both_sides():
    x, y = draw(2, 3, 8, 12, dtype=torch.float64), draw(2, 12, 4, 6, dtype=torch.float64, seed=1)
    assert torch.allclose(haar_idwt2(haar_dwt2(x)), x, atol=1e-12)
    assert torch.allclose(haar_dwt2(haar_idwt2(y)), y, atol=1e-12)
    assert torch.allclose(haar_dwt2(x).square().sum(), x.square().sum(), rtol=1e-12)
    assert torch.allclose((haar_dwt2(x) * y).sum(), (x * haar_idwt2(y)).sum(), rtol=1e-12)


def test_a_constant_has_no_detail_and_a_shift_by_two_is_one_by_one():
    low, *detail = haar_dwt2(torch.full((1, 1, 8, 8), 3.0)).chunk(4, 1)
    assert (low == 6).all() and not torch.cat(detail).any()
    x = draw(1, 2, 8, 8)
    assert torch.equal(haar_dwt2(x.roll((2, 2), (2, 3))), haar_dwt2(x).roll((1, 1), (2, 3)))
    odd = haar_dwt2(x.roll(1, 3))
    assert not any(torch.allclose(odd, haar_dwt2(x).roll(k, 3)) for k in range(4))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 16, 17, 33])
def test_the_native_path_has_the_bits_of_the_reference(width):
    x, y = draw(2, 3, 6, 2 * width), draw(2, 12, 3, width, seed=1)
    for function, value in ((haar_dwt2, x), (haar_idwt2, y)):
        kept = value.clone()
        assert torch.equal(function(value, backend="native"), function(value, backend="reference"))
        assert torch.equal(value, kept)


def test_threads_take_channels_and_change_no_bit(monkeypatch, compiler):
    monkeypatch.setattr(native, "WORTH", 64)
    shared = []
    share = threads.share
    monkeypatch.setattr(threads, "share", lambda items, *rest: (shared.append(items), share(items, *rest)))
    x, before = draw(1, 7, 8, 8), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = haar_dwt2(x)
        back = haar_idwt2(found)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, haar_dwt2(x, backend="reference"))
    assert torch.equal(back, haar_idwt2(found, backend="reference"))
    assert shared == ([[range(3), range(3, 7)]] * 2 if threads.available() > 0 and threads._controls() else [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = draw(2, 4, 4, 6, dtype=dtype)
    for function in (haar_dwt2, haar_idwt2):
        assert function(x).dtype == dtype and torch.equal(function(x), function(x.float()).to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_registration_and_compilation(path):
    for inverse, function, other in ((False, haar_dwt2, haar_idwt2), (True, haar_idwt2, haar_dwt2)):
        x = draw(2, 4, 4, 6).requires_grad_()
        y = function(x, backend=path)
        grad = draw(*y.shape, seed=1)
        (found,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(found, other(grad)) and dispatch.last_backend("haar") == "native"
        torch.library.opcheck(torch.ops.workbench.haar.default, (x, inverse, path))
        compiled = torch.compile(lambda x: function(x, backend=path), fullgraph=True, backend="aot_eager")  # noqa: B023
        assert torch.equal(compiled(x), function(x))
        wide = draw(1, 4, 2, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(function, wide) and torch.autograd.gradgradcheck(function, wide)


def test_shapes_and_views():
    x = draw(3, 2, 4, 6, 8)
    assert torch.equal(haar_dwt2(x)[1], haar_dwt2(x[1]))
    assert torch.equal(haar_dwt2(x[0, 0]), haar_dwt2(x)[0, 0])  # one image, in no batch
    last = x[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(haar_dwt2(last), haar_dwt2(x[0])) and haar_dwt2(last).is_contiguous()
    for path in PATHS:
        assert haar_dwt2(torch.empty(0, 3, 4, 4), backend=path).shape == (0, 12, 2, 2)
        assert haar_idwt2(torch.empty(2, 4, 0, 3), backend=path).shape == (2, 1, 0, 6)


def test_what_is_not_a_number_stays_in_its_cell():
    x = draw(1, 2, 4, 4)
    clean = haar_dwt2(x)
    x[0, 1, 3, 0] = torch.nan
    for path in PATHS:
        out = haar_dwt2(x, backend=path)
        assert out[0, 1::2, 1, 0].isnan().all() and out.isnan().sum() == 4
        assert torch.equal(out[0, 0::2], clean[0, 0::2])


def test_wrong_input_is_named(compiler):
    for call, message in [
        (lambda: haar_dwt2(torch.zeros(1, 3, 4)), "x is 3 x 4 but its height and width must be even"),
        (lambda: haar_dwt2(torch.zeros(1, 4, 5)), "x is 4 x 5 but"),
        (lambda: haar_idwt2(torch.zeros(1, 6, 2, 2)), "y has 6 channels but must have a multiple of 4"),
        (lambda: haar_dwt2(torch.zeros(4, 4)), r"x is torch.float32 of shape \(4, 4\) but must be floating point"),
        (lambda: haar_idwt2(torch.zeros(4, 2, 2).long()), "y is torch.int64"),
        (lambda: haar_dwt2(torch.zeros(1, 2, 2).to(torch.float8_e5m2)), "two bytes at least"),
        (lambda: haar_dwt2(torch.zeros(1, 2, 2), backend="cuda"), "backend of haar 'cuda' is unknown"),
        (lambda: haar_dwt2(torch.zeros(1, 2, 2).double(), backend="native"), "they must be torch.float32"),
        (lambda: torch.ops.workbench.haar(torch.zeros(1, 3, 2), False, "native"), "must be even"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
