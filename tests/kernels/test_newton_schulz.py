"""Newton-Schulz on its CPU paths: singular values and vectors, scale, transposes, torch's own, registration."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import dispatch, newton_schulz
from workbench.kernels.newton_schulz import CEILING, COEFFICIENTS

PATHS = ("reference", "cpu")
SHAPES = [(12, 12), (7, 20), (20, 7), (1, 9), (9, 1), (1, 1)]
paths = pytest.mark.parametrize("path", PATHS)


def quintic(s, steps=5):
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@paths
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_it_is_the_quintic_of_the_singular_values_between_the_singular_vectors(path, shape, steps):
    x = draw(*shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    exact = u @ torch.diag(quintic(s / s.norm(), steps)) @ vh
    assert torch.allclose(newton_schulz(x, steps=steps, backend=path), exact, atol=1e-12)
    assert dispatch.last_backend("newton_schulz") == path
    single = newton_schulz(x.float(), steps=steps, backend=path)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), exact, atol=1e-5)


@paths
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_that_follow_others(path, shape):
    """Without normalisation two steps and three are five; and with other coefficients they end at the polar factor."""
    x = draw(*shape, dtype=torch.float64)
    two, kept = (newton_schulz(x, steps=2, backend=path) for _ in range(2))
    five = newton_schulz(two, steps=3, normalise=False, backend=path)
    assert torch.equal(two, kept) and torch.allclose(five, newton_schulz(x), atol=1e-12)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    polished = newton_schulz(five, steps=3, coefficients=(15 / 8, -10 / 8, 3 / 8), normalise=False, backend=path)
    assert torch.allclose(polished, u @ vh, atol=1e-6)


def test_the_range_of_singular_values_on_a_grid():
    """A diagonal matrix has its singular values in sight: from 0 to 1 times its norm, by way of a large one beside."""
    s = torch.cat([torch.linspace(0, 1, 4001, dtype=torch.float64), torch.logspace(-7, 0, 500, dtype=torch.float64)])
    grid = torch.zeros(len(s), 2, 2, dtype=torch.float64)
    grid[:, 0, 0], grid[:, 1, 1] = s, (1 - s**2).sqrt()
    out = newton_schulz(grid)
    found = out.diagonal(dim1=-2, dim2=-1)[:, 0]
    assert out.triu(1).abs().max() == 0 and out.tril(-1).abs().max() == 0
    large = s >= 0.003
    assert found[large].min() >= 0.68 and 1.1 < found[large].max() <= CEILING < 1.21
    assert (found >= 0).all() and (found <= 485 * s + 1e-12).all()  # nothing turns round, the small do not explode
    assert quintic(torch.tensor(CEILING, dtype=torch.float64), 1) <= CEILING


@paths
def test_scale_does_not_matter(path):
    x = draw(6, 9)
    out = newton_schulz(x, backend=path)
    for scale in (2.0**-120, 2.0**100, -4.0):
        assert torch.equal(newton_schulz(scale * x, backend=path), out if scale > 0 else -out)
    assert torch.equal(newton_schulz(torch.zeros(3, 5), backend=path), torch.zeros(3, 5))
    assert newton_schulz(torch.full((4, 4), 1e-44), backend=path).sum() > 2.7  # less than a square can be


@paths
@pytest.mark.parametrize("shape", [(5, 5), (4, 11)])
def test_a_transpose_goes_through(path, shape):
    x = draw(*shape, dtype=torch.float64)
    assert torch.allclose(newton_schulz(x.mT, backend=path), newton_schulz(x, backend=path).mT, atol=1e-13)
    view = draw(2, *shape[::-1]).mT
    out = newton_schulz(view.contiguous(), backend=path)
    assert torch.allclose(newton_schulz(view, backend=path), out, atol=1e-5)
    assert newton_schulz(view, backend=path).is_contiguous()


@paths
def test_each_matrix_of_a_batch_is_alone(path):
    x, kept = draw(2, 3, 4, 6), draw(2, 3, 4, 6)
    out = newton_schulz(x, backend=path)
    assert torch.equal(x, kept)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        assert torch.allclose(out[i, j], newton_schulz(x[i, j], backend=path), atol=1e-6)
    x[0, 1, 2, 3], x[1, 1, 0, 0] = torch.nan, torch.inf
    again = newton_schulz(x, backend=path)
    assert again[0, 1].isnan().all() and again[1, 1].isnan().all()
    assert torch.equal(again[:, [0, 2]], out[:, [0, 2]])
    assert newton_schulz(torch.empty(0, 3, 4), backend=path).shape == (0, 3, 4)
    assert newton_schulz(torch.empty(2, 0, 4), backend=path).shape == (2, 0, 4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_in_bfloat16_it_is_as_close_to_the_meaning_as_torch_is(shape, seed):
    x = draw(*shape, seed=seed)
    exact = newton_schulz(x.double())

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    ours, plain = (newton_schulz(x.bfloat16(), backend=path) for path in ("cpu", "reference"))
    assert ours.dtype == torch.bfloat16
    assert error(ours) < 1.5 * error(_zeropower_via_newtonschulz(x, COEFFICIENTS, 5, 1e-7))
    assert error(plain) < 0.06  # which rounds each product and each sum


@paths
def test_registration_compilation_and_what_it_costs(path):
    x = draw(3, 6, 4)
    torch.library.opcheck(torch.ops.workbench.newton_schulz.default, (x, 5, list(COEFFICIENTS), True, path))
    compiled = torch.compile(lambda x: newton_schulz(x, backend=path), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), newton_schulz(x, backend=path))
    assert not newton_schulz(x.requires_grad_(), backend=path).requires_grad
    with FlopCounterMode(display=False) as counter:
        newton_schulz(x, steps=2, backend=path)
    assert counter.get_total_flops() == 2 * 3 * 2 * (2 * 4 * 4 * 6 + 4**3)


def test_wrong_input_is_named():
    for call, message in [
        (lambda: newton_schulz(torch.zeros(4)), r"x is torch.float32 of shape \(4,\) but must be matrices"),
        (lambda: newton_schulz(torch.zeros(4, 4).long()), "x is torch.int64"),
        (lambda: newton_schulz(torch.zeros(4, 4), steps=0), "steps is 0 but must be a whole number, at least 1"),
        (lambda: newton_schulz(torch.zeros(4, 4), steps=2.5), "steps is 2.5"),
        (lambda: newton_schulz(torch.zeros(4, 4), coefficients=(1.5, -0.5)), "must be three numbers"),
        (lambda: newton_schulz(torch.zeros(4, 4), backend="cuda"), "backend of newton_schulz 'cuda' is unknown"),
        (lambda: newton_schulz(torch.zeros(4, 4), backend="triton"), "they must be on a GPU"),
        (
            lambda: torch.ops.workbench.newton_schulz(torch.zeros(4), 5, [1.0, 0.0, 0.0], True, "cpu"),
            "must be matrices",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
