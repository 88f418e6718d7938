"""Projections: orthonormal bases, what they keep of a gradient, and how moments follow them."""

from functools import partial
from itertools import combinations

import pytest
import scipy.linalg
import torch

from tests import draws
from workbench.errors import InputError
from workbench.lib.core.optim import PROJECTORS, ColumnSelector, Power, Random, Svd, projectors
from workbench.lib.core.optim.projectors import BASES, make_projector

draw = partial(draws.draw, dtype=torch.float64)


def begun(projector, grad):
    state = projector.fresh(tuple(grad.shape[:-2]), grad.shape[-1], dtype=grad.dtype, device=grad.device)
    return projector.refresh(grad, state)


def basis_of(projector, state, like):
    """Q (*stack, m, r)."""
    m = like.shape[-1]
    identity = torch.eye(projector.rank, dtype=like.dtype).expand(*like.shape[:-2], -1, -1)
    return projector.lift(identity, state, m).mT


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_keeps_the_protocol(name, stack):
    projector, grad = make_projector(name, 3), draw(*stack, 9, 8)
    empty = projector.fresh(stack, 8, dtype=grad.dtype, device="cpu")
    kept = {key: value.clone() for key, value in empty.items()}
    state, low = projector.refresh(grad, empty)
    assert all(torch.equal(empty[key], kept[key]) for key in kept)  # the old state stays
    assert {key: (t.shape, t.dtype) for key, t in state.items()} == {k: (t.shape, t.dtype) for k, t in kept.items()}
    q = basis_of(projector, state, grad)
    assert torch.allclose(q.mT @ q, torch.eye(3, dtype=q.dtype).expand(*stack, 3, 3), atol=1e-12)
    assert torch.allclose(low, grad @ q, atol=1e-12) and torch.allclose(projector.project(grad, state), low, atol=1e-12)
    assert torch.allclose(projector.lift(low, state, 8), low @ q.mT, atol=1e-12)
    other, _ = projector.refresh(draw(*stack, 9, 8, seed=1), state)
    (turned,) = projector.remap([low], state, other)
    assert torch.allclose(turned, low @ q.mT @ basis_of(projector, other, grad), atol=1e-12)


def test_the_svd_keeps_most_of_all():
    grad = draw(12, 8)
    _, low = begun(Svd(3), grad)
    values = torch.linalg.svdvals(grad)
    assert torch.allclose(low.norm() ** 2, (values[:3] ** 2).sum())


def test_a_random_basis_is_of_its_draw_alone():
    grad = draw(9, 8)
    first, _ = begun(Random(3), grad)
    torch.manual_seed(5)
    again, _ = begun(Random(3), draw(9, 8, seed=1))
    second, _ = Random(3).refresh(grad, first)
    assert torch.equal(first["basis"], again["basis"]) and int(second["draws"]) == 2
    assert not torch.allclose(first["basis"], second["basis"])


def test_power_iteration_comes_to_the_svd():
    u, v = torch.linalg.qr(draw(12, 8)).Q, torch.linalg.qr(draw(8, 8, seed=1)).Q
    grad, power = u * torch.tensor([3.0, 2.5, 2, 0.2, 0.1, 0.1, 0, 0], dtype=u.dtype) @ v.T, Power(3)
    state, _ = begun(power, grad)
    for _ in range(5):
        state, low = power.refresh(grad, state)
    assert torch.allclose(state["basis"] @ state["basis"].T, v[:, :3] @ v[:, :3].T, atol=1e-6)
    still, low = begun(power, torch.zeros(12, 8, dtype=u.dtype))
    assert torch.allclose(still["basis"].T @ still["basis"], torch.eye(3, dtype=u.dtype)) and not low.any()


# -- columns of one matrix


@pytest.mark.parametrize("basis", BASES)
def test_the_two_norm_chooses_the_best_columns_of_all(basis):
    for seed in range(5):
        grad, selector = draw(9, 8, seed=seed), ColumnSelector(3, basis=basis)
        index, low = selector.select(grad)
        whole = selector.vectors(8, torch.arange(8), grad)
        parts = grad @ whole

        def error(columns, grad=grad, whole=whole):
            q = whole[:, list(columns)]
            return float((grad - grad @ q @ q.T).norm())

        best = min(combinations(range(8), 3), key=error)
        assert tuple(index.tolist()) == best
        exact = grad.norm() ** 2 - sum(parts[:, k].norm() ** 2 for k in best)
        assert abs(error(best) ** 2 - exact) < 1e-10 and torch.allclose(low, parts[:, list(best)])
        assert error(best) ** 2 <= (1 - 3 / 8) * float(grad.norm() ** 2) + 1e-12  # the mean column is no better


