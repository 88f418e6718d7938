"""Experts that choose tokens: whom, of how many, with what weight, in training and causally."""

import math

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.expert_choice import (
    AuxiliaryRouter,
    ExpertChoiceRouter,
    auxiliary_accuracy,
    by_mode,
    deciding,
    logistic_like,
    train_auxiliary_routers,
)
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routing import Context
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains

N, D, E = 11, 8, 4


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def router(**options) -> ExpertChoiceRouter:
    torch.manual_seed(0)
    made = ExpertChoiceRouter(D, E, **options)
    nn.init.normal_(made.projection.weight)
    return made


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("capacity", "each"), [(2.0, 6), (1.0, 3), (0.1, 1), (4.0, 11)])
def test_every_expert_takes_the_tokens_that_it_scores_highest(x, score, capacity, each):
    made = router(capacity=capacity, score=score)
    with torch.no_grad():
        routing = made(x)
    assert routing.counts.tolist() == [each] * E and routing.top_k is None  # ceil(capacity N / E)
    logits = made.projection(x).detach()
    scores = logits.softmax(-1) if score == "softmax" else 1 / (1 + torch.exp(-logits))
    for expert in range(E):  # a loop over tokens and experts
        ranked = sorted(range(N), key=lambda token, j=expert: -float(scores[token, j]))
        for token in range(N):
            weight = scores[token, expert] if token in ranked[:each] else 0.0
            assert float(routing.dense()[token, expert]) == pytest.approx(float(weight), abs=1e-7)
    assert torch.allclose(routing.probs.sum(1), torch.ones(N)) and torch.equal(routing.logits, logits)


def test_a_sigmoid_score_does_not_depend_on_the_other_experts(x):
    made = router(score="sigmoid", capacity=1.0)
    before = made(x).dense()
    made.projection.weight.data[1:] *= -3
    assert torch.equal(made(x).dense()[:, 0], before[:, 0])
    soft = router(capacity=1.0)
    before = soft(x).dense()
    soft.projection.weight.data[1:] *= -3
    assert not torch.equal(soft(x).dense()[:, 0], before[:, 0])


@pytest.mark.parametrize("mode", ["expert_choice", "auxiliary"])
def test_padding_is_chosen_by_none_and_takes_no_capacity(x, mode):
    made = router(score="sigmoid", capacity=2.0)
    made.auxiliary = AuxiliaryRouter(D, E)
    made.mode = mode
    mask = torch.tensor([True, False, True, True, False, True, True, False, True, True, False])
    loud = x.clone()
    loud[~mask] = 100 * made.projection.weight[0].detach()  # what expert 0 would want most
    routing = made(loud, Context(mask=mask))
    assert not routing.mask()[~mask].any()
    alone = made(x[mask])
    assert torch.equal(routing.mask()[mask], alone.mask())
    assert torch.allclose(routing.dense()[mask], alone.dense(), atol=1e-6)
    if mode == "expert_choice":
        assert routing.counts.tolist() == [4] * E  # ceil(2 * 7 / 4)
    none = made(x, Context(mask=torch.zeros(N, dtype=torch.bool)))
    assert none.expert.numel() == 0 and none.n_tokens == N


class Oracle(nn.Module):
    """An auxiliary router that knows what was chosen."""

    def __init__(self, chosen: torch.Tensor):
        super().__init__()
        self.chosen = chosen

    def forward(self, x):
        return torch.where(self.chosen, 1.0, -1.0)


def test_the_causal_mode_looks_at_each_token_alone_and_weighs_by_the_main_router(x):
    made = router(score="sigmoid", capacity=1.0)
    made.auxiliary = AuxiliaryRouter(D, E)
    whole = made(x).mask()
    with deciding(made, "auxiliary"):
        routing = made(x)
        alone = torch.cat([made(x[i : i + 1]).dense() for i in range(N)])
        assert torch.allclose(routing.dense(), alone, atol=1e-6)
        assert torch.equal(routing.mask(), made.auxiliary(x) > 0)
        scores = torch.sigmoid(made.projection(x))
        assert torch.equal(routing.dense(), scores * routing.mask())
        made.auxiliary = Oracle(whole)
        oracle = made(x)
    assert torch.equal(oracle.dense(), made(x).dense()) and made.mode == "expert_choice"


def test_a_choice_without_an_auxiliary_router_is_refused_and_no_choice_needs_none(x):
    made = router(score="sigmoid", capacity=1.0)
    with (
        pytest.raises(InputError, match="'auxiliary' but router has no auxiliary router"),
        deciding(nn.ModuleDict({"router": made}), "auxiliary"),
    ):
        pass
    made.mode = "auxiliary"
    with pytest.raises(InputError, match="no auxiliary router"):
        made(x)
    everyone = router(score="sigmoid", capacity=float(E))
    with deciding(everyone, "auxiliary"):
        assert bool(everyone(x).mask().all())
    with pytest.raises(InputError, match="mode 'causal'"), deciding(made, "causal"):
        pass
    with pytest.raises(InputError, match="score 'tanh'"):
        ExpertChoiceRouter(D, E, score="tanh")
    assert by_mode(GLU(D, 4), lambda: 3) == {"expert_choice": 3, "auxiliary": 3}


