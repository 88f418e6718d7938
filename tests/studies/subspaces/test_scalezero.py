"""The study of ScaleZero: matched parts, what is measured where, tasks that end, and its rule on rows made by hand."""

import json

import pytest
import torch

from workbench.beds.control_tasks import TASKS, ControlTasks
from workbench.lib.core.budget import count_params
from workbench.lib.core.train import TrainConfig
from workbench.lib.subspaces.scalezero import StagedLoRALinear
from workbench.studies.rows import Row, Rows
from workbench.studies.subspaces.scalezero import (
    ARMS,
    COMPONENTS,
    DENSE,
    DPS,
    FULL,
    MARGIN,
    PRESETS,
    RANDOM,
    SELECTED,
    STOP,
    build,
    component,
    conflict,
    groups_of,
    judge,
    optimizer_of,
    task_entropy,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
ROW = {
    DENSE: {"metric": 0.6, "layer_conflict": 0.4, "samples": 50.0, "test_loss": 0.1},
    FULL: {"metric": 0.4, "layer_conflict": 0.2, "samples": 50.0, "test_loss": 0.1},
    RANDOM: {"metric": 0.5, "layer_conflict": 0.2, "samples": 50.0, "test_loss": 0.1},
    SELECTED: {"metric": 0.5, "layer_conflict": 0.2, "samples": 50.0, "test_loss": 0.1},
    STOP: {"metric": 0.4, "layer_conflict": 0.2, "samples": 40.0, "test_loss": 0.15},
    DPS: {"metric": 0.4, "layer_conflict": 0.2, "samples": 30.0, "test_loss": 0.15},
}


def judgement(change=None, noise=None, seeds=3):
    rows = []
    for i, arm in enumerate(ARMS):
        values = ROW[arm] | (change or {}).get(arm, {})
        for seed in range(seeds):
            own = {name: value + NOISE[seed] * (i + 1) / 12 for name, value in values.items()}
            for name, added in (noise or {}).get(arm, {}).items():
                own[name] += added[seed]
            extra = {name: own[name] for name in ("layer_conflict", "samples", "test_loss")}
            parts = {name: [0.3, 0.4] if name != "router" else [None, None] for name in COMPONENTS}
            extra |= {"conflict": parts, "solved": 6, "line": [{"why": "time"}]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, own["metric"], extra))
    return judge(Rows(rows), PRESETS["smoke"])


def test_reproduced_if_conflict_falls_the_gate_matters_and_stages_save():
    result = judgement()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(-0.2, abs=0.01)
    assert "router" not in result.details["conflict"][FULL] and result.details["stages"] == {"solved": 0, "time": 1}
    json.dumps(result.details, allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        {FULL: {"metric": 0.7}},
        {FULL: {"layer_conflict": 0.5}},
        {RANDOM: {"metric": 0.3}},  # the gate that learns does not beat the one that does not
        {DPS: {"samples": 45.0}},  # stopping alone saves more
        {DPS: {"test_loss": 0.15 + 2 * MARGIN}},
    ],
)
def test_not_reproduced_if_one_of_them_is_the_other_way_round(change):
    assert judgement(change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm, what", [(DENSE, "metric"), (DENSE, "layer_conflict"), (RANDOM, "metric"),
                                       (STOP, "samples"), (STOP, "test_loss")])  # fmt: skip
def test_not_resolved_if_an_interval_includes_zero(arm, what):
    wide = (40.0, -40.0, 10.0) if what == "samples" else (0.5, -0.5, 0.1)
    assert judgement(noise={arm: {what: wide}}).verdict == NOT_RESOLVED
    assert judgement(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_dense_part_has_as_many_active_parameters(preset):
    settings = PRESETS[preset]
    dense, mixed = (build(arm, settings).transformer.blocks[0].ffn for arm in (DENSE, FULL))
    active = count_params(mixed.experts[0]) + count_params(mixed.shared)
    assert count_params(dense) == pytest.approx(active, rel=0.01)


def test_arms_differ_in_what_they_say():
    torch.manual_seed(0)
    random = build(RANDOM, PRESETS["smoke"]).transformer.blocks[0].ffn
    assert not random.router.projection.weight.requires_grad
    assert build(SELECTED, PRESETS["smoke"]).transformer.blocks[0].ffn.router.gate_norm == "selected"
    model = build(DPS, PRESETS["smoke"])
    staged = [name for name, module in model.named_modules() if isinstance(module, StagedLoRALinear)]
    assert len(staged) == 2 * (2 + 8 * 2) and not any("router" in name or "shared" in name for name in staged)


def test_conflict_is_measured_at_every_component_and_heads_are_nowhere():
    settings = PRESETS["smoke"]
    model, task = build(FULL, settings), ControlTasks(0, settings["rows"])
    groups = groups_of(model)
    assert {component(group) for group in groups} == set(COMPONENTS)
    measured = {id(member) for group in groups.values() for member in group}
    assert id(model.heads.weight) not in measured
    model.train()
    found = conflict(model, task, 8, 0)
    assert model.training and all(-1 <= worst <= 1 and 0 <= rate <= 1 for worst, rate in found.values())
    assert found == conflict(model, task, 8, 0)
    assert all(p.grad is None for p in model.parameters())
    assert "router" not in conflict(build(SELECTED, settings), task, 8, 0)  # no gradient is no cosine of 0


def test_the_optimizer_has_adapters_from_the_beginning_and_no_fixed_gate():
    for arm in (DPS, RANDOM):
        model = build(arm, PRESETS["smoke"])
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        held = {id(p) for group in optimizer_of(model, TrainConfig(1)).param_groups for p in group["params"]}
        assert before == {name: p.requires_grad for name, p in model.named_parameters()}
        left = [name for name, p in model.named_parameters() if id(p) not in held]
        assert left == ([] if arm == DPS else [f"transformer.blocks.{i}.ffn.router.projection.weight" for i in (0, 1)])


def test_the_entropy_of_a_task_is_that_of_its_experts():
    task = torch.arange(6).repeat_interleave(8)
    spread = torch.where(task == 0, torch.arange(48) % 8, 3)
    assert task_entropy([[(spread, task)]], 8) == pytest.approx([1.0, 0, 0, 0, 0, 0])


@pytest.mark.study
def test_rows_say_what_was_solved_and_which_stages_began(smoke):
    rows = {row.arm: row for row in smoke("scalezero").rows if row.seed == 0}
    assert [event["stage"] for event in rows[DPS].extra["line"]] == [1, 2]
    assert rows[FULL].extra["line"] == [] and len(rows[FULL].extra["losses"]) == 3
    assert rows[STOP].extra["samples"] <= rows[FULL].extra["samples"] == 6 * 12 * 16
    assert len(rows[FULL].extra["losses"][0]) == len(TASKS)
    assert rows[SELECTED].extra["conflict"]["router"] == [None, None]
