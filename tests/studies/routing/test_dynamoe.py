"""The study of DynaMoE: it runs, its budgets match, and its rule says what it says."""

import json
import math

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.schedules import SCHEDULES
from workbench.lib.core.task import Classification
from workbench.lib.data.types import Arrays
from workbench.lib.routing.dynamoe import PercentileGate, percentile_count
from workbench.studies.routing.dynamoe import PRESETS, Classifier, arms, judge, run, schedule_of
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.004, -0.002, 0.001)
SETTINGS = {"data": ("digits",)}


def images() -> Classification:
    x, y = torch.zeros(6, 1, 8, 8), torch.arange(6) % 3
    return Classification(
        Arrays("blank", {split: (x, y) for split in ("train", "validation", "test")}, tuple("abc"), {})
    )


def rows(seeds=4, wiggle=0.1, ratio=-0.5, ratio_wiggle=0.1, suffix="", **accuracy) -> Rows:
    """Accuracy by arm; the difference to uniform varies over the seeds by `wiggle` times the noise of uniform."""
    level = {"uniform": 0.9, "descending": 0.93, "wave": 0.9, "top-k": 0.9, "relative": 0.9} | accuracy
    made = []
    for arm, value in level.items():
        for seed in range(seeds):
            change = 1 if arm == "uniform" else 1 + wiggle
            log_noise = ratio + ratio_wiggle * (seed % 2) if arm == "relative" else 0.0
            extra = {
                "active_histogram": [[10, 10 * (arm == "relative")]],
                "active_against_loss": [0.3, 0.1, 0.5],
                "gradient_noise_experts": [math.exp(log_noise)] * 2,
            }
            made.append(Row(arm + suffix, seed, 1, 1, 1, 1, value + change * NOISE[seed], extra))
    return Rows(made)


def test_reproduced_if_descending_is_above_uniform():
    result = judge(rows(), SETTINGS)
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(0.03, abs=1e-3) and result.ci[0] > 0
    found = result.details["digits"]
    assert found["less_gradient_noise"] == "holds" and found["published_gate_varies"] is False
    assert found["mean_active"]["relative"] == pytest.approx(1.5) and found["room"] == pytest.approx(0.1, abs=1e-2)
    assert "refuted by construction" in result.reason
    json.dumps(result.details)


@pytest.mark.parametrize("descending", [0.9, 0.87])
def test_not_reproduced_if_the_interval_is_narrow_and_includes_zero_or_lies_below(descending):
    assert judge(rows(descending=descending), SETTINGS).verdict == NOT_REPRODUCED


def test_not_resolved_if_the_interval_is_as_wide_as_the_effect_of_the_paper():
    assert judge(rows(descending=0.92, wiggle=15), SETTINGS).verdict == NOT_RESOLVED
    assert judge(rows(seeds=1), SETTINGS).verdict == NOT_RESOLVED


def test_holm_corrects_over_all_schedules():
    two = judge(rows(), SETTINGS).details["digits"]["schedules"]["descending"]["holm_p"]
    three = judge(rows(pyramid=0.9, wiggle=0.1), SETTINGS).details["digits"]["schedules"]["descending"]["holm_p"]
    assert three == pytest.approx(1.5 * two)


def test_an_uncorrected_interval_above_zero_is_not_enough():
    level = dict.fromkeys(SCHEDULES[2:], 0.9) | {"descending": 0.905, "uniform": 0.9}
    result = judge(rows(wiggle=0.8, **level), SETTINGS)
    assert result.ci[0] > 0 and result.details["digits"]["schedules"]["descending"]["holm_p"] > 0.05
    assert result.verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    "ratio, wiggle, seeds, status",
    [
        (-0.5, 0.1, 4, "holds"),
        (-0.05, 0.5, 4, "fails"),
        (-0.3, 0.5, 4, "open"),
        (0.5, 0.1, 4, "fails"),
        (-1, 0, 1, "open"),
    ],
)
def test_the_gradient_noise_is_judged_apart(ratio, wiggle, seeds, status):
    result = judge(rows(seeds, ratio=ratio, ratio_wiggle=wiggle), SETTINGS)
    assert result.details["digits"]["less_gradient_noise"] == status


def test_the_first_data_set_decides_and_the_others_are_reported():
    both = Rows(rows() + rows(suffix="@mnist-1d", descending=0.8))
    result = judge(both, {"data": ("digits", "mnist-1d")})
    assert result.verdict == REPRODUCED and "On mnist-1d: -0.0999 [-0.1" in result.reason
    assert result.details["mnist-1d"]["schedules"]["descending"]["difference"] == pytest.approx(-0.1, abs=1e-3)


@pytest.mark.parametrize("preset", ["small", "full"])
def test_schedules_have_one_total_and_one_number_of_parameters(preset):
    settings = PRESETS[preset]
    schedules = {kind: schedule_of(kind, settings) for kind in settings["arms"]}
    matched = [kind for kind in schedules if not kind.endswith("-unmatched")]
    assert {sum(schedules[kind]) for kind in matched} == {settings["total"]}
    assert set(SCHEDULES) < set(matched)
    params = {kind: count_params(Classifier(images(), schedules[kind], kind, settings)) for kind in matched}
    assert len(set(params.values())) == 1


def test_the_unmatched_arms_have_the_totals_of_their_shape():
    settings = PRESETS["full"]
    unmatched = [kind for kind in settings["arms"] if kind.endswith("-unmatched")]
    assert {kind: sum(schedule_of(kind, settings)) for kind in unmatched} == {
        "pyramid-unmatched": 26,
        "valley-unmatched": 34,
    }


def test_the_gates_of_the_arms_are_the_published_one_top_k_and_thresholds_from_the_same_weights():
    models = {}
    for kind in ("uniform", "top-k", "relative"):
        torch.manual_seed(0)
        models[kind] = Classifier(images(), [5] * 6, kind, PRESETS["small"])
    published, top_k = (next(iter(moe_layers(models[kind]).values())).router for kind in ("uniform", "top-k"))
    assert isinstance(published, PercentileGate) and (published.noise, published.weight) == (0.1, "softmax")
    assert (top_k.noise, top_k.weight, top_k.tau) == (0.0, "renorm", published.tau)
    weights = [list(model.parameters()) for model in models.values()]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*weights, strict=True))


def test_arms_of_further_data_sets_are_named_after_them():
    names = arms({"data": ("digits", "mnist-1d"), "arms": ("uniform", "descending")})
    assert names == ["uniform", "descending", "uniform@mnist-1d", "descending@mnist-1d"]


@pytest.mark.study
def test_a_run_shows_what_the_gates_do():
    settings = PRESETS["smoke"]
    row = run("relative", 6, settings)
    assert row.extra["fold"] == 1
    assert any(sum(n > 0 for n in histogram) > 1 for histogram in row.extra["active_histogram"])
    published = run("descending", 6, settings)
    for n, histogram in zip(published.extra["schedule"], published.extra["active_histogram"], strict=True):
        assert [k + 1 for k, count in enumerate(histogram) if count] == [percentile_count(n, settings["tau"])]
    assert math.isnan(published.extra["active_against_loss"][0])


@pytest.mark.study
def test_the_smoke_preset_resolves_nothing_at_equal_parameters(smoke):
    result = smoke("dynamoe")
    assert result.verdict == NOT_RESOLVED and len({row.params for row in result.rows}) == 1