def test_the_one_norm_may_choose_others():
    grad = torch.zeros(4, 2, dtype=torch.float64)
    grad[:, 0], grad[0, 1] = 1.0, 3.0  # sums 4 and 3, squares 4 and 9, as parts of cosines
    grad = grad @ ColumnSelector(1).vectors(2, torch.arange(2), grad).T
    assert [ColumnSelector(1, norm=norm).select(grad)[0].item() for norm in (1, 2)] == [0, 1]


def test_bases_are_orthonormal_and_what_they_are_called():
    for basis in BASES:
        c = ColumnSelector(1, basis=basis).vectors(16, torch.arange(16), draw(1))
        assert torch.allclose(c.T @ c, torch.eye(16, dtype=c.dtype), atol=1e-12)
        spread = ColumnSelector(16, basis=basis).select(torch.eye(16, dtype=c.dtype))[1]
        assert torch.allclose(spread, c, atol=1e-12)
    hadamard = ColumnSelector(1, basis="hadamard").vectors(16, torch.arange(16), draw(1))
    assert torch.allclose(hadamard, torch.tensor(scipy.linalg.hadamard(16) / 4.0))
    with pytest.raises(InputError, match="power of two"):
        ColumnSelector(2, basis="hadamard").select(draw(7, 6))


def test_a_gradient_of_few_cosines_is_kept_whole():
    selector = ColumnSelector(3)
    grad = draw(9, 3) @ selector.vectors(8, torch.tensor([1, 4, 6]), draw(1)).T
    state, low = begun(selector, grad)
    assert state["index"].tolist() == [1, 4, 6] and torch.allclose(selector.lift(low, state, 8), grad)


def test_moments_move_with_their_columns_and_no_product_is_made():
    selector, low = ColumnSelector(3), draw(5, 3)
    old, new = ({"index": torch.tensor(index, dtype=torch.int32)} for index in ([1, 4, 6], [4, 5, 6]))
    q = [selector.vectors(8, state["index"], low) for state in (old, new)]
    turn = q[0].T @ q[1]
    assert torch.allclose(turn.round(), turn) and turn.round().abs().sum(0).max() <= 1
    moved, positive = selector.remap([low, low.abs()], old, new)
    assert torch.allclose(moved, low @ turn) and torch.equal(moved[:, [0, 2]], low[:, [1, 2]])
    assert not moved[:, 1].any() and (positive >= 0).all()


def test_long_rows_take_the_fft_and_say_the_same(monkeypatch):
    selector, grad = ColumnSelector(5), draw(9, 33)
    state, low = begun(selector, grad)
    short = selector.project(grad, state), selector.lift(low, state, 33)
    monkeypatch.setattr(projectors, "FFT_FROM", 4)
    long = selector.project(grad, state), selector.lift(low, state, 33)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(short, long, strict=True))
    assert not torch.equal(short[1], long[1])  # it was another way


def test_wrong_options_are_named():
    with pytest.raises(InputError, match="norm is 3 but must be 1 or 2"):
        ColumnSelector(2, norm=3)
    with pytest.raises(InputError, match="basis 'dft' is unknown; did you mean 'dct'"):
        ColumnSelector(2, basis="dft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e25, 1e37])
@pytest.mark.parametrize("name", PROJECTORS)
def test_the_subspace_does_not_depend_on_the_size_of_a_gradient(name, size, dtype):
    grad = (draw(9, 8) * torch.logspace(0, -3, 8, dtype=torch.float64)).to(dtype)
    projector = make_projector(name, 3)
    (state, low), (scaled, _) = begun(projector, grad), begun(projector, grad * size)
    q, turned = (basis_of(projector, found, grad) for found in (state, scaled))
    assert low.isfinite().all()
    torch.testing.assert_close(turned @ turned.mT, q @ q.mT, atol=1e-3, rtol=0)


def test_a_power_of_two_changes_no_bit_of_a_subspace():
    grad = draw(9, 8).float()
    for projector in (Power(3), ColumnSelector(3)):
        (state, _), (scaled, _) = begun(projector, grad), begun(projector, grad * 2.0**-20)
        assert all(torch.equal(state[key], scaled[key]) for key in state)
