"""The study of RMoE: it runs, its budgets match, and its rule says what it says."""

import json

import pytest
import torch
from torch import nn

from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.studies.routing.rmoe import PRESETS, build, expert_similarity, judge, pair_counts, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
BITS = {"mlp": 2.5, "linear": 2.51, "gru": 2.48, "gru-detach": 2.49, "gru-shuffle": 2.505}
INFORMATION = {"mlp": 0.3, "linear": 0.2, "gru": 0.6, "gru-detach": 0.5, "gru-shuffle": 0.2}


def judged(bits=None, information=None, noise=None, seeds=3):
    bits, information = BITS | (bits or {}), INFORMATION | (information or {})
    noise = noise or {}
    rows = Rows(
        Row(
            arm,
            seed,
            1,
            1,
            1,
            1,
            value + NOISE[seed] + noise.get(arm, NOISE)[seed] / 50,
            {"consecutive_information": information[arm] + NOISE[seed] / (2 if arm == "gru" else 1)},
        )
        for arm, value in bits.items()
        for seed in range(seeds)
    )
    return judge(rows, {"arms": list(bits)})


def test_reproduced_if_gain_memory_and_agreement_hold():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.02) and result.ci[1] < 0
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": {"gru": 2.505}},  # worse than the router of as many parameters, better than the linear one
        {"bits": {"linear": 2.45}},
        {"bits": {"gru-shuffle": 2.46}},  # the information is not what helps
        {"information": {"gru": 0.25}},
        {"information": {"gru": 0.1}},
    ],
)
def test_not_reproduced_if_one_interval_is_on_the_other_side(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "change",
    [
        {"noise": {"mlp": (3.0, -3.0, 0.0)}},
        {"noise": {"gru-shuffle": (3.0, -3.0, 0.0)}},
        {"bits": {"gru": 2.5}},
        {"information": {"mlp": 0.6}},
    ],
)
def test_not_resolved_if_an_interval_includes_zero(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_equivalence_with_the_matched_router_is_said():
    assert "gru and mlp are shown to be equivalent within 0.01" in judged(bits={"gru": 2.5005}).reason
    assert "gru and mlp are not shown to be equivalent" in judged().reason


@pytest.mark.parametrize("preset", ["small", "full"])
def test_router_parameters_match_and_experts_are_equal(preset):
    settings, params = PRESETS[preset], {}
    for arm in settings["arms"]:
        model = build(arm, settings)
        params[arm] = count_params(nn.ModuleList(block.ffn.router for block in model.blocks))
        assert all(block.ffn.router.top_k == settings["top_k"] for block in model.blocks)
    width = settings["d_model"] + settings["n_experts"]
    assert params["gru"] == params["gru-detach"] == params["gru-shuffle"]
    assert abs(params["mlp"] - params["gru"]) <= settings["n_layers"] * width / 2
    assert params["linear"] == settings["n_layers"] * settings["d_model"] * settings["n_experts"]


def test_arms_of_one_seed_start_from_the_same_weights():
    states = {}
    for arm in PRESETS["small"]["arms"]:
        torch.manual_seed(0)
        states[arm] = build(arm, PRESETS["small"]).state_dict()
    for arm, state in states.items():
        common = [name for name in state if "router" not in name or arm.startswith("gru")]
        assert all(torch.equal(state[name], states["gru"][name]) for name in common)


def test_pair_counts_are_those_of_a_loop():
    experts = torch.randint(3, (2, 50), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            for i, j in zip(experts[a], experts[b], strict=True):
                counts[a, b, i, j] += 1
    assert torch.equal(pair_counts(experts, 3), counts)


def test_similarity_is_the_mean_cosine_of_different_experts():
    bank = GLUExperts(3, 4, 4)
    flat = torch.cat([bank.gate_up.flatten(1), bank.down.flatten(1)], 1)
    cosines = [torch.cosine_similarity(flat[i], flat[j], dim=0).item() for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert expert_similarity(bank) == pytest.approx(sum(cosines) / 3, abs=1e-6)
    with torch.no_grad():
        for weight in bank.parameters():
            weight[:] = weight[0].clone()
    assert expert_similarity(bank) == pytest.approx(1, abs=1e-5)


@pytest.mark.study
def test_a_run_shows_its_state_and_its_curve(smoke):
    row = smoke("rmoe").rows.arm("gru-shuffle")[0]
    flow = torch.tensor(row.extra["state_flow"])
    assert flow.shape == (3, 3) and not flow.triu(1).any()
    assert row.extra["curve"][-1][0] == PRESETS["smoke"]["steps"]


@pytest.mark.study
def test_every_arm_of_the_full_preset_runs(smoke):
    settings = PRESETS["smoke"] | {"arms": PRESETS["full"]["arms"]}
    ran = smoke("rmoe").rows
    judge(Rows(ran.arm(arm)[0] if arm in ran.arms else run(arm, 0, settings) for arm in settings["arms"]), settings)
