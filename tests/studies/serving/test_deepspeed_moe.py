"""The study of DeepSpeed-MoE: arms are what they say, students cost what their teachers do, and its rule holds."""

import json
import math

import pytest
import torch

from workbench.beds.python_text import python_text
from workbench.lib.core.budget import count_params
from workbench.lib.core.moe import moe_layers
from workbench.lib.serving.deepspeed_moe import ResidualMoE, block_params
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.serving.deepspeed_moe import (
    ARMS,
    BASELINES,
    MARGIN,
    PRESETS,
    SMALL_ARMS,
    SMALLER,
    TEACHER,
    build,
    judge,
    layers,
    run,
    teacher,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

BITS = {"dense": 2.6, "moe": 2.5, "pr-moe": 2.49, "student": 2.55, "student-staged": 2.5}
PARAMS = {"dense": 0, "moe": 1000, "pr-moe": 400, "student": 300, "student-staged": 300}
SMOKE, SMALL = PRESETS["smoke"], PRESETS["small"]


def judged(bits=None, params=None, spread=0.001, seeds=6):
    noise = torch.randn(len(BITS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[i][seed], extra(arm, params))
        for i, (arm, value) in enumerate((BITS | (bits or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {})


def extra(arm: str, params: dict | None) -> dict:
    return {"moe_params": (PARAMS | (params or {}))[arm], "dropped": 0.1, "experts_say": [0.4, 0.6]}


def test_reproduced_if_both_keep_the_quality_and_the_teacher_helps():
    result = judged()
    assert result.verdict == REPRODUCED
    assert (
        result.effect == pytest.approx(0, abs=0.003) and result.claimed == (-math.inf, MARGIN) and result.level == 0.9
    )
    assert result.details["times_fewer_moe_params"] == {"pr-moe": 2.5, "student-staged": pytest.approx(10 / 3)}
    assert result.details["experts_say"] == pytest.approx([0.4, 0.6])
    json.dumps(result.details)


@pytest.mark.parametrize("bits", [{"pr-moe": 2.53}, {"student-staged": 2.53}, {"student": 2.49}])
def test_not_reproduced_if_one_is_shown_to_be_worse(bits):
    assert judged(bits).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"spread": 0.05},
        {"bits": {"pr-moe": 2.5144}},
        {"bits": {"student-staged": 2.5144}},
        {"bits": {"student": 2.5001}},
        {"bits": {"dense": 2.5}},  # no quality to keep
        {"bits": {"dense": 2.4, "pr-moe": 2.9}},  # nor then
        {"params": {"pr-moe": 600}},
    ],
)
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_arms_that_are_in_the_full_preset_alone_are_beside():
    rows = [
        Row(arm, seed, 1, 1, 1, 1, BITS.get(arm, 2.5) + 0.001 * seed * i, extra(arm, dict.fromkeys(ARMS, 500) | PARAMS))
        for i, arm in enumerate(ARMS)
        for seed in range(4)
    ]
    details = judge(Rows(rows), {}).details
    assert details["student_staged_minus_student_full"]["mean"] == pytest.approx(0, abs=0.01)
    assert "second_half_minus_first_half" in details and "residual_minus_top_2" in details


def test_the_margin_is_a_hundredth_of_a_nat():
    assert pytest.approx(0.0144270, abs=1e-6) == MARGIN


def test_experts_are_where_each_arm_says():
    full = PRESETS["full"]
    expected = {
        "dense": [0] * 8,
        "moe": [0, 16] * 4,
        "pr-moe": [0, 4, 0, 4, 0, 4, 0, 8],
        "student": [0, 4, 0, 4, 0, 8, 0],  # an eighth of the depth less, of the first MoE layers
        "first-half": [0, 16, 0, 16, 0, 0, 0, 0],
        "second-half": [0, 0, 0, 0, 0, 16, 0, 16],
    }
    assert {arm: layers(arm, full) for arm in expected} == expected
    assert layers("student", full) == layers("student-staged", full) == layers("student-full", full)
    assert layers(TEACHER, SMALL) == [4, 4, 4, 8] and layers("student", SMALL) == [4, 4, 8]


def test_arms_start_alike_and_have_the_parameters_that_they_say():
    models = {arm: build(arm, 0, SMALL) for arm in SMALL_ARMS}
    for arm, model in models.items():
        banks = moe_layers(model).values()
        sizes = [n for n in layers(arm, SMALL) if n]
        assert [layer.n_experts for layer in banks] == sizes
        assert all(isinstance(layer, ResidualMoE) == ARMS[arm].residual for layer in banks)
        params = block_params(sizes, SMALL["d_model"], SMALL["d_hidden"], ARMS[arm].residual)
        assert params == sum(count_params(layer) for layer in banks)
    same = [models[arm].blocks[3].attention.qkv.weight for arm in ("dense", "moe", TEACHER)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    whole, pyramid = (sum(map(count_params, moe_layers(models[arm]).values())) for arm in ("moe", TEACHER))
    assert whole / pyramid >= SMALLER


def test_a_token_costs_the_baselines_alike_but_for_the_router():
    """Places are for as many tokens as there are, and what finds none is not computed: hence at most as much."""
    task = python_text(SMOKE)
    dense, moe = (training_budget(build(arm, 0, SMOKE), task, 4) for arm in BASELINES)
    tokens, routers = 4 * SMOKE["seq_len"], 2 * SMOKE["d_model"] * SMOKE["n_experts"]
    assert moe.flops <= dense.flops + 6 * tokens * routers
    assert moe.active_params == dense.active_params + routers


def test_a_student_pays_for_its_teacher_as_long_as_it_has_one():
    none, staged, full = (run(arm, 0, SMOKE) for arm in ("student", "student-staged", "student-full"))
    cost = (full.flops - none.flops) / SMOKE["steps"]
    # each model drops tokens of its own, which are not computed
    assert cost > 0 and staged.flops - none.flops == pytest.approx(cost * round(0.6 * SMOKE["steps"]), rel=0.02)
    assert len({none.metric, staged.metric, full.metric}) == 3
    assert none.params == staged.params == full.params


def test_the_teacher_is_the_arm_of_its_name_to_the_bit():
    row = run(TEACHER, 1, SMOKE)
    found = python_text(SMOKE).evaluate(teacher(1, SMOKE), "test", SMOKE["test_batches"])["bits_per_byte"]
    assert found == row.metric
    assert len(row.extra["experts_say"]) == 2 and all(0 < c < 1 for c in row.extra["experts_say"])
    assert 0 < row.extra["dropped"] < 1 and run("dense", 1, SMOKE).extra["dropped"] == 0
