"""The study of CDSP-MoE: its tasks, its separate experts, what it measures, and its rule on rows made by hand."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from workbench.lib.core.budget import count_params
from workbench.lib.core.routing import Context
from workbench.lib.subspaces.cdsp_moe import cdsp_layers
from workbench.studies.rows import Row, Rows
from workbench.studies.subspaces.cdsp_moe import (
    ARMS,
    CDSP,
    MARGIN,
    MOE_DROPOUT,
    NO_CONFLICT,
    PRESETS,
    SEPARATE,
    SHUFFLED,
    TASKS,
    TOKENS,
    Symbols,
    build,
    grating_images,
    judge,
    judged,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
BITS = dict.fromkeys(ARMS, 0.4) | {CDSP: 0.9, MOE_DROPOUT: 0.5, NO_CONFLICT: 0.6, SHUFFLED: 0.7}
POINT = {"link in conflict": 0.4, "link in agreement": 0.6, "overlap in conflict": 0.3, "overlap in agreement": None}


def judgement(noise=None, seeds=3, **bits):
    values = BITS | {name.replace("_", "-"): value for name, value in bits.items()}
    extra = {"information_told": 1.0, "accuracy": 0.8, "accuracy_untold": 0.7, "cut": 0.1, "half": 0.2}
    rows = [
        Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] * (i + 1) / 9 + (noise or {}).get(arm, (0, 0, 0))[seed],
            extra | {"history": [POINT] * 4})
        for i, (arm, value) in enumerate(values.items())
        for seed in range(seeds)
    ]  # fmt: skip
    return judge(Rows(rows), PRESETS["smoke"])


def test_reproduced_if_it_beats_the_same_dropout_and_the_conflict_is_why():
    result = judgement()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.4, abs=0.01)
    assert result.details["parted"][CDSP] == {"link": pytest.approx(-0.2), "overlap": 0.0}
    json.dumps(result.details, allow_nan=False)


@pytest.mark.parametrize("arm", [MOE_DROPOUT, NO_CONFLICT, SHUFFLED])
def test_not_reproduced_if_one_of_them_is_better(arm):
    assert judgement(**{arm: 1.2}).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", [NO_CONFLICT, SHUFFLED])
def test_not_reproduced_if_the_conflict_is_shown_to_do_nothing(arm):
    result = judgement(**{arm: 0.9})
    assert result.verdict == NOT_REPRODUCED and f"Equivalent within {MARGIN}: CDSP and {arm}." in result.reason


def test_not_resolved_if_an_interval_includes_zero_and_nothing_is_equivalent():
    for arm in (MOE_DROPOUT, NO_CONFLICT, SHUFFLED):
        assert judgement(noise={arm: (0.8, -0.8, 0.4)}).verdict == NOT_RESOLVED
    assert judgement(seeds=1).verdict == NOT_RESOLVED


def test_without_the_dropout_a_loss_of_the_baseline_decides_nothing():
    """The paper's own baseline has none: that it loses is a confound."""
    assert judgement(moe=0.0, noise={MOE_DROPOUT: (0.8, -0.8, 0.4)}).verdict == NOT_RESOLVED


@pytest.fixture(scope="module")
def task() -> Symbols:
    return Symbols(60, 40, 0)


def test_the_three_tasks_are_what_they_say(task: Symbols):
    assert task.domains == TASKS
    digits, turned, gratings = (task.splits["train"][name] for name in TASKS)
    assert torch.equal(turned[0].transpose(2, 3), 1 - digits[0]) and torch.equal(turned[1], digits[1] % 2)
    assert set(gratings[1].tolist()) == {0, 1}
    for split, n in (("train", 60), ("test", 40)):
        for x, y in task.splits[split].values():
            assert x.shape == (n, 1, 8, 8) and y.shape == (n,) and 0 <= float(x.min()) <= float(x.max()) <= 1
    assert Symbols(60, 40, 0).manifest == task.manifest != Symbols(60, 40, 1).manifest


def test_finer_gratings_have_more_of_their_power_at_higher_frequencies():
    x, fine = grating_images(600, torch.Generator().manual_seed(0))
    power = torch.fft.fft2(x[:, 0] - x.mean((2, 3))[..., None]).abs().square()
    along = torch.fft.fftfreq(8)
    radius = (along[:, None].square() + along.square()).sqrt()
    mean = (power * radius).sum((1, 2)) / power.sum((1, 2))
    assert float(mean[fine == 1].mean()) > float(mean[fine == 0].mean()) + 0.1


def test_tokens_are_told_their_task_but_where_none_is(task: Symbols):
    batch = task.batch("train", 6, torch.Generator().manual_seed(0))
    assert torch.equal(task.context(batch).domain.view(6, TOKENS)[:, 3], batch.domain)
    with task.untold():
        assert task.context(batch).domain is None
    assert task.context(batch).domain is not None


def test_arms_have_the_same_weights_and_separate_experts_are_separate():
    settings, states = PRESETS["small"], {}
    for arm in ARMS:
        torch.manual_seed(0)
        states[arm] = build(arm, settings)
    sizes = {arm: count_params(model) for arm, model in states.items()}
    assert len({sizes[arm] for arm in ARMS if arm != "moe-untold"}) == 1
    for arm in SEPARATE:
        layer = next(iter(cdsp_layers(states[arm]).values())).eval()
        x = torch.randn(20, settings["d_model"])
        routing, block = layer.router(x, Context()), settings["d_base"] // settings["n_experts"]
        ups, downs = layer.backbone.up.weight.split(block), layer.backbone.down.weight.split(block, 1)
        gates = routing.dense()
        expected = sum(gates[:, e, None] * (F.silu(x @ u.T) @ d.T) for e, (u, d) in enumerate(zip(ups, downs)))  # noqa: B905
        torch.testing.assert_close(layer(x), expected)
        assert not layer.topology.logits.requires_grad and not layer.router.coefficients["conflict"]
        assert layer.router.coefficients["lbl"] > 0


def test_the_information_is_that_of_experts_and_tasks(task: Symbols):
    """A router that sends each task to two experts of its own tells log2 3 bits, one that sees nothing none."""
    model = build(CDSP, PRESETS["smoke"])
    for layer in cdsp_layers(model).values():
        with torch.no_grad():
            layer.router.projection.weight.zero_()
            layer.router.projection.bias.zero_()
            layer.router.projection.weight[:, layer.backbone.up.in_features :].zero_()
            layer.router.tasks.weight.zero_()
            for t in range(3):
                layer.router.tasks.weight[t, t] = 1.0
                layer.router.projection.weight[[2 * t, 2 * t + 1], layer.backbone.up.in_features + t] = 5.0
    told = judged(model, task)
    with task.untold():
        untold = judged(model, task)
    assert told["information"] == pytest.approx(math.log2(3), abs=0.01) and told["distance"] == pytest.approx(1)
    assert abs(untold["information"]) < 0.01 and untold["distance"] == pytest.approx(0, abs=1e-6)
    assert torch.tensor(told["routing"]).shape == (2, 3, 16)


@pytest.mark.study
def test_rows_say_what_happened_over_time(smoke):
    rows = {row.arm: row for row in smoke("cdsp-moe").rows}
    points = rows[CDSP].extra["history"]
    assert [point["step"] for point in points] == [3, 6] and points[-1]["conflict rate"] is not None
    assert all(value is None for name, value in rows["moe"].extra["history"][0].items() if name != "step")
    assert rows["moe-untold"].extra["told"] == rows["moe-untold"].extra["untold"]
    assert rows["moe"].extra["cut"] == 1.0
