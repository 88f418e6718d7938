"""The study of MixLoRA: it runs, its arms match, and its rule says what it says."""

import json

import pytest

from workbench.studies.lora_experts.mixlora import PRESETS, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
ACCURACY = {
    "lora-active": 0.6,
    "lora-equal": 0.7,
    "mixlora": 0.8,
    "mixlora-no-balance": 0.75,
    "single-lora-equal": 0.9,
    "single-mixlora": 0.9,
}


def judged(seeds=4, noise=None, **accuracy):
    accuracy = ACCURACY | {name.replace("_", "-"): value for name, value in accuracy.items()}
    noise = noise or {}
    rows = []
    for i, (arm, value) in enumerate(accuracy.items()):
        for seed in range(seeds):
            own = noise[arm][seed] if arm in noise else 0.05 * i * NOISE[seed]
            metric = value + NOISE[seed] + own
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, {"worst": metric - 0.1}))
    return judge(Rows(rows), {})


def test_mixlora_study_reproduces_if_it_gains_and_only_on_several_tasks():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=1e-3) and result.ci[0] > 0
    json.dumps(result.details)
    # a gain on single tasks too, but a smaller one
    assert judged(single_mixlora=0.95).verdict == REPRODUCED


@pytest.mark.parametrize(
    "accuracy",
    [
        {"mixlora": 0.65},  # the LoRA of as many parameters is better
        {"single_mixlora": 1.1},  # more is gained on single tasks
        {"mixlora": 0.65, "single_mixlora": 0.5},
    ],
)
def test_mixlora_study_does_not_reproduce_if_an_interval_is_below_zero(accuracy):
    assert judged(**accuracy).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("accuracy", "noise"),
    [
        ({"mixlora": 0.7}, {"mixlora": (0.1, -0.1, 0.1, -0.1)}),
        ({}, {"lora-equal": (0.3, -0.3, 0.3, -0.3)}),
        ({}, {"single-mixlora": (0.3, -0.3, 0.3, -0.3)}),
    ],
)
def test_mixlora_study_resolves_nothing_if_an_interval_includes_zero(accuracy, noise):
    assert judged(noise=noise, **accuracy).verdict == NOT_RESOLVED


def test_mixlora_study_resolves_nothing_with_one_seed():
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.study
def test_mixlora_study_main_arms_train_as_many_parameters(smoke):
    rows = {row.arm: row for row in smoke("mixlora").rows}
    trained = {arm: row.extra["trained"] for arm, row in rows.items()}
    assert trained["mixlora"] == trained["lora-equal"] == trained["single-mixlora"] > trained["lora-active"]
    assert rows["mixlora"].steps == 4 and rows["single-mixlora"].steps == 1
    extra = rows["mixlora"].extra
    assert [len(table) for table in extra["load_by_task"]] == [12, 12]
    assert all(sum(shares) == pytest.approx(1) for table in extra["load_by_task"] for shares in table)
    assert all(1 <= value <= 8 for value in extra["support"])
    assert all(1 <= value <= 2 for value in extra["weight_support"])
    assert "load_by_task" not in rows["lora-equal"].extra


@pytest.mark.study
def test_mixlora_study_single_arms_learn_one_task_at_a_time():
    settings = PRESETS["smoke"] | {"single_tasks": 2}
    row = run("single-lora-equal", 0, settings)
    assert row.steps == 2 and len(row.extra["by_task"]) == 2
    assert row.metric == pytest.approx(sum(row.extra["by_task"]) / 2)
