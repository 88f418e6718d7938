"""Weights on the simplex, candidate mixtures, the sampler's exact budgets, and ranks against scipy's."""

import math
from math import comb

import numpy as np
import pytest
import scipy
import torch

from workbench.errors import InputError
from workbench.lib.core.mixtures import MixtureSampler, check_weights, dirichlet_mixtures, rank_report, simplex_grid

DOMAINS = ("code", "docs", "tales")


def test_weights_may_be_given_by_name_in_any_order_and_what_is_left_out_is_nothing():
    made = check_weights({"tales": 0.25, "code": 0.75}, DOMAINS)
    assert made.dtype == torch.float64 and made.tolist() == [0.75, 0, 0.25]
    assert check_weights(torch.tensor([0.1, 0.2, 0.7]), DOMAINS).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.6, -0.1], "weights has -0.1 for 'tales' but must be at least 0"),
        ([0.5, 0.5, math.nan], "weights has nan for 'tales'"),
        ([0.5, 0.4, 0.0], "weights has a sum of 0.9 but must have one of 1"),
        ([0.5, 0.5], r"weights has shape \(2,\) but must be one number for each of 3"),
        ({"code": 0.5, "doc": 0.5}, "domain 'doc' is unknown; did you mean 'docs'"),
        (np.array(["a", "b", "c"]), "weights is .* but must be real numbers"),
        (np.array([1, 1j, 0]), "must be real numbers"),
        (torch.tensor([1, 1j, 0]), "must be real numbers"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(weights, said: str):
    with pytest.raises(InputError, match=said):
        check_weights(weights, DOMAINS)


def test_a_domain_that_is_there_twice_would_have_a_weight_twice():
    with pytest.raises(InputError, match="must each be another"):
        check_weights({"code": 0.5}, ["code", "code"])


@pytest.mark.parametrize("kind", [np.array, lambda values: torch.tensor(values, dtype=torch.float64)])
def test_weights_are_no_view_of_what_was_given(kind):
    given = kind([0.5, 0.25, 0.25])
    made = check_weights(given, DOMAINS)
    given[0] = 9.0
    assert made.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.filterwarnings("error")
def test_weights_may_come_from_anywhere():
    backwards = np.array([0.25, 0.25, 0.5])[::-1]
    fixed = backwards.copy()
    fixed.flags.writeable = False
    learned = torch.tensor([0.5, 0.25, 0.25], requires_grad=True)
    for weights in (backwards, fixed, learned, learned.bfloat16(), (0.5, 0.25, 0.25)):
        assert check_weights(weights, DOMAINS).tolist() == [0.5, 0.25, 0.25]
    assert check_weights([0, 1, 0], DOMAINS).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("domains", "parts"), [(1, 1), (2, 8), (3, 8), (4, 5)])
def test_a_grid_has_every_mixture_of_its_step_once(domains: int, parts: int):
    inside, whole = (simplex_grid(domains, 1 / parts, interior) for interior in (True, False))
    assert len(inside) == comb(parts - 1, domains - 1)
    assert len(whole) == comb(parts + domains - 1, domains - 1)
    for grid in (inside, whole):
        assert torch.allclose(grid.sum(1), torch.ones(len(grid), dtype=torch.float64), atol=1e-15)
        assert len({tuple(row) for row in grid.tolist()}) == len(grid)
        assert torch.equal((grid * parts).round() / parts, grid)
    assert (inside > 0).all() and (whole >= 0).all()


def test_the_grids_of_the_papers():
    assert len(simplex_grid(2)) == 7 and len(simplex_grid(3)) == 21


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((3, 0.3), "step is 0.3"), ((3, 0.0), "step is 0"), ((3, 0.5), "at most 1/3"), ((0, 0.5), "n_domains is 0")],
)
def test_a_step_that_makes_no_grid_is_refused(arguments, said: str):
    with pytest.raises(InputError, match=said):
        simplex_grid(*arguments)


