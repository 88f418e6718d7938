"""The study of UniPool: its budgets match, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.python_text import python_text
from workbench.lib.core.budget import count_params
from workbench.lib.core.moe import moe_layers
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sharing.unipool import ARMS, BASELINES, MARGIN, PRESETS, build, judge, run
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

BITS = {"vanilla": 2.5, "vanilla-norm": 2.49, "tied": 2.51, "unipool": 2.47, "unipool-2/3": 2.505}
SMOKE = PRESETS["smoke"]


def judged(bits=None, spread=0.001, seeds=6):
    noise = torch.randn(len(BITS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[i][seed], extra(arm))
        for i, (arm, value) in enumerate((BITS | (bits or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {})


def extra(arm: str) -> dict:
    own = {"jaccard": 0.3, "dead": 0} if ARMS[arm][2] != "layer" else {}
    return {"expert_params": 100, "randomised": [0.1, 0.2]} | own


def test_reproduced_if_the_pool_is_better_and_the_smaller_one_no_worse():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.03, abs=0.003) and result.ci[1] < 0
    assert result.details["unipool_minus_tied"]["mean"] == pytest.approx(-0.04, abs=0.003)
    json.dumps(result.details)


@pytest.mark.parametrize("bits", [{"unipool": 2.53}, {"unipool-2/3": 2.53}])
def test_not_reproduced_if_one_is_shown_to_be_worse(bits):
    assert judged(bits).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"spread": 0.05}, {"bits": {"unipool": 2.4995}}, {"bits": {"unipool-2/3": 2.514}}])
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_the_margin_is_a_hundredth_of_a_nat():
    assert pytest.approx(0.0144270, abs=1e-6) == MARGIN


def test_arms_compute_alike_and_have_the_experts_that_they_say():
    settings = PRESETS["small"]
    experts = settings["n_experts"] * settings["n_layers"]
    models = {}
    for arm in ARMS:
        torch.manual_seed(0)
        models[arm] = build(arm, settings)
        banks = {id(layer.experts): layer.experts for layer in moe_layers(models[arm]).values()}
        share = ARMS[arm][2]
        assert sum(bank.n_experts for bank in banks.values()) == (
            experts if share == "layer" else round(share * experts)
        )
        assert len(banks) == (settings["n_layers"] if share == "layer" else 1)
        assert torch.equal(models[arm].blocks[3].attention.qkv.weight, models["vanilla"].blocks[3].attention.qkv.weight)
    sizes = {arm: count_params(model) for arm, model in models.items()}
    assert sizes["unipool"] == sizes["tied"] + settings["n_layers"]  # the scales
    assert sizes["unipool-2/3"] < 0.8 * sizes["vanilla"]
    task = python_text(SMOKE)
    costs = {arm: training_budget(build(arm, SMOKE), task, 4) for arm in BASELINES}
    routers = 6 * 4 * 16 * 16 * (6 - 3) * 2  # a row of the router for each expert, forward and backward
    assert costs["tied"].flops - costs["vanilla"].flops == routers


def test_a_row_says_how_the_pool_was_used():
    row = run("unipool", 0, SMOKE)
    traffic = torch.tensor(row.extra["traffic"])
    assert traffic.shape == (2, 6) and (traffic.sum(1) == traffic.sum(1)[0]).all()
    assert len(row.extra["randomised"]) == 2 and any(row.extra["randomised"])
    assert len(row.extra["gamma"]) == 8 and len(row.extra["gamma"][0]) == 2
    assert row.extra["expert_params"] == 6 * 3 * 16 * 16
    assert {"jaccard", "dead", "coverage", "union", "entropy_bits"} <= row.extra.keys()
    assert "jaccard" not in run("vanilla", 0, SMOKE).extra
