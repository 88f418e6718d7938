"""ReMix: the law of its selections, the policy gradient and what it may touch, equal weights, and its trainer."""

import math
from itertools import permutations, product

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from workbench.beds.symbol_maps import SymbolMaps
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import Batch, Task
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts.remix import (
    PlackettLuceRouter,
    ReMix,
    ReMixLinear,
    ReMixTrainer,
    Selection,
    example,
    log_probability,
    rloo_surrogate,
    row_losses,
    sample_selection,
    sampled_loss,
)
from workbench.lib.measures.routing import effective_support_size

I, O = 10, 7  # noqa: E741 - the letters of the module
TASK = SymbolMaps(range(3), 3, 4)


def orders(n, k):
    """(P, k) all ordered selections."""
    return torch.tensor(list(permutations(range(n), k)))


def logits(n, seed=0, spread=1.0):
    return spread * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_q(scores, index):
    return log_probability(scores.expand(len(index), -1), index)


def tokens(*shape, seed=1):
    return torch.randn(*shape, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed=0, **options):
    torch.manual_seed(seed)
    made = ReMixLinear(nn.Linear(I, O), **{"experts": 5, "rank": 3, "top_k": 2} | options).double()
    nn.init.normal_(made.experts.b)
    nn.init.normal_(made.router.projection.weight)
    return made


def decoder(seed=0, **options):
    """A small decoder with ReMix on its feed-forward layers, and its handle."""
    torch.manual_seed(seed)
    model = DecoderLM(TASK.vocab, 16, 2, 2, lambda layer: GLU(16, 24), TASK.seq_len)
    adapter = ReMix(**{"experts": 4, "rank": 2, "top_k": 2} | options)
    adapted = Adapted(model, adapter, ("*.ffn.*",), {})
    for name, linear in match_targets(model, ("*.ffn.*",)).items():
        adapted.put(name, linear, adapter.linear(linear, name))
    for made in adapted.layers.values():
        nn.init.normal_(made.experts.b, std=0.3)
    return adapted


def mean_rows(model, batch):
    """Loss of each row of the symbol maps."""
    return F.cross_entropy(model(batch.inputs)[:, -4:].transpose(1, 2), batch.targets, reduction="none").mean(1)


def batch(size=6, seed=2):
    return TASK.batch("train", size, torch.Generator().manual_seed(seed))


# the law of the selections


@pytest.mark.parametrize(("n", "k"), [(5, 2), (4, 3), (4, 4), (3, 1)])
def test_remix_probabilities_of_all_selections_have_the_sum_one(n, k):
    q, index = logits(n).softmax(0), orders(n, k)
    expected = []
    for chosen in index.tolist():
        p, left = 1.0, 1.0
        for i in chosen:
            p, left = p * float(q[i]) / left, left - float(q[i])
        expected.append(p)
    got = log_q(logits(n), index).exp()
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert float(got.sum()) == pytest.approx(1, abs=1e-12)


def test_remix_draws_follow_that_law():
    scores, index, n = logits(5), orders(5, 2), 20_000
    drawn = sample_selection(scores.expand(n, -1), 2, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    counts = counts[index[:, 0] * 5 + index[:, 1]].numpy()
    assert counts.sum() == n  # never the same expert twice
    assert stats.chisquare(counts, n * log_q(scores, index).exp().numpy()).pvalue > 0.001


def test_remix_log_probability_survives_a_policy_that_is_almost_certain():
    scores = torch.tensor([[80.0, 0.0, -1.0, 60.0]], requires_grad=True)  # 1 - q_1 is 0 in float32
    value = log_probability(scores, torch.tensor([[0, 3, 1]]))
    assert value.item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)
    value.sum().backward()
    assert torch.isfinite(scores.grad).all() and float(scores.grad[0, 2]) == pytest.approx(-1 / (1 + math.e), abs=1e-6)


