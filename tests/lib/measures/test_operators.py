"""Power iteration, orthogonality, subspaces and data alignment."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.measures.operators import (
    data_alignment,
    gram_participation_ratio,
    orthogonality_error,
    power_iteration,
    subspace_overlap,
    top_subspace,
)
from workbench.lib.measures.spectra import participation_ratio, stable_rank


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_power_iteration_never_exceeds_the_norm_and_grows(steps):
    w = gaussian(512, 128)
    true = torch.linalg.matrix_norm(w, 2)
    found = power_iteration(w, steps=steps, generator=torch.Generator().manual_seed(0)).value
    more = power_iteration(w, steps=steps + 1, generator=torch.Generator().manual_seed(0)).value
    assert found <= more <= true * (1 + 1e-12)
    if steps == 20:
        assert found / true > 0.95


def test_power_iteration_warm_start_follows_a_moving_matrix():
    w = gaussian(60, 40)
    vector = power_iteration(w, steps=300, generator=torch.Generator().manual_seed(0)).vector
    moved = w + 1e-3 * gaussian(60, 40, seed=1)
    value = power_iteration(moved, vector, steps=2).value
    torch.testing.assert_close(value, torch.linalg.matrix_norm(moved, 2), rtol=1e-4, atol=0)
    assert vector.norm().item() == pytest.approx(1)


def test_power_iteration_is_exact_for_rank_one_and_undefined_for_zero():
    w = torch.outer(gaussian(5), gaussian(7, seed=1))
    torch.testing.assert_close(power_iteration(w, steps=1).value, torch.linalg.matrix_norm(w, 2))
    assert power_iteration(torch.zeros(3, 4)).value.isnan()
    with pytest.raises(InputError, match="steps is 0"):
        power_iteration(w, steps=0)


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (2, 12, 5)])
def test_participation_ratio_without_decomposition(shape):
    w = gaussian(*shape)
    torch.testing.assert_close(gram_participation_ratio(w), participation_ratio(torch.linalg.svdvals(w)))
    assert gram_participation_ratio(torch.zeros(2, 3)).isnan()


def test_orthogonality_error():
    q = torch.linalg.qr(gaussian(8, 8)).Q[:5]
    error = orthogonality_error(torch.linalg.svdvals(q))
    assert error.largest < 1e-12 and error.rms < 1e-12
    x = gaussian(5, 9)
    error = orthogonality_error(torch.linalg.svdvals(x))
    direct = torch.linalg.matrix_norm(x @ x.T - torch.eye(5)) / math.sqrt(5)
    torch.testing.assert_close(error.rms, direct)
    assert error.largest.item() == pytest.approx((torch.linalg.svdvals(x) - 1).abs().max().item())


def test_subspace_overlap():
    q = torch.linalg.qr(gaussian(20, 20)).Q
    a, b = q[:, :4], q[:, 4:8]
    assert subspace_overlap(a, a).item() == pytest.approx(1)
    assert subspace_overlap(a, b).item() == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(a, q[:, 2:6]).item() == pytest.approx(0.5)
    rotation = torch.linalg.qr(gaussian(4, 4, seed=1)).Q
    assert subspace_overlap(a, a @ rotation).item() == pytest.approx(1)  # of spaces, not of bases
    random = torch.linalg.qr(gaussian(400, 20, 4, seed=2)).Q
    assert subspace_overlap(random[:200], random[200:]).mean().item() == pytest.approx(4 / 20, abs=0.01)
    with pytest.raises(InputError, match="shape"):
        subspace_overlap(a, q[:, :3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_top_subspace(side):
    u, s, vt = torch.linalg.svd(gaussian(12, 7), full_matrices=False)
    found = top_subspace(u @ s.diag() @ vt, 3, side)
    expected = u[:, :3] if side == "left" else vt[:3].T
    assert subspace_overlap(found, expected).item() == pytest.approx(1)
    with pytest.raises(InputError, match="side is 'top'"):
        top_subspace(u, 3, "top")
    with pytest.raises(InputError, match="rank is 8"):
        top_subspace(u, 8, side)


def test_data_alignment():
    w, h = gaussian(6, 10), gaussian(5000, 10, seed=1)
    top = torch.linalg.svd(w).Vh[0]
    assert data_alignment(w, top.expand(3, 10)).item() == pytest.approx(1)
    assert 0 < data_alignment(w, h) < 1
    isotropic = math.sqrt(stable_rank(torch.linalg.svdvals(w)) / 10)
    assert data_alignment(w, h).item() == pytest.approx(isotropic, rel=0.03)
    torch.testing.assert_close(data_alignment(5 * w, 3 * h), data_alignment(w, h))
    assert data_alignment(torch.zeros(6, 10), h).isnan()
