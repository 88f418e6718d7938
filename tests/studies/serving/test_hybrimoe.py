"""The study of HybriMoE: its rule on rows made by hand, and costs that are those that were measured."""

import json
import math

import pytest
import torch

from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.serving.hybrid_schedule import PUBLIC
from workbench.lib.serving.hybrimoe import CACHES
from workbench.studies import measured
from workbench.studies.rows import Row, Rows
from workbench.studies.serving.hybrimoe import ARMS, METHOD, PRESETS, costs, judge, replays
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SETTINGS = PRESETS["small"]
SIZES = ("25%", "50%", "75%")
LOGS = {"fixed": 1.0, "on-demand": 0.9, "hybrimoe": 0.3, "no-schedule": 0.6, "no-scores": 0.4, "no-prefetch": 0.45}
LOGS |= {"score-prefetch": 0.35, "belady": 0.2, "best-schedule": 0.3}


def judged(logs=None, sizes=None, hits=None, spread=0.01, seeds=6):
    """`sizes`: what an arm has more at a size; `hits`: of an arm, 0.5 otherwise."""
    noise = torch.randn(len(LOGS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = []
    for at, (arm, value) in enumerate((LOGS | (logs or {})).items()):
        for seed in range(seeds):
            by_size = {size: value + noise[at][seed] + (sizes or {}).get((arm, size), 0.0) for size in SIZES}
            own = (hits or {"hybrimoe": 0.6}).get(arm, 0.5) + noise[at][seed]
            token_ms = {size: [2 ** by_size[size]] * 5 for size in SIZES}
            extra = {"by_size": by_size, "hits": dict.fromkeys(SIZES, own), "first_token": 3.0, "token_ms": token_ms}
            if arm == "hybrimoe":
                extra |= {"reuse": 0.4, "foreseen": [0.8, 0.7], "replay": {"50%": dict.fromkeys(CACHES, 0.6)}}
            rows.append(Row(arm, seed, 1, 1, 1, 1, sum(by_size.values()) / 3, extra))
    return judge(Rows(rows), SETTINGS)


def test_reproduced_if_it_is_faster_everywhere_and_each_part_helps():
    found = judged()
    assert found.verdict == REPRODUCED
    assert found.effect == pytest.approx(-0.7, abs=0.02) and found.ci[1] < 0
    assert found.details["hits_minus_lru"]["mean"] == pytest.approx(0.1, abs=0.02)
    assert found.details["simulator"]["configurations"] >= 4
    json.dumps(found.details)


@pytest.mark.parametrize(
    "change",
    [
        {"logs": {"no-prefetch": 0.2}},
        {"logs": {"no-scores": 0.2}},
        {"logs": {"no-schedule": 0.2}},
        {"sizes": {("on-demand", "75%"): -0.8}},
        {"sizes": {("fixed", "25%"): -0.9}},
        {"hits": {"no-scores": 0.6}},
    ],
)
def test_not_reproduced_if_one_of_them_is_shown_to_be_otherwise(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"spread": 0.5},
        {"logs": {"no-prefetch": 0.302}},
        {"hits": {"hybrimoe": 0.502}},
        {"sizes": {("on-demand", "50%"): -0.6}},
        {"seeds": 1},
    ],
)
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_what_has_no_part_in_the_verdict_changes_none():
    assert judged({"belady": 9.0, "score-prefetch": -9.0, "best-schedule": 9.0}).verdict == REPRODUCED


def test_costs_are_what_was_measured_and_the_device_is_so_many_times_as_fast():
    record = measured.read(METHOD)
    found = costs(SETTINGS)
    assert [*found] == ["5x", "10x", "20x", "50x", "public"] and found["public"] is PUBLIC
    for ratio, cost in ((5, found["5x"]), (50, found["50x"])):
        assert cost.cpu.seconds([1, 3]) == pytest.approx(
            sum(record.calibration["one_thread"][key] * n for key, n in (("first", 1), ("expert", 2), ("token", 4))),
            rel=1e-3,
        )
        assert cost.device.seconds([1, 3]) == pytest.approx(cost.cpu.seconds([1, 3]) / ratio)
        assert cost.transfer == pytest.approx(record.calibration["copy"], rel=1e-3)
        assert cost.dense == pytest.approx((cost.cpu.expert + cost.cpu.token) / ratio)


def test_the_simulator_was_held_to_real_runs():
    record = measured.read(METHOD)
    assert len(record.rows) >= 4 and len({row["policy"] for row in record.rows}) >= 3
    assert record.unit == "ms" and all(row["measured"] > 0 for row in record.rows)
    assert math.isfinite(record.median_error)


def test_replays_are_bounded_by_the_one_that_knows_and_leave_out_what_is_too_small():
    trace = zipf_markov(2, experts=16, top_k=5)
    found = replays(trace, {"sizes": (0.25, 0.5, 0.75)})
    assert [*found] == ["50%", "75%"]  # a quarter has four places, and five experts are asked for at once
    for rules in found.values():
        assert all(0 < rules[rule] <= rules["belady"] < 1 for rule in ("lru", "lfu", "mrs"))


def test_every_arm_differs_from_the_method_and_from_every_other():
    assert len({tuple(sorted(how.items())) for how in ARMS.values()}) == len(ARMS) and ARMS["hybrimoe"] == {}
