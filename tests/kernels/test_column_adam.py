"""Adam in columns of a cosine transform: by hand, both paths alike, and what it refuses."""

import importlib

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import column_adam, dct_basis, dispatch

NATIVE = importlib.import_module("workbench.kernels.column_adam.native")  # the folder's name is the operator's
BETAS, EPS = (0.9, 0.99), 1e-6


def begin(shape, r, dtype=torch.float32):
    *batch, n, _ = shape
    moments = torch.zeros(*batch, n, r, dtype=dtype), torch.zeros(*batch, n, r, dtype=dtype)
    return [*moments, torch.zeros(*batch, r, dtype=torch.int32)]


def steps(shape, r, backend, number=4, dtype=torch.float32, scale=1.0, **options):
    """Every u, and the moments and the index at the end."""
    state, found = begin(shape, r, dtype), []
    for i in range(number):
        grad = draw(*shape, dtype=dtype, seed=i) * scale
        kept = grad.clone()
        found.append(column_adam(grad, *state, step=i + 1, betas=BETAS, eps=EPS, backend=backend, **options))
        assert torch.equal(grad, kept)
    return [torch.stack(found), *state]


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("norm", [1, 2])
def test_by_hand(norm, remap):
    (n, m), r, (b1, b2) = (7, 5), 2, BETAS
    us, exp_avg, exp_avg_sq, index = steps((n, m), r, None, dtype=torch.float64, norm=norm, remap=remap)
    assert dispatch.last_backend("column_adam") == "reference"
    full = torch.zeros(2, n, m, dtype=torch.float64)  # moments of all columns, zero where they are not chosen
    low = torch.zeros(2, n, r, dtype=torch.float64)
    for i, u in enumerate(us):
        s = draw(n, m, dtype=torch.float64, seed=i) @ dct_basis(m, torch.float64)
        chosen = s.norm(p=norm, dim=0).topk(r).indices.sort().values
        if remap:
            low = full[..., chosen]
        g = s[:, chosen]
        low = torch.stack([b1 * low[0] + (1 - b1) * g, b2 * low[1] + (1 - b2) * g**2])
        full = torch.zeros_like(full).index_copy_(-1, chosen, low)
        hats = low[0] / (1 - b1 ** (i + 1)), low[1] / (1 - b2 ** (i + 1))
        torch.testing.assert_close(u, hats[0] / (hats[1].sqrt() + EPS), rtol=1e-9, atol=1e-12)
    assert index.tolist() == chosen.tolist()
    torch.testing.assert_close(torch.stack([exp_avg, exp_avg_sq]), low)


@pytest.mark.parametrize(("norm", "remap"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize(
    ("shape", "r"), [((128, 128), 32), ((150, 129), 129), ((131, 130), 1), ((1, 256), 7), ((2, 3, 140, 131), 17)]
)
def test_paths_are_alike(shape, r, norm, remap):
    ours = steps(shape, r, "native", norm=norm, remap=remap)
    assert dispatch.last_backend("column_adam") == "native"
    theirs = steps(shape, r, "reference", norm=norm, remap=remap)
    assert torch.equal(ours[3], theirs[3])
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_short_rows_have_the_bits_of_the_reference():
    for one, other in zip(steps((40, 64), 9, "native"), steps((40, 64), 9, "reference"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-30, 1e19])
def test_columns_whose_squares_are_no_numbers(scale):
    """The choice is that of the matrix in range; at 1e19 second moments are infinite, and no direction is NaN."""
    ours, plain = steps((130, 129), 9, "native", scale=scale), steps((130, 129), 9, "native")
    assert torch.equal(ours[3], plain[3]) and ours[0].isfinite().all()
    zeros = begin((130, 129), 9)
    assert not column_adam(torch.zeros(130, 129), *zeros, step=1, backend="native").any()


def test_no_bit_depends_on_the_threads(monkeypatch):
    monkeypatch.setattr(NATIVE, "PIECE", 129 * 10)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(steps((135, 129), 20, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch.testing.assert_close(found[0], steps((135, 129), 20, "reference"), rtol=1e-4, atol=2e-6)


def test_columns_that_were_chosen_in_any_order_are_found():
    """And a number that no column has is none that was chosen."""
    r, grad = 6, draw(129, 140)
    states = [[draw(129, r, seed=1), draw(129, r, seed=2).abs(), torch.zeros(r).int()] for _ in range(2)]
    column_adam(grad, *begin(grad.shape, r), step=1)
    chosen = (grad @ dct_basis(140)).square().sum(0).topk(r).indices.sort().values
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    for state, backend in zip(states, ("native", "reference"), strict=True):
        state[2] = chosen[order].int()
        state[2][1] = 139 if 139 not in chosen else 0
        column_adam(grad, *state, step=2, backend=backend)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    lost = [draw(129, r, seed=1), draw(129, r, seed=2).abs(), torch.tensor([-1, 10**6, 7, 7, -(2**31), 140]).int()]
    assert column_adam(grad, *lost, step=2, backend="native").isfinite().all()


def test_registration():
    grad, state = draw(2, 7, 5), begin((2, 7, 5), 3)
    given = (grad, *state, 2, True, 1, 0.9, 0.999, 1e-8, "reference")
    torch.library.opcheck(torch.ops.workbench.column_adam.default, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(7, 5).half()}, "grad is torch.float16"),
        ({"grad": torch.zeros(0, 5)}, r"of shape \(0, 5\)"),
        ({"index": torch.zeros(6, dtype=torch.int32)}, "r from 1 to 5"),
        ({"index": torch.zeros(2)}, "must be torch.int32"),
        ({"exp_avg": torch.zeros(7, 3)}, r"exp_avg is torch.float32 of shape \(7, 3\)"),
        ({"exp_avg_sq": torch.zeros(7, 2).double()}, "exp_avg_sq is torch.float64"),
        ({"exp_avg": torch.zeros(2, 7).T}, "exp_avg must be contiguous"),
        ({"norm": 3}, "norm is 3 but must be 1 or 2"),
        ({"step": 0}, "step is 0 but must be at least 1"),
        ({"betas": (1.0, 0.9)}, "betas, eps are"),
        ({"eps": -1.0}, "betas, eps are"),
        ({"backend": "nativ"}, "nativ"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(change, message):
    given = dict(zip(("exp_avg", "exp_avg_sq", "index"), begin((7, 5), 2), strict=True))
    given |= {"grad": draw(7, 5), "step": 1} | change
    parts = [given[name] for name in ("exp_avg", "exp_avg_sq", "index")]
    before = [part.clone() for part in parts]
    with pytest.raises(InputError, match=message):
        column_adam(given.pop("grad"), *(given.pop(name) for name in ("exp_avg", "exp_avg_sq", "index")), **given)
    assert all(torch.equal(part, kept) for part, kept in zip(parts, before, strict=True))
