"""The study of PCB-Merging: its rule says what it says, its arms are the method without a part, and grids are alike."""

import json

import pytest
import torch

from workbench.lib.merging.pcb_merging import pcb_merge, pcb_scores
from workbench.studies.merging import pcb_merging as study
from workbench.studies.merging.pcb_merging import ARMS, FEWER, PARTS, RIVALS, SPARSE, SUMS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
KEPT = dict.fromkeys(ARMS, 0.6) | {"pcb": 0.7}


def judged(seeds=4, weakest=0.9, noise=None, **kept):
    noise, rows = noise or {}, []
    for i, (arm, value) in enumerate((KEPT | {name.replace("_", "-"): v for name, v in kept.items()}).items()):
        for seed in range(seeds):
            metric = value + NOISE[seed] + (noise[arm][seed] if arm in noise else 0.05 * i / len(KEPT) * NOISE[seed])
            extra = {"worst": metric, "weakest_expert": weakest, "chosen": {"lam": 1.0}, "survivors": [0.5, 0.5]}
            extra |= {"fewer": [[2, metric]], "curve": [[0.1, 1.0, metric]]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {})


def test_pcb_study_reproduces_if_it_beats_ties_and_task_arithmetic():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=1e-2) and result.ci[0] > 0
    assert result.details["curve"]["ties"] == [[0.1, 1.0, pytest.approx(0.6, abs=0.02)]]
    json.dumps(result.details)
    assert judged(dare=0.9, average=0.9, pcb_softmax=0.9).verdict == REPRODUCED  # of these the claim says nothing


@pytest.mark.parametrize("arm", RIVALS)
def test_pcb_study_does_not_reproduce_if_one_of_them_is_better(arm):
    assert judged(**{arm: 0.8}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", RIVALS)
def test_pcb_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.2, -0.2, 0.2, -0.2)}, **{arm: 0.7}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_pcb_study_says_nothing_of_weak_experts():
    assert judged(weakest=0.84).verdict == NOT_TESTABLE


def test_every_method_has_as_many_points_to_choose_from():
    assert len(study.points(1)) == len(SUMS) == 24 and set(PARTS) < set(SPARSE)
    assert {"ratio": 0.2, "lam": 1.0} in study.points(1)


def test_arms_without_a_part_are_the_method_but_for_it():
    stack = torch.randn(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, alike = study.graded(torch.mul)(stack), SPARSE["pcb-no-rescale"](stack)
    for ratio in (0.1, 0.4, 0.8):
        torch.testing.assert_close(whole(ratio), pcb_merge(stack, ratio))
        clipped, scale = pcb_scores(stack, ratio)
        alive = scale > 0
        torch.testing.assert_close(alike(ratio), (clipped * alive).sum(0) / alive.sum(0).clamp(min=1))
        counts = torch.tensor(study.survivors(stack, ratio))
        assert counts.sum() == pytest.approx(1) and counts @ torch.arange(5.0) == pytest.approx(4 * ratio, abs=0.02)
    for arm, inter in (("pcb-sum-tanh", "sum_tanh"), ("pcb-softmax", "paper_softmax")):
        torch.testing.assert_close(SPARSE[arm](stack)(0.3), pcb_merge(stack, 0.3, inter=inter))
    # by size alone each task keeps its largest, whatever the others do
    kept = SPARSE["pcb-no-inter"](stack)(0.1) != 0
    largest = stack.abs() > stack.abs().kthvalue(451, dim=1, keepdim=True).values
    assert torch.equal(kept, largest.any(0))
    made = {arm: prepare(stack)(0.4) for arm, prepare in SPARSE.items()}
    assert all(not torch.allclose(made[arm], made["pcb"]) for arm in made if arm != "pcb")


@pytest.mark.study
def test_pcb_study_has_what_its_figures_need(smoke):
    rows = {row.arm: row for row in smoke("pcb-merging").rows}
    assert set(rows) == set(ARMS)
    for arm, row in rows.items():
        assert len(row.extra["by_task"]) == 8 and row.steps == 0
        assert ("chosen" in row.extra) == (arm not in ("base", "average"))
        assert ("curve" in row.extra) == (arm not in ("base", "average", "task-arithmetic"))
        assert [n for n, _ in row.extra.get("fewer", [])] == (list(FEWER) if arm in (*RIVALS, "pcb") else [])
    pcb = rows["pcb"].extra
    assert len(pcb["survivors"]) == 9 and sum(pcb["survivors"]) == pytest.approx(1)
    chosen = pcb["chosen"]
    assert max(pcb["curve"], key=lambda line: line[2]) == [chosen["ratio"], chosen["lam"], chosen["validation"]]
