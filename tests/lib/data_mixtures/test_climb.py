"""The space of mixtures, its limits and its mean; the accounts of a search, and what it finds of a known optimum."""

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.mixtures import dirichlet_mixtures
from workbench.lib.data_mixtures.climb import IterativeMixtureSearch, MixturePredictor, MixtureSpace, SearchResult
from workbench.lib.data_mixtures.optuna_search import OptunaSearch

SHARE = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(search, score) -> SearchResult:
    while not search.done:
        search.tell([score(weights) for weights in search.ask()])
    return search.result()


def bowl(seed: int, domains: int = 8):
    """A quadratic with its least value, 0, at a random mixture, and any axes."""
    generator = torch.Generator().manual_seed(seed)
    best = dirichlet_mixtures(domains, 1, seed=seed)[0]
    root = torch.randn(domains, domains, generator=generator, dtype=torch.float64)
    form = root @ root.T / domains

    def score(weights: Tensor) -> float:
        return float((weights - best) @ form @ (weights - best))

    return score


# -- the space


@pytest.mark.parametrize("draw", ["sample", "proposals"])
def test_what_is_drawn_is_within_the_limits_on_the_grid_and_distinct(draw: str):
    space = MixtureSpace(SHARE, max_repeat=2.0, minimum=1e-3)
    drawn = getattr(space, draw)(200, rng())
    assert len(drawn) == 200 if draw == "sample" else 50 < len(drawn) <= 200
    assert torch.allclose(drawn.sum(1), torch.ones(len(drawn), dtype=torch.float64), atol=1e-12)
    assert (drawn <= (2 * SHARE).clamp(max=1) + 1e-12).all()
    assert torch.allclose(drawn * 1000, (drawn * 1000).round(), atol=1e-9)
    assert not ((drawn > 0) & (drawn < 1e-3 - 1e-12)).any() and (drawn == 0).any()
    assert len({tuple(row) for row in drawn.tolist()}) == len(drawn)
    assert torch.equal(drawn, getattr(space, draw)(200, rng()))


def test_a_domain_with_little_data_has_no_more_weight_than_its_repetition_allows():
    drawn = MixtureSpace(SHARE).sample(500, rng())
    assert 0.1 < drawn[:, 4].max() <= 15 * 0.01 + 1e-12 and drawn[:, 3].max() > 0.3


def test_without_limits_and_with_one_strength_the_mean_is_the_tempered_prior():
    space = MixtureSpace(SHARE, strengths=(2.0, 2.0), max_repeat=1e9, minimum=1e-7)
    prior = SHARE.sqrt() / SHARE.sqrt().sum()
    assert torch.allclose(space.prior, prior)
    drawn = space.sample(1000, rng(3))
    deviation = (prior * (1 - prior) / 3 / len(drawn)).sqrt()
    assert ((drawn.mean(0) - prior).abs() < 3 * deviation).all()
    flat = MixtureSpace(SHARE, temperature=0.0)
    assert torch.allclose(flat.prior, torch.full((5,), 0.2, dtype=torch.float64))


def test_proposals_have_the_shares_as_their_mean():
    space = MixtureSpace(SHARE, max_repeat=1e9, minimum=1e-7)
    drawn = space.proposals(20_000, rng(1))  # of concentration 1
    deviation = (SHARE * (1 - SHARE) / 2 / 20_000).sqrt()
    # Corners are drawn more than once and count once, which takes a little from the largest.
    assert ((drawn.mean(0) - SHARE).abs() < 3 * deviation + 0.01).all()


def test_the_first_round_has_sparse_and_even_mixtures():
    drawn = MixtureSpace(SHARE).sample(300, rng())
    largest = drawn.max(1).values
    assert (largest > 0.95).any() and (largest < 0.4).any()


