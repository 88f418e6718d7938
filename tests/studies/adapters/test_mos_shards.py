"""The study of MoS: arms of a budget train the same, and the rule says what it says."""

import json

import pytest

from workbench.beds import shifted_digits as bed
from workbench.lib.core.adapt import adapt
from workbench.studies.adapters.mos_shards import ARMS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import Swept
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)
WINS = {"mos, 1": 0.95, "mos, 2": 0.95, "pure, 1": 0.8, "pure, 2": 0.8}


def judged(seeds=4, **best):
    best, rows = WINS | {name.replace("_", ", "): value for name, value in best.items()}, []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            score = best.get(arm, 0.9) + NOISE[(seed + i) % 4]
            swept = Swept((0.001, 0.01, 0.1), (0.2, score, 0.2), (0.2, score, 0.2))
            rows.append(Row(arm, seed, 1, 1, 1, 1, swept.metric, swept.extra() | {"trained": 7}))
    return judge(Rows(rows), {})


def test_it_reproduces_if_mos_wins_at_both_budgets_and_pure_sharing_hurts():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.05, abs=0.003)
    json.dumps(result.details)


@pytest.mark.parametrize("arm", ["mos_1", "mos_2"])
def test_each_budget_counts(arm):
    assert judged(**{arm: 0.85}).verdict == NOT_REPRODUCED
    assert judged(**{arm: 0.9}).verdict == NOT_RESOLVED


def test_pure_sharing_must_hurt():
    assert judged(pure_1=0.95, pure_2=0.95).verdict == NOT_REPRODUCED
    assert judged(pure_1=0.9, pure_2=0.9).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_arms_of_a_budget_train_the_same():
    for arm, (slug, options) in ARMS.items():
        assert adapt(bed.ResidualMLP(), slug, bed.TARGETS, **options).report()["trained"] == 2304 * int(arm[-1]), arm


@pytest.mark.study
def test_rows_hold_what_was_swept(smoke):
    result = smoke("mos-shards")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    for row in result.rows:
        assert row.metric == row.extra["test"][row.extra["rates"].index(row.extra["best_rate"])]
