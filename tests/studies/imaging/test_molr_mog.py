"""The study of MoLR-MoG: its rule on rows made by hand, points with levels, the discrepancy, models of one floor."""

import json
import math

import pytest
import torch

from workbench.studies.imaging.molr_mog import (
    ARMS,
    PRESETS,
    TIMES,
    Network,
    Noised,
    judge,
    mixture,
    mmd2,
    noised,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SETTINGS = PRESETS["smoke"]
NOISE = (0.0, 0.001, -0.001, 0.0005)
FOUND = {"molrg": 0.2, "gaussian": 0.04, "mog-4": 0.02, "mog-8": 0.02, "mog-4-random": 0.1, "mlp": 0.03}


def judged(noise=1.0, seeds=4, points=(2.0, 0.2), dims=(0.2, 0.21), control=(1.0, 1.0), **found):
    rows = []
    for i, arm in enumerate(ARMS):
        for seed in range(seeds):
            wobble = noise * NOISE[(seed + i) % 4]
            by = {"gaussian": (control, control)}.get(arm, (points, dims))
            grown = [[value * (1 + wobble * (j + 1)) for j, value in enumerate(values)] for values in by]
            extra = {"noise_mse": 0.1, "recognised": 0.9, "by_time": [0.1] * len(TIMES)}
            extra |= {"excess_by_points": grown[0], "excess_by_dims": grown[1]}
            value = (FOUND | {name.replace("_", "-"): value for name, value in found.items()})[arm]
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + wobble, extra))
    return judge(Rows(rows), SETTINGS)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, REPRODUCED),
        ({"gaussian": 0.01}, NOT_REPRODUCED),
        ({"molrg": 0.01}, NOT_REPRODUCED),
        ({"mlp": 0.01}, NOT_REPRODUCED),
        ({"mlp": 0.018}, REPRODUCED),  # within the margin
        ({"control": (0.1, 0.1)}, NOT_REPRODUCED),
        ({"points": (0.2, 0.3)}, NOT_REPRODUCED),  # more points make it worse
        ({"dims": (0.2, 0.4)}, NOT_REPRODUCED),  # grows with the dimension
        ({"gaussian": 0.02}, NOT_RESOLVED),
        ({"mog_8": 0.5, "mog_4_random": 0.0}, REPRODUCED),  # reported alone
    ],
)
def test_the_rule_asks_for_the_control_too(found, verdict):
    result = judged(**found)
    assert result.verdict == verdict
    json.dumps(result.details, allow_nan=False)


def test_the_effect_is_over_the_gaussian_with_a_mean():
    assert judged().effect == pytest.approx(0.02, abs=0.002)
    assert judged(noise=100.0).verdict == judged(seeds=1).verdict == NOT_RESOLVED


def test_points_carry_their_level_and_held_out_ones_stay():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    inputs, noise = noised(x, torch.Generator().manual_seed(1))
    assert inputs.shape == (6, 5) and noise.shape == (6, 4)
    assert bool(((inputs[:, -1] >= 0.02) & (inputs[:, -1] <= 1)).all())
    clean = {split: {"a": x, "b": x + 1} for split in ("train", "test")}
    task = Noised("t", clean, {})
    batch = task.batch("train", 32, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (32, 5) and batch.domain.tolist() == sorted(batch.domain.tolist())
    assert set(task.batch("train", 8, torch.Generator().manual_seed(0), domain=1).domain.tolist()) == {1}
    first, again = ([b.inputs for b in task.batches("test", 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_discrepancy_is_about_zero_for_one_density_and_not_for_two():
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 3, generator=draws) for _ in range(2))
    assert abs(mmd2(a, b)) < 0.01 < mmd2(a + 1, b)


def test_models_of_all_arms_map_points_with_levels():
    draws = torch.Generator().manual_seed(0)
    bases = [*torch.linalg.qr(torch.randn(2, 16, 12, generator=draws)).Q]
    parts = [torch.randn(40, 16, generator=draws) for _ in bases]
    inputs = noised(parts[0], draws)[0]
    for arm, form in ARMS.items():
        if form is not None:
            model = mixture(arm, bases, parts, 0)
            assert model(inputs).shape == (40, 16) and model.n_experts == 2 * form[0]
            assert all(expert.tau > 0.01 for expert in model.prior.experts)
    assert Network(16)(inputs).shape == (40, 16)
    assert math.isfinite(float(Network(16)(inputs).sum()))


@pytest.mark.study
def test_rows_hold_what_is_judged(smoke):
    of = {row.arm: row for row in smoke("molr-mog").rows if row.seed == 0}
    assert of["mlp"].params > 15 * of["mog-4"].params > 15 * of["gaussian"].params
    assert all(sum(row.extra["classes"]) == SETTINGS["drawn"] for row in of.values())
    assert len(of["mog-4"].extra["excess_by_points"]) == len(SETTINGS["points"])
