"""Glyph detection: what is drawn, how answers are matched to it and scored."""

import numpy as np
import pytest
import torch

from workbench.beds import glyph_detection as bed


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
