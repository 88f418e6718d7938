"""The study of MoMa: its arms compute alike, its two modes are what they say, and its rule says what it says."""

import json
import math

import pytest
import torch

from workbench.beds.glyph_stream import FIRST_CODE
from workbench.lib.core.budget import count_params
from workbench.lib.core.expert_choice import by_mode
from workbench.lib.core.moe import MoELayer
from workbench.lib.modality.moma import MixtureOfDepths, ModalityExpertFFN
from workbench.studies.modality.moma import ARMS, PRESETS, build, held_out, judge, run, speed_up, stream
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE, SMALL, FULL = (PRESETS[name] for name in ("smoke", "small", "full"))
#: Arm -> bits of (text, image) in training mode, and what each costs more causally.
BITS = {
    "dense": ((1.40, 1.80), (0, 0)),
    "mixed": ((1.38, 1.82), (0.03, 0.01)),
    "1t1i": ((1.37, 1.78), (0, 0)),
    "4t4i": ((1.36, 1.74), (0.01, 0.01)),
    "dense-total": ((1.30, 1.75), (0, 0)),
}


def rows(changes=None, spread=0.001, seeds=8) -> Rows:
    found, generator = [], torch.Generator().manual_seed(0)
    for arm, (trained, more) in (BITS | (changes or {})).items():
        for seed in range(seeds):
            noise = (spread * torch.randn(2, generator=generator)).tolist()
            bits = {f"{name}/expert_choice": trained[i] + noise[i] for i, name in enumerate(("text", "image"))}
            bits |= {f"{name}/auxiliary": trained[i] + more[i] + noise[i] for i, name in enumerate(("text", "image"))}
            curve = [[1, 3.0, 3.0], [2, *trained]]
            extra = bits | {"curve": curve, "auxiliary_accuracy": [0.9], "unserved": {}}
            found.append(Row(arm, seed, 1, 1, 1, 1, bits["image/auxiliary"], extra))
    return Rows(sorted(found, key=lambda row: row.seed))


def test_reproduced_if_images_gain_in_both_modes_and_more_than_text():
    result = judge(rows(), {})
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.05, abs=0.003) and result.ci[1] < 0  # causally
    assert result.details["image_beyond_text"]["expert_choice"]["mean"] == pytest.approx(0.06, abs=0.003)
    assert result.details["image_beyond_text"]["auxiliary"]["mean"] == pytest.approx(0.04, abs=0.003)
    assert result.details["causal_costs"]["mixed"]["text"] == pytest.approx(0.03)
    json.dumps(result.details, allow_nan=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"4t4i": ((1.36, 1.74), (0.01, 0.08))},  # the gain is gone causally
        {"4t4i": ((1.36, 1.83), (0.01, -0.06))},  # or in training mode
        {"4t4i": ((1.20, 1.74), (0.01, 0.01))},  # more on text
        {"mixed": ((1.38, 1.82), (0.20, 0.01))},  # more on text, causally
    ],
)
def test_not_reproduced_if_one_of_the_four_is_shown_to_fail(changes):
    assert judge(rows(changes), {}).verdict == NOT_REPRODUCED


def test_not_resolved_in_between():
    assert judge(rows({"4t4i": ((1.39, 1.7999), (0.0, 0.0))}), {}).verdict == NOT_RESOLVED
    assert judge(rows(spread=0.3), {}).verdict == NOT_RESOLVED


def test_the_speed_up_is_where_the_line_of_an_arm_crosses_the_end_of_dense():
    def one(arm: str, *image: float) -> Row:
        curve = [[10 * (i + 1), 1.0, bits] for i, bits in enumerate(image)]
        return Row(arm, 0, 1, 1, 1, 1, 0.0, {"curve": curve})

    both = Rows([one("dense", 3.0, 2.0), one("fast", 2.5, 1.5), one("slow", 4.0, 3.0)])
    assert speed_up(both, "fast")["image"] == pytest.approx(20 / 15)
    assert speed_up(both, "dense")["image"] == 1 and speed_up(both, "slow")["image"] is None


