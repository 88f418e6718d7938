"""The study of DCN-V2: what its crosses are, what its arms weigh, and its rule on rows made by hand."""

import json

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.studies.features.dcn_v2 import ARMS, PRESETS, click_model, crosses, judge, network
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

PAIRS = {"full": -6.0, "low-rank": -3.0, "mix": -3.0, "v1": -0.2, "mlp": -2.0}
TRIPLES = {"full": -1.5, "low-rank": -0.5, "mix": -0.5, "v1": -0.1, "mlp": -1.0}
AUC = dict.fromkeys(ARMS, 0.84)


def judged(pairs=None, triples=None, auc=None, spread=1.0, seeds=8):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for arm in ARMS:
        for seed in range(seeds):
            a, b, c = torch.randn(3, generator=draw).tolist()
            extra = {
                "pairs": (PAIRS | (pairs or {}))[arm] + 0.1 * spread * a,
                "triples": (TRIPLES | (triples or {}))[arm] + 0.1 * spread * b,
                "auc": (AUC | (auc or {}))[arm] + 0.002 * spread * c,
                "log_loss": 0.4,
                "params": {"pairs": 1, "triples": 1, "ratings": 1},
            }
            rows.append(Row(arm, seed, 1, 1, 1, 1, extra["pairs"], extra))
    return judge(Rows(rows), {})


def test_reproduced_if_crosses_take_fewer_parameters_and_the_mixture_costs_nothing():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(4.0, abs=0.2)
    json.dumps(result.details)


@pytest.mark.parametrize("change", [{"pairs": {"full": -1.0}}, {"triples": {"full": -0.5}}, {"auc": {"mix": 0.82}}])
def test_not_reproduced_if_one_part_is_the_other_way(change):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_not_resolved_in_between():
    assert judged({"full": -2.0}, spread=3).verdict == NOT_RESOLVED
    assert judged(auc={"mix": 0.83}).verdict == NOT_RESOLVED


def test_a_target_is_the_sum_of_its_products():
    task = crosses("triples", 3, 64)
    x, y = task._split("train")[0]
    again, _ = crosses("triples", 3, 64)._split("train")[0]
    other, _ = crosses("triples", 4, 64)._split("train")[0]
    assert x.shape == (64, 20) and float(x.abs().max()) <= 1 and y.shape == (64, 1)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert float(y.std()) > 0.1 and task._split("test")[0][0].shape == (16, 20)


def test_what_the_arms_weigh():
    assert [count_params(network(arm, "pairs")) for arm in ("full", "mlp")] == [441, 71_425]
    assert count_params(network("full", "triples")) == 861
    sizes = {arm: click_model(arm, (9,) * 8, PRESETS["small"]) for arm in ARMS}
    beside = {arm: count_params(model) - count_params(model.embedding) for arm, model in sizes.items()}
    assert beside["mlp"] == pytest.approx(beside["full"], rel=0.02) and beside["mix"] < 0.5 * beside["full"]
