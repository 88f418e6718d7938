"""The study of D2MoE: its rule says what it says, its baselines have the bits they should, its costs were measured."""

import json
import math
import statistics

import pytest
import torch

from workbench.studies import measured
from workbench.studies.rows import Row, Rows
from workbench.studies.serving import d2moe as study
from workbench.studies.serving.d2moe import ARMS, METHOD, POLICIES, PRESETS, RandomBits, calibrated, judge
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

SETTINGS = PRESETS["smoke"]
NOISE = (0.0, 0.002, -0.001, 0.001)
BITS = {"fp32": 3.0, "int8": 3.0, "uniform@4": 3.01, "random@4": 3.05, "d2moe@4": 3.005}
BITS |= {"uniform@3": 3.03, "random@3": 3.06, "d2moe@3": 3.015}
SPEED = {"whole": 100.0, "fifo": 200.0, "johnson": 220.0, "hebf": 215.0, "progressive": 250.0}


def judged(bits=None, speed=None, spent=3.0, noise=NOISE, seeds=4):
    rows = []
    for at, arm in enumerate(ARMS):
        kind = arm.partition("@")[0]
        for seed in range(seeds):
            own = noise[seed] * (1 + at / 10)
            extra = {"bits": spent if arm == "d2moe@3" else 4.0}
            for share in SETTINGS["budgets"]:
                for policy in POLICIES.get(kind, ()):
                    rate = (SPEED | (speed or {}))[policy] * (1 + own * (2 if policy == "hebf" else 1))
                    extra |= {f"tokens_per_second {policy}@{share:g}": rate, f"bits_used {policy}@{share:g}": 3.5}
            rows.append(Row(arm, seed, 1, 1, 0, 0, (BITS | (bits or {}))[arm] + own, extra))
    return judge(Rows(rows), SETTINGS)


def test_d2moe_reproduced_if_all_four_hold():
    found = judged()
    assert found.verdict == REPRODUCED and found.effect == pytest.approx(-0.015, abs=1e-3)
    assert "2.15 times as fast as int8" in found.reason and "1.076 times as fast as first come" in found.reason
    json.dumps(found.details)
    assert found.details["log speed of hebf over others, 0.25 of the memory"]["johnson"]["mean"] == pytest.approx(
        math.log(215 / 220), abs=1e-3
    )


@pytest.mark.parametrize(
    ("bits", "speed"),
    [
        ({"d2moe@3": 3.05}, None),
        ({"d2moe@4": 3.03}, None),
        (None, {"whole": 300.0}),
        (None, {"fifo": 215.0}),
        (None, {"fifo": 230.0}),
    ],
)
def test_d2moe_not_reproduced_if_one_is_shown_to_fail(bits, speed):
    """Worse than 3 bits for all, farther than a per cent, slower than int8, no faster than first come."""
    assert judged(bits, speed).verdict == NOT_REPRODUCED


def test_d2moe_not_resolved_if_one_is_open():
    assert judged({"d2moe@3": 3.03}).verdict == NOT_RESOLVED
    assert judged(speed={"fifo": 212.0}, noise=(0.0, 0.02, -0.01, 0.01)).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_d2moe_is_not_tested_at_more_bits_than_it_is_compared_with():
    assert judged(spent=3.05).verdict == NOT_TESTABLE
    assert judged(spent=3.015).verdict == REPRODUCED


@pytest.mark.parametrize("mean", study.WIDTHS)
def test_bits_at_random_have_their_mean(mean):
    widths = study.WIDTHS[mean]
    drawn = RandomBits(widths, mean, torch.Generator().manual_seed(0))
    share = drawn(torch.zeros(5000, 3), torch.zeros(5000, 2))
    assert float(drawn.shares @ torch.tensor(widths, dtype=torch.float64)) == pytest.approx(mean, abs=1e-6)
    assert torch.equal(share.sum(-1), torch.ones(5000, 2))
    assert float((share @ torch.tensor(widths).float()).mean()) == pytest.approx(mean, abs=0.06)
    logs = drawn.shares.log()  # of all with this mean the one with the most entropy: straight in the bits
    slopes = [(logs[i + 1] - logs[i]) / (widths[i + 1] - widths[i]) for i in range(2)]
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), abs=1e-6)


def test_what_is_simulated_was_held_to_real_runs():
    """Four configurations or more, none a part of the calibration; the median error is what the file says."""
    record = measured.read(METHOD)
    assert len(record.rows) >= 4 and len({row["configuration"] for row in record.rows}) == len(record.rows)
    assert record.median_error == statistics.median(record.errors) <= 0.15
    assert calibrated().basis == record.label
    assert record.label.startswith("simulated, calibrated by ") and record.date in record.label
    assert sorted(calibrated().sizes) == [*range(2, 9)]


@pytest.mark.study
def test_d2moe_the_smoke_preset_has_equal_models_and_serves_them(smoke):
    rows = smoke("d2moe").rows
    plain = [row for row in rows if not row.arm.startswith("d2moe")]
    assert len({(row.params, row.active_params) for row in plain}) == 1
    assert all((row.steps > 0) == row.arm.startswith("d2moe") for row in rows)
    assert rows.of("int8", "bits") == [8.0] and rows.of("uniform@3", "bits") == [3.0]
    for arm, bits in (("d2moe@3", 3), ("d2moe@4", 4)):
        (row,) = rows.arm(arm)
        assert row.extra["bits_calibrated"] <= bits + 1e-9
        for share in SETTINGS["budgets"]:
            for policy in POLICIES["d2moe"]:
                assert row.extra[f"tokens_per_second {policy}@{share:g}"] > 0
                assert 0 <= row.extra[f"bubbles {policy}@{share:g}"] < 1