def test_noise_is_the_difference_of_gumbels_and_there_is_none_in_evaluation(x):
    torch.manual_seed(0)
    n, logit = 200_000, torch.tensor([-2.0, -0.3, 0.0, 1.5])
    above = (logit + logistic_like(logit.expand(n, 4)) > 0).double().mean(0)
    expected = logit.double().sigmoid()
    assert ((above - expected).abs() < 3 * (expected * (1 - expected) / n).sqrt()).all()
    gumbels = -torch.log(-torch.log(torch.rand(2, n, dtype=torch.float64)))
    drawn = logistic_like(torch.zeros(n, dtype=torch.float64))
    for q in (0.1, 0.5, 0.9):
        assert float(drawn.quantile(q)) == pytest.approx(float((gumbels[0] - gumbels[1]).quantile(q)), abs=0.05)
    noisy = router(score="sigmoid", capacity=1.0, gumbel=True)
    assert not torch.equal(noisy(x).logits, noisy(x).logits)
    noisy.eval()
    assert torch.equal(noisy(x).logits, noisy.projection(x))


def test_the_auxiliary_router_has_its_parameters():
    assert sum(p.numel() for p in AuxiliaryRouter(D, E).parameters()) == D * D // 2 + D * E // 2


@pytest.mark.parametrize("mode", ["expert_choice", "auxiliary"])
def test_a_mask_that_is_not_one_for_each_token_is_refused_and_one_of_nobody_is_none(x, mode, unchecked):
    made = router(score="sigmoid", capacity=1.0)
    made.auxiliary = AuxiliaryRouter(D, E)
    with deciding(made, mode):
        for mask in (torch.ones(1, dtype=torch.bool), torch.ones(N, dtype=torch.long), torch.ones(N)):
            with pytest.raises(InputError, match=r"context.mask is .* but must be bool \(11,\)"):
                made(x, Context(mask=mask))
        routing = made(x, Context(mask=torch.zeros(N, dtype=torch.bool)))
    assert not routing.expert.numel() and not routing.mask().any()


def test_a_state_dict_brings_the_auxiliary_router(x):
    trained = router(score="sigmoid", capacity=1.0)
    trained.auxiliary = AuxiliaryRouter(D, E)
    fresh = nn.Sequential(ExpertChoiceRouter(D, E, 1.0, "sigmoid"))
    fresh.load_state_dict(nn.Sequential(trained).state_dict())
    with deciding(fresh, "auxiliary"), deciding(trained, "auxiliary"):
        assert torch.equal(fresh(x).dense(), trained(x).dense())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(nn.Sequential(router(score="sigmoid", capacity=1.0)).state_dict())


def test_a_batch_that_shows_no_router_with_a_choice_teaches_nothing():
    class Unrouted(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.scale = router(score="sigmoid", capacity=1.0), nn.Parameter(torch.ones(256))

        def forward(self, tokens, context=None):
            return self.scale.expand(*tokens.shape, -1)

    model = Unrouted()
    train_auxiliary_routers(model, task(), TrainConfig(2, 4))
    assert model.router.auxiliary is not None and auxiliary_accuracy(model, task(), "test", 4, 1) == {}


def task() -> LanguageModelling:
    text = torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    splits = {split: {"letters": text} for split in ("train", "validation", "test")}
    return LanguageModelling(TextDomains("letters", ("letters",), splits, {}), 16)


def test_auxiliary_routers_learn_the_choice_and_nothing_reaches_the_model():
    torch.manual_seed(0)
    bank = lambda layer: MoELayer(ExpertChoiceRouter(16, 4, 1.0, "sigmoid"), GLUExperts(4, 16, 8))  # noqa: E731
    model, data = DecoderLM(256, 16, 2, 2, bank, 16), task()
    train(model, data, TrainConfig(20, 8, eval_every=None))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heard = []
    handle = model.blocks[0].ffn.observe(lambda *said: heard.append(said))
    train_auxiliary_routers(model, data, TrainConfig(150, 8, lr=1e-2))
    handle.remove()
    assert (
        not heard and model.training and all(p.grad is None for p in model.blocks[0].ffn.router.auxiliary.parameters())
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    grown = sum(after[name].numel() for name in after.keys() - before.keys())
    assert grown == 2 * (16 * 16 // 2 + 16 * 4 // 2)
    accuracy = auxiliary_accuracy(model, data, "test", 8, 4)
    assert list(accuracy) == ["blocks.0.ffn.router", "blocks.1.ffn.router"]
    assert min(accuracy.values()) > 0.85  # 0.75 by saying no
    found = by_mode(model, lambda: data.evaluate(model, "test")["bits_per_byte"])
    assert found["expert_choice"] != found["auxiliary"] and all(math.isfinite(bits) for bits in found.values())


def test_the_model_is_causal_in_the_causal_mode_alone():
    torch.manual_seed(0)
    bank = lambda layer: MoELayer(ExpertChoiceRouter(16, 4, 1.0, "sigmoid"), GLUExperts(4, 16, 8))  # noqa: E731
    model = DecoderLM(256, 16, 2, 2, bank, 12).eval()
    for block in model.blocks:
        nn.init.normal_(block.ffn.router.projection.weight)
        block.ffn.router.auxiliary = AuxiliaryRouter(16, 4)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(3))
    leaks = dict.fromkeys(("expert_choice", "auxiliary"), 0)
    for mode in leaks:
        with deciding(model, mode), torch.no_grad():
            said = model(tokens)
            for t in range(1, 12):
                other = tokens.clone()
                other[:, t] = (other[:, t] + 7) % 256
                leaks[mode] += int((model(other)[:, :t] - said[:, :t]).abs().amax() > 1e-5)
    assert leaks["auxiliary"] == 0 and leaks["expert_choice"] > 0
