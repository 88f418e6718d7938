"""The study of WideNet: its parameters match, and its rule says what it says."""

import json

import pytest
import torch

from workbench.lib import data
from workbench.lib.core.budget import count_params
from workbench.lib.core.task import Classification
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sharing.widenet import ARMS, PRESETS, SMALL_ARMS, build, judge, off_diagonal, run
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

ACCURACY = {"widenet": 0.6, "tied-norms": 0.55, "routers": 0.6, "albert": 0.5, "vit-moe": 0.7}
AGREEMENT = {"widenet": 0.1, "tied-norms": 0.3, "routers": 0.05}
SMOKE, SMALL = PRESETS["smoke"], PRESETS["small"]


def judged(accuracy=None, agreement=None, spread=0.01, seeds=6):
    noise = torch.randn(2, len(ACCURACY), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    agrees = AGREEMENT | (agreement or {})
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + noise[0][i][seed], extra(arm, agrees, noise[1][i][seed]))
        for i, (arm, value) in enumerate((ACCURACY | (accuracy or {})).items())
        for seed in range(seeds)
    )
    return judge(rows, {})


def extra(arm: str, agrees: dict[str, float], noise: float) -> dict:
    own = {"above_chance": agrees[arm] + noise} if arm in agrees else {}
    return own | ({} if arm == "albert" else {"dropped": 0.1})


def test_reproduced_if_experts_and_norms_help_and_routers_choose_anew():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=0.02) and result.ci[0] > 0
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change", [{"accuracy": {"albert": 0.7}}, {"accuracy": {"tied-norms": 0.7}}, {"agreement": {"tied-norms": 0.0}}]
)
def test_not_reproduced_if_one_of_the_three_is_the_other_way(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"spread": 0.3}, {"accuracy": {"tied-norms": 0.6}}])
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


@pytest.mark.parametrize("preset", PRESETS)
def test_the_arms_of_the_verdict_have_the_same_parameters_to_a_few_percent(preset: str):
    task, settings = Classification(data.load("mnist-1d")), PRESETS["small" if preset == "full" else preset]
    sizes = {arm: count_params(build(arm, task, settings)) for arm in ARMS}
    for arm in ("tied-norms", "routers", "albert"):
        assert sizes[arm] == pytest.approx(sizes["widenet"], rel=0.05)
    assert sizes["vit-moe"] > 2.5 * sizes["widenet"]
    if preset == "small":
        flops = {arm: training_budget(build(arm, task, settings), task, 8).flops for arm in SMALL_ARMS}
        assert flops["vit-moe"] == pytest.approx(flops["widenet"], rel=0.03)  # nothing is saved
        assert flops["albert"] > 1.4 * flops["widenet"]


def test_a_row_says_how_depths_agree():
    row = run("widenet", 0, SMOKE)
    agreement = torch.tensor(row.extra["agreement"])
    assert agreement.shape == (3, 3) and agreement.diagonal().eq(1).all() and torch.equal(agreement, agreement.T)
    assert sum(row.extra["distinct"]) == 10 * len(data.load("mnist-1d").splits["test"][0])
    assert 0 <= row.extra["dropped"] < 0.5
    assert "agreement" not in run("albert", 0, SMOKE).extra
    assert off_diagonal(torch.tensor([[9.0, 1, 2], [3, 9, 4], [5, 6, 9]])) == 3.5
