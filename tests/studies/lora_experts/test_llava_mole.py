"""The study of LLaVA-MoLE: it runs, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.digit_questions import DigitQuestions
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.studies.lora_experts.llava_mole import OURS, PRESETS, ByDomain, build, judge, learn, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.003)
ACCURACY = {
    "lora-single": (0.95, 0.9, 0.8),
    "lora-mix": (0.9, 0.6, 0.6),
    "lora-mix-2x": (0.95, 0.7, 0.65),
    "lora-rank-k": (0.95, 0.7, 0.65),
    OURS: (0.95, 0.88, 0.78),
}


def judged(change=None, noise=None, seeds=3):
    accuracy, noise = ACCURACY | (change or {}), noise or {}
    rows = []
    for i, (arm, values) in enumerate(accuracy.items()):
        for seed in range(seeds):
            moved = [
                v + NOISE[seed] * (1 + i + 0.1 * d) + noise.get(arm, (0, 0, 0))[seed] for d, v in enumerate(values)
            ]
            rows.append(Row(arm, seed, 1, 1, 1, 1, sum(moved) / 3, {"by_domain": moved}))
    return judge(Rows(rows), {"arms": list(accuracy)})


def test_llava_mole_study_reproduces_if_the_mix_hurts_and_the_experts_undo_it():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.17, abs=1e-2) and result.ci[0] > 0
    assert set(result.details["minus"]) == set(ACCURACY) - {OURS}
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"lora-single": (0.5, 0.5, 0.5)},  # the mix helps
        {OURS: (0.8, 0.6, 0.5)},
        {OURS: (0.7, 0.95, 0.95)},  # better on the mean, worse on one domain
        {"lora-mix-2x": (0.99, 0.95, 0.9)},
        {"lora-rank-k": (0.99, 0.95, 0.9)},  # it was capacity
    ],
)
def test_llava_mole_study_does_not_reproduce_if_one_part_is_contradicted(change):
    assert judged(change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", ["lora-single", "lora-mix", "lora-mix-2x", "lora-rank-k"])
def test_llava_mole_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.6, -0.6, 0.0)}).verdict == NOT_RESOLVED


def test_llava_mole_study_resolves_nothing_with_one_seed():
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.study
def test_llava_mole_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("llava-mole").rows}
    assert rows["lora-mix"].steps == rows["lora-single"].steps == rows[OURS].steps == 6
    assert rows["lora-mix-2x"].steps == 12
    assert rows["lora-rank-k"].extra["trained"] == 3 * rows["lora-mix"].extra["trained"]
    assert rows["mole-oracle"].extra["trained"] == rows["mole-random"].extra["trained"] < rows[OURS].extra["trained"]
    assert rows["mole-oracle"].extra["load_by_domain"] == [torch.eye(3).tolist()] * 2
    assert len(rows["lora-mix"].extra["gradient_cosine"]) == 3


@pytest.mark.study
def test_llava_mole_study_arms_are_what_they_are_called():
    settings = PRESETS["smoke"]
    random = build("mole-random", 0, settings)
    first = next(layer for layer in random.layers.values() if isinstance(layer, RoutedFeedForward)).router
    before = first.projection.weight.clone()
    trained = learn("mole-random", 0, DigitQuestions(), 2, settings, 0)[0]
    routers = [layer.router for layer in trained.layers.values() if isinstance(layer, RoutedFeedForward)]
    assert torch.equal(routers[0].projection.weight, before)
    oracle = build("mole-oracle", 0, settings)
    routers = [layer.router for layer in oracle.layers.values() if isinstance(layer, RoutedFeedForward)]
    assert all(isinstance(router, ByDomain) for router in routers) and not list(oracle.adapter.facts)
    assert run("mole-uneven", 0, settings).steps == 6
