"""RMM: what is lost is what Eckart and Young say, in any gauge, and what is kept is counted."""

from functools import partial

import peft
import pytest
import torch
from torch import nn

import workbench
from tests.draws import draw
from tests.kinds import models
from workbench.errors import InputError
from workbench.lib.core.merge.low_rank import positions
from workbench.lib.merging.rmm import (
    Basis,
    ReversibleMerge,
    aligned,
    balanced,
    merge_factors_separately,
    pt_svd,
    share,
)

drawn = partial(draw, dtype=torch.float64)

D_IN, D_OUT, RANK, N = 11, 7, 4, 6
M = D_IN + D_OUT


def lora(seed=0, rank=RANK, scale=1.0, dtype=torch.float64):
    return drawn(rank, D_IN, seed=seed, dtype=dtype), drawn(D_OUT, rank, seed=seed + 100, dtype=dtype), scale


def loras(n=N, **options):
    return [lora(i, **options) for i in range(n)]


def dense(a, b, scale):
    return scale * b @ a


def turned(given, rotation):
    a, b, scale = given
    return torch.linalg.solve(rotation, a), b @ rotation, scale


def off(fitted, given):
    """Squared distance of the factors that come back, scale in B, from those given."""
    back = positions([fitted.revert(i) for i in range(len(given))])
    return (back - positions(given)).square().sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("n", "p"), [(3, 2), (6, 4)])  # n - 1, and the rank of what is centred
def test_with_enough_directions_every_task_comes_back(dtype, tolerance, n, p):
    given = loras(n, dtype=dtype, scale=0.5)
    basis = Basis.fit(given, p)
    for i, (a, b, scale) in enumerate(given):
        back = basis.revert(i)
        assert back[2] == 1.0 and back[0].dtype == dtype
        for one, other in ((back[0], a), (back[1], scale * b)):
            assert (one - other).norm() <= tolerance * other.norm()


def test_without_directions_all_tasks_are_the_average_of_the_factors():
    given = loras(scale=0.5)
    basis = Basis.fit(given, 0)
    average = merge_factors_separately(given, lambda stack: stack.mean(0))
    for i in range(N):
        a, b, scale = basis.revert(i)
        torch.testing.assert_close(a, sum(x for x, _, _ in given) / N)
        torch.testing.assert_close(b, sum(0.5 * x for _, x, _ in given) / N)
        assert scale == 1
        torch.testing.assert_close(a, average[0]), torch.testing.assert_close(b, average[1])


