"""The Walsh-Hadamard transform on its CPU paths: the matrix, its square, equal bits, gradients and registration."""

import pytest
import torch
from scipy.linalg import hadamard

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, threads, walsh_hadamard
from workbench.kernels.walsh_hadamard import native

PATHS = ("reference", "native")


@pytest.mark.parametrize("length", [2**n for n in range(9)])
def test_it_is_the_product_with_the_matrix(length):
    x = draw(4, length, dtype=torch.float64)
    exact = x @ torch.tensor(hadamard(length), dtype=x.dtype)
    assert torch.allclose(walsh_hadamard(x), exact, atol=1e-12)
    assert dispatch.last_backend("walsh_hadamard") == "reference"
    for path in PATHS:
        whole = torch.randint(-9, 10, (4, length)).float()  # sums of small whole numbers are exact
        assert torch.equal(walsh_hadamard(whole, backend=path), whole @ torch.tensor(hadamard(length)).float())
        assert dispatch.last_backend("walsh_hadamard") == path


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 9, 11, 12, 13, 14, 17, 18, 19])
def test_the_native_path_has_the_bits_of_the_reference(n):
    x = draw(3, 2**n)
    kept = x.clone()
    ours = walsh_hadamard(x, backend="native")
    assert torch.equal(ours, walsh_hadamard(x, backend="reference")) and torch.equal(x, kept)
    twice = walsh_hadamard(ours.double()) / 2**n
    assert torch.allclose(twice, x.double(), atol=1e-5)


def test_threads_take_rows_and_change_no_bit(monkeypatch, compiler):
    monkeypatch.setattr(native, "WORTH", 256)
    shared = []
    share = threads.share
    monkeypatch.setattr(threads, "share", lambda items, *rest: (shared.append(items), share(items, *rest)))
    x, before = draw(7, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = walsh_hadamard(x)
        walsh_hadamard(x[:1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, walsh_hadamard(x, backend="reference"))
    assert shared == ([[range(3), range(3, 7)]] if threads.available() > 0 and threads._controls() else [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = draw(3, 256, dtype=dtype)
    out = walsh_hadamard(x)
    assert out.dtype == dtype and torch.equal(out, walsh_hadamard(x.float()).to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_registration_and_compilation(path):
    x, grad = draw(2, 3, 16).requires_grad_(), draw(2, 3, 16, seed=1)
    (found,) = torch.autograd.grad(walsh_hadamard(x, backend=path), x, grad)
    assert torch.equal(found, walsh_hadamard(grad))  # it is symmetric
    torch.library.opcheck(torch.ops.workbench.walsh_hadamard.default, (x, path))
    compiled = torch.compile(lambda x: walsh_hadamard(x, backend=path), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), walsh_hadamard(x))
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(walsh_hadamard, wide) and torch.autograd.gradgradcheck(walsh_hadamard, wide)


def test_shapes_and_views():
    x = draw(4, 6, 8)
    assert torch.equal(walsh_hadamard(x.transpose(0, 1)), walsh_hadamard(x).transpose(0, 1))
    assert torch.equal(walsh_hadamard(x[1, 2]), walsh_hadamard(x)[1, 2])  # one row, in no batch
    one = draw(3, 1)
    out = walsh_hadamard(one)
    assert torch.equal(out, one) and out.data_ptr() != one.data_ptr()
    for path in PATHS:
        assert walsh_hadamard(torch.empty(0, 8), backend=path).shape == (0, 8)


def test_what_is_not_a_number_stays_in_its_row():
    x = draw(3, 64)
    clean = walsh_hadamard(x)
    x[1, 7] = torch.nan
    for path in PATHS:
        out = walsh_hadamard(x, backend=path)
        assert out[1].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


def test_wrong_input_is_named(compiler):
    for call, message in [
        (lambda: walsh_hadamard(torch.zeros(4).to(torch.float8_e5m2)), "x is torch.float8_e5m2 .* two bytes at least"),
        (lambda: walsh_hadamard(torch.zeros(2, 6)), r"x is torch.float32 of shape \(2, 6\) but must be floating point"),
        (lambda: walsh_hadamard(torch.zeros(2, 0)), "its last dimension a power of two"),
        (lambda: walsh_hadamard(torch.tensor(1.0)), r"of shape \(\)"),
        (lambda: walsh_hadamard(torch.zeros(4).long()), "x is torch.int64"),
        (lambda: walsh_hadamard(torch.zeros(4), backend="cuda"), "backend of walsh_hadamard 'cuda' is unknown"),
        (lambda: walsh_hadamard(torch.zeros(4).double(), backend="native"), "they must be torch.float32"),
        (lambda: torch.ops.workbench.walsh_hadamard(torch.zeros(6), "native"), "a power of two"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
