"""The study of Linear-DMO: its rule says what it says, and its rankings are those of what they are called."""

import json

import numpy as np
import pytest
import torch

from workbench.beds.stdlib_domains import DOMAINS, JUDGED
from workbench.lib.data_mixtures.linear_dmo import candidates
from workbench.studies.data_mixtures.linear_dmo import (
    ARMS,
    BUDGETS,
    PRESETS,
    RUNS,
    TARGETS,
    judge,
    of_targets,
    ranked,
    regressed,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
RHO = dict.fromkeys(ARMS, 0.4) | {"merge": 0.8, "merge-half": 0.75, "merge-eighth": 0.6, "ceiling": 0.9}


def judged(seeds=4, noise=None, **rho):
    noise, rows = noise or {}, []
    for arm, value in (RHO | {name.replace("_", "-"): v for name, v in rho.items()}).items():
        for seed in range(seeds):
            metric = value + noise.get(arm, NOISE)[seed]
            extra = {
                "by_target": dict.fromkeys(TARGETS, metric),
                "of_mean": metric,
                "regret": 0.01,
                "gain_on_even": 0.0,
            }
            extra |= {"mean": [1.0, 2.0], "true": [2.0, 1.0], "by_runs": {str(n): metric for n in RUNS}}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {})


def test_it_reproduces_if_merges_rank_better_than_losses_and_than_shorter_experts():
    result = judged(noise={"loss-average": (0.01, -0.01, 0.02, 0), "merge-eighth": (0, 0.01, -0.02, 0.01)})
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.4, abs=0.02) and result.ci[0] > 0
    json.dumps(result.details)


SPREAD = (0.5, -0.5, 0.5, -0.5)


@pytest.mark.parametrize(
    ("rho", "noise", "verdict"),
    [
        ({"loss_average": 0.9}, {}, NOT_REPRODUCED),
        ({"merge_eighth": 0.9}, {}, NOT_REPRODUCED),
        ({"merge": 0.45, "loss_average": 0.1, "merge_eighth": 0.2}, {}, NOT_REPRODUCED),
        ({}, {"loss-average": SPREAD}, NOT_RESOLVED),
        ({}, {"merge-eighth": SPREAD}, NOT_RESOLVED),
        ({"merge": 0.45, "loss_average": 0.1, "merge_eighth": 0.1}, {"merge": (0.2, -0.2, 0.2, -0.2)}, NOT_RESOLVED),
        ({"ceiling": 0.4}, {}, NOT_TESTABLE),
    ],
)
def test_it_does_not_reproduce_otherwise(rho, noise, verdict):
    assert judged(noise=noise, **rho).verdict == verdict


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def losses(seed: int) -> torch.Tensor:
    return torch.rand(22, len(JUDGED), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_ranking_by_the_truth_is_perfect_and_by_its_opposite_the_worst():
    true = losses(0)
    best, worst = ranked(true + 3, true), ranked(-true, true)
    assert best["by_target"] == pytest.approx(dict.fromkeys(TARGETS, 1.0)) and best["regret"] == 0
    assert worst["by_target"] == pytest.approx(dict.fromkeys(TARGETS, -1.0)) and worst["of_mean"] == pytest.approx(-1)
    mean = np.mean(list(of_targets(true).values()), axis=0)
    assert worst["regret"] == pytest.approx(np.ptp(mean)) and best["gain_on_even"] == pytest.approx(
        mean[-1] - mean.min()
    )


def test_a_ranking_that_says_nothing_is_as_good_as_chance():
    true = losses(0)
    nothing = ranked(torch.ones_like(true), true)
    mean = np.mean(list(of_targets(true).values()), axis=0)
    assert set(nothing["by_target"].values()) == {0.0}
    assert nothing["regret"] == pytest.approx(mean.mean() - mean.min())


def test_a_target_is_the_mean_of_its_texts():
    found = of_targets(losses(0))
    assert list(found) == list(TARGETS) and {text for texts in TARGETS.values() for text in texts} == set(JUDGED)
    np.testing.assert_allclose(found["unseen"], losses(0)[:, 3:].mean(1))
    assert all(len(texts) > 1 for texts in TARGETS.values())


def test_a_linear_regression_finds_linear_losses_from_three_runs_and_trees_from_more():
    tried = candidates(len(DOMAINS))
    linear = tried @ torch.rand(3, len(JUDGED), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(regressed("linear", 3, 0, linear), linear)
    bowl = (tried - torch.tensor([0.2, 0.5, 0.3])).square().sum(1, keepdim=True).expand(-1, len(JUDGED))
    few, many = (ranked(regressed("trees", runs, 0, bowl), bowl)["of_mean"] for runs in (3, 12))
    assert many > max(few, 0.7)


def test_experts_of_every_budget_train_and_those_of_an_eighth_an_eighth():
    for settings in PRESETS.values():
        assert settings["steps"] % max(BUDGETS.values()) == 0


@pytest.mark.study
def test_the_study_has_what_its_figures_need_and_counts_what_was_trained(smoke):
    result = smoke("linear-dmo")
    rows = {row.arm: row for row in result.rows}
    steps = PRESETS["smoke"]["steps"]
    assert set(rows) == set(ARMS)
    trained = {"merge": 3, "merge-half": 1.5, "merge-eighth": 0.375, "fisher": 3, "loss-average": 3, "linear": 3,
               "trees": 3, "random": 0, "ceiling": 22}  # fmt: skip
    assert {arm: row.steps / steps for arm, row in rows.items()} == trained
    assert rows["merge"].flops == rows["linear"].flops == 3 * rows["ceiling"].flops // 22
    assert len(rows["merge"].extra["mean"]) == len(rows["ceiling"].extra["true"]) == 22
    assert list(rows["linear"].extra["by_runs"]) == list(map(str, RUNS))
    for arm in ("merge-eighth", "fisher", "loss-average"):
        assert rows[arm].extra["mean"] != rows["merge"].extra["mean"]
    shown = result.judgement.details["losses"]
    assert {len(values) for values in shown.values()} == {22}