def test_what_is_lost_is_the_singular_values_left_out_and_no_other_basis_loses_less():
    given = loras()
    pool = positions(given)
    centered = pool - pool.mean(2, keepdim=True)
    s = torch.stack([torch.linalg.svdvals(x) for x in centered])
    before = None
    for p in range(RANK + 1):
        basis = Basis.fit(given, p)
        torch.testing.assert_close(off(basis, given), s[:, p:].square().sum(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(basis.lost, s[:, p:].square().sum(1), rtol=1e-9, atol=1e-9)
        for seed in range(20):
            other = torch.linalg.qr(drawn(M, RANK, RANK, seed=seed))[0][:, :, :p]
            lost = (centered - other @ (other.mT @ centered)).square().sum((1, 2))
            assert (basis.lost <= lost + 1e-9).all()
        assert before is None or (basis.lost <= before + 1e-12).all()
        before = basis.lost
    # and a mean other than the mean loses more
    moved = centered + 0.1
    assert (torch.linalg.svdvals(moved)[:, 2:].square().sum(1) >= Basis.fit(given, 2).lost - 1e-9).all()


@pytest.mark.parametrize("p", [0, 1, 3])
def test_what_is_kept_is_counted_with_mean_and_coefficients(p):
    adapters = [{"x": lora(i), "y": lora(i + 50)} for i in range(N)]
    merge = ReversibleMerge(adapters, p)
    assert merge.numbers == 2 * (M * (RANK + RANK * p) + M * p * N)
    held = sum(t.numel() for b in merge.layers.values() for t in (b.mean, b.directions, b.coefficients))
    assert merge.numbers == held
    assert merge.numbers / (2 * M * RANK * N) == pytest.approx(share(p, RANK, N))
    assert [share(p, 16, 8) for p in (0, 1, 2)] == [0.125, 0.3125, 0.5]


def test_another_order_of_the_tasks_changes_the_order_and_nothing_else():
    given, order = loras(), [3, 0, 5, 1, 4, 2]
    one, other = Basis.fit(given, 2), Basis.fit([given[i] for i in order], 2)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.lost, other.lost)
    # directions have no sign of their own, their products with the coefficients have
    torch.testing.assert_close((one.directions @ one.coefficients)[:, :, order], other.directions @ other.coefficients)


def test_equal_adapters_lose_nothing_and_two_groups_need_one_direction():
    for p in range(3):
        assert Basis.fit([lora(1)] * N, p).lost.sum() < 1e-20
    groups = [lora(1), lora(2), lora(1), lora(1), lora(2)]
    assert Basis.fit(groups, 1).lost.sum() < 1e-20 < 1e-2 < Basis.fit(groups, 0).lost.sum()


def test_a_gauge_changes_what_is_lost_and_not_the_updates():
    """A warning: the same adapters, each turned by itself, are another problem."""
    shared = lora(0)
    near = [
        (shared[0] + 1e-3 * drawn(RANK, D_IN, seed=i), shared[1] + 1e-3 * drawn(D_OUT, RANK, seed=-i - 9), 1.0)
        for i in range(N)
    ]
    rotated = [turned(each, torch.linalg.qr(drawn(RANK, RANK, seed=i + 40))[0]) for i, each in enumerate(near)]
    for one, other in zip(near, rotated, strict=True):
        torch.testing.assert_close(dense(*one), dense(*other))
    size = positions(near).square().sum()
    assert Basis.fit(near, 1).lost.sum() < 1e-5 * size
    assert Basis.fit(rotated, 1).lost.sum() > 0.1 * size
    # with all directions no gauge matters
    assert Basis.fit(near[:3], 2).lost.sum() < 1e-20 * size and Basis.fit(rotated[:3], 2).lost.sum() < 1e-20 * size
    # our gauges see the update alone, so that the turn is undone
    for gauge in (balanced, aligned):
        for one, other in zip(gauge(rotated), rotated, strict=True):
            torch.testing.assert_close(dense(*one), dense(*other))
        for one, other in zip(gauge(rotated), gauge(near), strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=0, atol=1e-8)
    assert Basis.fit(aligned(rotated), 1).lost.sum() < 1e-5 * size


def test_alignment_loses_less_than_the_balanced_factors_that_it_turns():
    given = loras()
    for p in (0, 1):
        assert Basis.fit(aligned(given), p).lost.sum() < Basis.fit(balanced(given), p).lost.sum()
    order = [3, 0, 5, 1, 4, 2]
    shuffled = aligned([given[i] for i in order])
    for i, found in zip(order, shuffled, strict=True):
        torch.testing.assert_close(found[0], aligned(given)[i][0], rtol=0, atol=1e-8)


def test_a_reverted_adapter_in_a_layer_equals_its_dense_update():
    """With its factors in peft's LoRA layer, which computes them one after the other."""
    adapters = [{"0": lora(i, dtype=torch.float32, scale=2.0)} for i in range(N)]
    a, b, scale = ReversibleMerge(adapters, 1).revert(2)["0"]
    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    x = drawn(5, D_IN, seed=3, dtype=torch.float32)
    expected = base(x) + x @ dense(a, b, scale).T
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_separate_averages_are_peft_s_linear_with_squared_weights():
    """It takes the root of a weight on either factor: 1 / n^2 for a mean of each."""
    given = loras(3, dtype=torch.float32)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(D_IN, D_OUT)), peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]), "0"
    )
    layer = model.base_model.model[0]
    for i, (a, b, _) in enumerate(given):
        if i:
            model.add_adapter(str(i), peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
        layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = a.clone(), b.clone()
    model.add_weighted_adapter(["0", "1", "2"], [1 / 9] * 3, "merged", combination_type="linear")
    ours = merge_factors_separately([(a, b, 2.0) for a, b, _ in given], lambda stack: stack.mean(0))
    torch.testing.assert_close(layer.get_delta_weight("merged"), dense(*ours), rtol=1e-5, atol=1e-6)


def test_pt_svd_is_balanced_and_nearest():
    delta = drawn(D_OUT, D_IN)
    a, b, scale = pt_svd(delta, 3)
    torch.testing.assert_close(a @ a.T, b.T @ b)
    lost = (delta - dense(a, b, scale)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(delta)[3:].square().sum())


def test_a_model_comes_back_by_merge():
    base, experts = models(3)
    whole = workbench.merge(base, experts, "rmm", task=1, rank=12, p=2)
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(whole[name], experts[1][name], rtol=0, atol=1e-5)
    torch.testing.assert_close(whole["0.bias"], sum(e["0.bias"] for e in experts) / 3)
    off = workbench.merge(base, experts, "rmm", task=1, rank=12, p=0)
    other = workbench.merge(base, experts, "rmm", task=2, rank=12, p=0)
    assert not torch.equal(off["0.weight"], whole["0.weight"])
    assert torch.equal(off["0.weight"], other["0.weight"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Basis.fit(loras(), 5), "p is 5 but must be from 0 to the smaller of rank and tasks - 1, 4"),
        (lambda: Basis.fit(loras(3), 3), "p is 3 but .* 2"),
        (lambda: Basis.fit(loras(), -1), "p is -1"),
        (lambda: pt_svd(torch.full((4, 5), float("nan")), 2), r"matrix \(4, 5\) has values that are not finite"),
        (lambda: Basis.fit([lora(0), lora(1, rank=3)], 1), "ranks 4, 3 but must have one rank"),
        (lambda: Basis.fit(loras(), 1).revert(N), "task is 6 but must be from 0 to 5"),
        (lambda: ReversibleMerge([], 0), "adapters have the layers none"),
        (lambda: ReversibleMerge([{"x": lora(0)}, {"y": lora(1)}], 0), "layers x; y but must all have the same"),
        (lambda: workbench.merge(*models(3), "rmm", task=0, rank=0), "rank is 0"),
        (lambda: workbench.merge(*models(3), "rmm", task=3), "task is 3"),
        (lambda: workbench.merge(*models(3), "rmm", task=0, p=3), "p is 3"),
        (lambda: workbench.merge(*models(3), "rmm"), "needs task"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
