"""The study of Dynamic-DINO: it runs, its arms start where they should, and its rule decides."""

import json

import pytest
import torch

from workbench.beds import glyph_detection, glyph_detector
from workbench.lib.core.budget import count_params
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.dynamic_dino import SlicedFeedForward
from workbench.studies.lora_experts.dynamic_dino import FIRST, PRESETS, SMALL_ARMS, build, judge, widen
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.003)
AP = {"dense": 0.4, "mixture": 0.43, "random": 0.3, "untied": 0.35, "wide": 0.42}
FIRST_LOSS = {"dense": 3.0, "mixture": 3.0, "random": 9.0, "untied": 6.0, "wide": 3.0}


def judged(ap=None, first=None, noise=0.2, start=0.0, seeds=3):
    ap, first = AP | (ap or {}), FIRST_LOSS | (first or {})
    rows = []
    for arm in SMALL_ARMS:
        for seed in range(seeds):
            own = NOISE[(seed + len(arm)) % 3] * noise
            losses = [first[arm] + NOISE[seed] + own] * FIRST
            losses[0] = 3.0 + NOISE[seed] + (start if arm == "mixture" else 0.0)
            extra = {"first_losses": losses, "common": 0.5, "rare": 0.3 + own, "unseen": 0.1}
            if arm in ("mixture", "random", "untied"):
                extra |= {"same_copy": [[1.0], [0.4]], "partners": [[1.0], [3.0]], "partners_null": [9.0]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, ap[arm] + NOISE[seed] + own, extra))
    return judge(Rows(rows), {"arms": SMALL_ARMS})


def test_reproduced_if_it_starts_as_dense_and_ends_better():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.03, abs=2e-3) and result.ci[0] > 0
    assert result.details["co_selection"]["mixture"] == {
        "same_copy_start": [1.0],
        "same_copy_end": [pytest.approx(0.4)],
        "partners_start": [1.0],
        "partners_end": [3.0],
        "partners_null": [9.0],
    }
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"ap": {"mixture": 0.37}},  # worse
        {"ap": {"mixture": 0.4005}},  # shown to be as good within the margin
        {"start": 0.01},  # another function at the start
        {"first": {"untied": 2.0}},  # the control starts lower
    ],
)
def test_not_reproduced_if_one_part_is_on_the_other_side(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change", [{"ap": {"mixture": 0.405}, "noise": 5}, {"first": {"untied": 3.001}, "noise": 1}, {"seeds": 1}]
)
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


@pytest.mark.study
def test_the_arms_start_and_cost_as_the_comparison_needs(smoke):
    rows = {row.arm: row for row in smoke("dynamic-dino").rows if row.seed == 0}
    assert rows["mixture"].extra["first_losses"][0] == pytest.approx(rows["dense"].extra["first_losses"][0], rel=1e-5)
    assert rows["wide"].extra["first_losses"][0] == pytest.approx(rows["dense"].extra["first_losses"][0], rel=1e-5)
    assert rows["random"].extra["first_losses"][0] != pytest.approx(rows["dense"].extra["first_losses"][0], rel=1e-3)
    totals = [rows[arm].params for arm in ("mixture", "whole", "quarters", "wide")]
    assert max(totals) / min(totals) < 1.02  # equal in all
    active = [rows[arm].active_params for arm in ("dense", "mixture", "whole", "quarters")]
    assert max(active) / min(active) < 1.03  # and in what a query uses
    for arm, partners in (("mixture", 1.0), ("quarters", 3.0)):
        assert rows[arm].extra["same_copy"][0] == [1.0] * 3
        assert rows[arm].extra["partners"][0] == pytest.approx([partners] * 3)
    assert rows["untied"].extra["same_copy"][0] != [1.0] * 3
    assert "same_copy" not in rows["whole"].extra


def test_all_arms_tune_the_same_parts_and_only_those():
    settings = PRESETS["smoke"]
    image = glyph_detection.draw_scenes("train", 2, torch.Generator().manual_seed(0))[0]
    before = glyph_detector.base(settings).state_dict()
    for arm in ("dense", "mixture"):
        adapted = build(arm, 0, settings)
        assert sum(isinstance(layer, SlicedFeedForward) for layer in adapted.layers.values()) == 3
        assert set(adapted.layers) == {
            *(f"layers.{i}.ffn" for i in range(3)),
            *("enhancer.q", "enhancer.kv", "enhancer.out", "class_head", "box_head"),
        }
        context = Context()
        loss = sum(logits.square().mean() + boxes.square().mean() for logits, boxes in adapted.model(image, context))
        (loss + context.aux).backward()
        torch.optim.SGD(adapted.parameters(), 0.1).step()
        assert all(torch.equal(value, before[key]) for key, value in adapted.remove().state_dict().items())


def test_a_widened_block_is_the_same_function_with_units_to_spare():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    wide, x = widen(block, 3), torch.randn(9, 6)
    assert torch.allclose(wide(x), block(x), atol=1e-6)
    assert count_params(wide) == 6 * 24 * 2 + 24 + 6
    wide(x).square().sum().backward()
    assert wide[2].weight.grad[:, 8:].any()
