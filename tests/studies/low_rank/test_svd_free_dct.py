"""The study of optimisers without an SVD: arms have the optimisers they name, and the rule says what it says."""

import json

import pytest
import torch

from workbench.lib.core.optim import Svd
from workbench.studies.low_rank import svd_free_dct as study
from workbench.studies.low_rank.svd_free_dct import ADAMW, ARMS, DCT, FED, GALORE, MUON, RANDOM, TRION, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = study.PRESETS["smoke"]
NOISE = (0.0, 0.002, -0.002, 0.001)


def judged(dct=3.0, galore=3.0, random=3.1, seeds=4):
    means, rows = {DCT: dct, GALORE: galore, RANDOM: random}, []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            extra = {"kept": [0.5, 0.6], "state_bytes": 8}
            rows.append(Row(arm, seed, 1, 1, 1, 1, means.get(arm, 3.0) + NOISE[(seed + i) % 4], extra))
    return judge(Rows(rows), SMOKE)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, REPRODUCED),
        ({"dct": 3.01}, REPRODUCED),
        ({"dct": 2.5}, REPRODUCED),
        ({"dct": 3.04}, NOT_REPRODUCED),
        ({"random": 2.9}, NOT_REPRODUCED),
        ({"dct": 3.02}, NOT_RESOLVED),
        ({"random": 3.0}, NOT_RESOLVED),
    ],
)
def test_it_may_lose_a_little_and_must_beat_what_is_not_chosen(values, verdict):
    result = judged(**values)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(values.get("dct", 3.0) - values.get("galore", 3.0), abs=0.002)
    json.dumps(result.details)


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_arms_have_the_optimisers_they_name():
    torch.manual_seed(0)
    model, width, rank = study.build(SMOKE), SMOKE["d_model"], SMOKE["rank"]
    made = {arm: study.make_optimizer(arm, model, SMOKE, 0.01) for arm in ARMS}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in made.values():
        for group in optimizer.param_groups:  # alike in all arms
            found = {names[id(p)] for p in group["params"]}
            assert group["matrix"] == all("blocks" in name and "norm" not in name for name in found), found
            assert group["lr_scale"] == (1.0 if group["matrix"] else SMOKE["lr"] / 0.01)
            assert group["weight_decay"] == (SMOKE["weight_decay"] if group["matrix"] or found == {"position"} else 0.0)
    options = {arm: optimizer.param_groups[0] for arm, optimizer in made.items()}
    assert type(made[ADAMW]) is torch.optim.AdamW
    assert isinstance(made[GALORE].projector(options[GALORE]), Svd) and options[GALORE]["update_gap"] == 3
    assert options[RANDOM] | {"projector": "svd", "params": 0} == options[GALORE] | {"params": 0}
    assert options[DCT]["update_gap"] == 1 and not options[DCT]["error_feedback"] and options[FED]["ef_bits"] == 8
    assert [options[arm]["rank"] for arm in (GALORE, DCT, TRION, MUON)] == [rank, rank, rank, width]


def test_shares_are_those_of_the_gradient(monkeypatch):
    monkeypatch.setattr(study, "PRESETS", {})
    seen = study.Kept(3)
    state = study.trained(GALORE, 0, SMOKE, 0.003, seen)  # looks at 0, 3, 6, when a subspace has just been chosen
    assert seen.steps == [0, 3, 6] and seen.kept == pytest.approx(seen.best, abs=1e-5)
    other = study.Kept(2)
    study.trained(GALORE, 0, SMOKE, 0.003, other)
    assert other.steps == [0, 2, 4, 6]
    assert all(kept <= best + 1e-6 for kept, best in zip(other.kept, other.best, strict=True))
    assert other.kept[1] < other.best[1]
    shapes = [p.shape for group in state.optimizer.param_groups if group["matrix"] for p in group["params"]]
    n, m, r = (torch.tensor([f(shape) for shape in shapes]) for f in (max, min, lambda _: SMOKE["rank"]))
    assert study.matrix_state_bytes(state.optimizer) == 4 * int((2 * n * r + m * r).sum())


@pytest.mark.study
def test_rows_of_the_smoke_preset(smoke):
    result = smoke("svd-free-dct")
    assert [row.arm for row in result.rows if row.seed == 0] == list(ARMS)
    size = {row.arm: row.extra["state_bytes"] for row in result.rows}
    assert size[DCT] < size[GALORE] == size[RANDOM] < size[ADAMW] and size[DCT] < size[FED]
