"""Exact properties of DCT-AdamW and Trion; the released form where it differs."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import scipy.fft
import torch
from torch import nn

from tests import draws
from tests.draws import walked
from workbench.errors import InputError
from workbench.kernels import dispatch, native, newton_schulz
from workbench.lib.core.optim import projectors
from workbench.lib.core.optim.projectors import BASES, ColumnSelector
from workbench.lib.low_rank.svd_free_dct import SCALES, DCTAdamW, Trion, pack, unpack

draw = partial(draws.draw, dtype=torch.float64)

SHAPES = pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6), (2, 9, 6)])


# -- DCT-AdamW


def test_a_wide_matrix_takes_the_path_in_c_and_the_same_steps():
    found, _, _ = walked(DCTAdamW, (140, 130), range(4), rank=20, dtype=torch.float32)
    assert dispatch.last_backend("column_adam") == ("native" if native.compiler() else "cpu")
    expected, _, _ = walked(DCTAdamW, (140, 130), range(4), rank=20)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_the_step_of_the_formulas_written_out(shape):
    """Scipy's transform, the dense rotation of the moments, and the whole error, from numpy up."""
    n, m, r = 9 if 9 in shape else 6, 6, 2
    c = torch.tensor(scipy.fft.dct(torch.eye(m, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=1))
    lying = (lambda t: t) if shape[0] >= shape[1] else (lambda t: t.T)
    w, first, second = draw(*shape, seed=99), torch.zeros(n, r).double(), torch.zeros(n, r).double()
    error, before = torch.zeros(n, m).double(), None
    for t in range(1, 6):
        a = lying(draw(*shape, seed=t - 1)) + error
        scores = (a @ c).norm(dim=0)
        q = c[:, sorted(sorted(range(m), key=lambda k: -scores[k])[:r])]
        if before is not None:
            first, second = first @ (before.T @ q), (second @ (before.T @ q)).abs()
        low, before = a @ q, q
        error = a - low @ q.T
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        u = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        w = (1 - 0.01 * 0.3) * w - 0.01 * lying(u @ q.T)
    found, _, _ = walked(DCTAdamW, shape, range(5), rank=2, lr=0.01, weight_decay=0.3, error_feedback=True)
    assert torch.allclose(found, w, atol=1e-10)


@SHAPES
def test_error_feedback_telescopes(shape):
    """What was used and what is left are what came, exactly but for rounding."""
    p = nn.Parameter(draw(*shape, seed=99))
    used = torch.zeros(*shape[:-2], max(shape[-2:]), min(shape[-2:]), dtype=torch.float64)

    class Spying(DCTAdamW):
        def adam(self, low, state, group):
            used.add_(self.projector(group).lift(low, state, used.shape[-1]))
            return super().adam(low, state, group)

    optimizer, came = Spying([p], rank=2, update_gap=2, error_feedback=True), torch.zeros_like(used)
    for step in range(7):
        p.grad = draw(*shape, seed=step)
        came += projectors.tall(p.grad)
        optimizer.step()
        assert torch.allclose(used + optimizer.state[p]["error"], came, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_error_of_few_bits_is_off_by_half_a_step_at_most(bits):
    x = torch.cat([draw(5, 7), torch.zeros(1, 7).double(), torch.full((1, 7), 3.0).double()])
    codes, low, step = pack(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (7, 7 if bits == 8 else 4)
    found = unpack(codes, low, step, bits, 7)
    assert ((found - x).abs() <= step / 2 * (1 + 1e-9)).all() and torch.equal(found[5:], x[5:])
    assert torch.equal(found.amin(1), x.amin(1)) and torch.allclose(found.amax(1), x.amax(1))
    _, optimizer, _ = walked(DCTAdamW, (9, 6), range(5), rank=2, error_feedback=True, ef_bits=bits)
    _, exact, _ = walked(DCTAdamW, (9, 6), range(5), rank=2, error_feedback=True)
    (state,), (other,) = optimizer.state.values(), exact.state.values()
    kept = optimizer.error(state, optimizer.param_groups[0], 6)
    assert 0 < (kept - other["error"]).abs().max() < (0.05 if bits == 8 else 1.5)


@pytest.mark.parametrize("kind", [DCTAdamW, Trion])
def test_the_order_of_the_columns_does_not_matter(kind, monkeypatch):
    fed = {"error_feedback": True} if kind is DCTAdamW else {}  # which chooses apart from the rest of its step
    expected, _, _ = walked(kind, (9, 6), range(6), rank=3, **fed)
    select = ColumnSelector.select
    calls = []

    def shuffled(self, grad):
        index, low = select(self, grad)
        order = torch.randperm(3, generator=torch.Generator().manual_seed(len(calls)))
        calls.append(1)
        return index[order], low[:, order]

    monkeypatch.setattr(ColumnSelector, "select", shuffled)
    found, _, _ = walked(kind, (9, 6), range(6), rank=3, **fed)
    assert torch.allclose(found, expected, atol=1e-10)
    if kind is DCTAdamW:  # as released: the moments of a column go to another
        found, _, _ = walked(kind, (9, 6), range(6), rank=3, remap=False, **fed)
        assert not torch.allclose(found, walked(kind, (9, 6), range(6), rank=3, remap=True, **fed)[0], atol=1e-4)
    assert len(calls) >= 6


def test_moments_of_columns_that_stay_stay_and_new_ones_begin_at_zero():
    _, optimizer, _ = walked(DCTAdamW, (9, 6), [0], rank=3)
    (p,) = optimizer.state
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    p.grad = draw(9, 6, seed=1)
    optimizer.param_groups[0]["betas"] = (1 - 1e-12, 1 - 1e-12)  # nothing new is counted
    optimizer.step()
    old, new = before["index"].tolist(), optimizer.state[p]["index"].tolist()
    assert 0 < len(set(old) & set(new)) < 3
    for j, column in enumerate(new):
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = before[key][:, old.index(column)] if column in old else torch.zeros(9).double()
            assert torch.allclose(optimizer.state[p][key][:, j], wanted, atol=1e-10)
    assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()


@SHAPES
@pytest.mark.parametrize("basis", BASES[:2])
def test_the_whole_rank_is_a_change_of_basis(shape, basis, monkeypatch):
    c = ColumnSelector(6, basis=basis).vectors(6, torch.arange(6), draw(1))
    found, _, _ = walked(DCTAdamW, shape, range(4), rank=6, lr=0.01, basis=basis)
    turned = nn.Parameter(projectors.tall(draw(*shape, seed=99)) @ c)
    adam = torch.optim.AdamW([turned], lr=0.01, weight_decay=0.0)
    for step in range(4):
        turned.grad = projectors.tall(draw(*shape, seed=step)) @ c
        adam.step()
    assert torch.allclose(projectors.tall(found), turned.detach() @ c.T, atol=1e-10)
    monkeypatch.setattr(DCTAdamW, "adam", lambda self, low, state, group: low)
    plain, _, path = walked(DCTAdamW, shape, range(4), rank=6, lr=0.1, basis=basis, error_feedback=True)
    assert torch.allclose(plain, path[0] - 0.1 * sum(draw(*shape, seed=step) for step in range(4)), atol=1e-12)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, lambda n, m, r: 4 * (2 * n * r + r)),
        ({"error_feedback": True}, lambda n, m, r: 4 * (2 * n * r + r + n * m)),
        ({"error_feedback": True, "ef_bits": 8}, lambda n, m, r: 4 * (2 * n * r + r) + n * m + 8 * n),
        ({"error_feedback": True, "ef_bits": 4}, lambda n, m, r: 4 * (2 * n * r + r) + n * -(-m // 2) + 8 * n),
    ],
)
def test_the_state_is_of_the_size_of_the_formula(options, taken):
    for shape in ((9, 5), (5, 9)):
        _, optimizer, _ = walked(DCTAdamW, shape, [0], dtype=torch.float32, rank=2, **options)
        assert optimizer.state_bytes() == taken(9, 5, 2)
    _, optimizer, _ = walked(DCTAdamW, (3, 5, 9), [0], dtype=torch.float32, rank=2, **options)
    assert optimizer.state_bytes() == 3 * taken(9, 5, 2)
    _, optimizer, _ = walked(Trion, (9, 5), [0], dtype=torch.float32, rank=2)
    assert optimizer.state_bytes() == 4 * (9 * 5 + 2)


# -- Trion


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_trion_is_its_formulas_written_out(shape, scale):
    c = torch.tensor(scipy.fft.dct(torch.eye(6, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=1))
    lying = (lambda t: t) if shape[0] >= shape[1] else (lambda t: t.T)
    w, momentum = draw(*shape, seed=99), torch.zeros(9, 6).double()
    for step in range(4):
        momentum = momentum + lying(draw(*shape, seed=step))
        q = c[:, (momentum @ c).norm(dim=0).topk(2).indices]
        b = momentum @ q
        momentum = momentum - 0.1 * b @ q.T
        w = (1 - 0.02 * 0.5) * w - 0.02 * SCALES[scale](*shape) * lying(newton_schulz(b) @ q.T)
    found, _, _ = walked(Trion, shape, range(4), rank=2, lr=0.02, momentum=0.9, scale=scale, weight_decay=0.5)
    assert torch.allclose(found, w, atol=1e-10)


def test_the_whole_rank_is_muon_without_nesterov():
    """torch's own makes its products in bfloat16, which is what they differ by."""
    p = nn.Parameter(draw(9, 6, seed=99, dtype=torch.float32))
    muon = torch.optim.Muon([p], lr=0.02, momentum=0.9, nesterov=False, weight_decay=0.1)
    for step in range(4):
        p.grad = draw(9, 6, seed=step, dtype=torch.float32)
        muon.step()
    found, _, path = walked(
        Trion, (9, 6), range(4), dtype=torch.float32, rank=6, lr=0.02, momentum=0.9, weight_decay=0.1
    )
    assert (found - p).norm() < 0.03 * (found - path[0]).norm()


def test_what_trion_does_not_select_does_not_decay():
    _, optimizer, _ = walked(Trion, (9, 6), [0], rank=2, momentum=0.0)
    (state,) = optimizer.state.values()
    c = ColumnSelector(6).vectors(6, torch.arange(6), draw(1))
    parts, given = state["momentum"] @ c, draw(9, 6, seed=0) @ c
    chosen = state["index"].tolist()
    for k in range(6):
        assert torch.allclose(parts[:, k], torch.zeros(9).double() if k in chosen else given[:, k], atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_every_step_of_trion_has_rank_r_and_bounded_singular_values(shape):
    _, _, path = walked(Trion, shape, range(4), rank=2, lr=0.1, scale="none")
    for a, b in pairwise(path):
        values = torch.linalg.svdvals((a - b) / 0.1)
        assert values[0] < 1.21 and values[1] > 0.6 and values[2] < 1e-10


# -- both


@pytest.mark.parametrize("projector", ["dct", "svd", "random", "power"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DCTAdamW, {"update_gap": 2}),
        (DCTAdamW, {"error_feedback": True}),
        (DCTAdamW, {"error_feedback": True, "ef_bits": 8}),
        (DCTAdamW, {"error_feedback": True, "ef_bits": 4, "remap": False, "norm": 1}),
        (Trion, {}),
    ],
)
def test_from_a_state_dict_they_go_on_bit_for_bit(kind, options, projector):
    options = {"rank": 2, "projector": projector, "dtype": torch.float32, **options}
    whole, _, _ = walked(kind, (9, 6), range(5), **options)
    p, optimizer, _ = walked(kind, (9, 6), range(3), **options)
    rest, _, _ = walked(kind, (9, 6), range(3, 5), start=(p, optimizer.state_dict()), **options)
    assert torch.equal(whole, rest)


@pytest.mark.parametrize("kind", [DCTAdamW, Trion])
def test_zeros_and_what_is_no_number(kind):
    p = nn.Parameter(draw(9, 6))
    optimizer, before = kind([p], rank=2), p.detach().clone()
    p.grad = torch.zeros(9, 6).double()
    optimizer.step()
    assert torch.equal(p, before) and all(t.isfinite().all() for t in optimizer.state[p].values())
    state = copy.deepcopy(optimizer.state_dict()["state"][0])
    p.grad[3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match="no step was made"):
        optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(state[key], value) for key, value in optimizer.state_dict()["state"][0].items())


def test_a_rank_of_another_run_is_no_state_of_this_matrix():
    _, source, _ = walked(DCTAdamW, (9, 6), [0], rank=2, error_feedback=True)
    with pytest.raises(InputError, match=r"error \(9, 6\), .* but it must have error \(8, 6\)"):
        walked(DCTAdamW, (8, 6), [0], start=(draw(8, 6), source.state_dict()), rank=2, error_feedback=True)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (DCTAdamW, {"rank": 7}, r"rank is 7 but must be from 1 to 6, the smaller side of a matrix \(9, 6\)"),
        (DCTAdamW, {"ef_bits": 3, "error_feedback": True}, "ef_bits is 3 but must be one of"),
        (DCTAdamW, {"ef_bits": 8}, "error_feedback is False"),
        (DCTAdamW, {"norm": 0}, "norm is 0"),
        (DCTAdamW, {"projector": "qr"}, "projector 'qr' is unknown"),
        (Trion, {"rank": 7}, "rank is 7"),
        (Trion, {"momentum": 1.5}, "momentum is 1.5 but must be from 0 to 1"),
        (Trion, {"ns_steps": 0}, "ns_steps is 0"),
        (Trion, {"scale": "muon"}, "scale 'muon' is unknown"),
    ],
)
def test_wrong_options_are_named(kind, options, said):
    with pytest.raises(InputError, match=said):
        kind([nn.Parameter(draw(9, 6))], **({"rank": 2} | options))


@pytest.mark.parametrize("kind", [DCTAdamW, Trion])
def test_a_basis_that_a_width_has_not_is_refused_before_any_step(kind):
    with pytest.raises(InputError, match="'hadamard' but the width 12 is no power of two"):
        kind([nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(12, 16))], rank=2, basis="hadamard")
