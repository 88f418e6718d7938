"""PCB-Merging: the formulas as loops, and what follows from them exactly."""

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.merging.pcb_merging import INTER, norm, pcb_merge, pcb_scores


def vectors(n: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops(tau: torch.Tensor, ratio: float, lam: list[float], inter: str, q: float) -> list[float]:
    """The head of the file, number by number, the intra term with its e^n."""
    rows = tau.tolist()
    n, p = len(rows), len(rows[0])

    def stretched(row):
        low, high = min(row), max(row)
        return [(v - low) / (high - low) for v in row]

    sizes, clipped, signed = [], [], []
    for row in rows:
        order = sorted(abs(v) for v in row)
        low, high = order[int(p * q)], order[int(p * (1 - q)) - 1]
        a = [min(max(abs(v), low), high) for v in row]
        sizes.append(stretched(a))
        clipped.append([math.copysign(x, v) for x, v in zip(a, row, strict=True)])
        signed.append([math.copysign(x, v) for x, v in zip(sizes[-1], row, strict=True)])
    scales = []
    for i in range(n):
        if inter == "pairwise_tanh":
            agree = [sum(math.tanh(signed[i][k] * signed[j][k]) for j in range(n)) for k in range(p)]
        elif inter == "sum_tanh":
            agree = [math.tanh(rows[i][k] * sum(rows[j][k] for j in range(n))) for k in range(p)]
        else:
            agree = [0.0] * p
            for j in range(n):
                e = [math.exp(v) for v in stretched([rows[i][k] * rows[j][k] for k in range(p)])]
                agree = [had + v / sum(e) for had, v in zip(agree, e, strict=True)]
        score = [math.exp(n * z * z) * b for z, b in zip(sizes[i], agree, strict=True)]
        cut = sorted(score)[int(p * (1 - ratio))]
        scales.append(stretched([max(v, cut) for v in score]))
    merged = []
    for k in range(p):
        total = sum(scales[i][k] for i in range(n))
        merged.append(sum(lam[i] * scales[i][k] * clipped[i][k] for i in range(n)) / total if total else 0.0)
    return merged


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("clip", [0.0, 0.04])
def test_it_is_the_formula_as_loops(inter, clip):
    tau, lam = vectors(3, 50), [0.8, 1.0, 1.3]
    made = pcb_merge(tau, 0.3, torch.tensor(lam, dtype=tau.dtype), inter=inter, clip=clip)
    expected = torch.tensor(loops(tau, 0.3, lam, inter, clip), dtype=torch.float64)
    assert 10 < (expected != 0).sum() < 50
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("n", [1, 4])
def test_of_one_task_or_of_its_copies_the_kept_weights_are_the_clipped_ones(inter, n):
    tau = vectors(1, 400).repeat(n, 1)
    clipped, scale = pcb_scores(tau, 0.2, inter)
    merged, kept = pcb_merge(tau, 0.2, inter=inter), scale[0] > 0
    assert 70 < kept.sum() < 90
    torch.testing.assert_close(merged[kept], clipped[0][kept], rtol=1e-14, atol=0)
    assert (merged[~kept] == 0).all()


def test_the_share_that_stays_is_the_ratio():
    _, scale = pcb_scores(vectors(3, 20_000), 0.2)
    assert ((scale > 0).sum(1) == 3999).all()
    assert (scale.amin(1) == 0).all() and (scale.amax(1) == 1).all()
    _, scale = pcb_scores(vectors(3, 500), 1.0)
    assert ((scale == 0).sum(1) == 1).all()


@pytest.mark.parametrize("inter", INTER)
def test_every_merged_weight_is_between_those_that_survive(inter):
    clipped, scale = pcb_scores(vectors(5, 1000), 0.3, inter)
    merged, alive = pcb_merge(vectors(5, 1000), 0.3, inter=inter), scale > 0
    low = clipped.masked_fill(~alive, math.inf).amin(0)
    high = clipped.masked_fill(~alive, -math.inf).amax(0)
    some = alive.any(0)
    assert (~some).any() and (alive.sum(0) > 1).any()
    assert (merged[some] >= low[some] - 1e-12).all() and (merged[some] <= high[some] + 1e-12).all()
    assert (merged[~some] == 0).all()


@pytest.mark.parametrize("inter", INTER)
def test_signs_and_scales_go_through_but_for_the_form_that_takes_raw_products(inter):
    tau = vectors(4, 300)
    merged = pcb_merge(tau, inter=inter)
    torch.testing.assert_close(pcb_merge(-tau, inter=inter), -merged)
    scaled = pcb_merge(100 * tau, inter=inter) / 100
    if inter == "sum_tanh":
        assert (scaled - merged).abs().max() > 0.01 * merged.abs().max()
    else:
        torch.testing.assert_close(scaled, merged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inter", INTER)
def test_the_order_of_tasks_says_nothing_and_weights_move_with_their_places(inter):
    tau = vectors(4, 300)
    merged = pcb_merge(tau, inter=inter)
    torch.testing.assert_close(pcb_merge(tau[[2, 0, 3, 1]], inter=inter), merged, rtol=1e-10, atol=1e-12)
    places = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pcb_merge(tau[:, places], inter=inter), merged[places], rtol=1e-10, atol=1e-12)


def test_two_opposite_weights_of_one_size_have_the_score_of_none():
    """tanh(g^2) + tanh(-g^2) = 0; everything that agrees is above it."""
    tau = vectors(1, 200).repeat(2, 1)
    opposite = int(tau[0].abs().argmax())
    tau[1, opposite] *= -1
    _, scale = pcb_scores(tau, 1.0)
    assert (scale[:, opposite] == 0).all() and (scale.sum(1) > 0).all()


def test_lambda_scales_what_is_added_and_is_no_part_of_the_scores():
    tau = vectors(3, 300)
    merged = pcb_merge(tau)
    torch.testing.assert_close(pcb_merge(tau, lam=1.7), 1.7 * merged)
    each = sum(pcb_merge(tau, lam=torch.eye(3, dtype=torch.float64)[i]) for i in range(3))
    torch.testing.assert_close(each, merged)
    assert (pcb_merge(tau, lam=0.0) == 0).all()


def test_many_tasks_do_not_overflow():
    tau = vectors(120, 60).float()
    assert pcb_merge(tau).isfinite().all() and (pcb_merge(tau) != 0).any()


def test_a_constant_task_vector_has_no_say_and_nothing_is_not_a_number():
    tau = vectors(3, 100)
    tau[1] = 0.5
    _, scale = pcb_scores(tau, 0.3)
    assert (scale[1] == 0).all() and (scale[0] > 0).any()
    assert pcb_merge(tau, 0.3).isfinite().all()
    assert (pcb_merge(torch.zeros(3, 100)) == 0).all()
    assert (norm(torch.full((2, 5), 3.0)) == 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.01}, "ratio is 0.01 but must be above clip, 0.01"),
        ({"ratio": 1.1}, "ratio is 1.1"),
        ({"clip": 0.5}, "clip is 0.5"),
        ({"inter": "tanh"}, "inter"),
        ({"lam": torch.ones(2)}, "one for each of 3 tasks"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        pcb_merge(vectors(3, 50), **options)


@pytest.mark.parametrize("tau", [torch.ones(3), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, 3)])
def test_what_is_no_matrix_of_floats_is_refused(tau):
    with pytest.raises(InputError, match="must be floats"):
        pcb_merge(tau)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    tau = vectors(3, 50)
    tau[1, 7] = value
    with pytest.raises(InputError, match="finite"):
        pcb_merge(tau)
