"""Linear-DMO: a merged model for every mixture, exact where the theory says so, and nothing said where nothing is."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import workbench
from workbench.errors import InputError
from workbench.lib.core.merge import merge
from workbench.lib.core.mixtures import dirichlet_mixtures, rank_report
from workbench.lib.data_mixtures.linear_dmo import (
    MergeProxy,
    by_fisher,
    by_grams,
    candidates,
    evaluate_mixtures,
    mix,
)

DOMAINS = ["code", "prose", "names"]


def net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)  # with a counter in it


def some_experts(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[nn.Module]]:
    base, experts = net(0, dtype), [net(seed, dtype) for seed in (1, 2, 3)]
    for number, expert in enumerate(experts):
        expert[1].num_batches_tracked.fill_(10 + number)
    return base, experts


# -- the merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_weight_on_a_domain_is_its_expert_bit_for_bit(dtype):
    base, experts = some_experts(dtype)
    for number, expert in enumerate(experts):
        state = MergeProxy(base, experts).state_dict(torch.eye(3)[number])
        assert list(state) == list(base.state_dict())
        for name, value in expert.state_dict().items():
            wanted = value if value.is_floating_point() else base.state_dict()[name]
            assert torch.equal(state[name], wanted) and state[name].dtype == wanted.dtype, name


def test_the_even_mixture_is_the_average_of_the_merging_module():
    base, experts = some_experts(torch.float64)
    state = MergeProxy(base, experts).state_dict([1 / 3] * 3)
    for name, value in merge(base, experts, "average").items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-14)


def test_the_merge_is_affine_in_the_weights():
    base, experts = some_experts(torch.float64)
    proxy = MergeProxy(base, experts)
    w, v = dirichlet_mixtures(3, 2, seed=0)
    one, other, between = (proxy.state_dict(weights) for weights in (w, v, (w + v) / 2))
    for name in proxy.vectors.names:
        torch.testing.assert_close(between[name], (one[name] + other[name]) / 2, rtol=0, atol=1e-14)


def test_weights_are_by_name_too_and_what_is_excluded_is_the_base_s():
    base, experts = some_experts()
    proxy = MergeProxy(base, experts, DOMAINS, exclude="2.*")
    state = proxy.state_dict({"names": 1.0})
    assert torch.equal(state["0.weight"], experts[2][0].weight) and torch.equal(state["2.weight"], base[2].weight)


def test_models_are_left_as_they_were_and_share_no_memory_with_what_is_made():
    base, experts = some_experts()
    before = copy.deepcopy(experts[0].state_dict())
    state = MergeProxy(base, experts).state_dict([1.0, 0, 0])
    for value in state.values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in experts[0].state_dict().items())
    assert base[0].weight.any()


def test_a_lora_counts_by_its_product_and_not_by_its_factors(tmp_path):
    base, changes = net(0), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = workbench.adapt(copy.deepcopy(base), "lora", targets="*", rank=2)
        with torch.no_grad():
            for parameter in adapted.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        adapted.save(tmp_path / str(seed))
        adapted.model.eval()
        merged = copy.deepcopy(adapted.model)
        x = torch.eye(5)
        changes.append(merged[0](x) - merged[0](torch.zeros(1, 5)) - (base[0](x) - base[0](torch.zeros(1, 5))))
    state = MergeProxy(base, [tmp_path / "1", tmp_path / "2"]).state_dict([0.25, 0.75])
    change = (state["0.weight"] - base[0].weight).T
    torch.testing.assert_close(change, 0.25 * changes[0] + 0.75 * changes[1], rtol=1e-4, atol=1e-5)


# -- linear regression, where the theory holds exactly


def regression(shared: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Inputs X (20, 4) and targets y of three domains, the solution of each (1, 4), and weights of a mixture."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    xs = [first]
    for scale in (1.0, 3.0):
        turn = torch.linalg.qr(torch.randn(20, 20, generator=draw, dtype=torch.float64)).Q
        other = torch.randn(20, 4, generator=draw, dtype=torch.float64) * torch.tensor([1.0, scale, 1.0, 1 / scale])
        xs.append(turn @ first if shared else other)
    ys = [torch.randn(20, generator=draw, dtype=torch.float64) for _ in xs]
    return (
        xs,
        ys,
        [solution([x], [y], torch.ones(1)) for x, y in zip(xs, ys, strict=True)],
        torch.tensor([0.5, 0.2, 0.3]),
    )


def solution(xs, ys, weights) -> torch.Tensor:
    """What training on the mixture comes to: the minimum of sum of w_i |X_i theta - y_i|^2."""
    left = sum(w * x.T @ x for w, x in zip(weights, xs, strict=True))
    right = sum(w * x.T @ y for w, x, y in zip(weights, xs, ys, strict=True))
    return torch.linalg.solve(left, right)[None]


def gap(proxy: MergeProxy, xs, ys, weights) -> float:
    return float((proxy.state_dict(weights)["weight"] - solution(xs, ys, weights)).abs().max())


def test_domains_of_one_curvature_have_the_mixture_s_solution_as_their_merge():
    xs, ys, solved, weights = regression(shared=True)
    torch.testing.assert_close(xs[0].T @ xs[0], xs[2].T @ xs[2])
    proxy = MergeProxy({"weight": torch.zeros(1, 4).double()}, [{"weight": theta} for theta in solved])
    assert gap(proxy, xs, ys, weights) < 1e-8


def test_domains_of_different_curvature_do_not_unless_it_is_counted():
    xs, ys, solved, weights = regression(shared=False)
    base, experts = {"weight": torch.zeros(1, 4).double()}, [{"weight": theta} for theta in solved]
    assert gap(MergeProxy(base, experts), xs, ys, weights) > 1e-2
    counted = by_grams([{"": x.T @ x} for x in xs], ridge=0)
    assert gap(MergeProxy(base, experts, rule=counted), xs, ys, weights) < 1e-8


def test_curvature_along_the_axes_is_counted_by_fisher():
    xs, ys, _, weights = regression(shared=False)
    xs = [torch.linalg.qr(x).Q * scale for x, scale in zip(xs, torch.rand(3, 4).double() + 0.5, strict=True)]
    base = {"weight": torch.zeros(1, 4).double()}
    experts = [{"weight": solution([x], [y], torch.ones(1))} for x, y in zip(xs, ys, strict=True)]
    diagonals = [{"weight": (x.T @ x).diagonal()[None]} for x in xs]
    assert gap(MergeProxy(base, experts), xs, ys, weights) > 1e-3
    assert gap(MergeProxy(base, experts, rule=by_fisher(diagonals)), xs, ys, weights) < 1e-5


def test_what_is_in_no_matrix_of_a_layer_is_averaged_by_the_weights():
    base, experts = some_experts()
    grams = [{"0": torch.eye(5).double(), "2": torch.eye(7).double()} for _ in experts]
    state = MergeProxy(base, experts, rule=by_grams(grams)).state_dict([0.5, 0.25, 0.25])
    linear = MergeProxy(base, experts).state_dict([0.5, 0.25, 0.25])
    for name in ("0.bias", "0.weight", "1.running_mean"):  # of equal inputs all is linear
        torch.testing.assert_close(state[name], linear[name], rtol=1e-5, atol=1e-6)


# -- candidates and their scores


@pytest.mark.parametrize(("domains", "count"), [(1, 1), (2, 7), (3, 22), (4, 65)])
def test_candidates_are_those_of_the_paper_and_the_even_mixture(domains, count):
    found = candidates(domains)
    assert found.shape == (count, domains) and len(found.unique(dim=0)) == count
    assert (found > 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(count).double())
    assert (found == 1 / domains).all(1).sum() == 1
    assert torch.equal(found, candidates(domains, seed=0))
    assert torch.equal(found, candidates(domains, seed=1)) == (domains < 4)
    assert len(candidates(4, draws=20)) == 21


def test_every_mixture_is_scored_once_and_has_all_its_losses():
    base, experts = some_experts()
    seen, tried = [], candidates(3)

    def evaluate(state):
        seen.append(state["2.bias"])
        return [float(state["2.bias"].sum()), 1.0]

    scores = evaluate_mixtures(MergeProxy(base, experts), tried, evaluate)
    assert scores.shape == (22, 2) and len(seen) == 22 and (scores[:, 1] == 1).all()
    sums = torch.tensor([expert[2].bias.sum().item() for expert in experts], dtype=torch.float64)
    torch.testing.assert_close(scores[:, 0], tried @ sums, rtol=0, atol=1e-6)
    assert evaluate_mixtures(MergeProxy(base, experts), tried[:3], lambda state: 2.0).shape == (3, 1)


def test_experts_that_learned_nothing_rank_nothing():
    base, _ = some_experts()
    proxy = MergeProxy(base, [copy.deepcopy(base) for _ in range(3)])
    scores = evaluate_mixtures(proxy, candidates(3), lambda state: float(state["0.weight"].square().sum()))[:, 0]
    report = rank_report(scores, torch.arange(22.0))
    assert "degenerate" in report.degenerate and np.isnan([report.spearman.estimate, report.top1_regret]).all()


def test_the_best_candidate_is_chosen_and_no_other_mixture_is_asked_for():
    asked = []

    def score(weights):
        asked.append(weights)
        return float((weights - torch.tensor([0.6, 0.3, 0.1])).square().sum())

    assert torch.equal(mix(score, 3), torch.tensor([5, 2, 1]).double() / 8)
    assert torch.equal(torch.stack(asked), candidates(3))
    assert torch.equal(mix(score=lambda weights: 1.0, domains=1), torch.ones(1).double())


def test_a_corner_keeps_the_sign_of_a_nothing():
    expert = {"w": torch.tensor([-0.0, 0.0, -1.0])}
    state = MergeProxy({"w": torch.ones(3)}, [expert, {"w": torch.ones(3)}]).state_dict([1.0, 0.0])
    assert torch.equal(state["w"].signbit(), expert["w"].signbit())
    state["w"].fill_(7.0)
    assert expert["w"].tolist() == [0.0, 0.0, -1.0]


# -- what is refused


def test_what_is_no_mixture_or_does_not_fit_is_refused():
    base, experts = some_experts()
    proxy = MergeProxy(base, experts, DOMAINS)
    for weights, message in (
        ([0.5, 0.6, -0.1], "-0.1 for 'names'"),
        ([0.5, 0.2, 0.2], "sum of 0.9"),
        ({"code": 0.5, "music": 0.5}, "domain 'music'"),
        ([0.5, 0.5], r"shape \(2,\)"),
        ([float("nan"), 0.5, 0.5], "nan for 'code'"),
    ):
        with pytest.raises(InputError, match=message):
            proxy.state_dict(weights)
    with pytest.raises(InputError, match="domains has 2 names but must have one for each of 3 experts"):
        MergeProxy(base, experts, DOMAINS[:2])
    with pytest.raises(InputError, match=r"experts\[0\] has no 0.weight"):
        MergeProxy(base, [{}])
    for losses in ([float("nan")], [], [1.0, None]):
        with pytest.raises(InputError, match=r"evaluate gives .* but must give numbers, as many for each"):
            evaluate_mixtures(proxy, candidates(3), lambda state, losses=losses: losses)
    growing = iter(([1.0], [1.0, 2.0]))
    with pytest.raises(InputError, match=r"evaluate gives \[1.0, 2.0\]"):
        evaluate_mixtures(proxy, candidates(3), lambda state: next(growing))
    with pytest.raises(InputError, match="mixtures is empty"):
        evaluate_mixtures(proxy, candidates(3)[:0], lambda state: 1.0)
    with pytest.raises(InputError, match="grams has 1 entries but must have one for each of 3"):
        MergeProxy(base, experts, rule=by_grams([{}])).state_dict([1.0, 0, 0])
    with pytest.raises(InputError, match="scores holds nan"):
        mix(lambda weights: float("nan"), 2)
    with torch.no_grad():
        experts[1][0].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"0.weight of experts\[1\] has 1 weights that are not finite"):
        MergeProxy(base, experts)
