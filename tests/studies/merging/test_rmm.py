"""The study of RMM: its rule says what it says, and arms that are to hold as much do."""

import json

import pytest
import torch

from workbench.beds import digit_experts
from workbench.studies.merging import rmm
from workbench.studies.merging.adapters import load
from workbench.studies.merging.rmm import ARMS, CURVES, CUT, RANK, REVERSIBLE, SINGLE, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
KEPT = dict.fromkeys(ARMS, 0.6) | dict.fromkeys(REVERSIBLE, 0.85) | {"rmm": 0.9}


def judged(seeds=4, weakest=0.9, noise=None, **kept):
    noise, rows = noise or {}, []
    for i, (arm, value) in enumerate((KEPT | {name.replace("_", "-"): v for name, v in kept.items()}).items()):
        for seed in range(seeds):
            metric = value + NOISE[seed] + (noise[arm][seed] if arm in noise else 0.05 * i / len(KEPT) * NOISE[seed])
            curve = {"curve": [[0.1, metric], [0.4, metric]]} if arm in CURVES else {}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, {"worst": metric, "weakest_expert": weakest} | curve))
    return judge(Rows(rows), {})


def test_rmm_study_reproduces_if_it_beats_every_single_merge_and_small_adapters():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.05, abs=1e-2) and result.ci[0] > 0
    json.dumps(result.details)


@pytest.mark.parametrize("kept", [{"cut": 0.95}, *({arm: 0.95} for arm in SINGLE)])
def test_rmm_study_does_not_reproduce_if_one_of_them_is_better(kept):
    assert judged(**kept).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", ["cut", "ties"])
def test_rmm_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.2, -0.2, 0.2, -0.2)}, **{arm: 0.9}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_rmm_study_says_nothing_of_weak_experts():
    assert judged(weakest=0.84).verdict == NOT_TESTABLE


def test_arms_at_equal_storage_hold_as_many_numbers():
    stored = rmm.share(rmm.P, RANK, 8)
    assert stored == CUT / RANK == (1 + 2) / 8
    assert all(point[0] > 0 for points in CURVES.values() for point in points)


@pytest.mark.study
def test_rmm_study_has_what_its_figures_need(smoke):
    rows = {row.arm: row for row in smoke("rmm").rows}
    assert set(rows) == set(ARMS)
    for arm, row in rows.items():
        assert len(row.extra["by_task"]) == 8 and row.steps == 0
        assert arm == "base" or "validation" in row.extra["chosen"]
        assert ("curve" in row.extra) == (arm in CURVES)
    assert rows["rmm"].metric > rows["base"].metric


@pytest.mark.study
def test_all_directions_and_all_ranks_give_the_adapters_back(smoke):
    smoke("rmm")  # the bed
    bed = load(rmm.PRESETS["smoke"], 0, "shared")
    for make in (rmm.rmm(7), rmm.cut(RANK), rmm.factor_pca(7)):
        for own, delta in zip(make(bed), bed.suite.deltas, strict=True):
            torch.testing.assert_close(bed.update(own), delta, rtol=0, atol=1e-5)
    assert bed.suite.deltas.shape[0] == len(digit_experts.TASKS)
    # p = 0 is the average of the factors
    same = rmm.rmm(0)(bed)[3]
    average = rmm.factorwise(bed, lambda stack: stack.mean(0))
    torch.testing.assert_close(bed.update(same), average, rtol=0, atol=1e-6)
