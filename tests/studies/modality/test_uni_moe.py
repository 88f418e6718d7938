"""The study of Uni-MoE: its arms see the same, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds.signal_questions import MODALITIES
from workbench.lib import data
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.train import attended
from workbench.studies.modality.uni_moe import (
    APART,
    ARMS,
    BALANCED,
    COPIES,
    DENSE,
    FIXED,
    MIXED,
    OURS,
    PRESETS,
    STUDY,
    ByRow,
    apart,
    build,
    judge,
    run,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
ACCURACY = {OURS: 0.75, COPIES: 0.7, BALANCED: 0.71, DENSE: 0.72, FIXED: 0.76}
INFORMATION = {OURS: 0.4, COPIES: 0.2, BALANCED: 0.1}


@pytest.fixture(scope="module", autouse=True)
def sets() -> None:
    for name in ("mnist-5k", "speech"):
        data.get(name)


def judged(accuracy=None, information=None, spread=0.004, seeds=6):
    noise = torch.randn(2, len(ARMS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()

    def row(i: int, arm: str, seed: int) -> Row:
        value = (ACCURACY | (accuracy or {}))[arm] + noise[0][i][seed]
        extra = {"by_modality": [value + 0.1, value, value - 0.1], "alone": [0.9, 0.8, 0.5] if arm == OURS else []}
        if arm in MIXED:
            extra["information"] = (INFORMATION | (information or {}))[arm] + noise[1][i][seed]
            extra["share"] = [[[0.25] * 4] * 3]
        return Row(arm, seed, 1, 1, 1, 1, value, extra)

    return judge(Rows(row(i, arm, seed) for seed in range(seeds) for i, arm in enumerate(ARMS)), {})


def test_reproduced_if_it_answers_more_and_its_routing_knows_more():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.05, abs=0.01) and result.ci[0] > 0
    assert result.details["gap"][COPIES] == pytest.approx(0.1 - -0.1, abs=0.02)  # -0.1, -0.1 and +0.1 beside alone
    assert result.details["minus"].keys() == {BALANCED, DENSE, FIXED}
    json.dumps(result.details)


@pytest.mark.parametrize("change", [{"accuracy": {OURS: 0.65}}, {"information": {OURS: 0.1}}])
def test_not_reproduced_if_one_of_the_two_is_shown_to_be_less(change):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"spread": 0.2}, {"accuracy": {OURS: 0.7005}}, {"information": {OURS: 0.2005}}])
def test_not_resolved_in_between(change):
    assert judged(**change).verdict == NOT_RESOLVED


def test_every_arm_takes_as_many_steps_and_sees_as_many_rows_of_each_modality():
    seen = {}

    class Count:
        def __enter__(self):
            return ()

        def __exit__(self, *_):
            return None

    for arm in ARMS:
        trained: list = []
        with attended(lambda state, trained=trained: trained.append((state.task.shares, state.config)) or Count()):
            row = run(arm, 0, SMOKE)
        rows = torch.zeros(3, dtype=torch.float64)
        for shares, config in trained:
            rows += config.steps * config.batch_size * shares / shares.sum()
        seen[arm] = row.steps, rows
        assert len(trained) == STUDY.trainings(arm)
    own = SMOKE["expert_steps"] * SMOKE["batch"]  # of the expert of each modality, which is trained unseen
    for arm in APART:
        seen[arm] = seen[arm][0], seen[arm][1] + own
    for steps, rows in seen.values():
        assert steps == 3 * (SMOKE["align_steps"] + SMOKE["expert_steps"]) + SMOKE["steps"]
        torch.testing.assert_close(rows, seen[OURS][1])


def test_arms_start_from_the_same_connectors_and_only_the_router_tells_them_apart():
    made = {arm: build(arm, 0, SMOKE)[0] for arm in ARMS}
    for arm in ARMS:
        layers = moe_layers(made[arm]).values()
        assert len(layers) == (0 if arm == DENSE else SMOKE["n_layers"])
        assert [type(layer.router) is ByRow for layer in layers] == [arm == FIXED] * len(layers)
        for name in ("queries", "norm.weight"):
            ours, theirs = (made[each].connectors["speech"].state_dict()[name] for each in (OURS, arm))
            assert torch.equal(ours, theirs)
    ours, copies, balanced = (next(iter(moe_layers(made[arm]).values())) for arm in (OURS, COPIES, BALANCED))
    assert torch.equal(ours.router.projection.weight, copies.router.projection.weight)
    assert copies.router.coefficients == {} and balanced.router.coefficients == {"lbl": 0.01}
    base = made[DENSE].lm.blocks[0].ffn.down.weight
    assert all(torch.equal(expert.down.weight, base) for expert in copies.experts)
    assert torch.equal(ours.experts[0].down.weight, base)
    for number, name in enumerate(MODALITIES, 1):
        expert = apart(name, 0, SMOKE)[0].blocks[0].down.weight
        assert torch.equal(ours.experts[number].down.weight, expert) and not torch.equal(expert, base)


def test_a_row_says_where_the_modalities_go():
    row = run(FIXED, 0, SMOKE)
    assert row.extra["share"] == [[[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]] * SMOKE["n_layers"]
    assert row.extra["information"] == pytest.approx(1)
    row = run(OURS, 0, SMOKE)
    share = torch.tensor(row.extra["share"])
    torch.testing.assert_close(share.sum(-1), torch.ones(SMOKE["n_layers"], 3))
    assert 0 <= row.extra["information"] <= 1 and len(row.extra["alone"]) == 3
    assert "information" not in run(DENSE, 0, SMOKE).extra
