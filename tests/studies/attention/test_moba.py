"""The study of MoBA: its task is what it says, its arms match, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.fact_recall import fact_recall
from workbench.lib.core.budget import count_params
from workbench.studies.attention.moba import (
    PRESETS,
    Finder,
    RandomFinder,
    arms,
    build,
    held_out,
    judge,
    theory,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
NOISE = (0.0, 0.01, -0.01)
RECALL = {"dense": 0.95, "moba-16": 0.5, "moba-4": 0.8, "moba-4-kconv": 0.94, "random-4": 0.3}
AGREEING = {"blocks": [16], "formula": [0.2], "simulated": [0.205]}


def task(**options):
    return fact_recall(SMOKE | {"test_rows": 70} | options)


def judged(recall=None, noise=None, seeds=3, probabilities=AGREEING):
    recall, noise = RECALL | (recall or {}), noise or {}
    extra = {"block_recall": 0.5, "snr": 1.0, "bits_per_byte": 3.0}
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise.get(arm, NOISE)[seed] + 0.001 * seed * len(arm), extra)
        for arm, value in recall.items()
        for seed in range(seeds)
    )
    return judge(rows, SMOKE, probabilities)


# the rule


def test_reproduced_if_all_four_hold():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.3, abs=0.01) and result.ci[0] > 0
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"recall": {"moba-16": 0.9}},
        {"recall": {"moba-4-kconv": 0.7}},
        {"recall": {"dense": 1.2}},
        {"probabilities": AGREEING | {"simulated": [0.25]}},
    ],
)
def test_not_reproduced_if_one_is_on_the_other_side(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"noise": {"moba-16": (0.9, -0.9, 0.0)}},
        {"noise": {"moba-4-kconv": (0.9, -0.9, 0.0)}},
        {"noise": {"dense": (0.4, -0.4, 0.0)}},
        {"recall": {"dense": 0.3, "moba-16": 0.9}},  # nothing was learnt
        {"seeds": 1},
    ],
)
def test_not_resolved_otherwise(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_theory_agrees_in_the_small_preset():
    found = theory(PRESETS["small"])
    assert found["blocks"] == [16, 32, 64, 128, 256]
    assert all(abs(a - b) < 0.015 for a, b in zip(found["formula"], found["simulated"], strict=True))


# the arms


def test_arms_are_named_by_their_blocks():
    assert arms(SMOKE) == ["dense", "moba-16", "moba-4", "moba-4-kconv", "random-4"]
    assert len(arms(PRESETS["small"])) == 6


@pytest.mark.parametrize("preset", ["small", "full"])
def test_arms_differ_in_their_blocks_alone(preset):
    settings, params = PRESETS[preset], {}
    for arm in arms(settings):
        torch.manual_seed(0)
        model = build(arm, settings)
        finder = model.blocks[1].attention
        params[arm] = count_params(model)
        if arm == "dense":
            assert finder.block_size == settings["seq_len"]
        else:
            assert finder.block_size * finder.blocks_per_query == settings["keys"]
        assert isinstance(finder, RandomFinder) == arm.startswith("random")
    plain = {arm: count for arm, count in params.items() if not arm.endswith("kconv")}
    assert len(set(plain.values())) == 1
    kconv = next(arm for arm in params if arm.endswith("kconv"))
    assert params[kconv] - params["dense"] == 3 * settings["d_model"]


def test_arms_of_one_seed_start_from_the_same_weights():
    states = {}
    for arm in arms(SMOKE):
        torch.manual_seed(0)
        states[arm] = build(arm, SMOKE).state_dict()
    for state in states.values():
        assert all(torch.equal(state[name], weight) for name, weight in states["dense"].items())


def test_the_finder_returns_what_comes_after():
    """Queries and keys start alike, and the key of a position is that of the position before."""
    torch.manual_seed(0)
    finder = Finder(16, 2, block_size=8, top_k=1, seq_len=8)
    x = torch.randn(1, 8, 16)
    q, k, _ = finder.heads(x)
    assert torch.equal(k[1:], q[:-1]) and not k[0].any()


def test_random_blocks_are_blocks_and_drawn_anew():
    finder = RandomFinder(16, 2, block_size=8, top_k=3, seq_len=64)
    q, k, _ = finder.heads(torch.randn(2, 60, 16))
    sequences = torch.tensor([0, 60, 120], dtype=torch.int32)
    first, second = (finder.choose(q, k, sequences) for _ in range(2))  # `from_blocks` refuses what cannot be
    own = torch.arange(120) % 60 // 8
    assert torch.equal((first.blocks >= 0).sum(-1), (own + 1).clamp(max=3)[:, None].expand(-1, 2))
    assert not torch.equal(first.blocks, second.blocks)
    assert set(first.blocks[59].flatten().tolist()) <= set(range(8))


def test_block_recall_is_a_count():
    """With as many blocks as there are, every fact's block is chosen; by chance, as often as chance has it."""
    torch.manual_seed(0)
    everything = build("dense", SMOKE)
    everything.blocks[1].attention.block_size, everything.blocks[1].attention.blocks_per_query = 4, 16
    found = held_out(everything, task())
    assert found["block_recall"] == 1.0 and isinstance(found["snr"], float)
    dense, exam = build("dense", SMOKE), task()
    assert held_out(dense, exam) == exam.evaluate(dense, "test") | {"block_recall": 1.0, "snr": "none"}
    chance = held_out(build("random-4", SMOKE | {"keys": 16}), task(test_rows=300))["block_recall"]
    expected = sum(3 / block for block in (12, 13, 14, 15)) / 4
    assert chance == pytest.approx(expected, abs=0.03)