def test_what_was_tried_is_not_drawn_again_and_an_exhausted_space_says_so():
    space = MixtureSpace([0.5, 0.5], minimum=0.25)
    assert len(space.sample(5, rng())) == 5  # 0, 1/4, ..., 1
    first = space.sample(3, rng())
    second = space.sample(2, rng(), without=first)
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 5
    with pytest.raises(InputError, match="only 2 mixtures that are new, and 3 are asked for"):
        space.sample(3, rng(), without=first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": [0.5, 0.6]}, "weights has a sum of 1.1"),
        ({"share": [1.0, 0.0]}, "share is 0 of domain 1 but must be above 0: it has no data"),
        ({"share": [1.0]}, "at least two domains"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"strengths": (2.0, 1.0)}, "strengths are"),
        ({"share": np.array(["a", "b"])}, "share is .* but must be real numbers"),
        ({"temperature": 1e4}, "temperature is 10000.0 but must be lower"),
        ({"max_repeat": 0.5}, "max_repeat is 0.5"),
        ({"minimum": 0.3}, "minimum is 0.3"),
    ],
)
def test_a_space_that_is_none_is_refused(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        MixtureSpace(**{"share": SHARE} | options)


@pytest.mark.parametrize("minimum", [0.5, 0.25])
def test_on_a_grid_so_coarse_that_draws_are_below_its_step_there_are_mixtures_only(minimum: float):
    found = MixtureSpace([0.2] * 5, max_repeat=5.0, minimum=minimum).proposals(400, rng())
    assert (found >= 0).all() and (found.sum(1) == 1).all() and len(found) >= 5


# -- the predictor


@pytest.mark.parametrize("kind", ["quadratic", "gp", "trees"])
def test_a_predictor_ranks_new_mixtures_and_does_not_care_how_domains_are_named(kind: str):
    space, score = MixtureSpace([0.25] * 4), bowl(1, 4)
    train, test = space.sample(112, rng(0)), space.sample(100, rng(1))
    made, truth = np.array([score(w) for w in train]), np.array([score(w) for w in test])
    said = MixturePredictor(kind).fit(train, made).predict(test)
    assert np.corrcoef(said, truth)[0, 1] > (0.999 if kind == "quadratic" else 0.9)
    order = torch.tensor([2, 0, 3, 1])
    turned = MixturePredictor(kind).fit(train[:, order], made).predict(test[:, order])
    # Of two splits that are as good, trees take the first domain's.
    torch.testing.assert_close(turned, said, rtol=0, atol=0.01 if kind == "trees" else 1e-3)


def test_the_quadratic_predictor_knows_a_quadratic_from_few_mixtures():
    space, score = MixtureSpace([1 / 3] * 3), bowl(4, 3)
    train, test = space.sample(12, rng(0)), space.sample(50, rng(1))
    said = MixturePredictor("quadratic").fit(train, [score(w) for w in train]).predict(test)
    assert said.tolist() == pytest.approx([score(w) for w in test], abs=1e-3)


@pytest.mark.parametrize("kind", ["quadratic", "gp", "trees"])
def test_of_equal_scores_a_predictor_expects_no_other(kind: str):
    space = MixtureSpace([0.25] * 4)
    said = MixturePredictor(kind).fit(space.sample(20, rng()), [2.5] * 20).predict(space.sample(30, rng(1)))
    assert said.tolist() == pytest.approx([2.5] * 30)


def test_a_predictor_refuses_what_it_cannot_fit():
    weights = MixtureSpace([0.5, 0.5]).sample(3, rng())
    with pytest.raises(InputError, match="predictor 'tree' is unknown; did you mean 'trees'"):
        MixturePredictor("tree")
    with pytest.raises(InputError, match="scores has 2 values"):
        MixturePredictor("gp").fit(weights, [1.0, 2.0])
    with pytest.raises(InputError, match="scores holds nan"):
        MixturePredictor("gp").fit(weights, [1.0, 2.0, float("nan")])
    with pytest.raises(InputError, match="needs at least 2"):
        MixturePredictor("gp").fit(weights[:1], [1.0])
    for wrong in (-weights, weights * float("nan")):
        with pytest.raises(InputError, match=r"weights has shape .* but must be .*, at least 0 and finite"):
            MixturePredictor("gp").fit(wrong, [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="must be fitted before it predicts"):
        MixturePredictor("gp").predict(weights)
    with pytest.raises(InputError, match="weights are of 3 domains but must be of the 2 it was fitted on"):
        MixturePredictor("gp").fit(weights, [1.0, 2.0, 3.0]).predict(torch.full((1, 3), 1 / 3).double())


# -- the search


def search(schedule=(12, 6, 3), seed: int = 0, **options) -> IterativeMixtureSearch:
    return IterativeMixtureSearch(
        MixtureSpace(SHARE), schedule, **{"predictor": "quadratic", "pool": 1000, "seed": seed} | options
    )


def test_every_run_of_the_schedule_is_made_once_on_another_mixture():
    score = bowl(0, 5)
    found = run(search(), score)
    assert found.rounds.bincount().tolist() == [12, 6, 3]
    assert len({tuple(row) for row in found.weights.tolist()}) == 21
    assert found.scores.tolist() == [score(weights) for weights in found.weights]
    assert found.foreseen[:12].isnan().all() and found.foreseen[12:].isfinite().all()
    best, value = found.best_measured
    assert value == found.scores.min() and score(best) == value


def test_every_round_is_fitted_on_all_pairs_before_it(monkeypatch: pytest.MonkeyPatch):
    seen = []
    fit = MixturePredictor.fit

    def counted(self, weights, scores):
        seen.append(len(scores))
        return fit(self, weights, scores)

    monkeypatch.setattr(MixturePredictor, "fit", counted)
    run(search(), bowl(0, 5))
    assert seen == [12, 18, 21]


def test_a_later_round_is_drawn_from_the_best_of_the_pool():
    score = bowl(0, 5)
    one = search(explore=lambda n: n)
    one.tell([score(weights) for weights in one.ask()])
    again = rng(0)
    first = one.space.sample(12, again)
    model = MixturePredictor("quadratic").fit(first, [score(weights) for weights in first])
    pool = one.space.proposals(1000, again, without=first)
    best = pool[model.predict(pool).argsort()[:6]]
    asked = one.ask()
    assert {tuple(row) for row in asked.tolist()} == {tuple(row) for row in best.tolist()}


def test_with_one_round_it_is_regmix():
    """RegMix: random mixtures, one fit, the best of new draws by what it predicts."""
    space, score, generator = MixtureSpace(SHARE), bowl(3, 5), rng(7)
    tried = space.sample(112, generator)
    model = MixturePredictor("trees", seed=7).fit(tried, [score(weights) for weights in tried])
    draws = space.proposals(2000, generator)
    said = model.predict(draws)
    found = run(search((112,), 7, predictor="trees", pool=2000), score)
    assert torch.equal(found.weights, tried)
    assert torch.equal(found.best_predicted[0], draws[said.argmin()]) and found.best_predicted[1] == said.min()


def test_shrinking_rounds_come_closer_to_a_known_optimum_than_as_many_random_mixtures():
    better = 0
    for seed in range(25):
        score, space = bowl(seed), MixtureSpace([1 / 8] * 8)
        options = {"predictor": "quadratic", "pool": 15_000, "seed": seed}
        found = run(IterativeMixtureSearch(space, (64, 32, 16), **options), score)
        random = min(score(weights) for weights in space.sample(112, rng(seed + 1000)))
        better += score(found.best_predicted[0]) < random
    assert better >= 20


def test_a_score_that_is_the_same_everywhere_ends_in_a_mixture():
    for predictor in ("quadratic", "gp", "trees"):
        weights, expected = run(search(predictor=predictor), lambda _: 1.0).best_predicted
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and expected == pytest.approx(1)


def test_one_seed_is_one_search_and_the_result_stays():
    score = bowl(0, 5)
    one = search(seed=5)
    first = run(one, score)
    torch.manual_seed(9)
    second, other = run(search(seed=5), score), run(search(seed=6), score)
    assert torch.equal(first.weights, second.weights) and not torch.equal(first.weights, other.weights)
    assert torch.equal(first.best_predicted[0], second.best_predicted[0])
    assert one.result().best_predicted is one.result().best_predicted


def test_asking_and_telling_out_of_turn_is_refused():
    one = search((4, 2))
    with pytest.raises(InputError, match="not done"):
        one.result()
    one.ask()
    with pytest.raises(InputError, match="4 mixtures wait for a score"):
        one.ask()
    with pytest.raises(InputError, match="scores has 3 values but 4 mixtures wait"):
        one.tell([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="scores holds nan"):
        one.tell([1.0, 2.0, 3.0, float("nan")])
    one.tell([1.0, 2.0, 3.0, 4.0])
    one.tell([1.0] * len(one.ask()))
    assert one.done
    with pytest.raises(InputError, match="the search is done"):
        one.ask()
    with pytest.raises(InputError, match="scores has 1 values but 0"):
        one.tell([1.0])


@pytest.mark.parametrize("schedule", [(), (1, 4), (4, 0)])
def test_a_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(InputError, match="schedule is"):
        search(schedule)


# -- the peer


def test_optuna_searches_on_the_simplex_and_does_better_than_its_random_start():
    score = bowl(2, 4)
    found = run(OptunaSearch(4, 60, seed=1), score)
    assert found.weights.shape == (60, 4) and torch.allclose(found.weights.sum(1), torch.ones(1, dtype=torch.float64))
    assert found.best_predicted is None and found.best_measured[1] == found.scores.min()
    assert found.scores[10:].min() < found.scores[:10].min()
    assert torch.equal(found.weights, run(OptunaSearch(4, 60, seed=1), score).weights)


def test_optuna_starts_with_all_mixtures_equally_likely():
    one = OptunaSearch(3, 10, seed=0)
    starts = torch.cat([run(OptunaSearch(3, 10, seed), lambda _: 0.0).weights for seed in range(40)])
    deviation = (torch.tensor(1 / 3 * 2 / 3 / 4 / len(starts))).sqrt()
    assert ((starts.mean(0) - 1 / 3).abs() < 3.5 * deviation).all() and starts.std(0).mean() == pytest.approx(
        (1 / 3 * 2 / 3 / 4) ** 0.5, rel=0.1
    )
    assert not one.done


def test_without_optuna_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match="pip install 'optuna>="):
        OptunaSearch(3, 4)


@pytest.mark.parametrize(("domains", "runs", "said"), [(0, 3, "n_domains is 0"), (3, 0, "runs is 0")])
def test_a_search_by_optuna_of_nothing_is_refused(domains: int, runs: int, said: str):
    with pytest.raises(InputError, match=said):
        OptunaSearch(domains, runs)
