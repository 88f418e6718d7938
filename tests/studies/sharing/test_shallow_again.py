"""The study of shallow-again: layouts from the same values, and a rule that judges two losses."""

import json
import math

import pytest
import torch

from workbench.studies.rows import Row, Rows
from workbench.studies.sharing.shallow_again import ARMS, MARGIN, PRESETS, judge, log, parity, run
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.02, 0.01)


def judged(seeds=4, noise=1.0, **ratios):
    """Losses of 0.1, times a ratio for an arm's held-out or training loss ("parallel_4_train")."""
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            name, jitter = arm.replace("-", "_"), noise * NOISE[(seed + i) % 4]
            held = math.log(0.1 * ratios.get(name, 1)) + jitter
            fit = math.log(0.1 * ratios.get(f"{name}_train", 1)) + jitter
            extra = {"test_loss": math.exp(held), "train_loss": math.exp(fit), "log_train_loss": fit, "best_rate": 0.01}
            extra |= {"at_edge": 0, "accuracy": 0.9, "gap_before": 0.1, "gap_after": 0.7, "converted_loss": 3.0}
            rows.append(Row(arm, seed, 1, 1, 1, 1, held, extra))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("ratios", "verdict", "held", "fit"),
    [
        ({}, REPRODUCED, REPRODUCED, REPRODUCED),
        ({"parallel_16": 1.1}, REPRODUCED, REPRODUCED, REPRODUCED),
        ({"parallel_16": 1.4}, NOT_REPRODUCED, NOT_REPRODUCED, REPRODUCED),
        ({"parallel_4": 0.7}, NOT_REPRODUCED, NOT_REPRODUCED, REPRODUCED),
        ({"parallel_4_train": 4.0}, NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED),
        ({"parallel_16_train": 1.25}, NOT_RESOLVED, REPRODUCED, NOT_RESOLVED),
    ],
)
def test_both_losses_are_to_be_alike_at_both_depths(ratios, verdict, held, fit):
    result = judged(**ratios)
    assert result.verdict == verdict
    assert result.details["alone"] == {"held-out loss": held, "training loss": fit}
    assert result.effect == pytest.approx(math.log(ratios.get("parallel_16", 1)), abs=0.02)
    assert result.claimed == (-MARGIN, MARGIN)
    json.dumps(result.details)


def test_noise_or_one_seed_resolves_nothing():
    assert judged(noise=15.0).verdict == judged(seeds=1).verdict == NOT_RESOLVED


def test_parity_is_all_words_and_half_of_them_odd():
    task = parity(6)
    x, y = task.data.splits["train"]
    assert x.shape == (64, 1, 6) and y.sum() == 32 and len(x.unique(dim=0)) == 64
    assert torch.equal(y, ((1 - x.prod(-1).squeeze(1) * (-1) ** 6) / 2).long())
    assert log(0.0) == log(1e-9) == math.log(1e-8)


@pytest.mark.study
def test_layouts_start_alike_and_rows_hold_both_losses(smoke):
    result = smoke("shallow-again")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    of = {row.arm: row for row in result.rows if row.seed == 0}
    for n in (4, 16):
        assert of[f"sequential-{n}"].params == of[f"parallel-{n}"].params
    for row in result.rows:
        assert row.metric == pytest.approx(math.log(row.extra["test_loss"]))
        assert ("converted_loss" in row.extra) == ("parallel" not in row.arm)


def test_one_layer_or_no_step_is_the_same_in_both_layouts(monkeypatch):
    monkeypatch.setitem(ARMS, "parallel-1", ("digits", "parallel", 1))
    settings = PRESETS["smoke"]
    deep, wide = (run(arm, 0, settings) for arm in ("single", "parallel-1"))
    assert wide.extra["validation"] == pytest.approx(deep.extra["validation"], rel=1e-5)
    assert wide.extra["train_loss"] == pytest.approx(deep.extra["train_loss"], rel=1e-5)
