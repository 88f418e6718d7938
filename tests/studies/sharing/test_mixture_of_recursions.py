"""The study of Mixture-of-Recursions: its arms are alike but for one thing, spend the same, and its rule holds."""

import json

import pytest
import torch

from workbench.lib.core.budget import count_params
from workbench.lib.core.observe import announcing
from workbench.studies.rows import Row, Rows
from workbench.studies.sharing.mixture_of_recursions import (
    ARMS,
    BASELINES,
    CLASSES,
    MARGIN,
    PRESETS,
    Spent,
    build,
    byte_classes,
    depth_measures,
    judge,
)
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
BITS = {"vanilla": 2.5, "recursive": 2.55, "expert": 2.49, "token": 2.6, "expert-share": 2.52, "random": 2.56}


def judged(bits=None, noise=None, seeds=3):
    bits, noise = BITS | (bits or {}), noise or {}
    extra = {"gap": 0.1, "mean_depth": 2.0, "spent": 1.0}
    rows = Rows(
        Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + noise.get(arm, NOISE)[seed] / 50, extra)
        for arm, value in bits.items()
        for seed in range(seeds)
    )
    return judge(rows, {"arms": ARMS})


def test_reproduced_if_depth_gains_nothing_is_lost_and_the_choice_matters():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.06) and result.ci[1] < 0
    json.dumps(result.details)
    assert judged({"vanilla": 2.49 - MARGIN + 0.001}).verdict == REPRODUCED


@pytest.mark.parametrize("bits", [{"recursive": 2.48}, {"vanilla": 2.46}, {"random": 2.48}])
def test_not_reproduced_if_one_interval_is_on_the_other_side(bits):
    assert judged(bits).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("arm", ["recursive", "vanilla", "random"])
def test_not_resolved_if_an_interval_does_not_say(arm):
    assert judged(noise={arm: (5.0, -5.0, 0.0)}).verdict == NOT_RESOLVED


def test_one_seed_resolves_nothing():
    assert judged(seeds=1).verdict == NOT_RESOLVED


@pytest.mark.parametrize("preset", ["small", "full"])
def test_recursions_share_their_layers_and_differ_from_each_other_in_routers_alone(preset):
    settings = PRESETS[preset]
    params = {arm: count_params(build(arm, settings)) for arm in ARMS}
    shared = (settings["n_layers"] - 2) // settings["n_recursions"]
    layer = (params["vanilla"] - params["recursive"]) // (settings["n_layers"] - 2 - shared)
    width = settings["d_model"]
    assert params["recursive"] == 256 * width + width + (2 + shared) * layer
    routed = {params[arm] for arm in ARMS if arm not in BASELINES}
    assert routed == {params["recursive"] + settings["n_recursions"] * width}


def test_arms_of_one_seed_start_from_the_same_weights():
    states = {}
    for arm in ARMS:
        torch.manual_seed(0)
        states[arm] = list(build(arm, PRESETS["small"]).parameters())
    for state in states.values():  # embedding, and the first layers that are drawn
        same = [p.equal(q) for p, q in zip(state, states["vanilla"], strict=False) if p.shape == q.shape]
        assert all(same[:10]) and len(same) > 10


def test_what_was_spent_is_counted_in_training_alone():
    settings = PRESETS["smoke"]
    torch.manual_seed(0)
    model, spent = build("expert", settings), Spent(settings["seq_len"])
    (mor,) = announcing(model)
    mor.observe(spent)
    tokens = torch.randint(256, (4, 16))
    model(tokens)
    once = spent.flops
    model.eval()(tokens)
    assert (spent.steps, spent.flops) == (1, once) and once > 0


def test_bytes_are_classed_by_the_words_they_stand_in():
    text = b"if x1:\n\treturn _for  # in 3"
    names = {number: name for name, number in CLASSES.items()}
    found = [names[c] for c in byte_classes(text).tolist()]
    words = ["keyword"] * 2 + ["space"] + ["identifier"] * 2 + ["other", "newline", "space"] + ["keyword"] * 6
    words += ["space"] + ["identifier"] * 4 + ["space"] * 2 + ["other", "space"] + ["keyword"] * 2 + ["space", "other"]
    assert found == words


def test_depths_of_a_text_are_read_by_class():
    found = depth_measures(torch.tensor([3, 3, 1, 2, 0]), b"if a\n", 3)
    assert found["mean_depth"] == 1.8 and found["depths"] == "33120" and found["text"] == "if a\n"
    assert found["depth_shares"] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert found["depth_by_class"] == {"keyword": 3, "identifier": 2, "space": 1, "newline": 0}


@pytest.mark.study
def test_all_arms_spend_what_vanilla_does(smoke):
    rows = smoke("mixture-of-recursions").rows
    settings = PRESETS["smoke"]
    wanted = rows.arm("vanilla")[0].flops
    for arm in ARMS:
        row = rows.arm(arm)[0]
        assert abs(row.flops - wanted) <= 0.5 * row.flops / row.steps  # a step is not cut in two
        assert [made for made, _ in row.extra["curve"]][-1] == row.flops
    assert rows.arm("recursive")[0].steps == settings["steps"] < rows.arm("expert")[0].steps


@pytest.mark.study
def test_a_run_says_how_deep_its_tokens_went_and_what_a_look_ahead_would_flatter(smoke):
    rows = smoke("mixture-of-recursions").rows
    for arm in ("expert", "expert-share", "random"):
        extra = rows.arm(arm)[0].extra
        assert extra["gap"] == rows.arm(arm)[0].metric - extra["top_k_bits"] != 0
        assert extra["spent"] == 1  # who is taken differs, and not how many
        assert extra["cache"] == pytest.approx(1 / 3 if arm == "expert-share" else extra["mean_depth"] / 3)
        assert set(extra["depths"]) <= set("0123") and len(extra["depths"]) == len(extra["text"]) == 256
    accuracy = rows.arm("expert")[0].extra["sampling_accuracy"]
    assert len(accuracy) == 2 and all(0 < share < 1 for share in accuracy)
    assert "sampling_accuracy" not in rows.arm("random")[0].extra and "gap" not in rows.arm("token")[0].extra
    assert rows.arm("token")[0].extra["depth_shares"][0] == 0
