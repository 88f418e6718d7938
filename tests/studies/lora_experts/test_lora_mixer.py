"""The study of LoRA-Mixer: its experts are trained apart, it runs, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds import symbol_maps as bed
from workbench.studies.lora_experts.lora_mixer import (
    ARMS,
    ELSEWHERE,
    PRESETS,
    ROUTERS,
    experts,
    judge,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
ACCURACY = dict.fromkeys(ARMS, 0.5) | {"described, 1024": 0.9, "described, 256": 0.8, "balance only, 256": 0.7}


def judged(accuracy=None, seeds=3, noise=None):
    rows = []
    for i, (arm, value) in enumerate((ACCURACY | (accuracy or {})).items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.05 * i * part for part in NOISE])[seed]
            extra = {"trained": 10} | dict.fromkeys(("entropy", "load_divergence", "task_information"), 0.5)
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(Rows(rows), {})


def test_lora_mixer_study_reproduces_if_it_beats_mixlora_and_its_loss_helps():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.4, abs=0.02)
    json.dumps(result.details)


def test_lora_mixer_study_does_not_reproduce_on_the_other_side_or_if_the_losses_are_equivalent():
    assert judged({"mixlora": 1.0}).verdict == NOT_REPRODUCED
    assert judged({"balance only, 256": 0.95}).verdict == NOT_REPRODUCED
    same = {"described, 256": (0.0, 0.001, 0.0), "balance only, 256": (0.001, 0.0, 0.001)}
    result = judged({"described, 256": 0.7}, noise=same)
    assert result.verdict == NOT_REPRODUCED and result.details["equivalent"]


def test_lora_mixer_study_resolves_nothing_if_an_interval_includes_zero():
    assert judged(noise={"described, 256": (0.3, -0.3, 0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_lora_mixer_study_routers_learn_from_few_strings():
    task, generator = bed.new_maps(which=range(6)).only(5, seed=1), torch.Generator().manual_seed(0)
    assert len({tuple(row.tolist()) for row in task.batch("train", 100, generator).inputs}) == 5
    assert len(task.batch("validation", 7, generator).inputs) == 7


@pytest.mark.study
def test_lora_mixer_study_experts_depend_on_the_seed_alone_and_each_is_of_its_own_map(tmp_path, monkeypatch):
    settings = PRESETS["smoke"]
    first = experts(settings, 0)
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "another"))  # trained again, in another state of the generator
    torch.manual_seed(9)
    again = experts(settings, 0)
    assert len(first) == 6 and set(first[0]) == {
        f"blocks.{i}.attention.{part}" for i in (0, 1) for part in ("qkv", "out")
    }
    for one, other in zip(first, again, strict=True):
        for name, (a, b, scale) in one.items():
            assert torch.equal(a, other[name][0]) and torch.equal(b, other[name][1]) and scale == other[name][2]
            assert b.any() and a.shape[0] == 4
    assert not torch.equal(first[0]["blocks.0.attention.out"][1], first[1]["blocks.0.attention.out"][1])
    other = experts(settings, 1)
    assert not torch.equal(first[0]["blocks.0.attention.out"][0], other[0]["blocks.0.attention.out"][0])


@pytest.mark.study
def test_lora_mixer_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("lora-mixer").rows}
    for arm in ROUTERS:  # two blocks: a router for each attention, or for each feed-forward layer
        assert rows[arm].extra["trained"] == 2 * 6 * (48 + 96 if ELSEWHERE in arm else 48)
    assert rows["average"].extra["trained"] == rows["sum"].extra["trained"] == 0
    assert rows["told the task"].extra["trained"] == 2 * 6 * 4 * (48 + 3 * 48 + 48 + 48)
    assert (
        rows["mixlora"].params > rows["described, 256"].params > sum(p.numel() for p in bed.make_model().parameters())
    )
    assert rows["average"].metric != rows["sum"].metric
    assert rows["mixlora"].steps == 6 * 12 + 3 and rows["average"].steps == 0
    for arm in ROUTERS:
        assert 0 <= rows[arm].extra["entropy"] <= 1 and set(rows[arm].extra["accuracy_in_use"]) == {"1", "2", "3"}
    for arm, share in (("average", 1 / 6), ("sum", 1.0)):
        model = bed.base(PRESETS["smoke"])
        with torch.no_grad():
            for lora in experts(PRESETS["smoke"], 0):
                for name, (a, b, scale) in lora.items():
                    model.get_submodule(name).weight += share * scale * b @ a
        assert bed.new_maps(PRESETS["smoke"], range(6)).evaluate(model)["accuracy"] == pytest.approx(
            rows[arm].metric, abs=2e-3
        )