def test_remix_the_likeliest_k_are_the_best_set_once_it_is_likelier_than_half():
    found = 0
    for seed in range(150):
        scores, index = logits(5, seed, spread=3.0), orders(5, 2)
        sets: dict[frozenset, float] = {}
        for chosen, p in zip(index.tolist(), log_q(scores, index).exp().tolist(), strict=True):
            sets[frozenset(chosen)] = sets.get(frozenset(chosen), 0.0) + p
        best = max(sets, key=sets.get)
        if sets[best] > 0.5:
            found += 1
            assert best == frozenset(scores.topk(2).indices.tolist())
    assert found > 50


# the policy gradient


def exact_and_expected(samples=2, log_q_of=log_q, surrogate=rloo_surrogate):
    """(gradient of sum_J Q(J) L(J), expectation of the estimator over all M-tuples of selections), n = 5, k = 2."""
    scores, index = logits(5).requires_grad_(), orders(5, 2)
    losses = torch.rand(len(index), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (exact,) = torch.autograd.grad((log_q(scores, index).exp() * losses).sum(), scores)
    q, expected = log_q(scores, index).exp().detach(), torch.zeros(5, dtype=torch.float64)
    for chosen in product(range(len(index)), repeat=samples):
        some = list(chosen)
        estimate = surrogate(losses[some, None], log_q_of(scores, index[some])[:, None])
        expected += q[some].prod() * torch.autograd.grad(estimate, scores)[0]
    return exact, expected


@pytest.mark.parametrize("samples", [2, 3])
def test_remix_policy_gradient_is_unbiased(samples):
    exact, expected = exact_and_expected(samples)
    assert torch.allclose(expected, exact, atol=1e-12)


def test_remix_a_baseline_with_the_sample_in_it_shrinks_the_gradient():
    """1 / M in place of 1 / (M - 1): exactly (M - 1) / M of it, half at M = 2."""
    exact, expected = exact_and_expected(surrogate=lambda x, q: ((x - x.mean(0)).detach() / len(x) * q).sum(0).mean())
    assert torch.allclose(expected, exact / 2, atol=1e-12)


def test_remix_with_replacement_probabilities_would_be_biased():
    def with_replacement(scores, index):
        return scores.log_softmax(0)[index].sum(1)

    exact, expected = exact_and_expected(log_q_of=with_replacement)
    assert (expected - exact).abs().max() > 0.01


def test_remix_a_constant_added_to_all_losses_changes_nothing_and_equal_losses_give_nothing():
    scores, index = logits(5).requires_grad_(), orders(5, 2)[:4]
    losses = torch.rand(4, 1, dtype=torch.float64)

    def gradient(values):
        return torch.autograd.grad(rloo_surrogate(values, log_q(scores, index)[:, None]), scores)[0]

    assert torch.allclose(gradient(losses), gradient(losses + 7), atol=1e-12)
    assert not gradient(torch.full_like(losses, 0.3)).any()


def test_remix_surrogate_is_the_mean_over_rows_of_the_leave_one_out_form():
    losses = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    logq = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = sum(
        (losses[m] - (losses.sum(0) - losses[m]) / 3).detach() * logq[m] / 4 for m in range(4)
    )  # against the mean of the OTHERS, averaged over m
    value = rloo_surrogate(losses, logq)
    assert torch.allclose(value, expected.mean(), atol=1e-12)
    value.backward()
    assert losses.grad is None and logq.grad.any()


def test_remix_with_all_experts_active_the_order_does_not_matter():
    made, x = layer(top_k=5), tokens(6)
    before = made(x)
    nn.init.normal_(made.router.projection.weight)
    assert torch.allclose(made(x), before, atol=1e-12)
    scores, index = logits(4).requires_grad_(), orders(4, 4)
    (grad,) = torch.autograd.grad((log_q(scores, index).exp().detach() * log_q(scores, index)).sum(), scores)
    assert torch.allclose(grad, torch.zeros_like(grad), atol=1e-12)  # E[grad log Q] = 0


# the layer


@pytest.mark.parametrize(("weight", "value"), [("lora", 2 / 6), ("rslora", 2 / 6**0.5), (0.4, 0.4)])
def test_remix_weights_are_one_constant_and_the_support_is_k(weight, value):
    made = layer(weight=weight)
    for training in (True, False):
        routing = made.train(training).router(tokens(20))
        assert torch.allclose(routing.weights, torch.full((20, 2), value, dtype=torch.float64))
        assert torch.allclose(effective_support_size(routing.dense()), torch.full((20,), 2.0, dtype=torch.float64))
        assert torch.allclose(routing.dense().sum(1), torch.full((20,), 2 * value, dtype=torch.float64))
        assert ((routing.dense() > 0).sum(1) == 2).all() and not routing.weight.requires_grad


def test_remix_layer_is_the_sum_of_the_selected_loras():
    made, x = layer(granularity="token"), tokens(3, 4)
    seen = []
    made.observe(lambda layer, routing, context: seen.append(routing))
    y = made(x).flatten(0, 1)
    (routing,) = seen
    for u, out, chosen in zip(x.flatten(0, 1), y, routing.indices, strict=True):
        expected = made.base(u) + 2 / 6 * sum(made.experts.b[i] @ made.experts.a[i] @ u for i in chosen)
        assert torch.allclose(out, expected, atol=1e-12)


def test_remix_draws_in_training_and_takes_the_likeliest_otherwise():
    made, x = layer(granularity="token"), tokens(50)
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.equal(made.router(x).indices, made.router(x).probs.topk(2).indices)
    made.router.always_sample = True
    assert not torch.equal(made(x), made(x))
    made.train()
    torch.manual_seed(5)
    first = made(x)
    assert not torch.equal(made(x), first)
    torch.manual_seed(5)
    assert torch.equal(made(x), first)


def test_remix_a_sequence_has_one_selection_each_its_own():
    made, x = layer(), tokens(8, 5)
    seen = []
    made.observe(lambda layer, routing, context: seen.append(routing))
    made(x)
    (routing,) = seen
    choice = routing.indices.view(8, 5, 2)
    assert torch.equal(choice, choice[:, :1].expand(-1, 5, -1)) and len({tuple(c) for c in choice[:, 0].tolist()}) > 1
    assert routing.logq.shape == (8,) and routing.probs.shape == (40, 5)
    expected = (x.mean(1) @ made.router.projection.weight.T).softmax(-1)
    assert torch.allclose(routing.probs.view(8, 5, 5)[:, 3], expected, atol=1e-12)
    assert torch.allclose(routing.logq, log_probability(expected.log(), choice[:, 0]), atol=1e-9)
    layer(granularity="token").observe(lambda layer, routing, context: seen.append(routing))
    assert made(tokens(2, 3, 4)).shape == (2, 3, 4, O) and seen[-1].logq.shape == (2,)  # an image, by its patches


def test_remix_a_selection_made_on_the_prompt_does_not_see_the_answer():
    made, x = layer(prompt=3).eval(), tokens(4, 6)
    other = x.clone()
    other[:, 3:] = tokens(4, 3, seed=9)
    seen = []
    made.observe(lambda layer, routing, context: seen.append(routing.probs.view(4, 6, 5)[:, 0]))
    made(x), made(other)
    assert torch.equal(*seen)
    made.prompt = None
    made(x), made(other)
    assert not torch.allclose(seen[2], seen[3])


def test_remix_rows_without_a_time_axis_have_a_selection_each():
    made, seen = layer(), []
    made.observe(lambda layer, routing, context: seen.append(routing.logq.shape))
    made(tokens(9))
    assert seen == [(9,)]


def test_remix_a_loss_alone_gives_the_router_a_gradient_of_zero():
    made = layer()
    made(tokens(4, 3)).square().sum().backward()
    assert not made.router.projection.weight.grad.any() and made.experts.a.grad.any()
    (logq,) = (made.router(tokens(4)).logq.sum(),)
    logq.backward()
    assert made.router.projection.weight.grad.any()


# the trainer


def gradients(adapted):
    return {name: p.grad.clone() for name, p in adapted.named_parameters().items()}


def test_remix_surrogate_touches_the_routers_alone_and_the_loras_get_the_mean_loss():
    adapted, data = decoder(), batch()
    torch.manual_seed(1)
    loss, surrogate = sampled_loss(adapted.model.train(), data, mean_rows, 4)
    (loss + surrogate).backward()
    both = gradients(adapted)
    adapted.model.zero_grad()
    torch.manual_seed(1)
    sampled_loss(adapted.model, data, mean_rows, 4)[0].backward()
    alone = gradients(adapted)
    adapted.model.zero_grad()
    torch.manual_seed(1)
    repeated = Batch(data.inputs.repeat(4, 1), data.targets.repeat(4, 1), data.domain.repeat(4))
    TASK.loss(adapted.model, repeated)[0].backward()  # the same draws, as an ordinary batch of 4 B rows
    plain = gradients(adapted)
    assert any(".router." in name for name in both)
    for name in both:
        if ".router." in name:
            assert both[name].any() and not alone[name].any() and not plain[name].any()
        else:
            assert torch.equal(both[name], alone[name]) and torch.allclose(alone[name], plain[name], atol=1e-7)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_remix_surrogate_is_that_of_losses_and_choices_recorded_by_hand(granularity, chunk):
    adapted, data, samples = decoder(granularity=granularity), batch(), 3
    model, seen, losses = adapted.model.train(), [], []
    handles = [
        made.observe(lambda layer, routing, context: seen.append(routing.logq)) for made in adapted.layers.values()
    ]

    def rows(model, data):
        losses.append(mean_rows(model, data))
        return losses[-1]

    loss, surrogate = sampled_loss(model, data, rows, samples, chunk)
    for handle in handles:
        handle.remove()
    per = 1 if granularity == "sequence" else TASK.seq_len
    by_layer = [torch.cat(seen[i :: len(adapted.layers)]) for i in range(len(adapted.layers))]
    logq = torch.stack([part.view(samples, 6, per).sum(2) for part in by_layer]).sum(0)
    assert len(losses) == math.ceil(samples / (chunk or samples))
    losses = torch.cat(losses).view(samples, 6)
    assert torch.allclose(loss, losses.mean()) and torch.allclose(surrogate, rloo_surrogate(losses, logq), atol=1e-6)
    assert not torch.allclose(losses[0], losses[1]) and not any(made.observed for made in adapted.layers.values())


def test_remix_at_the_start_all_selections_are_alike():
    adapted = decoder()
    for made in adapted.layers.values():
        nn.init.zeros_(made.experts.b)
    loss, surrogate = sampled_loss(adapted.model.train(), batch(), mean_rows, 3)
    (loss + surrogate).backward()
    for name, grad in gradients(adapted).items():
        assert bool(grad.abs().max() > 1e-6) is name.endswith("experts.b")


def test_remix_trainer_is_a_task_and_trains_routers():
    adapted = decoder()
    trainer = ReMixTrainer(TASK, samples=3)
    assert isinstance(trainer, Task) and trainer.metric == TASK.metric
    before = {name: p.detach().clone() for name, p in adapted.named_parameters().items()}
    state = train(adapted.model, trainer, TrainConfig(4, 6, eval_batches=1), optimizer=adapted.optimizer())
    assert state.aux != 0 and TASK.metric in state.metrics
    assert all(not torch.equal(p, before[name]) for name, p in adapted.named_parameters().items())


def test_remix_trainer_uses_no_draws_in_evaluation_mode():
    adapted, data = decoder(), batch()
    adapted.model.eval()
    loss, context = ReMixTrainer(TASK).loss(adapted.model, data)
    assert torch.equal(loss, TASK.loss(adapted.model, data)[0]) and context.aux == 0.0


def test_remix_row_losses_of_any_task_are_those_written_by_hand():
    adapted, data = decoder(), batch()
    model = adapted.model.eval()
    got, expected = row_losses(TASK)(model, data), mean_rows(model, data)
    assert got.shape == (6,) and torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(got.mean(), TASK.loss(model, data)[0], atol=1e-6)
    for rows in (row_losses(TASK), mean_rows):
        model.zero_grad()
        (rows(model, data) * torch.arange(6.0)).sum().backward()
        grads = gradients(adapted)
        expected = expected if rows is mean_rows else grads
    assert all(torch.allclose(grads[name], expected[name], atol=1e-6) for name in grads)


def test_remix_takes_batches_of_any_make():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer(granularity="token")

        def forward(self, x):
            return self.layer(x)

    net, x, y = Net(), tokens(6, 3), torch.randn(6, 3, O, dtype=torch.float64)
    forms = [
        (x, lambda net, b: net(b).square().mean((1, 2))),
        ((x, y), lambda net, b: (net(b[0]) - b[1]).square().mean((1, 2))),
        ({"x": x, "y": y}, lambda net, b: (net(b["x"]) - b["y"]).square().mean((1, 2))),
    ]
    for data, rows in forms:
        loss, surrogate = sampled_loss(net, data, rows, 2)
        (loss + surrogate).backward()
        assert net.layer.router.projection.weight.grad.any()
    with pytest.raises(InputError, match="batch holds a str"):
        sampled_loss(net, ["a"], forms[0][1], 2)


# defaults, files, errors


def test_remix_defaults_fit_layers_of_any_width():
    for width in (1, 4, 20):
        made = ReMix().linear(nn.Linear(width, width + 2), "layer")
        assert (made.n_experts, made.top_k, made.experts.rank) == (8, 4, min(8, width))
        assert made.router.weight == 2 / (4 * made.experts.rank) and made(torch.randn(3, width)).shape == (3, width + 2)
    assert decoder().adapter.router_lr == 4.0
    scales = {group["lr_scale"] for group in decoder().optimizer().param_groups}
    assert scales == {1.0, 4.0}


def test_remix_state_comes_back():
    first, second = decoder(0), decoder(1)
    second.model.load_state_dict(first.model.state_dict())
    data = batch().inputs
    assert torch.equal(first.model.eval()(data), second.model.eval()(data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, "top_k is 6 but must be between 1 and n_experts = 5"),
        ({"rank": 8}, "rank is 8 but must be between 1 and the layer's smaller width, 7"),
        ({"weight": "rlora"}, "weight 'rlora' is unknown; did you mean"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"granularity": "batch"}, "granularity 'batch' is unknown"),
        ({"prompt": 0}, "prompt is 0"),
    ],
)
def test_remix_names_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        layer(**options)


