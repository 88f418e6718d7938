"""The study of RDM: equal parameters, and a rule of four parts on rows made by hand."""

import json

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.studies.imaging.semi_parametric import ARMS, OURS, PRESETS, build, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

MMD = {OURS: 0.01, "unconditional": 0.05, "class": 0.04, "random": 0.05, "large": 0.03, "unseen": 0.2}
SHARE = {"unseen": 0.8, "unseen-random": 0.05}


def judged(mmd=None, share=None, ratio=0.9, spread=0.002, seeds=12):
    mmd, share = MMD | (mmd or {}), SHARE | (share or {})
    noise = torch.randn(len(ARMS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = []
    for i, arm in enumerate(ARMS):
        for seed, error in enumerate(noise[i]):
            extra = {"noise_error": 0.2, "unseen": share.get(arm, 0.2) + error}
            if not arm.startswith("unseen"):
                extra |= {"drawn_to_database": ratio + error, "held_out_to_database": 1.0, "drawn_to_train": 1.0}
                extra |= {"precision": 0.5, "recall": 0.5, "floor": 0.0}
            if arm == OURS:
                extra |= {"own": 1.0, "m": {"0.1": [0.1, 0.5, 0.5]}, "k": {"1": [0.1, 0.5, 0.5]}}
                extra["guided"] = [0.1, 0.5, 0.5]
            rows.append(Row(arm, seed, 1, 1, 1, 1, mmd.get(arm, 0.2) + error, extra))
    return judge(Rows(rows), {})


def test_reproduced_if_all_four_parts_hold():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(-0.04, abs=0.005)
    assert all(result.details["holds"].values())
    json.dumps(result.details)
    assert judged({"large": 0.005}).verdict == REPRODUCED  # within the margin


@pytest.mark.parametrize(
    "change",
    [
        {"mmd": {"unconditional": 0.005}},
        {"mmd": {"random": 0.005}},
        {"mmd": {OURS: 0.03, "large": 0.01}},
        {"share": {"unseen": 0.4}},
        {"ratio": 0.4},
    ],
)
def test_not_reproduced_if_one_part_is_refuted(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"mmd": {"random": 0.01}},
        {"mmd": {OURS: 0.02, "large": 0.009}},
        {"share": {"unseen": 0.5}},
        {"share": {"unseen-random": 0.8}},
        {"ratio": 0.5},
        {"spread": 0.2},
    ],
)
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_all_arms_but_the_large_one_have_the_same_parameters():
    sizes = {arm: count_params(build(arm, PRESETS["small"])) for arm in ARMS}
    large = sizes.pop("large")
    assert len(set(sizes.values())) == 1 and 4.5 < large / sizes[OURS] < 5.5
