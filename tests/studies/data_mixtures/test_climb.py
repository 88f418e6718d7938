"""The study of CLIMB: equal numbers of proxies, arms that share a search, and its rule on rows made by hand."""

import json

import pytest
import torch

from workbench.studies.data_mixtures.climb import ARMS, BASELINES, EFFECT, PRESETS, judge, run, searched
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

BITS = {"climb": 3.30, "climb-measured": 3.31, "regmix": 3.34, "random": 3.35, "bayesian": 3.35}
BITS |= {"uniform": 3.54, "natural": 3.42}
SMOKE = {key: value for key, value in PRESETS["smoke"].items() if key != "seeds"}


def judged(bits=None, spread=0.01, seeds=14):
    noise = torch.randn(len(BITS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[i][seed], {"proxy": value + 0.4, "foreseen": 3.0, "ranks": [0.5, 0.7]})
        for i, (arm, value) in enumerate((BITS | (bits or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {})


def test_reproduced_if_it_is_better_than_one_round_both_ways():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.04, abs=0.01) and result.ci[1] < 0
    assert result.details["rank_correlation_by_round"] == pytest.approx([0.5, 0.7])
    assert result.details["foreseen_minus_proxy"]["mean"] == pytest.approx(-0.7)
    assert result.details["proxies_rank_the_targets"] > 0.8
    json.dumps(result.details)


@pytest.mark.parametrize("bits", [{"climb": 3.37}, {"random": 3.27}, {"regmix": 3.301}])
def test_not_reproduced_if_it_is_worse_than_one_or_no_different_from_regmix(bits):
    assert judged(bits).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"spread": 0.08}, {"bits": {"random": 3.301}}])
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_every_search_has_as_many_proxies_and_arms_of_one_search_share_it():
    key = json.dumps(SMOKE)
    found = {name: searched(name, 0, key) for name in ("rounds", "one round", "optuna")}
    runs = sum(SMOKE["schedule"])
    assert [len(result.scores) for result in found.values()] == [runs] * 3
    assert found["rounds"].rounds.bincount().tolist() == list(SMOKE["schedule"])
    assert found["one round"].rounds.tolist() == [0] * runs
    assert searched("rounds", 0, key) is found["rounds"]
    assert ARMS["climb"][0] == ARMS["climb-measured"][0] and ARMS["regmix"][0] == ARMS["random"][0]


def test_a_row_says_what_was_chosen_and_what_it_cost():
    rows = {arm: run(arm, 0, SMOKE) for arm in ("climb-measured", "random", "natural")}
    for arm in ("climb-measured", "random"):
        extra = rows[arm].extra
        assert extra["runs"] == sum(SMOKE["schedule"]) == len(extra["best_so_far"])
        assert extra["proxy"] == extra["foreseen"] == extra["best_so_far"][-1]  # measured again: the same number
    assert rows["random"].flops == rows["climb-measured"].flops > rows["natural"].flops
    assert len({row.params for row in rows.values()}) == 1
    assert {"purity", "junk_kept", "text_pruned"} <= rows["natural"].extra.keys()
    assert all(sum(row.extra["weights"]) == pytest.approx(1, abs=1e-3) for row in rows.values())


def test_the_baselines_know_nothing_of_rounds():
    assert all(ARMS[arm][0] == "one round" for arm in BASELINES) and EFFECT == 0.02
