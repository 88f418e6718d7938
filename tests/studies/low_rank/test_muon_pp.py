"""The study of Muon++: how the best rate is found, what arms train, and the rule on rows made by hand."""

import json

import pytest
import torch

from workbench.lib.low_rank.muon_pp import MuonPP, Spectral
from workbench.studies.low_rank import muon_pp as study
from workbench.studies.low_rank.muon_pp import ADAMW, ADAPTIVE, DECAY, JORDAN, MUON_PP, PRESETS, RMS, judge
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.1, -0.1, 0.05)
OCTAVES = {ADAMW: 2.0, JORDAN: 0.8, RMS: 1.5, MUON_PP: 0.4, DECAY: 0.5}
SETTINGS = {"widths": (32, 256)}


def judged(norms=0.05, seeds=4, edge=0, **octaves):
    rows = []
    for i, (arm, value) in enumerate(
        (OCTAVES | {MUON_PP: octaves.get("ours", 0.4), RMS: octaves.get("rms", 1.5)}).items()
    ):
        for seed in range(seeds):
            extra = {"best_rates": [-5.0, -5.0 - value], "at_edge": edge, "regret": 0.1, "accuracy": 0.9}
            extra |= {"accuracy_own": 0.9, "norm_spread": norms + NOISE[seed] / 10}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[(seed + i) % 4], extra))
    return judge(Rows(rows), SETTINGS)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, REPRODUCED),
        ({"ours": 1.6, "rms": 3.0}, NOT_REPRODUCED),  # it drifts itself
        ({"ours": 0.6, "rms": 0.3}, NOT_REPRODUCED),  # the other drifts less
        ({"norms": 0.3}, NOT_REPRODUCED),
        ({"ours": 0.95}, NOT_RESOLVED),
        ({"rms": 0.45}, NOT_RESOLVED),
        ({"norms": 0.1}, NOT_RESOLVED),
        ({"seeds": 1}, NOT_RESOLVED),
    ],
    ids=str,
)
def test_the_rule(change, verdict):
    result = judged(**change)
    assert result.verdict == verdict
    assert result.effect == pytest.approx(change.get("ours", 0.4) - change.get("rms", 1.5), abs=0.16)
    json.dumps(result.details)


def test_rates_at_an_end_of_the_grid_are_said():
    assert "at an end of the grid" not in judged().reason
    assert f"{ADAMW} (4), {JORDAN} (4)" in judged(edge=1).reason


@pytest.mark.parametrize("place", [-4.7, -4.0, -3.6])
def test_the_parabola_finds_the_lowest_point_of_one(place):
    grid = (-7, -6, -5, -4, -3, -2)
    assert study.lowest(grid, [2 + 0.3 * (rate - place) ** 2 for rate in grid]) == pytest.approx(place)
    assert study.lowest((-8, -6, -4), [(rate + 5.5) ** 2 for rate in (-8, -6, -4)]) == pytest.approx(-5.5)


def test_the_lowest_point_at_an_end_or_on_a_floor_is_on_the_grid():
    assert study.lowest((-3, -2, -1), [0.1, 0.5, 0.7]) == -3 and study.lowest((-3, -2, -1), [3, 2, 1]) == -1
    assert study.lowest((-3, -2, -1), [10.0, 10.0, 10.0]) == -3
    assert study.lowest((-3, -2, -1), [10.0, 1.0, 1.0]) == pytest.approx(-1.5)


def test_the_spread_of_norms_is_of_the_end_and_of_each_layer():
    def found(*norms):
        return {
            name: [Spectral(0, 9.0, 1.0, 1.0, 1.0), Spectral(1, norm, 1.0, 1.0, 1.0)]
            for name, norm in zip("ab", norms, strict=True)
        }

    assert study.norm_spread([found(1.0, 2.0), found(1.1, 2.0), found(1.05, 1.0)]) == pytest.approx((0.1 + 1.0) / 2)


def test_arms_and_what_they_start_from():
    assert study.arms(PRESETS["small"]) == [ADAMW, JORDAN, RMS, MUON_PP, DECAY]
    assert study.arms(PRESETS["full"])[-1] == ADAPTIVE
    for arm in study.arms(PRESETS["full"]):
        model, optimizer = study.make(arm, 32, 0)
        norms = [
            torch.linalg.matrix_norm(la.weight.detach(), 2) * (la.weight.shape[1] / la.weight.shape[0]) ** 0.5
            for la in model.layers
        ]
        assert isinstance(optimizer, MuonPP) == (arm != ADAMW)
        assert all(abs(norm - 1) < 1e-4 for norm in norms) == (arm != ADAMW)
        assert [layer.weight.shape for layer in model.layers] == [(32, 64), (32, 32), (10, 32)]
        seen = [bool(layer._forward_pre_hooks) for layer in model.layers]
        assert seen == [arm == ADAPTIVE] * 3


def test_widths_span_a_factor_of_eight_and_rates_more_than_four_octaves():
    for name in ("small", "full"):
        preset = PRESETS[name]
        assert preset["widths"][-1] >= 8 * preset["widths"][0] and len(preset["widths"]) > 2
        for grid in ("muon", "adamw"):
            assert (
                all(b - a == 1 for a, b in zip(preset[grid], preset[grid][1:], strict=False)) and len(preset[grid]) >= 7
            )


def test_a_training_that_diverges_counts_as_the_worst(monkeypatch):
    from workbench.lib import data
    from workbench.lib.core.task import Classification

    def diverge(*args, **options):
        raise FloatingPointError

    monkeypatch.setattr(study, "train", diverge)
    task = Classification(data.load("digits"))
    assert study.learn(RMS, 16, 1.0, 0, PRESETS["smoke"], task, False).loss == study.WORST


@pytest.mark.study
def test_rows_hold_the_curves_and_the_traces(smoke):
    settings = PRESETS["smoke"]
    for row in smoke("muon-pp").rows:
        losses = row.extra["losses"]
        assert [len(of_width) for of_width in losses] == [3, 3, 3]
        assert row.metric == pytest.approx(max(row.extra["best_rates"]) - min(row.extra["best_rates"]))
        assert [len(norms) for norms in row.extra["weight_norms"]] == [11, 11, 11]
        updates = [value for norms in row.extra["update_norms"] for value in norms]
        if row.arm in (MUON_PP, JORDAN):  # the layer between the hidden ones is square
            assert min(updates) > 0.67 and max(updates) < 1.21
        assert row.params == 64 * 64 + 64 * 64 + 64 * 10 and row.steps == 9 * settings["steps"]
