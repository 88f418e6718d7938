"""Nested codes: every level is a prefix of the next, in the middle of its interval, and no refit makes it worse."""

from itertools import pairwise

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import plane_bytes
from workbench.lib.serving.d2moe_code import CLIPS, NestedQuantizer, grams, level_errors

PLAIN = NestedQuantizer(refit=False, weights=(0.0,) * 6 + (1.0,))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(cols: int, tokens: int = 40, batch: tuple[int, ...] = ()) -> torch.Tensor:
    x = draw(*batch, tokens, cols, seed=9)
    return x.mT @ (x * torch.linspace(0.1, 3, cols))


def symmetric(gram: torch.Tensor) -> torch.Tensor:
    return gram.mT @ gram


@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 70), (2, 3, 4, 10)])
@pytest.mark.parametrize(("bits", "base"), [(8, 2), (4, 1), (3, 3)])
def test_a_level_is_the_next_without_its_last_bit(shape, bits, base):
    nested = NestedQuantizer(bits, base, group=16).fit(draw(*shape))
    for level, above in pairwise(nested.levels):
        assert torch.equal(nested.codes(level), nested.codes(above) >> 1)
    assert int(nested.codes(bits).max()) < 2**bits
    planes = torch.cat([nested.plane(level) for level in nested.levels], -3)
    assert torch.equal(planes, nested.planes)
    for part in (nested.low, nested.scale):
        assert part.shape == (*shape[:-2], bits - base + 1, shape[-2], -(-shape[-1] // 16))


def test_bytes_are_those_of_the_planes_and_of_the_scales_of_each_level():
    nested = NestedQuantizer(8, 2, group=64).fit(draw(6, 100))
    side = 4 * 6 * 2
    assert nested.nbytes(0) == 0
    scales = [nested.nbytes(level) - plane_bytes(6, 100, level) for level in nested.levels]
    assert scales == [side * at for at in range(1, 8)]
    assert nested.nbytes(4) - nested.nbytes(2) == 2 * (plane_bytes(6, 100, 1) + side)
    stored = nested.planes.numel() + 2 * (nested.low.numel() + nested.scale.numel())
    assert stored == nested.nbytes(8)  # not the sum over the levels


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_without_clipping_no_weight_is_farther_than_half_an_interval(scale, monkeypatch):
    monkeypatch.setattr("workbench.lib.serving.d2moe_code.CLIPS", (1.0,))
    w = draw(9, 70, seed=3) * scale
    w[0] = 0.25 * scale  # a row of which all are the same
    nested = PLAIN.fit(w)
    for at, level in enumerate(nested.levels):
        step = (nested.scale[at].double() * nested.unit.double()).repeat_interleave(64, -1)[:, :70]
        off = (nested.dequant(level).double() - w.double()).abs()
        assert (off <= step / 2 * (1 + 1e-5) + 1e-6 * scale).all()


def test_the_highest_level_is_the_plain_quantiser_of_its_bits():
    w = draw(7, 64)
    nested = PLAIN.fit(w)
    low, step = nested.low[0].float() * nested.unit, nested.scale[-1].float() * nested.unit
    codes = ((w - low) / step).floor().clamp(0, 255)
    assert torch.equal(nested.dequant(8), low + step / 2 + step * codes)


def test_errors_fall_by_about_four_a_bit():
    w = draw(64, 256)
    errors = [float(error.sum()) for error in level_errors(NestedQuantizer(refit=False).fit(w), w).values()]
    assert all(3.2 < low / high < 4.8 for low, high in pairwise(errors))


@pytest.mark.parametrize("with_gram", [False, True])
def test_a_refit_makes_no_row_worse_at_any_level_and_changes_no_code(with_gram):
    w, gram = draw(3, 11, 40), symmetric(gram_of(40, batch=(3,))) if with_gram else None
    for weights in (None, (1.0,) * 7):
        plain = NestedQuantizer(group=16, refit=False, weights=weights).fit(w, gram)
        fitted = NestedQuantizer(group=16, weights=weights).fit(w, gram)
        assert torch.equal(plain.planes, fitted.planes)
        before, after = level_errors(plain, w, gram), level_errors(fitted, w, gram)
        for level in plain.levels:
            assert (after[level] <= before[level] * (1 + 1e-4) + 1e-9).all()
        assert after[2].sum() < 0.97 * before[2].sum()


def test_the_range_is_chosen_for_all_levels_and_by_what_the_inputs_weigh(monkeypatch):
    w = draw(16, 64)
    w[:, 0] = 12.0  # one outlier a row, of an input that is always 0
    gram = torch.eye(64, dtype=torch.float64)
    gram[0, 0] = 0.0
    chosen = NestedQuantizer(refit=False, weights=(1.0,) * 7).fit(w, gram)
    monkeypatch.setattr("workbench.lib.serving.d2moe_code.CLIPS", (1.0,))
    whole = NestedQuantizer(refit=False, weights=(1.0,) * 7).fit(w, gram)
    total = [sum(level_errors(nested, w, gram).values()) for nested in (chosen, whole)]
    assert (total[0] <= total[1]).all() and total[0].sum() < 0.9 * total[1].sum()
    assert len(CLIPS) > 1 and CLIPS[0] == 1.0


def test_grams_of_experts_that_saw_nothing_are_white():
    seen = grams([draw(5, 3), torch.zeros(0, 3)])
    assert torch.equal(seen[1], torch.eye(3, dtype=torch.float64)) and torch.linalg.matrix_rank(seen[0]) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NestedQuantizer(bits=9), "bits is 9 but must be from 1 to 8"),
        (lambda: NestedQuantizer(4, base=5), "base is 5 but must be from 1 to bits = 4"),
        (lambda: NestedQuantizer(group=0), "group is 0"),
        (lambda: NestedQuantizer(weights=(1.0,)), "each of the 7 levels"),
        (lambda: NestedQuantizer(weights=(0.0,) * 7), "one above it"),
        (lambda: NestedQuantizer(weights=(float("nan"),) * 7), "a finite number of at least 0"),
        (lambda: NestedQuantizer().fit(torch.full((2, 2), 2.0**126)), r"w holds 8.507e\+37 but must be below 2\^126"),
        (lambda: NestedQuantizer().fit(torch.full((2, 2), 1e300, dtype=torch.float64)), r"w holds 1e\+300"),
        (lambda: NestedQuantizer().fit(torch.full((2, 2), float("nan"))), "w is torch.float32"),
        (
            lambda: NestedQuantizer().fit(torch.zeros(2, 2), torch.eye(2) / 0),
            r"gram has shape \(2, 2\) but must be finite",
        ),
        (lambda: PLAIN.fit(torch.zeros(2, 3)).dequant(1), "level is 1 but must be from 2 to 8 bits"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_constant_and_lone_weights_of_every_type_come_back(dtype):
    most = min(torch.finfo(dtype).max, 2.0**125.9)
    for w in (torch.full((2, 9), 0.7), torch.full((1, 1), -3.0), torch.tensor([[most, -most, 0.0]]), torch.zeros(2, 3)):
        w = w.to(dtype)
        for given in (w, w.T.contiguous().T):  # neighbours in memory or not
            made = NestedQuantizer().fit(given).dequant(8).double()
            assert (made - w.double()).abs().amax() <= 0.005 * w.double().abs().amax()