def test_arms_compute_alike_and_hold_what_they_say():
    models = {}
    for arm in FULL["arms"]:
        torch.manual_seed(0)
        models[arm] = build(arm, FULL)
    sizes = {arm: count_params(model) for arm, model in models.items()}
    router = FULL["n_layers"] * FULL["d_model"] * FULL["n_experts"]
    assert sizes["mixed"] == sizes["4t4i"] == sizes["dense-total"] + router
    alike = [model for arm, model in models.items() if arm != "4t4i-depths"]  # which has more layers
    assert all(torch.equal(model.embedding.weight, models["dense"].embedding.weight) for model in alike)
    assert all(type(block.ffn) is ModalityExpertFFN for block in models["4t4i"].blocks)
    assert all(type(block.ffn) is MoELayer for block in models["mixed"].blocks)
    deep = models["4t4i-depths"].blocks
    assert [isinstance(block, MixtureOfDepths) for block in deep] == [True, False] * 3
    task = stream(tuple(SMOKE["faces"]))
    costs = {arm: training_budget(build(arm, SMALL), task, 8) for arm in ARMS}
    for arm in ("mixed", "1t1i", "4t4i"):  # within the padding, and rows of the router
        assert costs[arm].flops == pytest.approx(costs["dense"].flops, rel=0.04)
    assert costs["dense-total"].flops > 2 * costs["dense"].flops


def test_held_out_bits_are_those_of_each_modality():
    task = stream(tuple(SMOKE["faces"]))

    class Even(torch.nn.Module):
        def forward(self, tokens, context):
            assert context.mask.sum() == (tokens != 0).sum() and context.modality.shape == context.mask.shape
            return torch.zeros(*tokens.shape, task.vocab)

    found, unserved = held_out(Even(), task, SMOKE)
    assert all(bits == pytest.approx(math.log2(task.vocab)) for bits in found.values()) and unserved == []
    torch.manual_seed(0)
    model = build("dense", SMOKE)
    batches = [task.batch("test", 4, generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(2)]
    found, _ = held_out(model, task, SMOKE)
    images, every = (sum(int((b.targets >= first).sum()) for b in batches) for first in (FIRST_CODE, 1))
    with torch.no_grad():
        whole = sum(float(task.loss(model, b)[0]) * int((b.targets > 0).sum()) for b in batches) / math.log(2)
    assert found["image"] * images + found["text"] * (every - images) == pytest.approx(whole, rel=1e-5)


def test_a_row_holds_both_modes_and_they_differ_only_where_experts_choose():
    rows_ = {arm: run(arm, 0, SMOKE) for arm in ("1t1i", "4t4i")}
    for arm, row in rows_.items():
        same = row.extra["image/auxiliary"] == row.extra["image/expert_choice"]
        assert same == (arm == "1t1i") and row.metric == row.extra["image/auxiliary"]
    assert len(rows_["4t4i"].extra["auxiliary_accuracy"]) == 2 and not rows_["1t1i"].extra["auxiliary_accuracy"]
    assert [point[0] for point in rows_["4t4i"].extra["curve"]] == [2, 4, 6, 8]
    measured = by_mode(build("dense", SMOKE), lambda: object())
    assert measured["auxiliary"] is measured["expert_choice"]  # measured once


def test_the_arms_of_full_run_and_the_steps_of_the_seed_count():
    settings = dict(SMOKE) | {"deep_layers": 2, "seed_steps": 4, "n_experts": 4}
    upcycled = run("4t4i-upcycled", 0, settings)
    assert [point[0] for point in upcycled.extra["curve"]] == [2, 4, 6, 8] and upcycled.steps == 8
    assert len(run("4t4i-depths", 0, settings).extra["auxiliary_accuracy"]) == 2 + 2 + 1
