"""The study of LOST: arms start alike and have as many numbers, and the rule on rows made by hand."""

import json

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear
from workbench.lib.low_rank.lost import CoLALinear, LOSTLinear, SLTrainLinear
from workbench.studies.low_rank.lost import (
    ARMS,
    BEST,
    COLA,
    FULL,
    LINEAR,
    LOST,
    LOW,
    PRESETS,
    RANDOM,
    RATES,
    SLTRAIN,
    judge,
    made,
    run,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001, -0.001, 0.003, -0.003)


def judged(lost=3.0, full=3.0, low=3.2, sltrain=3.1, seeds=4):
    best, rows = {LOST: lost, FULL: full, LOW: low, SLTRAIN: sltrain}, []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            extra = {"block_params": 1, "best_rate": 0.01, "variation": 0.2, "chosen_above_mean": 1.5}
            rows.append(Row(arm, seed, 1, 1, 1, 1, best.get(arm, 3.0) + NOISE[(seed + i) % 7], extra))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, REPRODUCED),
        ({"full": 2.97, "sltrain": 2.97}, REPRODUCED),
        ({"full": 2.9}, NOT_REPRODUCED),
        ({"low": 2.98}, NOT_REPRODUCED),
        ({"sltrain": 2.9}, NOT_REPRODUCED),
        ({"full": 2.95}, NOT_RESOLVED),
        ({"low": 3.0}, NOT_RESOLVED),
        ({"seeds": 1}, NOT_RESOLVED),
    ],
)
def test_it_must_be_as_good_as_full_rank_better_than_low_rank_and_no_worse_than_sltrain(given, verdict):
    result = judged(**given)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(3.0 - given.get("full", 3.0), abs=0.003)
    json.dumps(result.details)


@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_arms_have_as_many_numbers_and_are_what_their_names_say(preset):
    settings = PRESETS[preset]
    models = {arm: made(arm, 3, settings) for arm in ARMS}
    sizes = {arm: count_params(model) for arm, model in models.items()}
    matrices = sum(p.numel() for p in models[FULL].blocks.parameters() if p.ndim == 2)
    gone = sizes[FULL] - sizes[LOW]
    assert matrices - gone <= settings["share"] * matrices
    assert sizes[LOW] == sizes[COLA] == sizes[SLTRAIN] and len({sizes[arm] for arm in (LOST, RANDOM, LINEAR)}) == 1
    assert sizes[LOW] - settings["d_model"] < sizes[LOST] <= sizes[LOW]
    kinds = {LOW: LowRankLinear, COLA: CoLALinear, SLTRAIN: SLTrainLinear, LOST: LOSTLinear, LINEAR: LOSTLinear}
    for arm, kind in kinds.items():
        layers = [m for m in models[arm].blocks.modules() if isinstance(m, kind)]
        assert len(layers) == 4 * settings["n_layers"]
        if kind is LOSTLinear:
            assert {layer.act for layer in layers} == {"silu" if arm == LOST else None}
    pairs = zip(models[LOST].blocks.modules(), models[RANDOM].blocks.modules(), strict=True)
    pairs = [(a, b) for a, b in pairs if isinstance(a, LOSTLinear)]
    assert any(not torch.equal(a.idx, b.idx) for a, b in pairs)
    assert all(torch.equal(a.a, b.a) and a.z.shape == b.z.shape for a, b in pairs)
    assert all(torch.equal(models[arm].embedding.weight, models[FULL].embedding.weight) for arm in ARMS)


def test_the_rates_of_small_are_inside_the_sweep():
    assert set(BEST) == set(ARMS) and set(BEST.values()) <= set(RATES[1:-1])


def test_a_swept_row_is_judged_at_the_rate_that_validation_chose():
    settings = PRESETS["smoke"] | {"rates": (1e-4, 1e-2), "steps": 3}
    row, one = run(LOW, 0, settings), run(LOW, 0, settings | {"rates": dict.fromkeys(ARMS, 1e-2)})
    assert row.extra["best_rate"] == 1e-2 and row.metric == one.metric and row.flops == 2 * one.flops


@pytest.mark.study
def test_rows_say_what_lost_had_to_choose_by(smoke):
    for row in smoke("lost").rows:
        assert ("variation" in row.extra) == (row.arm == LOST)
        if row.arm == LOST:
            assert 0 < row.extra["variation"] < 1 < row.extra["chosen_above_mean"]
