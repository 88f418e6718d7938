"""WeLore: the threshold against brute force, what the ranks do not depend on, what is split, frozen and trained."""

import copy
import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear
from workbench.lib.core.train import State
from workbench.lib.low_rank.welore import (
    GradientSubspaceTracker,
    apply_welore,
    by_energy,
    by_size,
    is_low_rank,
    solve_threshold,
    spectra,
    uniform_ranks,
)
from workbench.lib.measures.spectra import minmax_spectrum

SHAPES = [(20, 12), (12, 20), (16, 16), (5, 30), (1, 9)]


def model(seed: int = 0, decay: float = 0.9) -> nn.ModuleList:
    """Matrices of several shapes with spectra that fall, the later the faster."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(i, o) for o, i in SHAPES).double()
    for number, layer in enumerate(layers):
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data = (left * values * decay ** (number * torch.arange(len(values)))) @ right
    return layers


def kept(found, tau, axis=by_size):
    return {name: int((axis(values) >= tau).sum()) for name, values in found.items()}


@pytest.mark.parametrize("axis", [by_size, by_energy])
@pytest.mark.parametrize("reduction", [0.0, 0.1, 0.3, 0.5, 0.7, 0.88])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_one_that_brute_force_finds(seed, reduction, axis):
    found = spectra(model(seed))
    total = sum(map(len, found.values()))
    every = sorted({0.0, *(float(z) for values in found.values() for z in axis(values))})
    allowed = [tau for tau in every if sum(kept(found, tau, axis).values()) <= (1 - reduction) * total]
    solved = solve_threshold(found, reduction, axis)
    assert solved.ranks == kept(found, allowed[0], axis) == kept(found, solved.tau, axis)
    below = math.nextafter(solved.tau, -1)
    assert solved.tau == 0 or sum(kept(found, below, axis).values()) > (1 - reduction) * total


def test_a_higher_threshold_keeps_no_more_and_its_ends_keep_all_and_one():
    found = spectra(model())
    counts = [sum(kept(found, float(tau)).values()) for tau in torch.linspace(0, 1, 101).double()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == sum(map(len, found.values())) and counts[-1] == len(found)


def test_ranks_depend_on_neither_scale_nor_rotation():
    plain, other = model(), model()
    for number, layer in enumerate(other):
        left, right = (torch.linalg.qr(torch.randn(d, d).double()).Q for d in layer.weight.shape)
        layer.weight.data = 10.0**number * left @ layer.weight.data @ right
    for reduction in (0.3, 0.6):
        ours, theirs = (solve_threshold(spectra(m), reduction) for m in (plain, other))
        assert ours.ranks == theirs.ranks and ours.tau == pytest.approx(theirs.tau)


def test_equal_spectra_get_the_same_share():
    values = {f"{n}": torch.linspace(5, 1, n).double() for n in (10, 20, 40)}
    assert solve_threshold(values, 0.5).ranks == uniform_ranks(values, 0.5) == {"10": 5, "20": 10, "40": 20}


def test_the_axis_is_the_measure_and_of_flat_or_zero_spectra_it_is_said():
    values = torch.tensor([5.0, 3.0, 1.0]).double()
    assert torch.equal(by_size(values), minmax_spectrum(values)) and by_size(values).tolist() == [1.0, 0.5, 0.0]
    assert by_size(torch.ones(3).double()).tolist() == [1, 1, 1]
    for axis in (by_size, by_energy):
        assert axis(torch.zeros(3).double()).tolist() == [1, 0, 0]
    assert by_energy(values).tolist() == pytest.approx([1, 10 / 35, 1 / 35])


def test_uniform_ranks_have_the_sum_that_is_allowed():
    found = spectra(model())
    for reduction in (0.0, 0.25, 0.4, 0.61, 0.8):
        ranks = uniform_ranks(found, reduction)
        total = sum(map(len, found.values()))
        assert sum(ranks.values()) == int((1 - reduction) * total + 1e-9)
        assert all(1 <= ranks[name] <= len(values) for name, values in found.items())
        assert all(abs(ranks[n] - (1 - reduction) * len(v)) <= 1 for n, v in found.items() if ranks[n] > 1)


def test_low_rank_components_become_the_truncation_and_the_rest_stays_and_is_frozen():
    made = model()
    before = copy.deepcopy(made)
    ranks = solve_threshold(spectra(made), 0.55).ranks
    report = apply_welore(made, ranks)
    assert report.lrc and report.nlrc and sorted([*report.lrc, *report.nlrc]) == sorted(ranks)
    for name, rank in ranks.items():
        layer, there = made.get_submodule(name), before.get_submodule(name)
        if name in report.nlrc:
            assert type(layer) is nn.Linear and torch.equal(layer.weight, there.weight)
            continue
        left, values, right = torch.linalg.svd(there.weight, full_matrices=False)
        torch.testing.assert_close(layer.merged(), (left[:, :rank] * values[:rank]) @ right[:rank])
    (sum(layer(torch.randn(3, layer.in_features).double()).sum() for layer in made)).backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.{key}" for name in report.lrc for key in "uv"}
    sizes = {str(i): o + i_ for i, (o, i_) in enumerate(SHAPES)}
    assert report.tune("lrc") == sum(ranks[name] * sizes[name] for name in report.lrc)
    assert report.tune("nlrc") == sum(before.get_submodule(name).weight.numel() for name in report.nlrc)
    assert report.tune("all") == report.tune("lrc") + report.tune("nlrc")
    assert (report.params_before, report.params_after) == (count_params(before), count_params(made))
    with pytest.raises(InputError, match="tuned 'both' is unknown"):
        report.tune("both")


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 100)])
def test_parameters_never_grow_from_the_rule_on(shape):
    o, i = shape
    rho = 1 - max(o, i) / (o + i)
    saves = {r: r * (o + i) <= o * i for r in range(1, 9)}
    assert all(saves[r] for r in range(1, 9) if is_low_rank(r, 8, rho))
    assert not is_low_rank(4, 8, 0.5) and is_low_rank(3, 8, 0.5)  # half of a square matrix saves nothing


def test_with_all_that_is_cut_in_factors_some_grow():
    assert is_low_rank(6, 8, 0.0) and 6 * (8 + 8) > 8 * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: solve_threshold(spectra(m), 0.95), "^reduction is 0.95 but must be between 0 and 0.8913: each of 5"),
        (lambda m: solve_threshold(spectra(m), -0.1), "^reduction is -0.1 but must be between 0 and"),
        (lambda m: uniform_ranks(spectra(m), float("nan")), "^reduction is nan but must be between 0 and"),
        (lambda m: solve_threshold({"flat": torch.ones(4).double()}, 0.5), "can be cut by at most 0.0000: each keeps"),
        (lambda m: apply_welore(m, {"0": 2}, rho=1.0), "^rho is 1.0 but must be at least 0 and below 1"),
        (lambda m: apply_welore(m, {"9": 2}), "^name in ranks '9' is unknown"),
        (lambda m: apply_welore(m, {"0": 12, "1": 6}), "^rho is 0.5 but no matrix loses more than that"),
        (lambda m: apply_welore(m, {"0": 0}), "^0: rank is 0 but must be between 1"),
        (lambda m: spectra(m, "5"), "^targets '5' is unknown"),
    ],
)
def test_wrong_numbers_are_named_and_the_model_stays(call, message):
    made = model()
    with pytest.raises(InputError, match=message):
        call(made)
    assert not any(isinstance(layer, LowRankLinear) for layer in made)
    assert all(p.requires_grad for p in made.parameters())


def test_a_weight_that_is_not_finite_has_no_spectrum():
    made = model()
    made[1].weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"^1: the weight \(12, 20\) is not finite"):
        spectra(made)


def tracked(tracker: GradientSubspaceTracker, made: nn.Module, gradients) -> None:
    state = State.__new__(State)  # of which it reads the step alone
    for state.step, gradient in enumerate(gradients):
        made.weight.grad = gradient
        tracker.before_update(state)


def test_the_tracker_sees_what_stays_and_what_turns():
    made = nn.Linear(6, 4, bias=False).double()
    tracker = GradientSubspaceTracker(made, ["weight"], every=2, rank=2)
    basis = torch.eye(6).double()
    same = torch.randn(4, 2).double() @ basis[:2]
    other, half = torch.randn(4, 2).double() @ basis[4:], torch.randn(4, 2).double() @ basis[1:3]
    tracked(tracker, made, [same, other, 3 * same, half, other, None, half, None, torch.full_like(same, torch.nan)])
    assert tracker.steps == [0, 2, 4, 6, 8]  # of which 1, 3, 5, 7 are not looked at
    overlap, cosine = tracker.overlaps("weight"), tracker.cosines("weight")
    expected = torch.tensor([[1, 1, 0, 0.5], [1, 1, 0, 0.5], [0, 0, 1, 0], [0.5, 0.5, 0, 1]]).double()
    torch.testing.assert_close(overlap[:4, :4], expected)
    flat = [g.flatten() / g.norm() for g in (same, same, other, half)]
    torch.testing.assert_close(cosine[:4, :4], torch.stack([torch.stack([a @ b for b in flat]) for a in flat]))
    assert overlap[4].isnan().all() and cosine[:, 4].isnan().all()


def test_two_subspaces_that_were_drawn_overlap_by_their_share():
    torch.manual_seed(0)
    made = nn.Linear(40, 30, bias=False)
    tracker = GradientSubspaceTracker(made, ["weight"], every=1, rank=10)
    tracked(tracker, made, [torch.randn(30, 40) for _ in range(8)])
    overlap = tracker.overlaps("weight")
    assert overlap[~torch.eye(8).bool()].mean().item() == pytest.approx(10 / 40, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["weights"]}, "^layer 'weights' is unknown"),
        ({"layers": ["bias"]}, "^rank is 4 but bias, of shape"),
        ({"rank": 5}, "^rank is 5 but weight, of shape"),
        ({"every": 0}, "^every is 0"),
    ],
)
def test_the_tracker_says_what_it_cannot_follow(options, message):
    with pytest.raises(InputError, match=message):
        GradientSubspaceTracker(nn.Linear(6, 4), **{"layers": ["weight"]} | options)


def test_uniform_ranks_keep_no_more_than_a_threshold_may_where_small_matrices_keep_one():
    found = {"large": torch.ones(100).double(), **{f"small {i}": torch.ones(2).double() for i in range(20)}}
    ranks = uniform_ranks(found, 0.8)
    assert sum(ranks.values()) == 28 and ranks["large"] == 8 and ranks["small 0"] == 1
