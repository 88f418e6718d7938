"""The study of MoSA: equal passes for all that is compared, and a rule that says what it says."""

import json

import pytest

from workbench.beds import shifted_digits as bed
from workbench.studies.adapters.mosa import (
    ARMS,
    CLAIMED,
    DROP,
    FEW,
    FOUR,
    FULL,
    KINDS,
    MARGIN,
    TWICE,
    TWO,
    WHOLE,
    judge,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import Swept
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)


def judged(seeds=4, **best):
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            score = best.get(arm, 0.9) + NOISE[(seed + i) % 4]
            swept = Swept((0.008, 0.08, 0.8), (0.2, score, 0.2), (0.2, score, 0.2))
            extra = {"trained": 7, "union_validation": [0.3, 0.2, 0.1], "union_test": [0.25, 0.9, 0.9]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, swept.metric, swept.extra() | extra | {"alone": [0.0, 0.5, 0.0]}))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("best", "verdict", "effect"),
    [
        ({f"{TWO}, {FEW}": 0.95}, REPRODUCED, 0.05),
        ({f"{FOUR}, {FULL}": 0.95, f"{TWO}, {FEW}": 0.5}, REPRODUCED, 0.05),
        (dict.fromkeys(CLAIMED, 0.85), NOT_REPRODUCED, -0.05),
        (dict.fromkeys(CLAIMED, 0.9), NOT_REPRODUCED, 0.0),
        (dict.fromkeys(CLAIMED, 0.85) | {f"{TWICE}, {FEW}": 0.8}, REPRODUCED, 0.05),
    ],
)
def test_one_gain_is_enough_and_none_of_the_size_that_counts_is_a_failure(best, verdict, effect):
    result = judged(**best)
    assert result.verdict == verdict and result.effect == pytest.approx(effect, abs=0.004)
    json.dumps(result.details)


def test_a_gain_that_may_be_there_is_not_resolved():
    assert judged(**{f"{TWO}, {FULL}": 0.9 + MARGIN / 8}, seeds=3).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_union_and_single_experts_are_read_where_they_belong():
    found = judged().details
    assert set(found["union"]) == {arm for arm in ARMS if "mosa" in arm}
    assert set(found["union"].values()) == {0.25}  # at the rate that is best for the union on validation
    assert set(found["alone"].values()) == {0.5}  # at the rate that is best for the merged one


def test_all_that_is_compared_has_as_many_passes():
    passes = {kind: how["passes"] * how["times"] for kind, how in KINDS.items()}
    assert passes.pop(WHOLE) == 1 and set(passes.values()) == {2}
    assert KINDS[DROP]["experts"] == KINDS[TWICE]["experts"] == 1
    assert set(CLAIMED) | set(CLAIMED.values()) < set(ARMS)


@pytest.mark.study
def test_rows_hold_what_was_swept_and_cost_the_same(smoke):
    result = smoke("mosa")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    flops = {row.arm: row.flops for row in result.rows}
    assert len({flops[arm] for arm in ARMS if arm != f"{WHOLE}, {FEW}"}) == 1
    for row in result.rows:
        assert row.metric == row.extra["test"][row.extra["rates"].index(row.extra["best_rate"])]
        assert all(len(row.extra.get(key, "12")) == 2 for key in ("alone", "union_test", "union_validation"))
    sizes = {row.arm: row.extra["trained"] for row in result.rows}
    whole = sizes[f"{WHOLE}, {FEW}"]
    assert {sizes[f"{kind}, {FEW}"] - whole for kind in (TWICE, DROP)} == {0}
    assert sizes[f"{FOUR}, {FEW}"] - whole == 3 * bed.WIDTH * bed.BLOCKS  # biases of its own for every expert
