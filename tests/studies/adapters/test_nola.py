"""The study of NOLA: arms train what their names say, and the rule says what it says."""

import json

import pytest

from workbench.beds import shifted_digits as bed
from workbench.lib.core.adapt import adapt
from workbench.studies.adapters.nola import ARMS, HALF, LORA, QUARTER, WHOLE, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import Swept
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)


def judged(seeds=4, half=0.9, whole=0.95):
    best, rows = {HALF: half, WHOLE: whole}, []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            score = best.get(arm, 0.9) + NOISE[(seed + i) % 4]
            swept = Swept((0.001, 0.01, 0.1), (0.2, score, 0.2), (0.2, score, 0.2))
            rows.append(Row(arm, seed, 1, 1, 1, 1, swept.metric, swept.extra() | {"trained": 7}))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("half", "whole", "verdict"),
    [
        (0.9, 0.95, REPRODUCED),
        (0.95, 0.95, REPRODUCED),
        (0.88, 0.95, NOT_REPRODUCED),
        (0.9, 0.88, NOT_REPRODUCED),
        (0.89, 0.95, NOT_RESOLVED),
        (0.9, 0.9, NOT_RESOLVED),
    ],
)
def test_half_may_lose_a_little_and_as_many_must_win(half, whole, verdict):
    result = judged(half=half, whole=whole)
    assert result.verdict == verdict and result.effect == pytest.approx(half - 0.9, abs=0.002)
    json.dumps(result.details)


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_arms_train_what_their_names_say():
    sizes = {
        arm: adapt(bed.ResidualMLP(), slug, bed.TARGETS, **o).report()["trained"] for arm, (slug, o) in ARMS.items()
    }
    assert [sizes[arm] for arm in (LORA, WHOLE, HALF, QUARTER)] == [2304, 2304, 1152, 576]


@pytest.mark.study
def test_rows_hold_what_was_swept(smoke):
    result = smoke("nola")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    for row in result.rows:
        assert row.metric == row.extra["test"][row.extra["rates"].index(row.extra["best_rate"])]
