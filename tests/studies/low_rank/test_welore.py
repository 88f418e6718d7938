"""The study of WeLore: what its arms cut and tune, and the rule on rows made by hand."""

import json

import pytest
import torch

from workbench.beds import byte_model as bed
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear, factorise
from workbench.lib.low_rank.welore import spectra
from workbench.studies.low_rank.welore import (
    ALL,
    CUTS,
    ENERGY,
    LRC,
    NLRC,
    PRESETS,
    REDUCTIONS,
    TARGETS,
    UNIFORM,
    WELORE,
    cheapest,
    judge,
    trained,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import Swept
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)
CUT = (2.9, 3.0, 3.2, 3.6)


def judged(less=(-0.1, -0.1, -0.1, -0.1), lrc=0.3, every=0.3, share=0.4, seeds=4):
    """Rows in which WeLore's ranks differ from uniform ones by `less`, and tuning gains `lrc` and `every`."""
    rows = []
    for seed in range(seeds):
        for i, (arm, by) in enumerate({UNIFORM: (0,) * 4, ENERGY: (0,) * 4, WELORE: less}.items()):
            cut = [at + d + NOISE[(seed + i) % 4] for at, d in zip(CUT, by, strict=True)]
            extra = {"cut": cut, "params": [4, 3, 2, 1], "ranks": [1], "whole": 2.8}
            rows.append(Row(arm, seed, 3, 3, 0, 0, cut[1], extra))
        for i, (arm, gain, numbers) in enumerate(((LRC, lrc, share), (NLRC, 0.1, 0.6), (ALL, every, 1.0))):
            score = 3.0 - gain + NOISE[(seed + i) % 4] / 10
            swept = Swept((0.001, 0.01, 0.1), (4.0, score, 4.0), (4.0, score, 4.0), lower_is_better=True)
            extra = swept.extra() | {"before": 3.0, "trained": int(1000 * numbers)}
            rows.append(Row(arm, seed, 1, 1, 1, 1, swept.metric, extra))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, REPRODUCED),
        ({"less": (0.0, -0.1, -0.1, 0.0)}, REPRODUCED),
        ({"less": (0.0, -0.1, 0.0, 0.0)}, NOT_RESOLVED),
        ({"less": (0.0, 0.0, 0.0, 0.0)}, NOT_REPRODUCED),  # less than the margin
        ({"less": (0.1, -0.1, -0.1, 0.1)}, NOT_REPRODUCED),
        ({"lrc": 0.26}, NOT_REPRODUCED),
        ({"lrc": 0.27}, NOT_RESOLVED),
        ({"lrc": 0.4}, REPRODUCED),
        ({"share": 0.6}, NOT_REPRODUCED),
    ],
)
def test_ranks_must_lose_less_twice_and_few_numbers_must_gain_nearly_all(given, verdict):
    result = judged(**given)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(given.get("less", (-0.1,) * 4)[1], abs=0.003)
    json.dumps(result.details)


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.fixture(scope="module")
def model():
    return lambda: trained(0, PRESETS["smoke"])


def test_all_arms_keep_the_same_sum_of_ranks_of_every_linear_layer_of_the_blocks(model):
    found = spectra(model(), TARGETS)
    assert len(found) == 6 * PRESETS["smoke"]["layers"]
    total = sum(map(len, found.values()))
    for reduction in REDUCTIONS:
        sums = {arm: sum(ranks(found, reduction).values()) for arm, ranks in CUTS.items()}
        assert set(sums.values()) == {int((1 - reduction) * total + 1e-9)}, sums


def test_a_layer_that_factors_make_larger_is_counted_as_dense(model):
    made = model()
    dense, x = count_params(made), torch.arange(20).view(1, 20)
    name = "blocks.0.attention.out"  # 32 x 32: a rank of 20 takes 1280 numbers, of 10 640
    factorise(made, {name: 20, "blocks.1.attention.out": 10}, TARGETS)
    y = made(x)
    assert count_params(cheapest(made)) == dense - 1024 + 640
    assert not isinstance(made.get_submodule(name), LowRankLinear)
    torch.testing.assert_close(made(x), y)


def test_query_key_and_value_apart_are_the_same_function(model):
    settings, x = PRESETS["smoke"], torch.arange(20).view(1, 20)
    one = bed.base({key: settings[key] for key in bed.SMALL}, 0)
    torch.testing.assert_close(model()(x), one(x))
    assert count_params(model()) == count_params(one)


@pytest.mark.study
def test_rows_say_what_was_cut_and_swept(smoke):
    result = smoke("welore")
    bits = bed.make_task(PRESETS["smoke"]).evaluate(trained(0, PRESETS["smoke"]), "test")["bits_per_byte"]
    for row in result.rows:
        if row.arm in CUTS:
            assert row.metric == row.extra["cut"][1] and row.extra["params"] == sorted(row.extra["params"])[::-1]
            assert row.seed or row.extra["whole"] == bits
        else:
            assert row.metric == row.extra["test"][row.extra["rates"].index(row.extra["best_rate"])]
    parts = {row.arm: row.extra["trained"] for row in result.rows if row.seed == 0 and "trained" in row.extra}
    assert parts[ALL] == parts[LRC] + parts[NLRC] and min(parts.values()) > 0
