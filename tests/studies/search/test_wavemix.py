"""The study of WaveMix: matched budgets, arms of one state, what is kept, and a rule about two fronts."""

import json

import pytest

from workbench.beds import images
from workbench.lib.core.budget import count_params
from workbench.studies.rows import Row, Rows
from workbench.studies.search.wavemix import (
    ARMS,
    BUDGETS,
    CONTROLS,
    LARGEST,
    MARGIN,
    RIVALS,
    SIDE,
    enlarged,
    judge,
    kept_bytes,
    network,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.004, 0.002)


def judged(noise=1.0, seeds=4, accuracy=None, kept=None):
    """All arms at 0.9 and 1,000 bytes, WaveMix at 500, but for those named."""
    accuracy, kept = accuracy or {}, kept or {}
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            found = accuracy.get(arm, 0.9) + noise * NOISE[(seed + i) % 4]
            bytes_ = kept.get(arm, 500 if arm.startswith("wavemix") else 1000)
            rows.append(Row(arm, seed, 1, 1, 1, 1, found, {"kept_bytes": bytes_, "train_accuracy": 1.0}))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("accuracy", "kept", "verdict"),
    [
        ({}, {}, REPRODUCED),
        ({"resnet-3k": 0.95}, {}, REPRODUCED),  # on the front at two of three
        ({"resnet-3k": 0.95, "vit-12k": 0.95}, {}, NOT_REPRODUCED),
        ({"convmixer-3k": 0.918, "separable-6k": 0.918}, {}, NOT_REPRODUCED),
        ({}, {"wavemix-3k": 1000}, NOT_RESOLVED),
        ({}, {"wavemix-3k": 1000, "wavemix-6k": 1200}, NOT_REPRODUCED),
        ({"unshuffle": 0.95, "deconv": 0.99}, {"deconv": 1}, REPRODUCED),  # reported alone
    ],
)
def test_the_rule_asks_for_two_fronts(accuracy, kept, verdict):
    result = judged(accuracy=accuracy, kept=kept)
    assert result.verdict == verdict
    gains = [0.9 - accuracy.get(f"resnet-{budget}", 0.9) for budget in BUDGETS]
    assert result.effect == pytest.approx(sum(gains) / 3, abs=0.003)
    assert result.claimed[0] == -MARGIN
    json.dumps(result.details)


def test_noise_or_one_seed_resolves_nothing():
    assert judged(noise=20.0).verdict == judged(seeds=1).verdict == NOT_RESOLVED


def test_parameters_are_matched_within_five_in_a_hundred():
    of = {arm: count_params(network(arm)) for arm in ARMS}
    for budget in BUDGETS:
        for name in RIVALS:
            assert of[f"{name}-{budget}"] == pytest.approx(of[f"wavemix-{budget}"], rel=0.05)
    for arm in CONTROLS:
        assert of[arm] == of[f"wavemix-{LARGEST}"]
    assert of["deconv"] == pytest.approx(of[f"wavemix-{LARGEST}"], rel=0.05)


def test_networks_make_a_row_an_image_and_what_they_keep_is_an_images():
    task = enlarged(images.make("digits", "few", 0))
    assert task.data.splits["test"][0].shape[1:] == (1, SIDE, SIDE)
    for arm in ARMS:
        model = network(arm).eval()
        assert model(task.data.splits["train"][0][:3]).shape == (3, 10)
    small, large = kept_bytes(network("resnet-3k"), task, 4), kept_bytes(network("resnet-3k"), task, 16)
    assert small == pytest.approx(large, rel=0.1) and small > SIDE * SIDE * 4


@pytest.mark.study
def test_rows_hold_both_measures(smoke):
    result = smoke("wavemix")
    assert [row.arm for row in result.rows if row.seed == 0] == ARMS
    of = {row.arm: row for row in result.rows if row.seed == 0}
    assert of["unshuffle"].params == of[f"wavemix-{LARGEST}"].params
    assert all(0 <= row.metric <= 1 and row.flops > 0 for row in result.rows)
