"""The study of MoE-redundancy: its data, its arms, and its rule on rows made by hand."""

import json
import math
import unicodedata

import pytest
import torch

from workbench.beds import glyph_stream as bed
from workbench.errors import InputError
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Context
from workbench.lib.core.split import neuron_slices
from workbench.studies.modality.moe_redundancy import ARMS, MARGIN, PRESETS, SMALL_ARMS, build, judge, run
from workbench.studies.modality.names_to_glyphs import (
    BOI,
    EOI,
    FIRST_CODE,
    LENGTH,
    NEW,
    UNJUDGED,
    VOCAB,
    NamesToGlyphs,
    draw,
    frequent,
    split_blocks,
    text_model,
    text_task,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED

SMOKE = PRESETS["smoke"]
BITS = {"gw": 1.9, "random": 1.91, "permuted": 1.91, "dense": 1.91, "lora": 1.9, "full": 1.85}


@pytest.fixture(scope="module")
def task() -> NamesToGlyphs:
    return NamesToGlyphs(SMOKE["faces"])


# -- the data


def test_a_row_is_a_name_in_capitals_and_then_the_picture(task: NamesToGlyphs):
    stream = bed.GlyphStream(SMOKE["faces"])
    for split in ("train", "test"):
        assert len(task.rows[split]) == len(stream.rows[split])
        for row, theirs in zip(task.rows[split][::50], stream.rows[split][::50, 0], strict=True):
            begin, end = row.tolist().index(BOI), row.tolist().index(EOI)
            name = bytes(row[1:begin].tolist()).decode()
            letters = theirs[1 : theirs.tolist().index(bed.BOI)].tolist()
            assert name == "".join(bed.LETTERS[i - bed.FIRST_LETTER] for i in letters).upper()
            assert len(name) == 40 or unicodedata.lookup(name)
            assert row[0] == ord("\n") and end - begin == 50 and not row[end + 1 :].any()
            codes = theirs[(theirs >= bed.FIRST_CODE)] - bed.FIRST_CODE
            assert torch.equal(row[begin + 1 : end] - FIRST_CODE, codes.long())
    assert task.rows["train"].shape[1] == LENGTH + 1 and task.vocab == VOCAB + NEW


def test_only_codes_and_the_end_are_judged_and_padding_is_no_token(task: NamesToGlyphs):
    batch = task.batch("train", 5, torch.Generator().manual_seed(0))
    judged = batch.targets != UNJUDGED
    assert (judged.sum(1) == 50).all() and (batch.targets[judged] > BOI).all()
    assert torch.equal(batch.targets[:, :-1][judged[:, :-1]], batch.inputs[:, 1:][judged[:, :-1]])
    seen = []

    class Uniform(torch.nn.Module):
        def forward(self, tokens, context):
            seen.append(context)
            return torch.zeros(*tokens.shape, VOCAB + NEW)

    assert task.evaluate(Uniform(), "test", 1)[task.metric] == pytest.approx(math.log2(VOCAB + NEW))
    context: Context = seen[0]
    inputs = task.rows["test"][:64, :-1].flatten()
    assert torch.equal(context.modality, (inputs >= VOCAB).long()) and torch.equal(context.mask, inputs != 0)


def test_wrong_names_are_those_of_other_rows_with_the_same_pictures(task: NamesToGlyphs):
    right, wrong = task.rows["test"], task.with_wrong_names("test")
    assert torch.equal(right[right >= VOCAB], wrong[wrong >= VOCAB])
    assert (right != wrong).any(1).float().mean() > 0.95
    with pytest.raises(InputError, match="split 'tests' is unknown"):
        task.batch("tests", 2, torch.Generator())


def test_a_picture_is_drawn_of_codes_alone(task: NamesToGlyphs):
    model = build("gw", 0, SMOKE, task)
    drawn = draw(model, "latin small letter a", count=3, seed=1)
    assert drawn.shape == (3, 49) and int(drawn.min()) >= 0 and int(drawn.max()) < bed.CODES
    assert torch.equal(drawn, draw(model, "LATIN SMALL LETTER A", count=3, seed=1))
    assert not torch.equal(drawn[0], drawn[1])


# -- the models


def test_the_split_model_is_the_half_trained_one_in_slices():
    torch.manual_seed(0)
    dense = build("dense", 0, SMOKE, NamesToGlyphs(SMOKE["faces"])).base
    plain = text_model("dense", 0, SMOKE)
    before = [block.ffn.gate_up.weight.detach().clone() for block in plain.blocks]
    slices = [neuron_slices(block.ffn, SMOKE["n_experts"], seed=7) for block in plain.blocks]
    made = split_blocks(plain, 7, SMOKE)
    assert len(moe_layers(made)) == SMOKE["n_layers"] and not moe_layers(dense)
    for block, weight, chosen in zip(made.blocks, before, slices, strict=True):
        assert torch.equal(block.ffn.experts.gate_up[1, : chosen.shape[1]], weight[chosen[1]])
    with pytest.raises(InputError, match="base 'mo' is unknown"):
        text_model("mo", 0, SMOKE)


def test_frequent_bytes_are_those_of_the_training_text():
    task = text_task(SMOKE)
    found = frequent(task, least=20)
    texts = b"".join(bytes(text.tolist()) for text in task.data.splits["train"].values())
    assert found.tolist() == [byte for byte in range(256) if texts.count(bytes([byte])) >= 20]


@pytest.mark.parametrize("preset", ["small", "full"])
def test_arms_train_as_many_parameters_with_experts_and_without(preset: str, task: NamesToGlyphs):
    settings = {**PRESETS[preset], "cap": 16_384, "base_steps": 1, "split_steps": 1, "base_batch": 2}

    def trained(arm: str) -> int:
        return sum(p.numel() for p in build(arm, 0, settings, task).parameters() if p.requires_grad)

    assert trained("gw") == pytest.approx(trained("dense"), rel=3e-3)
    assert trained("gw") == trained("lora") == trained("permuted")


def test_arms_of_a_seed_differ_in_what_they_say_they_do(task: NamesToGlyphs):
    models = {arm: build(arm, 0, SMOKE, task) for arm in ARMS}
    ends = {arm: model.new.weight[:2] for arm, model in models.items() if arm != "dense"}
    assert all(torch.equal(rows, ends["gw"]) for rows in ends.values())
    factors = [dict(models[arm].named_parameters())["base.blocks.0.ffn.experts.down.a"] for arm in ("gw", "random")]
    assert torch.equal(*factors)
    rows = {arm: sorted(map(tuple, models[arm].new.weight[2:].tolist())) for arm in ("gw", "permuted", "random")}
    assert rows["gw"] == rows["permuted"] != rows["random"]
    assert all(p.requires_grad for p in models["full"].parameters())
    assert models["lora"].images.everywhere and not models["gw"].images.everywhere
    assert all(not layer.router.coefficients for model in models.values() for layer in moe_layers(model).values())


def test_a_row_says_that_text_is_the_same_where_it_is():
    extras = {arm: run(arm, 0, SMOKE).extra for arm in ("gw", "lora", "dense")}
    assert [extras[arm]["text_is_the_same"] for arm in ("gw", "dense", "lora")] == [1, 1, 0]
    assert extras["gw"]["text_bits"] != extras["lora"]["text_bits"]
    assert len(extras["gw"]["pathways"]) == 2 and all(0 <= value <= 1 for value in extras["gw"]["pathways"])
    assert extras["dense"]["pathways"] == [None, None] and extras["gw"]["at_start"] > 5
    json.dumps(extras, allow_nan=False)


# -- the rule


def judged(bits=None, same=1, rise=0.2, spread=0.003, seeds=8, way=None):
    noise = torch.randn(len(BITS), seeds, generator=torch.Generator().manual_seed(0)).mul(spread).tolist()
    rows = []
    for i, (arm, value) in enumerate((BITS | (bits or {})).items()):
        for seed in range(seeds):
            metric = value + noise[i][seed]
            experts = ARMS[arm][0] == "moe"
            extra = {
                "text_is_the_same": same if arm == "random" and seed == 3 else int(ARMS[arm][2] == "plora"),
                "on_the_way": metric + 0.5 if way is None or arm != "gw" else way + noise[i][seed],
                "pathways": [0.4, 0.4 + rise + noise[i][seed]] if experts else [None, None],
                "redundancy": {kind: [0.2, 0.1] if experts else [None, None] for kind in ("text", "image")},
                "wrong_name": metric,
                "at_start": 6.0,
                "text_bits": 3.0,
                "trained": 10,
                "norm_deviation": 0.1,
            }
            rows.append(Row(arm, seed, 1, 1, 1, 1, metric, extra))
    return judge(Rows(rows), {})


def test_reproduced_if_text_stays_experts_are_no_worse_and_pathways_part():
    result = judged()
    assert result.verdict == REPRODUCED
    assert result.effect == pytest.approx(-0.01, abs=0.005)
    json.dumps(result.details, allow_nan=False)


@pytest.mark.parametrize("change", [{"same": 0}, {"bits": {"gw": 1.98}}, {"rise": -0.2}])
def test_not_reproduced_if_one_of_the_three_is_shown_to_fail(change: dict):
    assert judged(**change).verdict == NOT_REPRODUCED


@pytest.mark.parametrize("change", [{"bits": {"gw": 2.05}, "spread": 0.1}, {"rise": 0.0}, {"spread": 0.2}])
def test_not_resolved_in_between(change: dict):
    assert judged(**change).verdict == NOT_RESOLVED


@pytest.mark.parametrize(
    ("gw", "way", "answer"),
    [
        (1.86, None, "helps"),
        (1.96, None, "harms"),
        (1.91, 2.41, "makes no difference"),
        (1.91, 2.3, "helps"),
        (1.86, 2.5, "is not resolved"),
    ],
)
def test_geometry_has_an_answer_of_its_own(gw: float, way: float | None, answer: str):
    result = judged({"gw": gw, "dense": gw + 0.01}, way=way)
    assert result.details["geometry"]["answer"] == answer
    assert result.verdict == REPRODUCED  # which is not asked


def test_where_both_are_small_and_certain_no_difference_is_said_before_a_sign():
    assert judged({"gw": 1.905, "permuted": 1.91}).details["geometry"]["answer"] == "makes no difference"
    assert pytest.approx(0.04) == MARGIN and set(SMALL_ARMS) < set(ARMS)
