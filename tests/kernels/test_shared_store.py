"""The shared store: places and signs word by word, equal on every path, and products that never have the matrix."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, shared_linear, shared_weight
from workbench.kernels.random_basis import philox
from workbench.kernels.shared_store import LAST, native, reference

PATHS = ("reference", "native")
SEED, SCALE = torch.tensor(-0x0123456789ABCDEF), torch.tensor(0.37)
SIZES = (1, 2, 7, 31, 32, 33, 100, 128, 257, 5000)
ops = torch.ops.workbench


def written_out(m, offset, numel, seed=SEED):
    """Place and sign of each weight, in Python's integers."""
    found = []
    for i in range(offset, offset + numel):
        words = philox(torch.tensor(i // 128), seed).tolist()
        turn = philox(torch.tensor(2**62 + i // m), seed).tolist()
        shift = ((turn[0] >> 1) * 2**32 + turn[1]) % m
        found.append(((shift + i % m) % m, -1 if words[i // 32 % 4] >> i % 32 & 1 else 1))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("m", [1, 5, 130])
@pytest.mark.parametrize("offset", [0, 126, 2**40 + 3])
def test_weights_are_what_the_formula_says(path, m, offset):
    memory = torch.randn(m)
    expected = [sign * float(memory[place] * SCALE) for place, sign in written_out(m, offset, 140)]
    made = shared_weight(memory, SEED, SCALE, (14, 10), offset=offset, backend=path)
    assert made.shape == (14, 10) and made.flatten().tolist() == expected
    assert dispatch.last_backend("shared_store") == path


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 31, 127, 129, 1_000_003])
def test_paths_agree_bit_for_bit_at_any_place(m, offset):
    """And in any pieces; sums back to rounding."""
    memory = torch.randn(m)
    for numel in (0, 1, 5, 64, 300, 1000):
        ours, theirs = (
            shared_weight(memory, SEED, SCALE, (numel,), offset=offset, backend=path)
            for path in ("native", "reference")
        )
        assert torch.equal(ours, theirs)
        values = torch.randn(numel)
        ours, theirs = (ops.shared_fold(values, SEED, SCALE, offset, m, path) for path in ("native", "reference"))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    cut = offset + 77
    pieces = [shared_weight(memory, SEED, SCALE, (77,), offset=offset)]
    pieces.append(shared_weight(memory, SEED, SCALE, (923,), offset=cut))
    assert torch.equal(torch.cat(pieces), shared_weight(memory, SEED, SCALE, (1000,), offset=offset))


def test_signs_and_shifts_are_even():
    negative = reference.negative(SEED, 0, 2**16).double()
    assert abs(negative.mean() - 0.5) < 4 * 0.5 / 2**8
    shifts = reference.shifts(SEED, 16, 0, 2**14)
    assert (torch.bincount(shifts, minlength=16) - 2**10).abs().max() < 5 * 2**5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n", "depth", "width", "m"), [(0, 3, 4, 5), (1, 1, 1, 1), (5, 33, 70, 231), (9, 64, 10, 640)])
@pytest.mark.parametrize("panel", [1, 100, 2**18])
def test_products_are_those_with_the_matrix(path, n, depth, width, m, panel, monkeypatch):
    monkeypatch.setattr(native, "PANEL", panel)
    x, memory = torch.randn(n, depth, requires_grad=True), torch.randn(m, requires_grad=True)
    matrix = shared_weight(memory, SEED, SCALE, (width, depth), offset=11, backend="reference")
    grad = torch.randn(n, width)
    expected = x @ matrix.T
    theirs = torch.autograd.grad(expected, (x, memory), grad)
    made = shared_linear(x, memory, SEED, SCALE, width, offset=11, backend=path)
    torch.testing.assert_close(made, expected)
    for ours, other in zip(torch.autograd.grad(made, (x, memory), grad), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=2e-5, rtol=1e-5)


def test_gradients_of_any_order():
    memory = torch.randn(7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = SCALE.double()
    assert torch.autograd.gradcheck(lambda m: shared_weight(m, SEED, scale, (4, 5)).sin(), memory)
    assert torch.autograd.gradcheck(lambda x, m: shared_linear(x, m, SEED, scale, 4).sin(), (x, memory))
    assert torch.autograd.gradgradcheck(lambda x, m: shared_linear(x, m, SEED, scale, 4).sin(), (x, memory))
    assert torch.autograd.gradgradcheck(lambda m: shared_weight(m, SEED, scale, (20,), offset=3).sin(), memory)


@pytest.mark.parametrize("path", PATHS)
def test_no_tensor_is_as_large_as_the_matrix_and_only_x_is_saved(path, monkeypatch):
    monkeypatch.setattr(native, "PANEL", 256)
    made, saved = [], []
    x, memory = torch.randn(4, 64, requires_grad=True), torch.randn(400, requires_grad=True)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), Largest():
        shared_linear(x, memory, SEED, SCALE, 64, backend=path).sum().backward()
    assert sum(saved) <= 256 + 400 + 2
    if path == "native":
        assert max(made) <= 400


def test_threads_find_the_same(compiler, monkeypatch):
    memory, before = torch.randn(900), torch.get_num_threads()
    monkeypatch.setattr(native, "PIECE", 1000)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(shared_weight(memory, SEED, SCALE, (90, 100), backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_wide(dtype):
    memory, x = torch.randn(50, dtype=dtype), torch.randn(2, 3, 20, dtype=dtype)
    made = shared_weight(memory, SEED, SCALE.to(dtype), (10, 20))
    y = shared_linear(x, memory, SEED, SCALE.to(dtype), 10)
    assert made.dtype == y.dtype == dtype and y.shape == (2, 3, 10)
    wide = torch.promote_types(dtype, torch.float32)
    expected = shared_weight(memory.to(wide), SEED, SCALE.to(dtype).to(wide), (10, 20))
    assert torch.equal(made, expected.to(dtype))
    torch.testing.assert_close(y, (x.to(wide) @ expected.T).to(dtype))


def test_tensors_that_lie_apart_and_a_nan():
    memory, x = torch.randn(60)[::2], torch.randn(20, 8).T
    plain = shared_linear(x.contiguous(), memory.contiguous(), SEED, SCALE, 7)
    assert torch.equal(shared_linear(x, memory, SEED, SCALE, 7), plain)
    grad = torch.autograd.grad(shared_weight(memory.requires_grad_(), SEED, SCALE, (40,)).sum(), memory)[0]
    assert grad.shape == (30,)  # of an expanded one
    memory = torch.zeros(30)
    memory[3] = torch.nan
    for path in PATHS:
        assert shared_weight(memory, SEED, SCALE, (60,), backend=path).isnan().sum() == 2


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path):
    x, memory, grad = torch.randn(3, 4, requires_grad=True), torch.randn(9, requires_grad=True), torch.randn(3, 5)
    torch.library.opcheck(ops.shared_expand.default, (memory, SEED, SCALE, 1, 12, path))
    torch.library.opcheck(ops.shared_fold.default, (x.detach().flatten().requires_grad_(), SEED, SCALE, 1, 9, path))
    torch.library.opcheck(ops.shared_product.default, (x, memory, SEED, SCALE, 1, 5, False, path))
    torch.library.opcheck(ops.shared_product.default, (x, memory, SEED, SCALE, 1, 5, True, path))
    torch.library.opcheck(ops.shared_outer.default, (grad.requires_grad_(), x, SEED, SCALE, 1, 9, path))


def test_wrong_input_is_named():
    memory, x = torch.randn(6), torch.randn(2, 3)
    for call, message in [
        (lambda: shared_weight(memory[None], SEED, SCALE, (2,)), r"memory is of shape \(1, 6\) but must be \(m,\)"),
        (lambda: shared_weight(memory[:0], SEED, SCALE, (2,)), "memory has 0 numbers but must have at least 1"),
        (lambda: shared_weight(memory.long(), SEED, SCALE, (2,)), "memory is torch.int64 but must be floating point"),
        (lambda: shared_weight(memory, SEED.int(), SCALE, (2,)), "seed is torch.int32 of shape .* one torch.int64"),
        (lambda: shared_weight(memory, SEED[None], SCALE, (2,)), r"seed is torch.int64 of shape \(1,\)"),
        (lambda: shared_weight(memory, SEED, SCALE[None], (2,)), r"scale is torch.float32 of shape \(1,\)"),
        (lambda: shared_weight(memory, SEED, SCALE.to("meta"), (2,)), "scale is .* on meta but must be .* on cpu"),
        (lambda: shared_weight(memory, SEED, SCALE, (2, -1)), "but must be weights from 0 to"),
        (lambda: shared_weight(memory, SEED, SCALE, (2,), offset=-1), "but must be weights from 0 to"),
        (lambda: shared_weight(memory, SEED, SCALE, (2,), offset=LAST - 1), "but must be weights from 0 to"),
        (
            lambda: shared_linear(x.long(), memory, SEED, SCALE, 2),
            "x is torch.int64 of shape .* must be floating point",
        ),
        (lambda: shared_linear(x[0, 0], memory, SEED, SCALE, 2), r"x is torch.float32 of shape \(\) but"),
        (lambda: shared_linear(x, memory, SEED, SCALE, -1), "but must be weights from 0 to"),
        (lambda: shared_weight(memory.double(), SEED, SCALE, (2,), backend="native"), "must be torch.float32"),
        (lambda: shared_weight(memory, SEED, SCALE, (2,), backend="cpu"), "backend of shared_store 'cpu' is unknown"),
        (lambda: ops.shared_product(x.double(), memory, SEED, SCALE, 0, 2, False, "reference"), "x is torch.float64"),
        (lambda: ops.shared_outer(x, x[:1], SEED, SCALE, 0, 6, "reference"), "grad has 2 rows but must have 1"),
        (lambda: ops.shared_fold(memory, SEED, SCALE, 0, 0, "reference"), "memory has 0 numbers"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
