"""The study of several outputs: a rule about what can be used without the label, and the oracle beside it."""

import json

import pytest

from workbench.lib.core.budget import count_params
from workbench.studies.imaging.multi_output_deblur import ARMS, HEADS, judge, network
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.004, 0.002)


def judged(single: float, overall: float, noise: float = 1.0):
    """All arms at 30 dB, but those of which the best is penalised: what one output gains, and the best."""
    rows = []
    for i, arm in enumerate(ARMS):
        ours = arm.startswith("winner")
        for seed in range(4):
            value = 30 + single * ours + noise * NOISE[(seed + i) % 4]
            best = 30 + overall * ours + noise * NOISE[(seed + i) % 4]
            rows.append(
                Row(arm, seed, 1, 1, 1, 1, value, {"best_overall": best, "worst": 1.0, "usage": [1.0], "spoiled": 29.0})
            )
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("single", "overall", "noise", "verdict"),
    [
        (0.05, 0.15, 1.0, REPRODUCED),
        (0.02, 0.15, 1.0, NOT_REPRODUCED),  # less than the least of the paper
        (-0.05, 0.15, 1.0, NOT_REPRODUCED),
        (0.06, -0.05, 1.0, NOT_REPRODUCED),
        (0.05, 0.15, 20.0, NOT_RESOLVED),
        (0.06, 0.0, 1.0, NOT_RESOLVED),
    ],
)
def test_the_rule_asks_what_one_output_gains(single, overall, noise, verdict):
    result = judged(single, overall, noise)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(single, abs=0.002 * noise)
    json.dumps(result.details)


def test_outputs_cost_what_the_last_convolution_costs():
    params = {kind: count_params(network(kind, 8)) for kind in ("single", "wide", "winner", "plain", "all")}
    assert params["wide"] == params["winner"] == params["plain"] == params["all"]
    assert params["winner"] - params["single"] == (HEADS - 1) * (9 * 8 + 1)


def test_smoke(smoke):
    result = smoke("multi-output-deblur")
    for row in result.rows:
        assert row.extra["worst"] <= row.metric <= row.extra["best_overall"] + 1e-9, row
        assert sum(row.extra["usage"]) == pytest.approx(1)
    of = {row.arm: len(row.extra["usage"]) for row in result.rows}
    assert of["single-0"] == of["wide-0"] == 1 and of["winner-3"] == 10 and of["plain-3"] == of["independent-3"] == 4
