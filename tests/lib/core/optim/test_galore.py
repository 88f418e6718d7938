"""GaLore's exact properties, and galore_torch beside it where it is installed."""

from collections import namedtuple
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests import draws
from workbench.lib.core.optim import PROJECTORS, GaLoreAdamW

draw = partial(draws.draw, dtype=torch.float64)
walked = partial(draws.walked, GaLoreAdamW)

Named = namedtuple("Named", "U S Vh")


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_the_whole_rank_is_adam_in_the_rotated_basis(shape):
    """r = m, a new basis at each step, one step: AdamW's own in the coordinates of the singular vectors."""
    p, _, path = walked(shape, [0], rank=6, update_gap=1, scale=1.0, lr=0.01, eps=1e-8)
    grad = draw(*shape, seed=0)
    u, _, vt = torch.linalg.svd(grad, full_matrices=False)  # of whatever signs: Adam's first step does not mind
    turned = nn.Parameter(path[0] @ vt.T if shape[0] >= shape[1] else u.T @ path[0])
    turned.grad = grad @ vt.T if shape[0] >= shape[1] else u.T @ grad
    torch.optim.AdamW([turned], lr=0.01, weight_decay=0.0).step()
    expected = turned.detach() @ vt if shape[0] >= shape[1] else u @ turned.detach()
    assert torch.allclose(p, expected, atol=1e-10)


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_whole_rank_with_plain_descent_is_plain_descent(name, monkeypatch):
    monkeypatch.setattr(GaLoreAdamW, "adam", lambda self, low, state, group: low)
    _, _, path = walked((9, 6), range(4), rank=6, projector=name, update_gap=2, scale=1.0, lr=0.1)
    for step in range(4):
        assert torch.allclose(path[step + 1], path[step] - 0.1 * draw(9, 6, seed=step), atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("name", PROJECTORS)
def test_the_update_lies_in_the_subspace_until_it_is_chosen_anew(shape, name):
    _, optimizer, path = walked(shape, range(9), rank=2, projector=name, update_gap=3, lr=0.01)
    changes = [b - a for a, b in pairwise(path)]
    for first in (0, 3, 6):
        assert torch.linalg.matrix_rank(sum(changes[first : first + 3]), rtol=1e-8) == 2
        side = 1 if shape[0] >= shape[1] else 0  # all lie in the span of one Q, on the smaller side
        assert torch.linalg.matrix_rank(torch.cat(changes[first : first + 3], 1 - side), rtol=1e-8) == 2
    assert 2 < torch.linalg.matrix_rank(path[-1] - path[0], rtol=1e-8) <= 6  # K r after K choices
    (state,) = optimizer.state.values()
    if "basis" in state:
        assert torch.allclose(state["basis"].T @ state["basis"], torch.eye(2, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("shape", "stack"), [((9, 6), 1), ((6, 9), 1), ((4, 9, 6), 4), ((6, 3, 2, 2), None)])
def test_the_state_is_of_the_size_of_the_formula(shape, stack):
    """2 n r numbers of moments and m r of the basis; of the cosines r integers."""
    n, m, copies = (12, 6, 1) if stack is None else (9, 6, stack)
    _, optimizer, _ = walked(shape, [0], dtype=torch.float32, rank=2)
    assert optimizer.state_bytes() == 4 * copies * (2 * n * 2 + m * 2)
    _, optimizer, _ = walked(shape, [0], dtype=torch.float32, rank=2, projector="dct")
    assert optimizer.state_bytes() == 4 * copies * (2 * n * 2 + 2)


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("name", PROJECTORS)
def test_from_a_state_dict_it_goes_on_bit_for_bit(name, remap):
    options = {"rank": 2, "projector": name, "update_gap": 2, "remap": remap, "dtype": torch.float32}
    whole, _, _ = walked((9, 6), range(7), **options)
    for middle in (1, 2, 3):
        p, optimizer, _ = walked((9, 6), range(middle), **options)
        rest, _, _ = walked((9, 6), range(middle, 7), start=(p, optimizer.state_dict()), **options)
        assert torch.equal(whole, rest)


def test_a_stack_is_its_matrices_one_by_one():
    options = {"rank": 2, "update_gap": 2, "remap": True}
    for name in PROJECTORS:
        whole, _, _ = walked((3, 9, 6), range(4), projector=name, **options)
        for e in range(3):
            p = nn.Parameter(draw(3, 9, 6, seed=99)[e].clone())
            optimizer = GaLoreAdamW([p], projector=name, **options)
            for step in range(4):
                p.grad = draw(3, 9, 6, seed=step)[e]
                optimizer.step()
            assert torch.allclose(whole[e], p, atol=1e-10)


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_galore_torch_makes_the_same_steps(shape, gap, monkeypatch):
    galore_torch = pytest.importorskip("galore_torch", exc_type=ImportError)
    svd = torch.linalg.svd

    def signed(matrix, full_matrices):  # the peer takes LAPACK's signs as they come
        u, s, vt = svd(matrix, full_matrices=full_matrices)
        signs = torch.where(u.sum(0) + vt.sum(1) < 0, -1.0, 1.0)
        return u * signs, s, vt * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, full_matrices: Named(*signed(matrix, full_matrices)))
    peer = nn.Parameter(draw(*shape, seed=99, dtype=torch.float32))
    options = {"rank": 3, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    theirs = galore_torch.GaLoreAdamW([{"params": [peer]} | options], lr=0.01, eps=1e-12, no_deprecation_warning=True)
    p = nn.Parameter(peer.detach().clone())
    ours = GaLoreAdamW([p], lr=0.01, rank=3, update_gap=gap, eps=1e-12)
    lying = (lambda t: t) if shape[0] >= shape[1] else (lambda t: t.T)
    for step in range(7):
        p.grad, peer.grad = (draw(*shape, seed=step, dtype=torch.float32) for _ in range(2))
        ours.step()
        theirs.step()
        basis = theirs.state[peer]["projector"].ortho_matrix
        basis = basis.T if shape[0] >= shape[1] else basis
        assert torch.allclose(ours.state[p]["basis"], basis, atol=1e-5)  # chosen at the same steps
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(ours.state[p][key], lying(theirs.state[peer][key]), atol=1e-5)
        assert torch.allclose(p, peer, atol=1e-5)
