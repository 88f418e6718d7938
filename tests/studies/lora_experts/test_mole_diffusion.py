"""The study of MoLE: it runs, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.glyph_scenes import PARTS
from workbench.studies.lora_experts.mole_diffusion import ARMS, GATES, PRESETS, experts, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.001)
ERROR = {"base": 0.6, "tuned": 0.5, "joint": 0.52, "merged": 0.48, "local": 0.42, "global": 0.45, "mole": 0.4}


def judged(seeds=3, noise=None, background=0.05, **error):
    rows = []
    for i, (arm, value) in enumerate((ERROR | error).items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.5 * i * part for part in NOISE])[seed]
            ground = (background if arm == "mole" else 0.05) + NOISE[seed] * (1 + i)
            extra = {"background": ground, "face": value, "hand": value, "box_auc": [0.9, 0.9], "absent": [0.0, 0.0]}
            extra |= {"drawn_right": 0.5, "drawn_distance": 1.0}
            extra |= {"scales": (1.0, 1.0), "sweep": {part: [0.6, 0.5] for part in PARTS}}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(Rows(rows), {})


def test_mole_diffusion_study_reproduces_if_gates_beat_merging_and_leave_the_background():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(-0.08, abs=0.005)
    json.dumps(result.details)


def test_mole_diffusion_study_does_not_reproduce_on_the_other_side():
    assert judged(mole=0.7).verdict == NOT_REPRODUCED
    assert judged(merged=0.3).verdict == NOT_REPRODUCED
    assert judged(background=0.5).verdict == NOT_REPRODUCED
    same = {"mole": (0.0, 0.001, 0.0), "merged": (0.001, 0.0, 0.001)}
    assert judged(mole=0.48, noise=same).verdict == NOT_REPRODUCED  # equivalent


def test_mole_diffusion_study_resolves_nothing_if_an_interval_includes_zero():
    assert judged(noise={"mole": (0.3, -0.3, 0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.study
def test_mole_diffusion_study_experts_are_kept(empty_home):
    settings = PRESETS["smoke"]
    first, again = experts(settings, 0), experts(settings, 0)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name][i], other[name][i]) for name in one for i in (0, 1))
    assert not torch.equal(*(lora["blocks.0.ffn.down"][1] for lora in first))


@pytest.mark.study
def test_mole_diffusion_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("mole-diffusion").rows}
    assert all(0 <= rows[arm].extra["drawn_right"] <= 1 and rows[arm].extra["drawn_distance"] >= 0 for arm in ARMS)
    assert set(rows["merged"].extra["scales"]) <= {0.0, 1.0}
    for arm in GATES:
        assert torch.tensor(rows[arm].extra["maps"]).shape == (2, 12, 12)
        assert all(0 <= value <= 1 for value in rows[arm].extra["box_auc"])
    trained = {arm: rows[arm].extra["trained"] for arm in GATES}
    assert trained["mole"] == trained["local"] + trained["global"]
