"""The study of MoA: its arms are equally dense, its base is trained once, and its rule says what it says."""

import json

import numpy as np
import pytest
import torch

from workbench.beds.pair_recall import decoder
from workbench.lib.attention import moa
from workbench.lib.attention.moa_plan import span_rules
from workbench.studies.attention import moa as study
from workbench.studies.attention.moa import PRESETS, arms, judge, plans_for
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
SETTINGS = {"densities": (0.25, 0.5)}
NOISE = (0.0, 0.01, -0.005)
RECALL = {"moa": 0.9, "uniform": 0.7, "random": 0.8, "static": 0.85}


def judged(seeds=3, correlation=0.8, noise=None, **changes):
    rows = []
    for arm in arms(SETTINGS):
        kind, low = arm.split("@")[0], arm.endswith("@0.25")
        for seed in range(seeds):
            value = RECALL.get(kind, 1.0) + (changes.get(kind, 0.0) if low else 0.0)
            value += NOISE[seed] * (2 if kind == "moa" else 1) + (noise or {}).get(kind, NOISE)[seed]
            extra = {"recall_unseen": value} | ({"correlation": correlation} if kind == "random" else {})
            rows.append(Row(arm, seed, 1, 1, 1, 1, value, extra))
    return judge(Rows(rows), SETTINGS)


def test_moa_reproduced_if_gain_chance_and_influence_hold():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.2, abs=0.01) and 0 < result.ci[0] < result.effect < result.ci[1]
    json.dumps(result.details)
    assert set(result.details["minus_moa"]) == {
        f"{k}@{r}" for k in ("uniform", "random", "static") for r in (0.25, 0.5)
    }


@pytest.mark.parametrize(
    "changes", [{"moa": -0.3}, {"random": 0.15}, {"random": 0.1}, {"correlation": 0.3}, {"correlation": -0.9}]
)
def test_moa_not_reproduced_if_a_part_is_shown_to_fail(changes):
    """Worse than uniform, worse than random plans, equal to random plans, or an influence that says nothing."""
    assert judged(**changes).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "changes",
    [
        {"correlation": 0.5},
        {"correlation": float("nan")},
        {"noise": {"random": (0.2, -0.2, 0.0)}},
        {"noise": {"uniform": (0.3, -0.3, 0.0)}},
    ],
)
def test_moa_not_resolved_if_a_part_is_open(changes):
    assert judged(**changes).verdict == NOT_RESOLVED


def test_moa_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_moa_the_higher_density_does_not_decide():
    assert "at density 0.25" in judged().reason


@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_moa_arms_are_equally_dense_at_every_length(preset):
    settings = PRESETS[preset]
    generator, block = torch.Generator().manual_seed(0), settings["block"]
    shape = (settings["n_layers"], settings["n_heads"])
    importance = {
        n: (torch.rand(*shape, 1, 1, generator=generator) * torch.ones(n // block, n // block)).tril()
        for n in settings["profiled"]
    }
    for rho in settings["densities"]:
        for kind in study.KINDS:
            plans, bounds = plans_for(kind, rho, importance, 0, settings)
            for plan in plans:
                for n in bounds:
                    assert 0.9 * rho - 1e-6 <= plan.density[n] <= rho + 1e-6
            if kind == "uniform":
                assert all(share == pytest.approx(rho) for share in plans[0].density.values())
            if kind == "random":
                assert len({plan.rules for plan in plans}) == study.RANDOM_PLANS + study.PLANS_TO_RANK
                assert all(len(set(layer)) <= 2 for plan in plans for layer in plan.rules)
            if kind == "static":
                assert all(rule.beta == 0 for layer in plans[0].rules for rule in layer)


def test_moa_random_plans_that_cannot_be_are_refused():
    rules = span_rules((32, 64), alpha_step=32, sink=8)
    importance = {32: torch.zeros(1, 1, 4, 4)}
    with pytest.raises(RuntimeError, match="random plans hold only"):
        study.random_plans(rules, importance, {32: 0.01}, 8, 1, 0)


def test_moa_accuracy_by_distance_counts_every_answer():
    distance, right = torch.tensor([1, 5, 31, 32, 60]), torch.tensor([True, False, True, True, False])
    table = study.by_distance(right, distance, 64, bins=2)
    assert table == [[16.0, 0.75, 4], [48.0, 0.0, 1]]


def test_moa_cache_bytes_are_those_of_the_formula():
    model = decoder(SMOKE)
    width, heads, layers = SMOKE["d_model"], SMOKE["n_heads"], SMOKE["n_layers"]
    dense = study.cache_bytes(model, 64)
    assert dense == layers * heads * 64 * (width // heads) * 2 * 4
    plan = moa.Plan.of([[moa.SpanRule(-8, 0.5, 8)] * heads] * layers, {64: torch.zeros(layers, heads, 8, 8)}, 8)
    assert study.cache_bytes(moa.use_spans(model, plan), 64) == dense // 2


@pytest.mark.study
def test_moa_the_smoke_preset_costs_every_arm_the_same(smoke):
    rows = smoke("moa").rows
    assert rows.arms == ["dense", "moa@0.5", "uniform@0.5", "random@0.5", "static@0.5"]
    dense = rows.arm("dense")[0]
    assert all((row.params, row.flops) == (dense.params, dense.flops) for row in rows)
    for arm in ("moa@0.5", "random@0.5"):
        assert np.shape(rows.arm(arm)[0].extra["spans"]["64"]) == (SMOKE["n_layers"], SMOKE["n_heads"])
