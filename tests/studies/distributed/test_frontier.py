"""The study of frontier: its rows, and its rule on rows made by hand."""

import json

import pytest
import torch

from workbench.studies.distributed.frontier import ARMS, PRESETS, PUBLISHED, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMALL = PRESETS["small"]
BEST = {"22B": 45.0, "175B": 41.0, "1T": 36.0}


def judged(spread: float = 0.1, best: dict | None = None, **changes: float):
    """By the mean that each arm reaches; best shares as given."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for arm, mean in ({"forest": 95, "tpe": 90, "random": 85, "grid": 85, "fitting": 93} | changes).items():
        for seed in range(12):
            noise = torch.randn(4, generator=draw).mul(spread).tolist()
            shares = {size: value + 0.1 * n for (size, value), n in zip((best or BEST).items(), noise, strict=False)}
            reached = {size: [0.0, mean + noise[3]] for size in PUBLISHED}
            extra = {"best": shares, "reached": reached, "failures": dict.fromkeys(PUBLISHED, 3)}
            rows.append(Row(arm, seed, 1, 1, 0, 1, mean + noise[3], extra))
    return judge(Rows(rows), SMALL)


def test_reproduced_if_shares_fall_as_published_and_a_forest_finds_more():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(10, abs=0.2)
    off = result.details["predicted_minus_published"]
    assert off["1T"]["mean"] == pytest.approx(38.38 * 36 / 45 - 31.96, abs=0.05)
    json.dumps(result.details)


@pytest.mark.parametrize("level", [0.5, 2.0])
def test_the_level_of_all_shares_decides_nothing(level: float):
    assert judged(spread=0.01, best={size: level * share for size, share in BEST.items()}).verdict == REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"best": BEST | {"175B": 46.0}},
        {"best": BEST | {"1T": 42.0}},
        {"best": BEST | {"1T": 20.0}},
        {"forest": 80},
    ],
)
def test_not_reproduced_if_shares_rise_or_fall_far_or_draws_find_more(change: dict):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_not_resolved_where_a_forest_finds_as_much_or_shares_stay():
    assert judged(spread=5.0, forest=85.5).verdict == NOT_RESOLVED
    assert judged(spread=3.0, best=BEST | {"175B": 45.0, "1T": 44.0}).verdict == NOT_RESOLVED


def test_a_row_says_what_was_reached_after_each_trial():
    found = {arm: run(arm, 0, PRESETS["smoke"]) for arm in ARMS}
    for row in found.values():
        (curve,) = row.extra["reached"].values()
        assert len(curve) == PRESETS["smoke"]["budget"] and curve == sorted(curve)
        assert 0 <= row.metric == curve[-1] <= 100 and row.extra["best"] == found["random"].extra["best"]
        assert 0 <= row.extra["failures"]["22B"] <= len(curve)
    assert found["fitting"].extra["failures"] == {"22B": 0} and found["fitting"].metric > 0
    assert found["forest"].extra["reached"]["22B"][:10] == found["random"].extra["reached"]["22B"][:10]
    assert run("forest", 0, PRESETS["smoke"]) == found["forest"]
