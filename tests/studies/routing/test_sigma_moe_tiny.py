"""The study of Sigma-MoE-Tiny: it runs, says what its arms cost, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.python_text import python_text
from workbench.lib.core.moe import moe_layers
from workbench.studies.routing.sigma_moe_tiny import PRESETS, ROUTERS, budget, build, held_out, judge, loads
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
SETTINGS = {"low": (4, 2), "arms": tuple(ROUTERS)}
SMOKE = PRESETS["smoke"]


def rows(seeds=3, noise=NOISE, **changes) -> Rows:
    """Rows in which all parts hold, but for what `changes` says."""
    lower = {
        "lbl": 5.0,
        "progressive": 3.0,
        "top1-lbl": 1.0,
        "loss-free": 20.0,
        "lbl-equal-flops": 5.0,
        "lbl-weak": 6.0,
    }
    bits = dict.fromkeys(ROUTERS, 2.5)
    lower |= changes.get("lower", {})
    bits |= changes.get("bits", {})
    made = []
    for arm in ROUTERS:
        for seed in range(seeds):
            change = noise[seed] * (2 if arm == "progressive" else 1)
            extra = {
                "bits_per_byte": bits[arm] + NOISE[seed],
                "max_vio": [lower[arm] + change, lower[arm] + change, 2.0, 2.0],
                "balance_loss": [changes.get("balance_loss", 1.1)] * 2 + [3.0] * 2,
                "tv_load": [changes.get("tv_load", 0.6) + change] * 2 + [0.0] * 2,
                "tv_probability": [0.2] * 4,
                "active_params_at_start": 8,
            }
            made.append(Row(arm, seed, 9, 7, 1, 1, extra["max_vio"][0], extra))
    return Rows(made)


def test_reproduced_if_all_parts_hold():
    result = judge(rows(), SETTINGS)
    assert result.verdict == REPRODUCED
    assert set(result.details["parts"].values()) == {"holds"}
    assert result.effect == pytest.approx(-2.0, abs=0.02) and result.ci[0] < result.effect < result.ci[1] < 0
    assert result.details["tv_load_over_tv_probability"] == pytest.approx(3, abs=0.02)  # of the lower layers only
    assert result.details["active_params_start_end"]["progressive"] == [8, 7]
    json.dumps(result.details)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"tv_load": 0.3}, "a: load far from uniform while P is near it"),
        ({"balance_loss": 1.4}, "a: load far from uniform while P is near it"),
        ({"lower": {"progressive": 5.5}}, "b: the schedule lowers MaxVio"),
        ({"bits": {"progressive": 2.6}}, "b: at equal quality"),
        ({"lower": {"loss-free": 0.5}}, "c: top-1 loss the most balanced"),
    ],
)
def test_not_reproduced_if_one_part_fails(changes, part):
    result = judge(rows(**changes), SETTINGS)
    assert result.verdict == NOT_REPRODUCED
    assert [name for name, found in result.details["parts"].items() if found == "fails"] == [part]


def test_not_resolved_if_the_seeds_do_not_show_the_repair():
    result = judge(rows(lower={"progressive": 4.9}, noise=(0.0, 1.0, -0.9)), SETTINGS)
    assert result.details["parts"]["b: the schedule lowers MaxVio"] == "open"
    assert result.verdict == NOT_RESOLVED


def test_one_seed_resolves_nothing():
    assert judge(rows(seeds=1), SETTINGS).verdict == NOT_RESOLVED
    assert judge(rows(seeds=1, lower={"progressive": 9.0}), SETTINGS).verdict == NOT_RESOLVED


def test_the_arm_at_equal_flops_trains_as_long_as_the_schedule_costs():
    task = python_text(SMOKE)
    torch.manual_seed(0)
    model = build("lbl", SMOKE)
    plans = {arm: budget(arm, model, task, SMOKE) for arm in ("lbl", "progressive", "lbl-equal-flops")}
    constant, progressive, equal = plans.values()
    assert (constant[1], progressive[1]) == (SMOKE["steps"],) * 2 and equal[1] > SMOKE["steps"]
    assert constant[2] < progressive[2]
    assert abs(equal[2] - progressive[2]) <= constant[2] / SMOKE["steps"] / 2  # up to half a step
    assert equal[0].switches == constant[0].switches == () and progressive[0].switches == (14,)
    assert int(sum(layer.router.window.counts.sum() for layer in moe_layers(model).values())) == 0


def test_loads_are_measured_in_eval_mode_and_leave_no_trace():
    task = python_text(SMOKE)
    torch.manual_seed(0)
    model = build("loss-free", SMOKE).train()
    metrics, meter = held_out(model, task, "test", 1)
    load, probability = loads(meter), torch.stack([meter.importance(layer) for layer in meter.layers])
    tokens = len(next(task.batches("test", 64))) * SMOKE["seq_len"]
    assert load.shape == (SMOKE["n_layers"], SMOKE["n_experts"]) and load.sum(-1).tolist() == [tokens] * 4
    assert torch.allclose(probability.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-5)
    assert metrics["bits_per_byte"] > 0 and model.training
    for layer in moe_layers(model).values():
        assert not layer._observers and layer.capacity_factor is None
        assert int(layer.router.bias.load.sum()) == 0  # held-out tokens do not move the bias


def test_arms_of_one_seed_start_from_the_same_weights():
    states = {}
    for arm in ROUTERS:
        torch.manual_seed(0)
        states[arm] = build(arm, SMOKE).state_dict()
    for state in states.values():
        assert all(torch.equal(value, state[name]) for name, value in states["lbl"].items())


def test_no_arm_renormalises_its_weights():
    for arm in ROUTERS:
        assert all(layer.router.renormalize is False for layer in moe_layers(build(arm, SMOKE)).values())


@pytest.mark.study
def test_a_run_says_what_it_cost(smoke):
    rows = smoke("sigma-moe-tiny").rows
    first, lbl = rows.arm("progressive")[0], rows.arm("lbl")[0]
    assert first.extra["active_params_at_start"] > first.active_params
    assert first.extra["switch_step"] == 14 and first.extra["curve"]["step"] == [5, 10, 15, 20]
    assert len(first.extra["max_vio"]) == SMOKE["n_layers"]
    assert first.metric == pytest.approx(sum(first.extra["max_vio"][:2]) / 2, abs=1e-5)
    assert all(1 <= value <= SMOKE["n_experts"] for value in first.extra["top1_loss"])
    assert lbl.flops < first.flops and lbl.active_params == first.active_params
    assert lbl.extra["switch_step"] is None and lbl.metric != first.metric
    assert smoke("sigma-moe-tiny").verdict == NOT_RESOLVED
