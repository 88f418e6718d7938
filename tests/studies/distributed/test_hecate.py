"""The study of Hecate: its rows, and its rule on rows made by hand."""

import json
import math

import pytest
import torch

from workbench.studies.distributed.hecate import POWERS, PRESETS, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

#: Logarithms of times, arm by arm, at the powers 0, 1, 2, 4.
LOGS = {"hecate": (1, 1, 1, 1), "remat": (1, 1, 1, 1), "ep": (1, 1.2, 1.4, 1.8), "relayout": (1, 1.1, 1.2, 1.4)}
LOGS |= {"fsdp": (2, 2, 2, 2)}


def judged(spread: float = 0.01, **changes):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for arm, logs in (LOGS | changes).items():
        for seed in range(8):
            noise = torch.randn(len(logs), generator=draw).mul(spread).tolist()
            times = {f"{p:g}": math.exp(a + b) for p, a, b in zip(POWERS, logs, noise, strict=True)}
            extra = {"times": times, "stragglers": times, "copied": times}
            rows.append(Row(arm, seed, 1, 1, 0, 1, times["1"], extra))
    return judge(Rows(rows), {})


def test_reproduced_if_faster_than_all_and_the_more_the_more_skewed():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx((0.2 + 0.4 + 0.8) / 3, abs=0.02)
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"fsdp": (2, 2, 2, 0.9)},
        {"relayout": (1, 0.9, 1.2, 1.4)},
        {"ep": (1, 1.4, 1.4, 1.2)},
        {"ep": (0.9, 1.2, 1.4, 1.8)},
    ],
)
def test_not_reproduced_if_one_is_faster_the_gain_falls_or_even_loads_cost(change):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_not_resolved_in_between():
    assert judged(spread=1.0).verdict == NOT_RESOLVED


def test_a_row_has_every_power_and_shares_that_sum_to_one():
    row = run("hecate", 0, PRESETS["smoke"])
    powers = [f"{power:g}" for power in POWERS]
    assert [*row.extra["times"]] == powers and min(row.extra["times"].values()) > 0
    assert all(sum(parts.values()) == pytest.approx(1) for parts in row.extra["parts"].values())
    assert row.extra["stragglers"]["0"] >= 1 and row.extra["copied"]["4"] >= 0
    assert run("hecate", 0, PRESETS["smoke"]) == row
    ep = run("ep", 0, PRESETS["smoke"])
    assert ep.extra["copied"] == dict.fromkeys(powers, 0.0)
    assert [*ep.extra["stragglers"].values()] == sorted(ep.extra["stragglers"].values())
