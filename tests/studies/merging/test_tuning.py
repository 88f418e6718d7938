"""What the studies of merging share: updates, the choice on validation, and what a row says of a merge."""

from statistics import fmean

import pytest
import torch

from workbench.beds import digit_experts as bed
from workbench.lib import data
from workbench.studies.merging import tuning
from workbench.studies.merging.tuning import POINTS, grid, judged_row, load, merged_row, spread, tuned, weak_experts
from workbench.studies.rows import Row, Rows

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def suite():
    data.get("mnist-5k")
    return load(bed.SMOKE, 0)


def test_grids_have_every_combination_and_the_points_asked_for():
    assert grid(ratio=(1, 2), lam=(3, 4)) == [
        {"ratio": 1, "lam": 3},
        {"ratio": 1, "lam": 4},
        {"ratio": 2, "lam": 3},
        {"ratio": 2, "lam": 4},
    ]
    values = spread(0.1, 0.6)
    assert len(values) == POINTS and values[0] == 0.1 and values[-1] == pytest.approx(0.6)


def test_an_expert_s_delta_makes_the_expert_and_none_makes_the_base(suite):
    for i, name in enumerate(bed.TASKS):
        expert, made = bed.expert(name, bed.SMOKE, 0).state_dict(), suite.model_of(suite.deltas[i]).state_dict()
        assert made.keys() == expert.keys()
        for key, value in made.items():
            torch.testing.assert_close(value, expert[key], rtol=0, atol=1e-6)
    zero = suite.model_of(torch.zeros_like(suite.start)).state_dict()
    assert all(torch.equal(zero[key], value) for key, value in suite.model.state_dict().items())
    assert suite.deltas.shape == (8, sum(v.numel() for k, v in zero.items() if not k.startswith("head.")))


def test_a_row_of_an_expert_keeps_all_of_its_own_task_and_of_the_base_what_the_base_has(suite):
    row = merged_row("x", 3, suite, suite.deltas[2])
    assert row.extra["by_task"][2] == pytest.approx(1, abs=0.01)
    assert row.metric == pytest.approx(sum(row.extra["by_task"]) / 8) and row.extra["worst"] == min(
        row.extra["by_task"]
    )
    base = judged_row("base", 3, suite, suite.model)
    assert base.metric == pytest.approx(base.extra["base_kept"]) and base.extra["recovered"] == pytest.approx(
        0, abs=1e-9
    )
    assert base.extra["accuracy"] == pytest.approx(base.extra["base_accuracy"])
    assert base.steps == base.flops == 0


def test_tuning_takes_the_best_on_validation_and_never_looks_at_test(suite, monkeypatch):
    seen = []
    evaluate = tuning.accuracies
    monkeypatch.setattr(
        tuning, "accuracies", lambda model, tasks, split: seen.append(split) or evaluate(model, tasks, split)
    )
    points = grid(lam=(8.0, 1 / 8, 0.0, 1 / 8))
    update, chosen = tuned(suite, lambda deltas, lam: lam * deltas.sum(0), points)
    assert seen == ["validation"] * 4
    scores = [fmean(suite.kept(suite.model_of(p["lam"] * suite.deltas.sum(0)), "validation")) for p in points]
    assert chosen == {"lam": points[scores.index(max(scores))]["lam"], "validation": max(scores)}
    assert torch.equal(update, chosen["lam"] * suite.deltas.sum(0))


def test_experts_are_weak_where_one_seed_has_a_weak_one():
    rows = [Row("a", seed, 1, 1, 1, 1, 0.5, {"weakest_expert": low}) for seed, low in enumerate((0.9, 0.86))]
    assert not weak_experts(Rows(rows))
    assert weak_experts(Rows([*rows, Row("a", 2, 1, 1, 1, 1, 0.5, {"weakest_expert": 0.84})]))
