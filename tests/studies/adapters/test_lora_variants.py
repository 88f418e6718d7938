"""The study of LoRA's variants: the arms are as large as they say, and its rule says what it says."""

import json

import pytest

from workbench.beds import shifted_digits as bed
from workbench.lib.core.adapt import adapt
from workbench.studies.adapters.lora_variants import ARMS, FACTORS, VARIANTS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import Swept
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.004, 0.002)


def judged(seeds=4, worst=0.2, **best):
    best = {name.replace("_", " "): value for name, value in best.items()}
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            score = best.get(arm, 0.9) + NOISE[(seed + i) % 4]
            swept = Swept((0.001, 0.01, 0.1), (worst, score, worst), (worst, score, worst))
            rows.append(Row(arm, seed, 1, 1, 1, 1, swept.metric, swept.extra() | {"trained": 7}))
    return judge(Rows(rows), {})


def test_it_reproduces_if_the_rate_outweighs_every_other_factor_and_no_variant_wins():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.7 - 3 * 0.008, abs=0.01)
    assert set(result.details["ranges"]) == {"rate", *FACTORS}
    json.dumps(result.details)
    assert judged(vera=0.5).verdict == REPRODUCED  # which trains much less, and is reported
    assert judged(**{"lora+": 0.95}).verdict == REPRODUCED  # the one that may win


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "lora+"])
def test_it_does_not_reproduce_if_a_variant_wins(variant):
    assert judged(**{variant: 0.95}).verdict == NOT_REPRODUCED


def test_it_does_not_reproduce_if_another_factor_is_near_the_rate_and_resolves_nothing_with_one_seed():
    assert judged(worst=0.7, **{"lora,_rank_2": 0.75}).verdict == NOT_REPRODUCED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_a_best_rate_at_an_end_of_the_sweep_is_said():
    swept = Swept((0.1, 1.0, 10.0), (0.9, 0.1, 0.1), (0.9, 0.1, 0.1))
    rows = [Row(arm, s, 1, 1, 1, 1, 0.9, swept.extra() | {"trained": 7}) for arm in ARMS for s in (0, 1)]
    assert "The best rate is at an end of the sweep for lora (2 of 2 seeds)" in judge(Rows(rows), {}).reason


def test_methods_that_are_compared_train_about_as_much():
    sizes = {}
    for arm in ("lora", *VARIANTS, "vera"):
        options = {key: value for key, value in ARMS[arm].items() if key != "batch"}
        sizes[arm] = adapt(bed.ResidualMLP(), "lora-variants", bed.TARGETS, **options).report()["trained"]
    assert sizes["lora"] == 12 * 8 * 192 and sizes["dora"] == sizes["lora"] + 6 * 192
    assert all(abs(sizes[arm] / sizes["lora"] - 1) < 0.07 for arm in VARIANTS)
    assert sizes["vera"] == 6 * 192 + 12 * 64


@pytest.mark.study
def test_rows_hold_what_was_swept(smoke):
    result = smoke("lora-variants")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    for row in result.rows:
        assert row.metric == row.extra["test"][row.extra["rates"].index(row.extra["best_rate"])]