def test_remix_names_bad_input():
    model, data = decoder().model.train(), batch()
    with pytest.raises(InputError, match="at least 2 selections"):
        rloo_surrogate(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(InputError, match=r"shapes \(2, 3\) and \(3, 2\)"):
        rloo_surrogate(torch.zeros(2, 3), torch.zeros(3, 2))
    for call in (lambda: sampled_loss(model, data, mean_rows, 1), lambda: ReMixTrainer(TASK, 1)):
        with pytest.raises(InputError, match="samples is 1 but must be at least 2"):
            call()
    with pytest.raises(InputError, match="chunk is 5 but must be between 1 and samples = 4"):
        sampled_loss(model, data, mean_rows, chunk=5)
    with pytest.raises(InputError, match="without a ReMix layer"):
        sampled_loss(nn.Linear(2, 2), data, mean_rows)
    with pytest.raises(InputError, match=r"rows gave a loss of shape \(\)"):
        sampled_loss(model, data, lambda model, data: mean_rows(model, data).mean())
    with pytest.raises(InputError, match="NaN or infinite"):
        layer()(tokens(3) * math.nan)
    assert isinstance(layer().router, PlackettLuceRouter) and isinstance(layer().router(tokens(3)), Selection)


def test_remix_example_maps_tokens_to_tokens():
    made = example()
    made(torch.randn(5, 32)).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
