"""The two small models: causality, shapes, any feed-forward block per layer, counted budgets."""

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM, VisionClassifier
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import HashRouter, LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, Classification, LanguageModelling
from workbench.lib.data.types import Arrays, TextDomains


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(0)
    splits = {
        split: {d: torch.randint(256, (400,), generator=generator).to(torch.uint8) for d in ("a", "b")}
        for split in ("train", "validation", "test")
    }
    return TextDomains("noise", ("a", "b"), splits, {})


def lm(ffn, n_layers=2):
    torch.manual_seed(0)
    return DecoderLM(256, 16, n_layers, 2, ffn, 32)


def test_the_language_model_is_causal_and_mixes_block_kinds():
    model = lm(lambda layer: GLU(16, 8) if layer == 0 else MoELayer(LinearRouter(16, 4, 2), GLUExperts(4, 16, 8)))
    tokens = torch.randint(256, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = 7
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 20, 256)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_token_ids_reach_the_routers():
    model = lm(lambda layer: MoELayer(HashRouter(256, 4, 1), GLUExperts(4, 16, 8)))
    tokens = torch.randint(256, (2, 5))
    seen = []
    model.blocks[1].ffn.observe(lambda layer, routing, context: seen.append(routing))
    model(tokens)
    assert torch.equal(seen[0].expert, model.blocks[1].ffn.router.table[tokens.flatten(), 0])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 33)])
def test_token_batches_that_cannot_be_are_refused(shape):
    with pytest.raises(InputError, match="tokens has shape"):
        lm(lambda layer: GLU(16, 8))(torch.zeros(shape, dtype=torch.int64))


def test_vision_classifier_and_its_errors():
    torch.manual_seed(0)
    model = VisionClassifier(
        (1, 8, 8), 2, 16, 2, 2, lambda layer: MoELayer(LinearRouter(16, 4, 1), GLUExperts(4, 16, 8)), 10
    )
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    with pytest.raises(InputError, match="images has shape"):
        model(torch.rand(3, 1, 9, 9))
    with pytest.raises(InputError, match="patch is 3"):
        VisionClassifier((1, 8, 8), 3, 16, 1, 2, lambda layer: GLU(16, 8), 10)


def test_language_modelling_batches_and_evaluation(text):
    task = LanguageModelling(text, 16)
    model = lm(lambda layer: GLU(16, 8))
    batch = task.batch("train", 6, torch.Generator().manual_seed(3))
    assert batch.inputs.shape == (6, 16) and torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    again = task.batch("train", 6, torch.Generator().manual_seed(3))
    assert torch.equal(batch.inputs, again.inputs) and torch.equal(batch.domain, again.domain)
    assert set(task.batch("train", 4, torch.Generator(), domain=1).domain.tolist()) == {1}
    windows = list(task.batches("validation", 8))
    assert sum(len(b) for b in windows) == 2 * ((400 - 1) // 16)
    metrics = task.evaluate(model)
    assert metrics["bits_per_byte"] == pytest.approx((metrics["bits_per_byte/a"] + metrics["bits_per_byte/b"]) / 2)
    assert 7 < metrics["bits_per_byte"] < 9  # noise: 8 bits a byte
    assert model.training
    with pytest.raises(InputError, match="split 'dev' is unknown"):
        task.batch("dev", 4, torch.Generator())
    with pytest.raises(InputError, match="size is 0"):
        task.batch("train", 0, torch.Generator())
    with pytest.raises(InputError, match="seq_len is 400"):
        LanguageModelling(text, 400)


def test_classification_evaluates_by_rows():
    x, y = torch.rand(70, 1, 8, 8), torch.arange(70) % 3
    task = Classification(Arrays("toy", {"train": (x, y), "validation": (x, y)}, ("a", "b", "c"), {}))

    class Constant(torch.nn.Module):
        def forward(self, images, context=None):
            return torch.eye(3)[torch.zeros(len(images), dtype=torch.int64)]

    assert task.evaluate(Constant())["accuracy"] == pytest.approx(24 / 70)


def test_budget_counts_every_matrix_product(text):
    """One dense block by hand: forward + two backward products each, attention counted as torch counts it."""
    task = LanguageModelling(text, 16)
    batch = Batch(torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2).long())
    model = lm(lambda layer: MoELayer(LinearRouter(16, 4, 2), GLUExperts(4, 16, 8)), n_layers=1)
    budget = measure_budget(model, task, batch)
    tokens = 32
    matrices = tokens * (16 * 48 + 16 * 16 + 16 * 4 + 16 * 256) + tokens * 2 * 3 * 16 * 8
    attention = 2 * 2 * (2 * 16 * 16 * 8) * 2  # batch x heads x (QK^T and PV), as multiply-adds x 2
    assert budget.flops == 3 * 2 * matrices + attention + attention * 5 // 2
    assert budget.params == count_params(model)
    assert budget.params - budget.active_params == 2 * 3 * 16 * 8  # two of four experts idle
    assert all(p.grad is None for p in model.parameters())


def test_context_is_fresh_for_each_forward():
    model = lm(lambda layer: MoELayer(LinearRouter(16, 4, 2, coefficients={"lbl": 1.0}), GLUExperts(4, 16, 8)))
    values = []
    for _ in range(2):
        context = Context()
        model(torch.zeros(1, 4, dtype=torch.int64), context)
        values.append(context.aux.item())
    assert values[0] == values[1]
