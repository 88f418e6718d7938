"""The cosine transform of rows on its CPU paths: scipy's numbers, orthonormality, gradients, registration."""

import pytest
import scipy.fft
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dct2_rows, dct3_rows, dct_basis, dispatch
from workbench.kernels.dct import cpu

PATHS = ("reference", "cpu")
WIDTHS = (1, 2, 3, 4, 5, 8, 17, 64, 100, 255, 256)


@pytest.fixture
def by_fft(monkeypatch):
    """Rows of any width are long enough for an FFT."""
    monkeypatch.setattr(cpu, "FFT_FROM", 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", WIDTHS)
def test_it_is_scipys_and_undoes_itself(m, path, by_fft):
    x = draw(7, m, dtype=torch.float64)
    y = dct2_rows(x, backend=path)
    assert dispatch.last_backend("dct_rows") == path
    assert torch.allclose(y, torch.tensor(scipy.fft.dct(x.numpy(), type=2, norm="ortho")), atol=1e-13, rtol=1e-12)
    inverse = dct3_rows(x, backend=path)
    assert torch.allclose(
        inverse, torch.tensor(scipy.fft.idct(x.numpy(), type=2, norm="ortho")), atol=1e-13, rtol=1e-12
    )
    assert torch.allclose(dct3_rows(y, backend=path), x, atol=1e-13)
    assert torch.allclose(dct2_rows(x.float(), backend=path).double(), y, atol=4e-6)


@pytest.mark.parametrize("m", WIDTHS)
def test_the_basis_is_orthonormal_and_its_columns_are_cosines(m):
    c = dct_basis(m, torch.float64)
    assert torch.allclose(c.T @ c, torch.eye(m, dtype=c.dtype), atol=1e-13)
    single = dct_basis(m)
    assert torch.allclose(single.T @ single, torch.eye(m), atol=1e-6)
    j, k = torch.arange(m)[:, None].double(), torch.arange(m).double()
    cosines = (torch.pi * k * (2 * j + 1) / (2 * m)).cos() * (2 / m) ** 0.5
    assert torch.allclose(c[:, 1:], cosines[:, 1:], atol=1e-11) and torch.allclose(c[:, 0], cosines[:, 0] / 2**0.5)
    assert dct_basis(m) is single  # kept


def test_the_width_decides_the_way(monkeypatch):
    ways = []
    monkeypatch.setattr(cpu, "_forward", lambda x: ways.append(x.shape[1]) or x.clone())
    for m in (cpu.FFT_FROM - 1, cpu.FFT_FROM):
        dct2_rows(draw(2, m))
    assert ways == [cpu.FFT_FROM]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, by_fft):
    x = draw(3, 60, dtype=dtype)
    for transform in (dct2_rows, dct3_rows):
        out = transform(x)
        assert out.dtype == dtype and torch.equal(out, transform(x.float()).to(dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", [dct2_rows, dct3_rows])
def test_gradients_registration_and_compilation(transform, path, by_fft):
    x, grad = draw(2, 3, 12).requires_grad_(), draw(2, 3, 12, seed=1)
    other = dct3_rows if transform is dct2_rows else dct2_rows
    (found,) = torch.autograd.grad(transform(x, backend=path), x, grad)
    assert torch.allclose(found, other(grad), atol=1e-6)  # the transpose is the inverse
    torch.library.opcheck(torch.ops.workbench.dct_rows.default, (x, transform is dct3_rows, path))
    compiled = torch.compile(lambda x: transform(x, backend=path), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), transform(x, backend=path))
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(transform, wide) and torch.autograd.gradgradcheck(transform, wide)


@pytest.mark.parametrize("path", PATHS)
def test_shapes_and_views(path, by_fft):
    x = draw(4, 6, 9)
    assert torch.allclose(dct2_rows(x.mT, backend=path), dct2_rows(x.mT.contiguous(), backend=path))
    assert torch.allclose(dct2_rows(x[1, 2], backend=path), dct2_rows(x, backend=path)[1, 2], atol=1e-6)
    kept = x.clone()
    dct3_rows(x, backend=path)
    assert torch.equal(x, kept)
    for transform in (dct2_rows, dct3_rows):
        assert transform(torch.empty(0, 8), backend=path).shape == (0, 8)


def test_what_is_not_a_number_stays_in_its_row(by_fft):
    x = draw(3, 30)
    clean = dct2_rows(x)
    x[1, 7] = torch.nan
    out = dct2_rows(x)
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dct2_rows(torch.zeros(4).long()), "x is torch.int64 of shape"),
        (lambda: dct2_rows(torch.zeros(4).to(torch.float8_e5m2)), "two bytes at least"),
        (lambda: dct3_rows(torch.zeros(2, 0)), "its last dimension at least 1"),
        (lambda: dct2_rows(torch.tensor(1.0)), r"of shape \(\)"),
        (lambda: dct2_rows(torch.zeros(4), backend="fft"), "backend of dct_rows 'fft' is unknown"),
        (lambda: dct_basis(0), "m is 0 but must be at least 1"),
        (lambda: torch.ops.workbench.dct_rows(torch.zeros(0), False, "cpu"), "last dimension at least 1"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
