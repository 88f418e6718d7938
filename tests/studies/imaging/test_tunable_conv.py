"""The study of tunable convolutions: its objectives, its rivals, its networks, and its rule on rows made by hand."""

import copy
import json
import math

import pytest
import torch

from tests.draws import draw
from workbench.lib.core.budget import count_params
from workbench.studies.imaging.tunable_conv import (
    ARMS,
    BLENDING,
    GRID,
    PRESETS,
    STUDY,
    contrast,
    faithful,
    judge,
    network,
    sharp,
)
from workbench.studies.imaging.tunable_rivals import Blended, interpolated
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.002, -0.002, 0.001)
LEVEL = {"tunable": -2.0, "dedicated": -2.02, "dni": -1.9, "film": -1.9, "film-wide": -1.9, "fixed": -1.8}
PARTS = [[0.3 - 0.01 * i, 0.1 + 0.01 * i] for i in range(len(GRID))]
"""Of points at which u, the knob of the first loss, grows."""


def judged(noise=1.0, seeds=4, parts=PARTS, **level):
    """Rows of these levels, a number for all points or one for each."""
    rows = []
    for k, arm in enumerate(ARMS):
        given = (LEVEL | level)[arm]
        levels = given if isinstance(given, list) else [given] * len(GRID)
        for seed in range(seeds):
            found = [value + noise * NOISE[(seed + k) % 4] for value in levels]
            extra = {"log_ratio": found, "parts": parts, "psnr": [25.0] * len(GRID)}
            if arm == "dni":
                extra[BLENDING] = dict(extra)
            rows.append(Row(arm, seed, 1, 1, 1, 1, sum(found) / len(GRID), extra))
    return judge(Rows(rows), {})


@pytest.mark.parametrize(
    ("level", "verdict"),
    [
        ({}, REPRODUCED),
        ({"film": -2.0}, NOT_REPRODUCED),  # as good
        ({"film": -2.1}, NOT_REPRODUCED),
        ({"dni": -2.0}, NOT_REPRODUCED),
        ({"dni": [-1.5, -2.0, -2.0, -2.0, -1.5]}, NOT_REPRODUCED),  # the middle counts
        ({"dni": [-2.5, -1.9, -1.9, -1.9, -2.5]}, REPRODUCED),
        ({"dedicated": [-2.0, -2.0, -2.0, -2.0, -2.2]}, NOT_REPRODUCED),
        ({"dedicated": [-2.0, -2.0, -2.0, -2.0, -2.0488]}, NOT_RESOLVED),
        ({"film-wide": -3.0, "fixed": -3.0}, REPRODUCED),  # reported alone
    ],
)
def test_the_rule(level: dict, verdict: str):
    result = judged(**level)
    assert result.verdict == verdict
    film = level.get("film", -1.9)
    assert result.effect == pytest.approx(-2.0 - film, abs=0.003)
    assert result.claimed[1] == -0.01
    json.dumps(result.details)


def test_losses_that_do_not_follow_their_knobs_resolve_nothing():
    crossed = [PARTS[1], PARTS[0], *PARTS[2:]]
    assert judged(parts=crossed).verdict == NOT_RESOLVED
    assert judged(parts=crossed).details["follows"][0] == pytest.approx(-0.9)


def test_noise_or_one_seed_resolves_nothing():
    assert judged(noise=100.0).verdict == judged(seeds=1).verdict == NOT_RESOLVED


def test_the_objectives_measure_what_they_say():
    y = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for loss in (faithful, sharp):
        assert loss(y, y, y).tolist() == [0.0] * 3
        assert loss(y + 0.1, y, y).tolist() == pytest.approx([0.01] * 3, rel=1e-3)  # of the same contrast
    turned = 2 * y.mean((2, 3), keepdim=True) - y
    torch.testing.assert_close(contrast(turned), contrast(y))
    flat = y.mean((2, 3), keepdim=True).expand_as(y)
    assert (contrast(flat) < 2e-3).all() and contrast(y).shape == (3, 1, 7, 7)
    assert (sharp(flat, y, y) > sharp(turned, y, y)).all()
    still = flat.clone().requires_grad_()
    sharp(still, y, y).sum().backward()
    assert still.grad.isfinite().all()


def test_all_networks_say_nothing_at_first_and_the_rivals_are_matched():
    settings, x = PRESETS["small"], draw(2, 1, 9, 10)
    of = {arm: network(arm, settings) for arm in ARMS}
    w = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    for net in of.values():
        assert torch.equal(net(x), x) and torch.equal(net(x, w=w), x) and torch.equal(net(x, w=w[0]), x)
    params = {arm: count_params(net) for arm, net in of.items()}
    assert params["dedicated"] == params["dni"] == params["fixed"]
    assert params["film-wide"] == pytest.approx(params["tunable"], rel=0.08)
    assert params["film"] < 1.1 * params["fixed"]


def test_weights_and_outputs_are_mixed():
    settings, x = PRESETS["smoke"], draw(2, 1, 9, 10)
    first = network("fixed", settings)
    with torch.no_grad():
        first.net.layers[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.net.layers[-1].weight.mul_(3)
    # the last layer is linear: here the two are the same
    middle = interpolated(first, second, (0.25, 0.75))
    blended = Blended(first, second)(x, w=torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(middle(x), blended, atol=1e-5, rtol=1e-5)
    assert torch.equal(interpolated(first, second, (1.0, 0.0))(x), first(x))


@pytest.mark.study
def test_rows_have_the_whole_axis(smoke):
    result = smoke("tunable-conv")
    first = [row for row in result.rows if row.seed == 0]
    assert [row.arm for row in first] == ARMS == STUDY.arms_of({})
    for row in first:
        assert len(row.extra["log_ratio"]) == len(row.extra["parts"]) == len(GRID)
        assert row.metric == pytest.approx(sum(row.extra["log_ratio"]) / len(GRID))
        assert all(math.isfinite(value) for value in row.extra["psnr"])
