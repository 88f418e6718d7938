"""The study of equifinality: it runs, its budgets match, and its rule says what it says."""

import json
from dataclasses import replace

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.studies.routing.equifinality import ACTIVE, COSINE, PRESETS, STUDY, build, judge, run
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMALL = {"seeds": 3}
NOISE = (0.0, 0.02, -0.01)


def rows(**changes) -> Rows:
    """Rows in which all parts hold, but for what `changes` says: perplexities by arm, cosine, saved, cost."""
    level = {"H1": 6.0, "H2": 6.01, "alpha": 6.02, "hash": 6.3, "linear": 5.9} | {
        name: value for name, value in changes.items() if name not in ("cosine", "saved", "cost", "noise")
    }
    hops = {
        "cosine": changes.get("cosine", 0.8),
        "halting": [
            {"target": 0.1, "threshold": 0.1, "saved": 0.0, "cost": 0.0},
            {"target": 0.25, "threshold": 0.2, "saved": changes.get("saved", 0.24), "cost": changes.get("cost", 0.001)},
        ],
    }
    noise = changes.get("noise", {})
    made = []
    for arm, perplexity in level.items():
        for seed in range(3):
            value = perplexity + NOISE[seed] + noise.get(arm, (0, 0, 0))[seed]
            made.append(Row(arm, seed, 1, 1, 1, 1, value, dict(hops) if arm == "H2" else {}))
    return Rows(made)


def test_reproduced_if_all_parts_hold():
    result = judge(rows(), SMALL)
    assert result.verdict == REPRODUCED
    assert set(result.details["parts"].values()) == {"holds"}
    assert result.details["margin"] == pytest.approx(0.03 * (6 + 0.01 / 3))
    assert result.effect == pytest.approx(-0.01) and result.ci[0] <= result.effect <= result.ci[1]
    assert result.details["linear_minus_H1"] == pytest.approx(-0.1)
    json.dumps(result.details)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"H2": 6.25, "alpha": 6.25}, "equivalence"),
        ({"hash": 5.7}, "controls"),
        ({"hash": 7.0}, "controls"),
        ({"cosine": 0.4}, "collinear"),
        ({"alpha": 6.3}, "scalar"),
        ({"saved": 0.19}, "halting"),
        ({"cost": 0.005}, "halting"),
    ],
)
def test_not_reproduced_if_one_part_is_contradicted(changes, part):
    result = judge(rows(**changes), SMALL)
    assert result.verdict == NOT_REPRODUCED
    assert result.details["parts"][part] == "contradicted"


@pytest.mark.parametrize(
    ("noise", "part"),
    [
        ({"H2": (0.4, -0.4, 0.0), "alpha": (0.4, -0.4, 0.0)}, "equivalence"),
        ({"alpha": (0.4, -0.4, 0.0)}, "scalar"),
        ({"hash": (0.5, -0.5, 0.0)}, "controls"),
    ],
)
def test_an_inconclusive_part_is_not_resolved(noise, part):
    """Means within the margin and no significant difference are no equivalence."""
    result = judge(rows(noise=noise), SMALL)
    assert result.verdict == NOT_RESOLVED
    assert result.details["parts"][part] == "open"


def test_a_loss_within_the_spread_of_the_topologies_is_open():
    assert judge(rows(H2=6.1, hash=6.12), SMALL).details["parts"]["controls"] == "open"


def test_collinearity_that_varies_between_seeds_is_open():
    made = rows()
    for row, cosine in zip(made.arm("H2"), (0.3, 0.6, 0.9), strict=True):
        row.extra["cosine"] = cosine
    result = judge(made, SMALL)
    assert result.details["parts"]["collinear"] == "open" and result.verdict == NOT_RESOLVED


def test_one_seed_resolves_nothing():
    assert judge(Rows(row for row in rows() if row.seed == 0), SMALL).verdict == NOT_RESOLVED


def test_every_pair_of_topologies_counts():
    many = rows(H3=6.0, H4=6.02, decoupled=6.01, random_fixed=6.25, iso_cosine=5.933)
    result = judge(many, SMALL)
    assert result.verdict == REPRODUCED and len(result.details["pairs"]) == 10
    assert result.details["gap_closed_by_iso_cosine"] == pytest.approx(0.67, abs=0.01)
    wide = Rows(replace(row, metric=6.3) if row.arm == "H4" else row for row in many)
    assert judge(wide, SMALL).verdict == NOT_REPRODUCED


def test_all_arms_have_the_active_parameters_of_h1_but_top1():
    settings = PRESETS["small"]
    for arm in PRESETS["full"]["arms"]:
        model = build(arm, settings)
        for block in model.blocks:
            active = sum(hop.router.top_k for hop in block.ffn.hops)
            assert active == (1 if arm == "top1" else ACTIVE)
            assert count_params(block.ffn.hops[0].experts) == 2 * settings["n_experts"] * settings["d_model"]


def test_router_parameters_of_the_iso_arm_match_the_linear_router():
    settings = PRESETS["full"]
    params = {arm: count_params(build(arm, settings).blocks[0].ffn.hops[0].router) for arm in ("linear", "iso_cosine")}
    assert abs(params["linear"] - params["iso_cosine"]) <= (settings["d_model"] + settings["n_experts"]) / 2 + 1


def test_topologies_of_one_seed_start_from_the_same_weights():
    weights = {}
    for arm in ("H1", "H3", "alpha", "hash", "linear"):
        torch.manual_seed(0)
        model = build(arm, PRESETS["small"])
        weights[arm] = [p for name, p in model.named_parameters() if "ffn.hops" not in name and "alpha" not in name]
        weights[arm] += [block.ffn.hops[0].experts.u for block in model.blocks]
    for arm in weights:
        assert all(torch.equal(a, b) for a, b in zip(weights["H1"], weights[arm], strict=True))


def test_full_runs_everything_the_paper_compares():
    assert set(PRESETS["full"]["arms"]) == {
        *COSINE, "alpha", "hash", "random_fixed", "top1", "linear", "iso_cosine"
    }  # fmt: skip
    assert set(COSINE) == {"H1", "H2", "H3", "H4", "decoupled"}


@pytest.mark.study
def test_every_arm_of_the_full_preset_runs(smoke):
    settings = PRESETS["smoke"] | {"arms": PRESETS["full"]["arms"]}
    ran = smoke("equifinality").rows
    judge(Rows(ran.arm(arm)[0] if arm in ran.arms else run(arm, 0, settings) for arm in settings["arms"]), settings)


@pytest.mark.study
def test_a_hop_is_measured_and_costs_no_parameters(smoke):
    rows = smoke("equifinality").rows
    assert rows.arm("H2")[0].active_params == rows.arm("H1")[0].active_params
    hop = rows.arm("H2")[0].extra
    assert -1 <= hop["cosine"] <= 1 and sum(hop["cosine_histogram"]) == 2 * 2 * 64 * 16
    with pytest.raises(InputError, match="preset 'smal' is unknown"):
        STUDY.execute("smal")
