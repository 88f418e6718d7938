"""The study of concrete subspaces: its rule says what it says, and arms that learn make as many passes."""

import json

import pytest
import torch

from workbench.beds import digit_experts as bed
from workbench.studies.merging import concrete_subspace as study
from workbench.studies.merging.concrete_subspace import ARMS, BATCH, LEARNED, POINTS, PRESETS, arms_of, judge
from workbench.studies.merging.tuning import load
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, NOT_TESTABLE, REPRODUCED

NOISE = (0.0, 0.02, -0.01, 0.01)
KEPT = dict.fromkeys(ARMS, 0.6) | {"concrete ta": 0.7, "concrete task": 0.7, "concrete layer": 0.8}
ASKED = ("task-arithmetic", "random mask", "adamerging layer")


def judged(seeds=4, weakest=0.9, noise=None, arms=ARMS, **kept):
    noise, rows = noise or {}, []
    for i, arm in enumerate(arms):
        value = kept.get(arm.replace(" ", "_").replace("-", "_"), KEPT[arm])
        for seed in range(seeds):
            metric = value + NOISE[seed] + (noise[arm][seed] if arm in noise else 0.05 * i / len(ARMS) * NOISE[seed])
            extra = {"worst": metric, "weakest_expert": weakest, "chosen": {}}
            if arm in LEARNED:
                extra |= {"curve": [[1, 0.5, metric]], "density": [0.5, 0.25 + 0.5 * metric], "hard": metric}
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {})


def test_concrete_study_reproduces_if_masks_help_fixed_and_learned_weights():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.1, abs=1e-2) and result.ci[0] > 0
    json.dumps(result.details)
    assert judged(adamerging_task=0.9).verdict == REPRODUCED  # which is only reported


@pytest.mark.parametrize("arm", ASKED)
def test_concrete_study_does_not_reproduce_if_one_of_them_is_better(arm):
    assert judged(**{arm.replace(" ", "_").replace("-", "_"): 0.9}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", ASKED)
def test_concrete_study_resolves_nothing_if_an_interval_includes_zero(arm):
    assert judged(noise={arm: (0.4, -0.4, 0.4, -0.4)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_concrete_study_says_nothing_of_weak_experts():
    assert judged(weakest=0.84).verdict == NOT_TESTABLE


def test_the_images_that_are_judged_are_learned_on_only_where_the_preset_says_so():
    on_test = {arm for arm, what in LEARNED.items() if what.split == "test"}
    assert on_test == {arm for arm in ARMS if arm.endswith("on test")} and len(on_test) == 3
    for settings in PRESETS.values():
        arms = set(arms_of(settings))
        assert arms == set(ARMS) - (set() if settings["transductive"] else on_test)
    result = judged(arms=arms_of({"transductive": False}))
    assert result.verdict == REPRODUCED and result.details["on_test"] == {}


@pytest.mark.parametrize("arm", LEARNED)
def test_arms_that_learn_make_as_many_passes_at_rates_of_the_same_reach(arm):
    what = LEARNED[arm]
    assert PRESETS["small"]["passes"] % 3 == 0
    for reach in what.reaches:
        merger = what.merger(reach, 120, 0.2, 0, [])
        assert (merger.passes if what.concrete else merger.steps) == 120
        assert what.granularity == "fixed" or merger.lr * merger.steps == pytest.approx(reach)
        assert not what.concrete or merger.mask_lr * merger.mask_steps == pytest.approx(2 * reach)
    assert len(study.SCALES) == len(study.TIES) == POINTS
    assert len(what.reaches) * study.LOOKS == POINTS or arm == "mask per task"


@pytest.mark.study
def test_concrete_study_has_what_its_figures_need(smoke):
    rows = {row.arm: row for row in smoke("concrete-subspace").rows}
    assert set(rows) == set(ARMS)
    for arm, row in rows.items():
        assert len(row.extra["by_task"]) == 8 and row.steps == (24 if arm in LEARNED else 0)
        assert arm == "base" or "validation" in row.extra["chosen"]
        assert ("curve" in row.extra) == (arm in LEARNED)
        if arm in LEARNED:
            passes, entropy, kept = row.extra["curve"][-1]
            assert passes == 24 and entropy > 0 and 0 < kept <= 1.1
        assert ("density" in row.extra) == (arm in LEARNED and LEARNED[arm].concrete)
    assert rows["concrete ta"].extra["hard"] != rows["concrete ta"].metric


@pytest.mark.study
def test_inputs_are_of_the_split_and_without_labels_and_a_random_mask_keeps_half_of_the_weights(smoke):
    smoke("concrete-subspace")  # the bed
    suite = load(bed.SMOKE, 0)
    for split in ("validation", "test"):
        for own, task in zip(study.batches(suite, split), suite.tasks, strict=True):
            (images, _), *_ = task.splits[split].values()
            assert len(own) == len(images) // BATCH and torch.equal(torch.cat(own), images[: len(own) * BATCH])
    mask = study.random_mask(suite, 0)
    for name, part in suite.split(mask).items():
        assert part.mean() == pytest.approx(1, abs=1e-5) and len(part.unique()) <= 2, name
    assert (mask > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(mask, study.random_mask(suite, 1))
