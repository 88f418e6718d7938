"""The study of Z-code M3: arms of one start and as many tokens, and a rule that says what it says."""

import json

import pytest
import torch

from workbench.lib.core.capacity import Capacity
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.train import attended
from workbench.studies.distributed import z_code_m3
from workbench.studies.distributed.z_code_m3 import GROWN, MARGIN, PARTS, POLICIES, PRESETS, build, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
#: Bits of models of which all three claims are true.
BITS = {"position": 3.1, "probability": 3.05, "random": 3.0, "aggregated": 2.9}
PRUNED = {"whole": 2.95, "utilised": 2.96, "chance": 3.0}


def judged(bits=None, pruned=None, spread=0.002, seeds=6):
    generator, rows = torch.Generator().manual_seed(0), []
    for arm, value in (BITS | (bits or {})).items():
        for seed in range(seeds):
            draw = lambda: spread * float(torch.randn((), generator=generator))  # noqa: E731
            extra = {"served_by_position": [0.5] * PARTS, "bits_by_position": [value] * PARTS}
            if arm == "random":
                found = {name: v + draw() for name, v in (PRUNED | (pruned or {})).items()}
                extra |= found | {f"{name}_before": v + 0.1 for name, v in found.items()}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + draw(), extra))
    return judge(Rows(sorted(rows, key=lambda row: row.seed)), {})


def test_reproduced_if_all_three_hold():
    result = judged()
    assert result.verdict == REPRODUCED, result.reason
    assert result.effect == pytest.approx(-0.1, abs=0.005)
    assert result.details["pruned"]["whole_before"] == pytest.approx(3.05, abs=0.01)
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": {"random": 3.2, "aggregated": 3.1}},
        {"bits": {"aggregated": 3.1}},
        {"pruned": {"utilised": PRUNED["whole"] + 2 * MARGIN}},
    ],
)
def test_not_reproduced_if_one_is_shown_to_be_false(change: dict):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"spread": 0.3},
        {"pruned": {"utilised": PRUNED["whole"] + MARGIN / 2}, "spread": 0.05},
        {"pruned": {"utilised": 2.96, "chance": 2.955}},  # chance would have done as well
    ],
)
def test_not_resolved_in_between(change: dict):
    assert judged(**change).verdict == NOT_RESOLVED


def test_arms_differ_in_who_is_served_alone():
    made = {}
    for arm in POLICIES:
        torch.manual_seed(0)
        made[arm] = build(arm, SMOKE, SMOKE["n_experts"])
    first = made["position"].state_dict()
    for arm, model in made.items():
        assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
        (layer,) = moe_layers(model).values()
        factor = SMOKE["n_experts"] if arm == "unlimited" else 0.5
        assert layer.capacity == Capacity(factor, POLICIES[arm], evaluation=max(2.0, factor))


@pytest.mark.parametrize("arm", POLICIES)
def test_every_arm_sees_as_many_rows_and_the_grown_ones_end_with_as_many_experts(arm: str):
    trained = []

    class Count:
        def __init__(self, state):
            trained.append((state.config.steps, state.task.shard, moe_layers(state.model)["blocks.1.ffn"].n_experts))

        def __enter__(self):
            return ()

        def __exit__(self, *_):
            return None

    with attended(Count):
        row = run(arm, 0, SMOKE)
    tuned = [SMOKE["tuning"]] * 3 if arm == "random" else []
    steps = [n for n, _, _ in trained]
    assert sum(steps) - sum(tuned) == SMOKE["steps"] == row.steps
    half, whole, full = SMOKE["n_experts"] // 2, SMOKE["n_experts"], (0, 1)
    expected = {
        "aggregated": [(2, full, half), (2, (0, 2), half), (2, (1, 2), half), (2, full, whole)],
        "unrelated": [(3, (0, 2), half), (3, (1, 2), half), (2, full, whole)],
        "random": [(8, full, whole), (2, full, whole), (2, full, half), (2, full, half)],
    }
    assert trained == expected.get(arm, [(8, full, whole)])
    assert len(row.extra["served_by_position"]) == len(row.extra["bits_by_position"]) == PARTS
    served = row.extra["served_by_position"]
    if arm == "position":
        assert served[0] > 0.9 and served[-1] < 0.2
    elif arm == "unlimited":
        assert served == [1.0] * PARTS
    else:
        assert max(served) - min(served) < 0.3
    assert ("whole" in row.extra) == (arm == "random") and set(GROWN) <= set(POLICIES)


def test_pruned_models_are_tuned_on_what_they_were_and_the_model_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Utilisation is of validation text: no training row is asked for it."""
    asked = []
    original = z_code_m3.Translation.batch

    def batch(self, split, *rest, **options):
        asked.append(split)
        return original(self, split, *rest, **options)

    torch.manual_seed(0)
    model, task = build("random", SMOKE, SMOKE["n_experts"]), z_code_m3.task_of(SMOKE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(z_code_m3.Translation, "batch", batch)
    found = z_code_m3.pruned(model, task, SMOKE, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert asked.count("train") == 3 * SMOKE["tuning"] and asked[:8] == ["validation"] * 8
    assert found["whole_before"] == z_code_m3.bits(model, task, SMOKE)