def test_dirichlet_draws_have_the_mean_and_the_spread_of_their_distribution():
    alpha = np.array([0.2, 0.5, 1.3])
    drawn = dirichlet_mixtures(3, 20_000, alpha, seed=1)
    mean = alpha / alpha.sum()
    deviation = np.sqrt(mean * (1 - mean) / (alpha.sum() + 1))
    assert (np.abs(drawn.mean(0).numpy() - mean) < 3 * deviation / math.sqrt(len(drawn))).all()
    assert drawn.std(0).numpy() == pytest.approx(deviation, rel=0.03)
    assert (drawn >= 0).all() and torch.allclose(drawn.sum(1), torch.ones(1, dtype=torch.float64))
    assert torch.equal(drawn, dirichlet_mixtures(3, 20_000, alpha, seed=1))


def test_very_spiky_draws_stay_on_the_simplex():
    drawn = dirichlet_mixtures(4, 2000, 1e-3, seed=0)
    assert drawn.isfinite().all() and torch.allclose(drawn.sum(1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"alpha": 0.0}, "alpha is 0.0"), ({"alpha": [1.0, 2.0]}, "alpha has shape"), ({"count": 0}, "count is 0")],
)
def test_a_distribution_that_is_none_is_refused(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        dirichlet_mixtures(**{"n_domains": 3, "count": 2} | options)


SIZES = {"code": 4000, "docs": 2000, "tales": 3000}
WEIGHTS = [0.6, 0.0, 0.4]


@pytest.mark.parametrize("replacement", [False, True])
def test_a_sampler_keeps_to_its_weights_and_its_budget(replacement: bool):
    domains, examples = MixtureSampler(SIZES, WEIGHTS, seed=3, replacement=replacement).draw(5000)
    assert len(domains) == len(examples) == 5000
    counts = domains.bincount(minlength=3)
    assert counts[1] == 0
    assert abs(counts[0] - 3000) < 3 * math.sqrt(5000 * 0.6 * 0.4)
    assert (examples >= 0).all() and (examples < torch.tensor([*SIZES.values()])[domains]).all()
    pairs = set(zip(domains.tolist(), examples.tolist(), strict=True))
    assert (len(pairs) == 5000) != replacement


def test_all_examples_of_a_domain_are_drawn_once_and_then_no_more():
    sampler = MixtureSampler({"code": 10, "docs": 5}, {"code": 1.0}, seed=0)
    parts = [sampler.draw(4)[1], sampler.draw(6)[1]]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    with pytest.raises(InputError, match="'code' would be asked for 11 of its 10 examples"):
        sampler.draw(1)
    assert len(sampler.draw(0)[0]) == 0


@pytest.mark.parametrize("replacement", [False, True])
def test_calls_go_on_where_the_last_one_ended_and_one_refused_takes_nothing(replacement: bool):
    whole, parts = (MixtureSampler(SIZES, WEIGHTS, 7, replacement) for _ in range(2))
    domains, examples = whole.draw(300)
    first = parts.draw(100)
    if not replacement:
        with pytest.raises(InputError, match="would be asked for"):
            parts.draw(20_000)
    second = parts.draw(200)
    assert torch.equal(domains, torch.cat([first[0], second[0]]))
    assert torch.equal(examples, torch.cat([first[1], second[1]]))


@pytest.mark.parametrize("replacement", [False, True])
def test_close_mixtures_draw_mostly_the_same_of_one_seed(replacement: bool):
    (a, x), (b, y) = (
        MixtureSampler(SIZES, weights, 5, replacement).draw(1000) for weights in (WEIGHTS, [0.58, 0.02, 0.4])
    )
    assert (a != b).sum() < 60
    for domain in (0, 2):  # the k-th example of a domain is the same one
        k = min(int((a == domain).sum()), int((b == domain).sum()))
        assert k > 300 and torch.equal(x[a == domain][:k], y[b == domain][:k])


def test_a_domain_without_examples_may_have_no_weight():
    MixtureSampler({"code": 3, "docs": 0}, [1.0, 0.0]).draw(3)
    with pytest.raises(InputError, match="sizes has 0 for 'docs', which has weight"):
        MixtureSampler({"code": 3, "docs": 0}, [0.5, 0.5])


def test_ranks_are_those_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 30).astype(float)
    y = x + rng.integers(0, 5, 30)
    report = rank_report(x, y)
    assert report.spearman.estimate == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert report.kendall.estimate == pytest.approx(scipy.stats.kendalltau(x, y).statistic, abs=1e-12)
    for interval in (report.spearman, report.kendall):
        assert -1 <= interval.low < interval.estimate < interval.high <= 1 and interval.n == 30
    assert report.degenerate is None and rank_report(torch.tensor(x), torch.tensor(y)) == report


