"""The seeded basis: the published generator, the same numbers on every path and in any pieces, none of them stored."""

import subprocess
import sys

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, random_basis, random_basis_adjoint
from workbench.kernels.random_basis import native, philox, reference, uniform

PATHS = ("reference", "native")
SEED = torch.tensor(0x0123456789ABCDEF)
SHAPES = [(3, 5), (4, 8), (), (1,), (1023,), (2, 514), (2500,)]


def stored(k, shape, start=0, seed=SEED):
    """(k, *shape) in float64, word by word in Python's integers, which never wrap round."""
    word, size, key = 2**32 - 1, torch.Size(shape).numel(), int(seed) % 2**64
    numbers = []
    for counter in range(start // 4, (start + k * size + 3) // 4):
        c, keys = [counter & word, counter >> 32 & word, 0, 0], [key & word, key >> 32]
        for _ in range(10):
            low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [high >> 32 ^ c[1] ^ keys[0], high & word, low >> 32 ^ c[3] ^ keys[1], low & word]
            keys = [(keys[0] + 0x9E3779B9) & word, (keys[1] + 0xBB67AE85) & word]
        numbers += [(w >> 8) / 2**23 - 1 for w in c]
    return torch.tensor(numbers, dtype=torch.float64)[start % 4 :][: k * size].view(k, *shape)


def test_the_generator_gives_its_published_answers():
    """The first of Random123's known answers: counter and key of zeros."""
    zero = philox(torch.tensor(0), torch.tensor(0))
    assert zero.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("seed", [0, 0x0123456789ABCDEF, -1, -(2**63)])
def test_the_numbers_are_those_of_the_rounds(path, seed):
    """Keys and counters of all 64 bits, signs among them."""
    seed = torch.tensor(seed)
    for start in (0, 2, 2**34 + 3, 2**63 - 200):
        assert torch.equal(uniform(seed, start, 101, backend=path).double(), stored(101, (), start, seed))
    assert dispatch.last_backend("random_basis") == path


@pytest.mark.parametrize("path", PATHS)
def test_numbers_are_the_same_in_any_pieces_and_types_and_in_another_process(path):
    whole = uniform(SEED, 0, 5001, backend="reference")
    for start, count in ((0, 5001), (0, 1), (3, 5), (4, 8), (97, 4), (50, 0), (1, 1024), (2, 1025), (3, 2048)):
        assert torch.equal(uniform(SEED, start, count, backend=path), whole[start : start + count])
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(uniform(SEED, 0, 101, dtype, backend=path), whole[:101].to(dtype))
    code = (
        "import torch; from workbench.kernels.random_basis import uniform; "
        f"print(uniform(torch.tensor({int(SEED)}), 7, 5, backend={path!r}).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(said) == whole[7:12].tolist()


def test_numbers_are_uniform_and_not_correlated():
    draws = uniform(SEED, 0, 2**16, torch.float64)
    assert -1 <= draws.min() < -0.999 and 0.999 < draws.max() < 1
    assert abs(draws.mean()) < 4 / (3 * 2**16) ** 0.5
    assert draws.square().mean() == pytest.approx(1 / 3, abs=0.005)
    assert abs((draws[1:] * draws[:-1]).mean()) < 4 / 3 / 2**8
    assert len(draws.unique()) > 0.99 * len(draws)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [0, 5])
def test_sums_and_products_are_those_of_the_stored_basis(path, shape, start):
    """To the rounding of their float32 terms; and with one coefficient a basis tensor comes back, bit for bit."""
    basis, k = uniform(SEED, start, 6 * torch.Size(shape).numel(), torch.float64).view(6, *shape), 6
    c, x = torch.randn(k), torch.randn(shape)
    made = random_basis(c, SEED, shape, start=start, backend=path)
    assert made.shape == shape and made.dtype == torch.float32
    off = (made.double() - torch.tensordot(c.double(), basis, 1)).abs().max()
    assert off <= 2**-24 * (k + 1) * c.abs().sum()
    found = random_basis_adjoint(x, SEED, k, start=start, backend=path)
    off = (found.double() - basis.view(k, -1) @ x.double().flatten()).abs().max()
    assert found.shape == (k,) and off <= 2**-24 * (x.numel() + 1) * x.abs().sum()
    for j in range(k):
        assert torch.equal(random_basis(torch.eye(k)[j], SEED, shape, start=start, backend=path), basis[j].float())


@pytest.mark.parametrize("chunk", [1, 4, 6, 13, 1000])
def test_gradients_of_any_order(chunk, monkeypatch):
    """However much of the basis the reference has in memory."""
    monkeypatch.setattr(reference, "CHUNK", chunk)
    c = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    basis = uniform(SEED, 0, 5 * 6, torch.float64).view(5, 2, 3)
    torch.testing.assert_close(random_basis(c, SEED, (2, 3)), torch.einsum("k,kij->ij", c, basis))
    torch.testing.assert_close(random_basis_adjoint(x, SEED, 5), torch.einsum("kij,ij->k", basis, x))
    assert torch.autograd.gradcheck(lambda c: random_basis(c, SEED, (2, 3)).sin(), c)
    assert torch.autograd.gradgradcheck(lambda x: random_basis_adjoint(x, SEED, 2, start=2).sin(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_c_are_the_adjoint(dtype):
    c, x = torch.randn(7, dtype=dtype).requires_grad_(), torch.randn(9, 4, dtype=dtype)
    made = random_basis(c, SEED, (9, 4), backend="native")
    assert made.dtype == dtype and torch.equal(made, random_basis(c.float(), SEED, (9, 4)).to(dtype))
    with dispatch.recording() as seen:
        made.backward(x)
    assert seen == [("random_basis", "native")]
    assert c.grad.dtype == dtype and torch.equal(c.grad, random_basis_adjoint(x.float(), SEED, 7).to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_none_of_the_basis_is_kept_and_torchs_generator_stays(path, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 1000)
    saved, made, before = [], [], torch.get_rng_state()
    c = torch.randn(50, requires_grad=True, generator=torch.Generator().manual_seed(0))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), Largest():
        random_basis(c, SEED, (10, 20), backend=path).sum().backward()
    assert sum(saved) <= len(c) + 1
    assert max(made) <= (200 if path == "native" else 1000 + 4)  # words of whole counters
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_and_pieces_find_the_same(monkeypatch, compiler):
    c, x, before = torch.randn(9), torch.randn(5000), torch.get_num_threads()
    found = []
    try:
        for threads, piece in ((1, 2**19), (1, 1), (2, 1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(native, "PIECE", piece)
            found.append((random_basis(c, SEED, (5000,)), random_basis_adjoint(x, SEED, 9)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_nothing_to_sum_a_nan_and_numbers_that_lie_apart(path):
    assert torch.equal(random_basis(torch.empty(0), SEED, (2, 3), backend=path), torch.zeros(2, 3))
    assert random_basis(torch.randn(3), SEED, (0, 3), backend=path).shape == (0, 3)
    assert torch.equal(random_basis_adjoint(torch.empty(0, 3), SEED, 4, backend=path), torch.zeros(4))
    assert random_basis_adjoint(torch.randn(3), SEED, 0, backend=path).shape == (0,)
    assert random_basis(torch.tensor([1.0, torch.nan]), SEED, (3,), backend=path).isnan().all()
    x, c = torch.randn(6, 5), torch.randn(8)
    assert torch.equal(
        random_basis_adjoint(x.T, SEED, 3, backend=path), random_basis_adjoint(x.T.contiguous(), SEED, 3, backend=path)
    )
    one = torch.ones(())
    assert torch.equal(  # as the gradient of a sum is
        random_basis_adjoint(one.expand(6, 5), SEED, 3, backend=path),
        random_basis_adjoint(torch.ones(6, 5), SEED, 3, backend=path),
    )
    assert torch.equal(
        random_basis(c[::2], SEED, (3,), backend=path), random_basis(c[::2].clone(), SEED, (3,), backend=path)
    )


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path):
    c, x = torch.randn(5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.workbench.random_basis.default, (c, SEED, [3, 4], 1, path))
    torch.library.opcheck(torch.ops.workbench.random_basis_adjoint.default, (x, SEED, 5, 1, path))


def test_wrong_input_is_named():
    c = torch.randn(3)
    for call, message in [
        (lambda: random_basis(c[None], SEED, (2,)), r"coefficients is of shape \(1, 3\) but must be \(k,\)"),
        (lambda: random_basis(c.long(), SEED, (2,)), "coefficients is torch.int64 but must be floating point"),
        (lambda: random_basis(c.to(torch.float8_e5m2), SEED, (2,)), "coefficients is torch.float8_e5m2 .* two bytes"),
        (lambda: random_basis_adjoint(c.to(torch.float8_e5m2), SEED, 2), "x is torch.float8_e5m2 .* two bytes"),
        (lambda: uniform(SEED, 0, 4, torch.int64), "dtype is torch.int64 but must be floating point"),
        (lambda: random_basis_adjoint(c.long(), SEED, 2), "x is torch.int64 but must be floating point"),
        (lambda: random_basis(c, SEED.int(), (2,)), "seed is torch.int32 of shape .* must be one torch.int64 number"),
        (lambda: random_basis(c, SEED[None], (2,)), r"seed is torch.int64 of shape \(1,\)"),
        (lambda: random_basis(c, SEED.to("meta"), (2,)), "seed is .* on meta but must be .* on cpu"),
        (lambda: random_basis(c, SEED, (2, -1)), "but must not be negative"),
        (lambda: random_basis_adjoint(c, SEED, -1), "but must not be negative"),
        (lambda: uniform(SEED, -1, 3), "but must not be negative"),
        (lambda: uniform(SEED, 2**63 - 3, 3), "which end past number 2.*63"),
        (lambda: random_basis(c.double(), SEED, (2,), backend="native"), "must be torch.float32"),
        (lambda: random_basis(c, SEED, (2,), backend="cpu"), "backend of random_basis 'cpu' is unknown"),
        (lambda: torch.ops.workbench.random_basis(c.bfloat16(), SEED, [2], 0, "reference"), "is torch.bfloat16 but"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
