"""The study of Streaming DiLoCo: its arms see the same rows, its bytes are counted, and its rule says what it says."""

import json

import pytest
import torch

from workbench.studies.distributed.streaming_diloco import (
    ARMS,
    BESIDE_DILOCO,
    BESIDE_PARALLEL,
    PARALLEL,
    PRESETS,
    STREAMING,
    judge,
    replicas_of,
    run,
    shards,
    text,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
BITS = dict.fromkeys(PRESETS["small"]["arms"], 3.0)


def judged(bits=None, spread=0.001, share=0.009, seeds=6):
    noise = torch.randn(len(BITS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[i][seed], {"share": share, "largest_bytes": 10, "apart": 0.01})
        for i, (arm, value) in enumerate((BITS | (bits or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {})


def test_reproduced_if_it_is_no_worse_than_either_with_a_hundredth_of_the_bytes():
    result = judged({STREAMING: 3.01})
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.01, abs=0.002)
    json.dumps(result.details)
    margins = [BESIDE_PARALLEL, BESIDE_DILOCO]
    assert margins == pytest.approx([0.0432809, 0.0288539], abs=1e-6)  # 0.03 and 0.02 nats


@pytest.mark.parametrize(
    ("bits", "share"),
    [({STREAMING: 3.06}, 0.009), ({STREAMING: 3.04}, 0.009), ({PARALLEL: 2.9}, 0.009), ({}, 0.02)],
)
def test_not_reproduced_if_it_is_shown_to_be_worse_or_sends_more(bits, share):
    """The second is within the margin of data-parallel and not within that of diloco; in the third diloco is as bad."""
    assert judged(bits, share=share).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"spread": 0.1}, {"bits": {STREAMING: 3.0288}}])
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_arms_see_the_same_rows_and_begin_with_the_same_weights():
    task = text(SMOKE)
    batch = [shards(task).batch("train", 4, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(batch[0].inputs, batch[1].inputs)
    split = shards(task, split=True).batch("train", 4, torch.Generator().manual_seed(1))
    assert split.domain.tolist() == [0, 0, 1, 1]
    for arm, how in ARMS.items():
        if how is not None and how.get("every", SMOKE["every"]) <= SMOKE["every"] and how["delay"] < 2:
            replicas = replicas_of(arm, SMOKE)
            first, *others = (replica.state_dict() for replica in replicas.replicas)
            assert all(torch.equal(first[name], other[name]) for other in others for name in first)
            assert len(replicas.parts[0].globals) == how["count"]


def test_a_row_says_what_was_sent():
    row = run(STREAMING, 0, SMOKE)
    part = replicas_of(STREAMING, SMOKE).parts[0]
    sizes = [part.message_bytes(p) for p in range(3)]
    assert row.extra["sent_bytes"] == 2 * sum(sizes) and row.extra["largest_bytes"] == max(sizes)  # 12 steps, H = 6
    assert row.extra["share"] == row.extra["sent_bytes"] / (2 * row.params * 12)
    assert 0 < row.extra["apart"] < 0.1 and row.extra["global_bits"] != row.metric
    assert row.metric == pytest.approx(sum(row.extra["by_domain"]) / 2)
    whole = run(PARALLEL, 0, SMOKE)
    assert whole.extra["share"] == 1 and (whole.params, whole.flops) == (row.params, row.flops)


def test_small_sends_a_hundredth():
    settings = PRESETS["small"] | {"public_steps": 1}
    part = replicas_of(STREAMING, settings).parts[0]
    sent = sum(part.sent_bytes(settings["steps"], 2))
    assert sent <= 0.01 * 2 * sum(len(theta) for theta in part.globals) * settings["steps"]
