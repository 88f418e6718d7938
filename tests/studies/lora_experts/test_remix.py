"""The study of ReMix: it runs, its arms match, and its rule says what it says."""

import json

import pytest
import torch

from workbench.beds import symbol_maps as bed
from workbench.studies.lora_experts.remix import ARMS, LORAS, PROMPT, judge, put, row_losses
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

NOISE = (0.0, 0.02, -0.01)
ACCURACY = dict.fromkeys(ARMS, 0.5) | {"remix-4": 0.9, "softmax": 0.8, "random": 0.6}
SUPPORT = {"weights": [4.0, 3.0, 2.0], "probabilities": [8.0, 5.0, 3.0]}


def judged(seeds=3, weights=None, noise=None, **accuracy):
    accuracy = ACCURACY | {name.replace("_", "-"): value for name, value in accuracy.items()}
    rows = []
    for i, (arm, value) in enumerate(accuracy.items()):
        for seed in range(seeds):
            own = (noise or {}).get(arm, [0.05 * i * part for part in NOISE])[seed]
            curve = {"steps": [0, 1, 2]} | SUPPORT
            if arm == "softmax":
                curve["weights"] = [value + NOISE[seed] for value in weights or SUPPORT["weights"]]
                curve["weights"][-1] += 0.02 * seed
            extra = {} if arm in LORAS else {"support": curve, "subsets": 1.0}
            rows.append(Row(arm, seed, 1, 1, 1, 1, value + NOISE[seed] + own, extra))
    return judge(Rows(rows), {})


def test_remix_study_reproduces_if_weights_collapse_and_the_learned_choice_gains():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == pytest.approx(0.1, abs=0.02)
    assert result.details["support_end"]["softmax"] == pytest.approx(2.0, abs=0.05)
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [4.0, 3.9, 3.8]},  # no collapse
        {"weights": [2.0, 2.1, 2.4]},  # a rise
        {"softmax": 1.0},
        {"random": 1.0},  # constant weights did it
    ],
)
def test_remix_study_does_not_reproduce_if_an_interval_is_on_the_other_side(change):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_remix_study_resolves_nothing_if_an_interval_includes_the_limit():
    assert judged(noise={"remix-4": (0.3, -0.3, 0.3)}).verdict == NOT_RESOLVED
    assert judged(seeds=1).verdict == NOT_RESOLVED


def test_remix_study_mixtures_have_equal_ranks_and_scales():
    for arm in ("softmax", "softmax-balance", "softmax-all", "random", "remix-4"):
        torch.manual_seed(0)
        layers = list(put(arm, bed.make_model()).layers.values())
        seen = []
        for layer in layers:
            assert (layer.experts.n_experts, layer.experts.rank) == (8, 1)
            layer.observe(lambda layer, routing, _, to=seen: to.append(routing.dense() * layer.experts.scale))
            layer(torch.randn(2, 13, layer.experts.d_in))
        assert all(torch.allclose(weights.sum(1), torch.tensor(4.0)) for weights in seen)


def test_remix_study_selects_by_what_is_not_to_be_predicted():
    torch.manual_seed(0)
    layer = next(iter(put("remix-4", bed.make_model()).layers.values())).eval()
    seen = []
    layer.observe(lambda layer, routing, _: seen.append(routing.indices))
    x = torch.randn(4, 13, layer.experts.d_in)
    other = x.clone()
    other[:, PROMPT:] += 10 * torch.randn(4, 13 - PROMPT, layer.experts.d_in)
    layer(x), layer(other)
    assert torch.equal(*seen)


def test_remix_study_row_losses_have_the_task_loss_as_mean():
    torch.manual_seed(0)
    model, task = bed.make_model(), bed.new_maps()
    batch = task.batch("train", 5, torch.Generator().manual_seed(0))
    assert torch.allclose(row_losses(model, batch).mean(), task.loss(model, batch)[0])


@pytest.mark.study
def test_remix_study_rows_say_what_their_arms_did(smoke):
    rows = {row.arm: row for row in smoke("remix").rows}
    assert rows["remix-4"].flops == 4 * rows["random"].flops == 4 * rows["remix-4, equal compute"].flops
    for arm in ("random", "remix-2", "remix-4"):
        assert rows[arm].extra["support"]["weights"] == pytest.approx([4.0] * len(rows[arm].extra["support"]["steps"]))
        assert rows[arm].extra["subsets"] >= 1
    assert rows["random"].metric == max(rows["random"].extra["likeliest"], rows["random"].extra["drawn"])
