"""The study of Mixture-of-Mamba: arms that cost alike and start alike, and its rule says what it says."""

import json
import math

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.lib.core.mamba import MambaBlock
from workbench.studies.modality.mixture_of_mamba import (
    ARMS,
    MARGIN,
    PRESETS,
    PROJECTIONS,
    SMALL_ARMS,
    build,
    judge,
    run,
    share_of_steps,
    stream,
)
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
BITS = {  # text, image
    "dense": (1.5, 2.0),
    "dense-total": (1.48, 1.99),
    "all": (1.44, 1.97),
    "in+out": (1.45, 1.98),
    "x+dt": (1.49, 2.0),
}


def judged(bits=None, spread=0.002, seeds=8):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for arm, (text, image) in (BITS | (bits or {})).items():
        for seed in range(seeds):
            a, b = (torch.randn(2, generator=generator) * spread).tolist()
            values = {"text": text + a, "image": image + b}
            curve = [[10, text + 1, image + 1], [20, text, image]]
            extra = values | {"curve": curve, "step_sizes": [[[0.1, 0.2, 0.3]] * 2]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, (text + image + a + b) / 2, extra))
    return judge(Rows(rows), SMOKE)


def test_reproduced_if_every_modality_gains():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.045, abs=0.004) and result.ci[1] < 0
    details = result.details
    assert details["image_minus_text"]["mean"] == pytest.approx(0.03, abs=0.005)
    assert details["synergy"]["text"]["mean"] == pytest.approx(-0.06 + 0.05 + 0.01, abs=0.005)
    assert details["synergy_over"] == ["in+out", "x+dt"]
    assert details["all_minus_dense_total"]["image"]["mean"] == pytest.approx(-0.02, abs=0.005)
    assert details["share_of_steps"]["text"] == pytest.approx([0.5 + 0.5 * 0.94] * 8)
    json.dumps(details)


@pytest.mark.parametrize("bits", [(1.44, 2.0), (1.5, 1.97), (1.44, 2.05), (1.5 - MARGIN / 3, 1.9)])
def test_not_reproduced_if_one_modality_is_shown_to_gain_too_little(bits):
    assert judged({"all": bits}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"spread": 0.2},
        {"bits": {"all": (1.44, 2 - MARGIN)}, "spread": 0.02},
        {"bits": {"all": (1.4, 1.99)}, "spread": 0.02},
    ],
)
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_a_share_of_steps_is_read_between_the_evaluations():
    curve = [[10, 3.0], [20, 2.0], [30, 2.5], [40, 1.0]]
    assert share_of_steps(curve, 1, 2.5) == 15 / 40
    assert share_of_steps(curve, 1, 1.0) == 1
    assert share_of_steps(curve, 1, 3.5) == 10 / 40
    assert share_of_steps(curve, 1, 0.9) == math.inf


def test_arms_cost_alike_and_start_alike():
    task = stream("glyphs", SMOKE["faces"])
    models = {arm: build(arm, 3, SMOKE, task) for arm in ARMS}
    costs = {arm: training_budget(models[arm], task, 2) for arm in SMALL_ARMS}
    equal = [arm for arm in SMALL_ARMS if arm != "dense-total"]
    assert len({(costs[arm].active_params, costs[arm].flops) for arm in equal}) == 1
    wide, all_ = costs["dense-total"].params, costs["all"].params
    assert 0.93 * all_ < wide <= all_ and costs["dense-total"].flops > costs["all"].flops
    dense = dict(models["dense"].named_parameters())
    for arm, split in ARMS.items():
        if arm == "dense-total":
            continue
        names = [name for name, p in models[arm].named_parameters() if ".parts.1." in name]
        assert len(names) == 2 * (len(split) + ("dt" in split))  # of two blocks
        for name, parameter in models[arm].named_parameters():
            same = torch.equal(parameter, dense[name.replace("parts.0.", "").replace("parts.1.", "")])
            assert same == (".parts.1." not in name), name
    blocks = [module for module in models["all"].modules() if isinstance(module, MambaBlock)]
    assert [block.split for block in blocks] == [PROJECTIONS] * 2 and models["all"].position is None
    assert count_params(models["all"]) == all_


def test_a_row_says_what_each_modality_costs_on_the_way_and_how_large_the_steps_are():
    row = run("all", 0, SMOKE)
    assert row.metric == (row.extra["text"] + row.extra["image"]) / 2
    assert [point[0] for point in row.extra["curve"]] == list(range(1, 11))
    assert all(len(point) == 3 for point in row.extra["curve"])
    sizes = torch.tensor(row.extra["step_sizes"])
    assert sizes.shape == (2, 2, 3) and (sizes > 0).all() and (sizes.diff(dim=-1) >= 0).all()
    again = run("all", 0, SMOKE)
    assert again.metric == row.metric and again.extra == row.extra
