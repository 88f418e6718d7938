"""The study of MHR: its tasks share their parts, it runs, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds import symbol_maps as bed
from workbench.studies.lora_experts.mhr import ARMS, COMBINED, HELD_OUT, SEEN, TARGETS, PartMaps, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
ACCURACY = dict.fromkeys(ARMS, 0.5) | {"mhr": 0.9, "poly": 0.8, "lora": 0.6, "lora-total": 0.7}


def judged(seeds=4, noise=None, **accuracy):
    accuracy = ACCURACY | {name.replace("_", "-"): value for name, value in accuracy.items()}
    rows = []
    for i, (arm, value) in enumerate(accuracy.items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.05 * i * part for part in NOISE])[seed]
            metric = value + NOISE[seed] + own
            few = {"all": [metric] * 5, "router": [metric - 0.1] * 5, "skills": [metric - 0.05] * 5}
            few = {"all": few["all"]} if arm.startswith("lora") else few
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, {"few": few, "seen": 1.0, "alignment": 0.1}))
    return judge(Rows(rows), {"shots": 16})


def test_mhr_study_reproduces_if_blocks_beat_wholes_and_both_shared_loras():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.1, abs=0.01)
    assert result.details["router_minus_all"]["mean"] == pytest.approx(-0.1)
    json.dumps(result.details)


@pytest.mark.parametrize("accuracy", [{"poly": 1.0}, {"lora": 1.0}, {"lora_total": 1.0}])
def test_mhr_study_does_not_reproduce_if_an_interval_is_below_zero(accuracy):
    assert judged(**accuracy).verdict == NOT_REPRODUCED


def test_mhr_study_resolves_nothing_if_an_interval_includes_zero():
    assert judged(noise={"poly": (0.3, -0.3, 0.3, -0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_mhr_study_tasks_share_their_parts_and_the_targets_are_new():
    task = PartMaps(COMBINED)
    maps = task.maps[list(COMBINED)]
    assert all(sorted(row.tolist()) == list(range(10)) for row in maps)
    low, high = maps[:, :5].view(3, 3, 5), maps[:, 5:].view(3, 3, 5)
    assert (low == low[:, :1]).all() and (high == high[:1]).all()
    assert len({tuple(row.tolist()) for row in maps}) == 9
    assert not set(SEEN) & set(TARGETS) and set(HELD_OUT) < set(COMBINED)
    for part in (low[:, 0], high[0]):  # every part of a held-out combination has been seen in another
        seen = {tuple(r.tolist()) for t in SEEN for r in (task.maps[t][:5], task.maps[t][5:])}
        assert {tuple(row.tolist()) for row in part} <= seen
    assert torch.equal(task.maps[: bed.OLD], bed.new_maps().maps[: bed.OLD])  # what the base has learned


def test_mhr_study_few_shots_are_few():
    task = PartMaps(TARGETS[:1]).only(4, seed=3)
    generator = torch.Generator().manual_seed(0)
    rows = {tuple(row.tolist()) for _ in range(20) for row in task.batch("train", 8, generator).inputs}
    assert len(rows) == 4
    assert len({tuple(row.tolist()) for row in task.batch("train", 8, generator, 0).inputs}) == 8  # the probes' own


@pytest.mark.study
def test_mhr_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("mhr").rows}
    assert set(rows["mhr"].extra["few"]) == {"all", "router", "skills"} and set(rows["lora"].extra["few"]) == {"all"}
    assert set(rows["average"].extra["few"]) == {"skills"}
    assert all(len(values) == 5 for values in rows["mhr"].extra["few"].values())
    assert torch.tensor(rows["mhr"].extra["allocation"]).shape == (len(SEEN), 8, 6)
    assert rows["mhr"].extra["trained"] > rows["poly"].extra["trained"]  # of the routers, not of the skills
    assert rows["mhr, fixed routing"].extra["trained"] == rows["average"].extra["trained"]
