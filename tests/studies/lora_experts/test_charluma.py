"""The study of CharLuMA: its model writes scripts as it was trained to, its arms are what they are called, its rule."""

import json

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.charts import LANGUAGES, render, sample_specs
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts.charluma import PoolLayer
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Row
from workbench.studies.lora_experts import charts_bed as bed
from workbench.studies.lora_experts.charluma import (
    ABLATIONS,
    ARMS,
    DECISIVE,
    OURS,
    PRESETS,
    STUDY,
    PerLanguage,
    build,
    judge,
)

NOISE = (0.0, 0.004, -0.003)
F1 = {OURS: 0.8, "shared": 0.7, "shared-router": 0.75, "lora-active": 0.7, "lora-total": 0.72, "per-language": 0.71}
SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def judged(change=None, noise=None, seeds=3):
    values, noise, rows = F1 | (change or {}), noise or {}, []
    for i, (arm, value) in enumerate(values.items()):
        for seed in range(seeds):
            metric = value + NOISE[seed] * (1 + i) + noise.get(arm, (0, 0, 0))[seed]
            by = dict.fromkeys(LANGUAGES, metric)
            extra = {name: by for name in ("executes", "f1", "value_f1", "colour_f1")}
            extra |= {"columns_of_all": 5, "columns_used": 14} if arm == OURS else {}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(rows, {"arms": list(values)})


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


@pytest.mark.parametrize("view", bed.VIEWS)
def test_charts_bed_parts_joined_are_the_script_again(view):
    for spec in sample_specs(200, seed=8):
        ids = bed.encode(bed.written(spec, view), view)
        assert ids[0] == bed.START[view] and ids[-1] == bed.END and bed.UNKNOWN not in ids
        assert len(ids) <= bed.LONGEST
        assert bed.decode(ids[1:]) == bed.decode([*ids[1:], 9, 9]) == bed.written(spec, view)


def test_charts_bed_reads_what_is_written_freely():
    specs = sample_specs(3, seed=8)
    for language in LANGUAGES:
        scripts = [render(spec, language) for spec in specs]
        assert bed.read([*scripts, "", scripts[0][:-4]], language) == [*specs, None, None]
    found = bed.measures({name: [(specs[0], specs[0]), (specs[1], None)] for name in LANGUAGES})
    assert found["mean_f1"] == 0.5 and found["executes"]["r"] == found["value_f1"]["latex"] == 0.5


def test_charts_bed_generation_is_greedy_decoding_of_the_forward(home):
    torch.manual_seed(0)
    task, model = bed.ChartScripts(SMOKE["charts"]), bed.ChartToCode()
    images, language = task.data.images[:3], torch.tensor([0, 1, 2])
    tokens = torch.tensor([[bed.START[name]] for name in LANGUAGES])
    written = model.generate(images, tokens[:, 0], language)
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, model(images, tokens, language)[:, -1:].argmax(-1)], 1)
    for row, expected in zip(written.tolist(), tokens[:, 1:].tolist(), strict=True):
        n = min(len(row), 12, expected.index(bed.END) + 1 if bed.END in expected else 12)
        assert row[:n] == expected[:n]
        assert set(row[row.index(bed.END) + 1 :]) <= {bed.PAD} if bed.END in row else True
    assert written.shape[1] <= bed.LONGEST


def test_charts_bed_learns_one_chart_by_heart(home):
    torch.manual_seed(0)
    task, model = bed.ChartScripts(SMOKE["charts"], ("python",), train_charts=1), bed.ChartToCode()
    train(model, task, TrainConfig(60, 3, lr=1e-2, weight_decay=0.0))
    ids = model.generate(task.data.images[:1], torch.tensor([bed.START["python"]]), torch.tensor([0]))
    assert bed.decode(ids[0].tolist()) == task.data.scripts(0)["python"]
    truth = task.data.specs[0]
    assert bed.read([bed.decode(ids[0].tolist())], "python") == [truth]


def test_charts_bed_data(home):
    task = bed.ChartScripts(SMOKE["charts"])
    batch = task.batch("train", 9, torch.Generator().manual_seed(0))
    assert batch.domain.bincount().tolist() == [3, 3, 3] and batch.inputs.shape == (9, 3, 64, 64)
    loose = bed.ChartScripts(SMOKE["charts"], aligned=False)
    pairs = {}
    for seed in range(30):
        one = loose.batch("train", 9, torch.Generator().manual_seed(seed))
        for image, view in zip(one.inputs, one.domain.tolist(), strict=True):
            pairs.setdefault(image.numpy().tobytes(), set()).add(view)
    assert max(map(len, pairs.values())) == 1  # each chart in one language
    held_out = torch.cat([b.inputs for b in task.batches("validation", 7)])
    assert held_out.shape[0] == 3 * bed.VALIDATION
    with pytest.raises(InputError, match="view 'pyton' is unknown"):
        bed.ChartScripts(SMOKE["charts"], ("pyton",))
    with pytest.raises(InputError, match="train_charts is 99"):
        bed.ChartScripts(SMOKE["charts"], train_charts=99)
    with pytest.raises(InputError, match="split 'test' is unknown"):
        task.batch("test", 3, torch.Generator())
    with pytest.raises(InputError, match="size is 0"):
        task.batch("train", 0, torch.Generator())


@pytest.mark.study
def test_charluma_study_arms_are_what_they_are_called(home):
    trained, outputs = {}, {}
    task = bed.ChartScripts(SMOKE["charts"])
    batch = task.batch("train", 6, torch.Generator().manual_seed(0))
    for arm in (*ARMS, *ABLATIONS):
        model, parameters, _ = build(arm, 0, SMOKE)
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
def test_charluma_study_projector_is_told_the_language_of_each_row(home):
    task = bed.ChartScripts(SMOKE["charts"])
    batch = task.batch("train", 6, torch.Generator().manual_seed(0))
    for arm in (OURS, "per-language", "shared-router"):
        model, _, _ = build(arm, 0, SMOKE)
        layer = model.projector
        if isinstance(layer, PoolLayer):
            nn.init.normal_(layer.experts.columns)
        else:
            assert isinstance(layer, PerLanguage)
            nn.init.normal_(layer.each[1][2].weight)
        one, other = (model.image_tokens(batch.inputs, torch.full((6,), language)) for language in (0, 1))
        assert torch.equal(one, other) == (arm == "shared-router")


@pytest.mark.study
def test_charluma_study_runs_twice_the_same(home):
    results = [STUDY.execute("smoke") for _ in range(2)]
    for one, other in zip(*(result.rows for result in results), strict=True):
        assert (one.metric, one.extra, one.flops) == (other.metric, other.extra, other.flops)
    rows = {row.arm: row for row in results[0].rows}
    assert set(rows) == set(ARMS) and all(row.steps == 6 for row in rows.values())
    columns = torch.tensor(rows[OURS].extra["columns"])
    torch.testing.assert_close(columns.sum(1), torch.full((3,), 8.0))
    json.dumps(results[0].judgement.details)
