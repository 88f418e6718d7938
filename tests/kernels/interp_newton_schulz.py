"""The Triton kernels of `newton_schulz` under the interpreter; run by test_interpreter in a process of its own."""

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, newton_schulz
from workbench.kernels.newton_schulz import COEFFICIENTS, triton


def check(x, steps=2):
    out = newton_schulz(x, steps=steps, backend="triton")
    assert dispatch.last_backend("newton_schulz") == "triton" and out.dtype == x.dtype
    exact = newton_schulz(x.double(), steps=steps, backend="reference")
    assert torch.allclose(out.double(), exact, atol=1e-5 if x.dtype == torch.float32 else 4e-3)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (5, 19), (19, 5), (64, 33)])
def test_equals_the_reference(dtype, shape):
    check(draw(*shape, dtype=dtype), steps=5 if dtype == torch.float32 else 2)  # each step makes rounding larger


@pytest.mark.parametrize("n, m", [(31, 32), (32, 33), (33, 33), (40, 70)])
def test_several_tiles_and_their_edges(n, m, monkeypatch):
    monkeypatch.setitem(triton.TILES, 4, triton.Tile(16, 16, 4, 1))
    check(draw(n, m))
    check(draw(m, n))


def test_the_tiles_as_they_are():
    side = triton.TILES[4].side
    check(draw(side + 1, 2 * side + 1), steps=1)


def test_matrices_of_a_batch_and_none():
    out = check(draw(3, 2, 6, 9))
    assert out.shape == (3, 2, 6, 9)
    assert newton_schulz(torch.empty(0, 3, 4), backend="triton").shape == (0, 3, 4)
    assert torch.equal(newton_schulz(torch.zeros(4, 5), backend="triton"), torch.zeros(4, 5))


def test_what_is_not_a_number_stays_in_its_matrix():
    x = draw(3, 5, 5)
    clean = newton_schulz(x, backend="triton")
    x[1, 2, 3] = torch.nan
    out = newton_schulz(x, backend="triton")
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


def test_float64_is_refused_and_the_registration_holds():
    with pytest.raises(InputError, match=r"x is torch.float64; it must be float32"):
        newton_schulz(draw(3, 3, dtype=torch.float64), backend="triton")
    torch.library.opcheck(
        torch.ops.workbench.newton_schulz.default, (draw(4, 6), 2, list(COEFFICIENTS), True, "triton")
    )
