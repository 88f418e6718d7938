"""The study of MoE-Lens: its rule says what it says, of real runs and of simulated ones, and neither alone suffices."""

import json
from dataclasses import replace

import pytest

from workbench.lib.core.simulation.validation import Validation
from workbench.studies.measured import read
from workbench.studies.rows import Row, Rows
from workbench.studies.serving.moe_lens import ARMS, METHOD, PRESETS, STUDY, facts, judged
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.01, -0.01, 0.005)
METRIC = {"moe-lens": 0.9, "headroom": 0.85, "separate": 0.6, "one-group": 0.7}


def rows(noise=NOISE, **metric) -> Rows:
    found = METRIC | {name.replace("_", "-"): value for name, value in metric.items()}
    sizes = len(PRESETS["smoke"]["memory_bytes"])
    extra = {"throughput": [1.0] * sizes, "stage1": [2.0] * sizes}
    return Rows(
        Row(arm, seed, 1, 1, 1, 1, value + (noise[seed] if arm == "separate" else NOISE[-1 - seed]), extra)
        for arm, value in found.items()
        for seed in range(4)
    )


def real(count=12, off=1.05, blind=1.3, hit=12, lead=2.0) -> Validation:
    measured = [
        {"configuration": f"c{i} full", "variant": "full", "predicted": off, "measured": 1.0, "without_memory": blind}
        | {"lead": lead, "bottleneck": "stream", "busiest": "stream" if i < hit else "device"}
        for i in range(count)
    ]
    slower = {**measured[0], "configuration": "c0 one group", "variant": "one group", "predicted": 0.7, "measured": 0.8}
    return Validation("moe-lens", {"cpu": "a test"}, "2026-01-01", {}, [*measured, slower], "tokens/s")


def verdict(record: Validation | None = None, **found) -> str:
    result = judged(rows(**found), PRESETS["smoke"], record or real())
    json.dumps(result.details)
    return result.verdict


def test_it_reproduces_if_predictions_hold_and_each_idea_helps():
    assert verdict() == REPRODUCED
    assert judged(rows(), PRESETS["smoke"], real()).effect == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    "record", [real(count=11), real(off=1.11), real(off=0.89), real(hit=10), real(blind=1.05), real(lead=1.0)]
)
def test_real_runs_that_are_not_as_predicted_refute_it_whatever_is_simulated(record):
    assert verdict(record) == NOT_REPRODUCED


@pytest.mark.parametrize("found", [{"separate": 0.95}, {"one_group": 0.95}, {"moe_lens": 0.75}])
def test_so_does_a_simulation_on_the_other_side(found):
    assert verdict(**found) == NOT_REPRODUCED


def test_what_is_neither_is_not_resolved():
    assert verdict(separate=0.88, noise=(0.1, -0.1, 0.1, -0.1)) == NOT_RESOLVED


def test_facts_are_of_the_full_system_and_speed_ups_of_the_same_setting():
    found = facts(real(hit=6))
    assert (found["configurations"], found["clear"], found["bottlenecks"]) == (12, 12, 0.5)
    assert found["accuracy"] == pytest.approx(0.95) and found["accuracy_without_memory"] == pytest.approx(0.7)
    assert {kind: pytest.approx([value]) for kind, value in (("predicted", 1.5), ("measured", 1.25))} == found[
        "speedups"
    ]["one group"]
    near = replace(real(), rows=[{**row, "lead": 1.05} for row in real().rows])
    assert (facts(near)["clear"], facts(near)["bottlenecks"]) == (0, 0.0)


def test_what_is_packaged_are_enough_real_runs_with_a_machine_and_a_date():
    record = read(METHOD)
    found = facts(record)
    assert record.system == "moe-lens" and found["configurations"] >= 12 and set(found["speedups"]) == {
        "separate", "one group"
    }  # fmt: skip
    assert record.machine["cpu"] and record.date > "2026" and set(record.calibration) >= {"products_in", "crowd"}


@pytest.mark.study
def test_the_study_simulates_below_its_bounds_and_trains_nothing(smoke):
    result = smoke("moe-lens")
    for row in result.rows:
        assert 0 < row.metric <= 1 + 1e-9
        for through, foreseen, bound in zip(*(row.extra[k] for k in ("throughput", "foreseen", "stage1")), strict=True):
            assert through <= bound * (1 + 1e-9)
            assert through == pytest.approx(foreseen, rel=0.05)
    assert {row.arm for row in result.rows} == set(ARMS)
    assert all(isinstance(STUDY.trainings(arm), str) for arm in ARMS)
    assert result.judgement.details["basis"] == "simulated, calibrated by a40-pcie4 (specified)"
