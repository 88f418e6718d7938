"""The study of Dynamic-DINO and its detection bed: it runs, its arms start where they should, and its rule decides."""

import json

import numpy as np
import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.dynamic_dino import SlicedFeedForward
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Row
from workbench.studies.lora_experts import glyph_detection as bed
from workbench.studies.lora_experts.dynamic_dino import FIRST, PRESETS, SMALL_ARMS, STUDY, build, judge, widen

NOISE = (0.0, 0.004, -0.003)
AP = {"dense": 0.4, "mixture": 0.43, "random": 0.3, "untied": 0.35, "wide": 0.42}
FIRST_LOSS = {"dense": 3.0, "mixture": 3.0, "random": 9.0, "untied": 6.0, "wide": 3.0}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))


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
    return judge(rows, {"arms": SMALL_ARMS})


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
def test_smoke_runs_twice_with_the_same_numbers(home):
    first, second = (STUDY.execute("smoke", seed=3) for _ in range(2))
    assert [(r.arm, r.seed, r.metric, r.extra) for r in first.rows] == [
        (r.arm, r.seed, r.metric, r.extra) for r in second.rows
    ]
    assert first.judgement == second.judgement
    rows = {row.arm: row for row in first.rows if row.seed == 3}
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


def test_all_arms_tune_the_same_parts_and_only_those(home):
    settings = PRESETS["smoke"]
    image = bed.draw_scenes("train", 2, torch.Generator().manual_seed(0))[0]
    before = bed.base(settings).state_dict()
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


def test_scenes_hold_what_their_targets_say():
    images, targets = bed.draw_scenes("train", 400, torch.Generator().manual_seed(0))
    assert images.shape == (400, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    text, here = targets[..., 0].long(), targets[..., 0] >= 0
    assert not torch.isin(text, torch.tensor(bed.UNSEEN)).any()
    assert set(here.sum(1).tolist()) == {2, 3, 4, 5}
    assert not torch.isin(torch.tensor(bed.RARE), torch.tensor(bed.UNSEEN)).any() and len(bed.RARE) == 17
    seen = torch.bincount(text[here], minlength=60)
    assert seen[list(bed.RARE)].sum() < seen.sum() / 5  # the tail is long
    left, top, right, bottom = (bed.corners(targets[..., 1:]) * 32).unbind(-1)
    assert left[here].min() >= 0 and bottom[here].max() <= 32
    inside = []
    for n, slot in here.nonzero()[:200].tolist():
        box = images[n, :, int(top[n, slot]) : int(bottom[n, slot]), int(left[n, slot]) : int(right[n, slot])]
        inside.append((text[n, slot] // 10, box.flatten(1).amax(1)))
    for colour, peak in inside:  # the strongest channels of a box are those of its colour
        shade = torch.tensor(tuple(bed.COLOURS.values()))[colour]
        assert peak[shade.argmax()] > 0.45
    _, test = bed.draw_scenes("test", 400, torch.Generator().manual_seed(0))
    assert torch.isin(torch.tensor(bed.UNSEEN), test[..., 0].long()).all()


def test_overlap_by_hand():
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])
    ratio, generalised = bed.overlap(a, b)
    assert ratio.item() == pytest.approx(1 / 7) and generalised.item() == pytest.approx(1 / 7 - 2 / 9)
    assert bed.overlap(a, a)[1].item() == pytest.approx(1)


def answers(targets):
    """Logits and boxes that are right: query m has the m-th digit."""
    text = targets[..., 0].long()
    logits = torch.full((len(targets), targets.shape[1], len(bed.TEXTS)), -8.0)
    for n, m in (text >= 0).nonzero().tolist():
        logits[n, m, text[n, m]] = 8.0
    return logits, torch.where(text[..., None] >= 0, targets[..., 1:], torch.tensor(0.5)).clone()


def test_average_precision_of_right_answers_is_one_and_falls_with_each_kind_of_error():
    targets = bed.draw_scenes("test", 60, torch.Generator().manual_seed(1))[1]
    logits, boxes = answers(targets)
    present = np.isin(np.arange(60), targets[..., 0].numpy())
    precisions = bed.average_precisions(logits, boxes, targets)
    assert np.array_equal(np.isnan(precisions), ~present)
    assert np.allclose(precisions[present], 1)
    row, place = (targets[..., 0] >= 0).nonzero()[0].tolist()
    text = int(targets[row, place, 0])
    moved = boxes.clone()
    moved[row, place, 0] += 0.5  # one box of this text elsewhere
    count = int((targets[..., 0] == text).sum())
    assert bed.average_precisions(logits, moved, targets)[text] < 1 - 1 / (2 * count)
    noise = torch.randn(logits.shape[:2], generator=torch.Generator().manual_seed(0))[..., None]
    twice = torch.cat([logits, logits + noise], 1)  # each found twice: the one of lower score is a mistake
    doubled = bed.average_precisions(twice, torch.cat([boxes, boxes], 1), targets)
    assert doubled[present].mean() < 1
    other = logits.roll(1, 2)
    assert np.nanmean(bed.average_precisions(other, boxes, targets)) < 0.1


def test_matching_gives_each_digit_its_own_query_and_right_answers_a_small_loss():
    targets = bed.draw_scenes("test", 20, torch.Generator().manual_seed(2))[1]
    logits, boxes = answers(targets)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    row, query, place = bed.match(logits[:, order], boxes[:, order], targets)
    assert len(row) == (targets[..., 0] >= 0).sum()
    assert torch.equal(order[query], place)
    right = bed.stage_loss(logits, boxes, targets)
    assert right < 0.01 and bed.stage_loss(-logits, boxes, targets) > 1
    assert bed.stage_loss(logits, boxes * 0.9, targets) > right
