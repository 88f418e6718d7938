"""The study of AsCAN: equal parameters, and a rule that weighs accuracy against measured time."""

import json

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.studies.rows import Row, Rows
from workbench.studies.search.ascan import PRESETS, SMALL_ARMS, build, judge, latency
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

ACCURACY = {"asymmetric": 0.9, "reversed": 0.8, "symmetric": 0.89, "blocks": 0.9, "convolutions": 0.85}
TIMES = {"asymmetric": 1.0, "reversed": 8.0, "symmetric": 5.0, "blocks": 1.1, "convolutions": 0.8}


def judged(accuracy=None, times=None, spread=0.005, seeds=8):
    noise = torch.randn(len(ACCURACY), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[i][seed], {"macs": 1})
        for i, (arm, value) in enumerate((ACCURACY | (accuracy or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {}, TIMES | (times or {}))


def test_reproduced_if_it_is_faster_and_hardly_less_accurate():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.01, abs=0.005)
    json.dumps(result.details)
    assert judged({"symmetric": 0.91}).verdict == REPRODUCED  # within the margin
    assert judged({"blocks": 0.99}).verdict == REPRODUCED  # it is slower


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": {"symmetric": 0.96}},
        {"accuracy": {"reversed": 0.96}},
        {"accuracy": {"convolutions": 0.95}},
        {"accuracy": {"blocks": 0.95}, "times": {"blocks": 1.0}},
        {"times": {"reversed": 0.9}},
        {"times": {"symmetric": 1.0}},
    ],
)
def test_not_reproduced_if_a_control_or_something_as_fast_is_better(change):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_not_resolved_in_between():
    assert judged(spread=0.2).verdict == NOT_RESOLVED
    assert judged({"symmetric": 0.93}).verdict == NOT_RESOLVED


def test_arms_have_the_same_parameters_to_five_percent():
    sizes = [count_params(build(arm, PRESETS["small"])) for arm in SMALL_ARMS]
    assert max(sizes) / min(sizes) < 1.1 and all(abs(size / 60_000 - 1) <= 0.05 for size in sizes)


def test_the_record_that_is_read_has_every_layout():
    times = latency()
    assert times.keys() >= set(SMALL_ARMS) and times["asymmetric"] == 1.0 and min(times.values()) > 0
