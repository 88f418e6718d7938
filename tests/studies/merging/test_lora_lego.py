"""The study of LoRA-LEGO: its rule says what it says, and arms at equal rank have that rank."""

import json

import pytest
import torch

from workbench.studies.merging import lora_lego as study
from workbench.studies.merging.adapters import load
from workbench.studies.merging.lora_lego import ARMS, CONDITIONS, LEGO, PRUNED, RANK, RIVALS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
KEPT = dict.fromkeys(ARMS, 0.6) | {"lora-lego": 0.7}


def judged(seeds=4, weakest=0.9, noise=None, **kept):
    noise, rows = noise or {}, []
    for i, (arm, value) in enumerate((KEPT | {name.replace("_", "-"): v for name, v in kept.items()}).items()):
        for seed in range(seeds):
            metric = value + NOISE[seed] + (noise[arm][seed] if arm in noise else 0.05 * i / len(KEPT) * NOISE[seed])
            extra = {"worst": metric, "weakest_expert": weakest, "curve": [[2, metric]]}
            for name in CONDITIONS:
                extra |= {name: metric, f"{name}_unscaled": metric, f"{name}_curve": [[4, metric, metric]]}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {})


def test_lego_study_reproduces_if_it_beats_all_four_at_its_rank():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=1e-2) and result.ci[0] > 0
    assert result.details["pruned"]["prune-svd"] == [[2, pytest.approx(0.6, abs=0.02)]]
    json.dumps(result.details)
    assert judged(cat=0.9, ensemble=0.9, svd_32=0.9).verdict == REPRODUCED  # more rank, more passes: no rivals


@pytest.mark.parametrize("arm", RIVALS)
def test_lego_study_does_not_reproduce_if_one_of_them_is_better(arm):
    assert judged(**{arm: 0.8}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", RIVALS)
def test_lego_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.2, -0.2, 0.2, -0.2)}, **{arm: 0.7}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_lego_study_says_nothing_of_weak_experts():
    assert judged(weakest=0.84).verdict == NOT_TESTABLE


@pytest.mark.study
def test_lego_study_has_what_its_figures_need(smoke):
    rows = {row.arm: row for row in smoke("lora-lego").rows}
    assert set(rows) == set(ARMS)
    for arm, row in rows.items():
        if not arm.startswith("prune-"):
            assert row.metric == pytest.approx(sum(row.extra[name] for name in CONDITIONS) / 2)
            assert row.metric == pytest.approx(sum(row.extra["by_task"]) / 8)
    for name in CONDITIONS:
        table, pieces = (rows["lora-lego"].extra[f"{name}_{key}"] for key in ("curve", "pieces"))
        assert all(len(line) == 5 for line in table)
        at_rank = next(line for line in table if line[0] == RANK // 2)
        assert at_rank[1] != at_rank[4]
        assert all(0 <= mixed <= RANK and 0 < share < 1 for mixed, _, share in pieces) and len(pieces) == 7
    assert [point[0] for point in rows["prune-svd"].extra["curve"]] == list(PRUNED)


@pytest.mark.study
def test_merges_at_rank_8_have_it_and_the_sum_is_what_cat_is(smoke):
    smoke("lora-lego")  # the bed
    bed = load(study.PRESETS["smoke"], 0, "independent")
    updates = {"lego": study.lego(bed), "svd": study.PLAIN["svd"](bed), "factors": study.PLAIN["factor-average"](bed)}
    updates |= {arm: merge(bed, 0)(0.4) for arm, merge in study.TRIMMED.items()}
    for update in updates.values():
        parts = bed.suite.split(update)
        for name in bed.layers:
            assert torch.linalg.matrix_rank(parts[f"{name}.weight"], rtol=1e-4) <= RANK
        assert not parts["norm.weight"].any()
    for options in LEGO.values():
        assert study.lego(bed, **options).isfinite().all()
    every = study.lego(bed, rank=8 * RANK, reweight_params=False, reweight_output=False)
    torch.testing.assert_close(every / 8, study.PLAIN["cat"](bed), rtol=0, atol=1e-6)
