"""The study of CharLuMA: it runs, its arms are what they are called, its rule."""

import json

import pytest
import torch
from torch import nn

from workbench.beds.charts import ChartScripts
from workbench.lib.charts import LANGUAGES
from workbench.lib.lora_experts.charluma import PoolLayer
from workbench.studies.lora_experts.charluma import (
    ABLATIONS,
    ARMS,
    DECISIVE,
    OURS,
    PRESETS,
    PerLanguage,
    build,
    judge,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.003)
F1 = {OURS: 0.8, "shared": 0.7, "shared-router": 0.75, "lora-active": 0.7, "lora-total": 0.72, "per-language": 0.71}
SMOKE = PRESETS["smoke"]


def judged(change=None, noise=None, seeds=3):
    values, noise, rows = F1 | (change or {}), noise or {}, []
    for i, (arm, value) in enumerate(values.items()):
        for seed in range(seeds):
            metric = value + NOISE[seed] * (1 + i) + noise.get(arm, (0, 0, 0))[seed]
            by = dict.fromkeys(LANGUAGES, metric)
            extra = {name: by for name in ("executes", "f1", "value_f1", "colour_f1")}
            extra |= {"columns_of_all": 5, "columns_used": 14} if arm == OURS else {}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {"arms": list(values)})


def test_charluma_study_reproduces_if_ours_is_better_than_each_of_four():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=1e-2) and result.ci[0] > 0
    assert result.details["columns_of_all_and_used"]["1"] == [5, 14]
    assert judged({"per-language": 0.95}).verdict == REPRODUCED  # reported only
    json.dumps(result.details)


@pytest.mark.parametrize("arm", DECISIVE)
def test_charluma_study_does_not_reproduce_if_one_of_four_is_better(arm):
    assert judged({arm: 0.9}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", DECISIVE)
def test_charluma_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.6, -0.6, 0.0)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.study
def test_charluma_study_arms_are_what_they_are_called():
    trained, outputs = {}, {}
    task = ChartScripts(SMOKE["charts"])
    batch = task.batch("train", 6, torch.Generator().manual_seed(0))
    for arm in (*ARMS, *ABLATIONS):
        model, parameters = build(arm, 0, SMOKE)
        trained[arm] = sum(p.numel() for p in parameters)
        with torch.no_grad():
            outputs[arm] = model(batch.inputs, batch.targets, batch.domain)
        assert not any(p.requires_grad for p in model.encoder.parameters())
    for arm in trained:  # all begin as the base
        torch.testing.assert_close(outputs[arm], outputs["shared"], atol=1e-5, rtol=1e-5)
    assert trained["per-language"] == 3 * trained["shared"]
    frozen_a = 8 * 64
    assert abs(trained["lora-total"] - trained[OURS] - frozen_a) < 2 * 128
    assert trained["trained-a"] == trained[OURS] + frozen_a
    assert trained["lora-active"] == 8 * (64 + 64)
    assert trained["shared-router"] == trained[OURS] - 2 * 16 * 64


@pytest.mark.study
def test_charluma_study_projector_is_told_the_language_of_each_row():
    task = ChartScripts(SMOKE["charts"])
    batch = task.batch("train", 6, torch.Generator().manual_seed(0))
    for arm in (OURS, "per-language", "shared-router"):
        model, _ = build(arm, 0, SMOKE)
        layer = model.projector
        if isinstance(layer, PoolLayer):
            nn.init.normal_(layer.experts.columns)
        else:
            assert isinstance(layer, PerLanguage)
            nn.init.normal_(layer.each[1][2].weight)
        one, other = (model.image_tokens(batch.inputs, torch.full((6,), language)) for language in (0, 1))
        assert torch.equal(one, other) == (arm == "shared-router")


@pytest.mark.study
def test_charluma_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("charluma").rows}
    assert all(row.steps == 6 for row in rows.values())
    columns = torch.tensor(rows[OURS].extra["columns"])
    torch.testing.assert_close(columns.sum(1), torch.full((3,), 8.0))