def test_intervals_hold_the_correlation_of_the_population_as_often_as_they_say():
    rng, rho = np.random.default_rng(1), 0.6
    population = 6 / math.pi * math.asin(rho / 2)  # Spearman's, of a normal pair of correlation rho
    held = 0
    for trial in range(200):
        x = rng.normal(size=40)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=40)
        interval = rank_report(x, y, samples=400, seed=trial).spearman
        held += interval.low <= population <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_regret_is_what_choosing_by_the_proxy_costs():
    true = [3.0, 1.0, 2.0, 5.0]
    lower = {"lower_is_better": True}
    assert rank_report([0.3, 0.1, 0.2, 0.9], true, **lower).top1_regret == 0
    report = rank_report([0.3, 0.4, 0.2, 0.9], true, uniform=3, **lower)
    assert (report.top1_regret, report.top1_vs_uniform) == (1, 3)
    assert rank_report([0.2, 0.4, 0.2, 0.9], true, **lower).top1_regret == 1.5  # the mean of two that are best alike
    assert rank_report([0.3, 0.4, 0.2, 0.9], true).top1_regret == 0
    assert math.isnan(rank_report(true, true).top1_vs_uniform)


@pytest.mark.parametrize("name", ["proxy", "true"])
def test_equal_scores_are_degenerate_and_no_correlation(name: str):
    scores = {"proxy": [1.0, 2.0, 3.0], "true": [1.0, 2.0, 3.0]} | {name: [2.0] * 3}
    report = rank_report(**scores, uniform=0)
    assert report.degenerate == f"degenerate: {name} has the same score for all 3 mixtures"
    numbers = (report.spearman.estimate, report.spearman.low, report.kendall.high, report.top1_regret)
    assert all(map(math.isnan, (*numbers, report.top1_vs_uniform)))


@pytest.mark.parametrize(
    ("proxy", "true", "options", "said"),
    [
        ([1.0, 2.0], [1.0], {}, "proxy has 2 scores"),
        ([1.0, math.nan], [1.0, 2.0], {}, "proxy holds nan"),
        ([1.0, 2.0], [1.0, 2.0], {"uniform": 2}, "uniform is 2"),
        ([1.0, 2.0], [1.0, 2.0], {"samples": 0}, "samples is 0 but must be at least 1"),
        (np.array(["a", "b"]), [1.0, 2.0], {}, "proxy is .* but must be real numbers"),
    ],
)
def test_scores_that_are_no_pairs_are_refused(proxy, true, options, said: str):
    with pytest.raises(InputError, match=said):
        rank_report(proxy, true, **options)


@pytest.mark.filterwarnings("error")
def test_where_no_resample_says_anything_there_is_no_interval():
    found = [rank_report([1.0, 2.0], [1.0, 2.0], samples=1, seed=seed).spearman for seed in range(20)]
    assert all(one.estimate == 1 for one in found)
    assert {(one.low, one.high) if one.low == 1 else "none" for one in found} == {(1.0, 1.0), "none"}


def test_scores_may_be_of_a_training():
    scores = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    assert rank_report(scores, [3.0, 2.0, 1.0]).kendall.estimate == -1


def test_a_sampler_has_no_domain_of_less_than_nothing():
    with pytest.raises(InputError, match="sizes has -5 for 'code', which has weight 0, but must be at least 0"):
        MixtureSampler({"code": -5, "docs": 9}, [0.0, 1.0])


def test_concentrations_whose_sum_is_no_number_are_refused():
    with pytest.raises(InputError, match=r"alpha is 1e\+308 but must be above 0, and finite in sum"):
        dirichlet_mixtures(2, 3, 1e308)
    with pytest.raises(InputError, match=r"alpha is .* but must be real numbers"):
        dirichlet_mixtures(2, 3, np.array("even"))
