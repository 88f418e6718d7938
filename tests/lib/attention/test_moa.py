"""MoA: the influence is the derivative it claims to be, plans keep their bounds, and decoding is masked attention."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.span_attention.reference import visible
from workbench.lib.attention import moa
from workbench.lib.attention.moa import HeteroKVCache, MoA, Plan, SpanRule
from workbench.lib.attention.moa_plan import span_losses
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Context

D, H, T, BLOCK = 16, 2, 16, 4


def language_model(seed=0, layers=2, dtype=torch.float64, rope=True, attention=Attention) -> DecoderLM:
    torch.manual_seed(seed)
    model = DecoderLM(
        20, D, layers, H, lambda _: GLU(D, 8), 4 * T, lambda _: attention(D, H, True, rope), learned_positions=not rope
    )
    return model.to(dtype)


def rows(batch=3, time=T, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    answers = torch.rand(batch, time, generator=generator) < 0.3
    answers[:, 0], answers[:, -1] = False, True
    return torch.randint(20, (batch, time), generator=generator), answers


def importance(lengths=(8, 16), layers=2, heads=2, seed=0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(layers, heads, n // BLOCK, n // BLOCK, generator=generator, dtype=torch.float64).tril()
        for n in lengths
    }


RULES = [SpanRule(4, 0, 0), SpanRule(8, 0, 0), SpanRule(0, 0.5, 0), SpanRule(0, 1, 0)]


# 1. influence


class Masked(Attention):
    """Dense attention with one entry (sample, head, row, column) on its way, by `epsilon`, to being masked."""

    entry, epsilon = None, 0.0

    def forward(self, x, context=None):
        q, k, v = self.heads(x)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible(x.shape[1], 10**6, 0), float("-inf"))
        a = scores.softmax(-1)
        if self.entry is not None:
            b, h, i, j = self.entry
            row = a[b, h, i]
            without = torch.where(torch.arange(len(row)) == j, 0, row / (1 - row[j]))
            change = torch.zeros_like(a)
            change[b, h, i] = without - row
            a = a + self.epsilon * change
        return self.out((a @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layer", [0, 1])
def test_moa_influence_is_the_derivative_of_masking_an_entry(layer):
    model = language_model(attention=Masked)
    tokens, answers = rows(2)
    effects = list(moa.masking_effects(model, tokens, answers))
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        b, h = int(torch.randint(2, (), generator=generator)), int(torch.randint(H, (), generator=generator))
        i = int(torch.randint(1, T, (), generator=generator))
        j = int(torch.randint(i + 1, (), generator=generator))
        attention = model.blocks[layer].attention
        attention.entry, losses = (b, h, i, j), []
        for epsilon in (1e-4, -1e-4):
            attention.epsilon = epsilon
            losses.append(moa._answer_losses(model, tokens, answers).sum().item())
        attention.entry = None
        difference = (losses[0] - losses[1]) / 2e-4
        assert effects[layer][b, h, i, j].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_moa_the_gradient_of_a_row_has_no_part_along_the_row():
    """sum_j A_ij (G_ij - S_i) = 0, which is sum_j E_ij (1 - A_ij) = 0."""
    model = language_model(layers=1, attention=Masked)
    tokens, answers = rows()
    (effect,) = moa.masking_effects(model, tokens, answers)
    x = model.blocks[0].attention_norm(model.embedding(tokens))
    q, k, _ = model.blocks[0].attention.heads(x)
    a = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible(T, T, 0), float("-inf")).softmax(-1)
    assert effect[..., 1:, :].abs().max() > 1e-4
    assert (effect * (1 - a))[..., 1:, :].sum(-1).abs().max() < 1e-12
    assert not effect.masked_select(~visible(T, T, 0)).any()


def test_moa_influence_is_summed_over_blocks_and_averaged_over_samples():
    model, (tokens, answers) = language_model(), rows()
    found = moa.attention_influence(model, tokens, answers, BLOCK)
    effects = torch.stack(list(moa.masking_effects(model, tokens, answers))).abs()  # (L, B, H, T, T)
    wanted = effects.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).sum((-1, -3)).mean(1)
    assert found.shape == (2, H, T // BLOCK, T // BLOCK) and torch.allclose(found, wanted, atol=1e-15)
    alone = [moa.attention_influence(model, tokens[i : i + 1], answers[i : i + 1], BLOCK) for i in range(3)]
    assert torch.allclose(found, torch.stack(alone).mean(0), atol=1e-15)  # each sample of its own loss


def test_moa_influence_leaves_the_model_as_it_was():
    model, (tokens, answers) = language_model(), rows()
    before = model(tokens, Context())
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen model has an influence too
    with torch.no_grad():
        frozen = moa.attention_influence(model, tokens, answers, BLOCK)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert torch.allclose(frozen, moa.attention_influence(model, tokens, answers, BLOCK), atol=1e-15)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(tokens, Context()), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_moa_only_answers_count_in_the_loss():
    model, (tokens, answers) = language_model(), rows()
    last = torch.zeros_like(answers)
    last[:, T // 2] = True
    other = tokens.clone()
    other[:, T // 2 + 1 :] = (other[:, T // 2 + 1 :] + 1) % 20
    first, second = (moa.attention_influence(model, t, last, BLOCK) for t in (tokens, other))
    assert torch.equal(first, second)  # what comes after the only answer has no influence
    assert not torch.allclose(first, moa.attention_influence(model, tokens, answers, BLOCK))
    logits = model(tokens, Context()).detach()
    picked = torch.tensor([F.cross_entropy(logits[b, T // 2 - 1], tokens[b, T // 2]) for b in range(3)])
    assert moa.answer_loss(model, tokens, last) == pytest.approx(picked.mean().item(), rel=1e-6)


def test_moa_answers_are_the_dense_models_own():
    model, (tokens, answers) = language_model(), rows()
    own = moa.own_answers(model, tokens, answers)
    assert torch.equal(own[~answers], tokens[~answers]) and not torch.equal(own, tokens)
    said = model(own, Context())[:, :-1].argmax(-1)  # each answer in view of the answers before it
    assert torch.equal(own[:, 1:][answers[:, 1:]], said[answers[:, 1:]])


def test_moa_a_key_head_needs_what_any_of_its_queries_needs():
    values = importance(heads=4)[8]
    shared = moa.per_key_head(values, 2)
    assert torch.equal(shared[:, 0], torch.maximum(values[:, 0], values[:, 1])) and shared.shape[1] == 2
    assert torch.equal(moa.per_key_head(values, 4), values)
    with pytest.raises(InputError, match="n_kv_heads is 3 but must divide the 4 heads"):
        moa.per_key_head(values, 3)


# 2. and the plan in the model


def test_moa_a_rule_of_the_whole_length_is_dense_attention():
    x = torch.randn(2, T, D, dtype=torch.float64)
    for rope in (False, True):
        dense = Attention(D, H, causal=True, rope=rope).double()
        for rule in (SpanRule(T, 0, sink=3), SpanRule(0, 1, sink=0)):
            assert torch.equal(MoA.from_dense(dense, rule)(x), dense(x))
            assert rule.layout(T, BLOCK).equal(torch.ones(4, 4).tril().bool()) and rule.kept(T) == T
            assert not span_losses(importance()[16], [rule], 16, BLOCK).any()


def test_moa_a_plan_is_put_into_a_model_and_computes_masked_attention():
    model, (tokens, _) = language_model(), rows()
    dense = copy.deepcopy(model)
    plan = Plan.of(
        [[SpanRule(4, 0, 2), SpanRule(0, 0.5, 2)], [SpanRule(1, 0, 2), SpanRule(0, 1, 2)]], importance(), BLOCK
    )
    used = moa.use_spans(model, plan)
    assert used is model and [m.spans(T) for m in moa.attention_layers(model)] == plan.spans(T)
    assert model.state_dict().keys() == dense.state_dict().keys()
    spans = dict(zip(moa.attention_layers(dense), plan.spans(T), strict=True))

    def masked(layer, args, output):
        q, k, v = layer.heads(args[0])
        keep = torch.stack([visible(T, span, 2) for span in spans[layer]])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return layer.out(y.transpose(1, 2).flatten(2))

    before = dense(tokens, Context())
    for layer in spans:
        layer.register_forward_hook(masked)
    after = dense(tokens, Context())
    assert torch.allclose(model(tokens, Context()), after, atol=1e-12) and not torch.allclose(before, after)
    moa.use_spans(model, Plan.of([[SpanRule(0, 1, 2)] * 2] * 2, importance(), BLOCK))  # and out again
    assert torch.allclose(model(tokens, Context()), before, atol=1e-12)


def test_moa_shares_the_projections_and_reads_dense_checkpoints(tmp_path):
    dense = Attention(D, H, causal=True, rope=True)
    made = MoA.from_dense(dense, SpanRule(4, 0))
    assert made.qkv is dense.qkv and made.out is dense.out and made.rope
    other = MoA(D, H, SpanRule(4, 0), rope=True)
    save_model(dense, str(tmp_path / "dense.safetensors"))
    load_model(other, str(tmp_path / "dense.safetensors"))
    x = torch.randn(2, T, D)
    assert torch.equal(other(x), made(x))


def test_moa_one_sequence_is_a_batch_of_one_and_the_spans_follow_its_length():
    layer, x = MoA(D, H, [SpanRule(0, 0.5, 1), SpanRule(-4, 0.75, 1)]), torch.randn(T, D)
    assert torch.allclose(layer(x), layer(x[None])[0], atol=1e-6)
    assert layer.spans(T) == [8, 8] and layer.spans(32) == [16, 20] and layer.spans(4) == [2, 1]


def test_moa_can_be_trained():
    layer = MoA(D, H, [SpanRule(3, 0, 1), SpanRule(0, 0.5, 1)]).double()
    x = torch.randn(1, 6, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,), fast_mode=True)


def test_moa_validation_takes_the_plan_with_the_least_loss_at_an_unseen_length():
    model, (tokens, answers) = language_model(), rows(time=24)
    plans = [Plan.of([[rule] * H] * 2, importance(), BLOCK) for rule in RULES]
    best, losses = moa.best_plan(model, plans, tokens, answers)
    by_hand = [moa.answer_loss(moa.use_spans(language_model(), plan), tokens, answers) for plan in plans]
    assert losses == pytest.approx(by_hand) and best is plans[by_hand.index(min(by_hand))]
    assert [m.rules for m in moa.attention_layers(model)] == list(best.rules)
    with pytest.raises(InputError, match="tokens has length 16, which was profiled"):
        moa.best_plan(model, plans, *rows())
    with pytest.raises(InputError, match="plans is empty"):
        moa.best_plan(model, [], tokens, answers)


def test_moa_bad_models_and_answers_are_named():
    tokens, answers = rows()
    with pytest.raises(InputError, match="without an Attention"):
        moa.attention_influence(nn.Linear(2, 2), tokens, answers, BLOCK)
    with pytest.raises(InputError, match="length is 16 but must be a multiple of block = 5"):
        moa.attention_influence(language_model(), tokens, answers, 5)
    with pytest.raises(InputError, match="model has spans already"):
        sparse = moa.use_spans(language_model(), Plan.of([[RULES[0]] * H] * 2, importance(), BLOCK))
        moa.attention_influence(sparse, tokens, answers, BLOCK)
    with pytest.raises(InputError, match="answers must hold a token of each sample"):
        moa.own_answers(language_model(), tokens, torch.zeros_like(answers))
    with pytest.raises(InputError, match=r"shapes \(3, 16\) and \(3, 15\)"):
        moa._answer_losses(language_model(), tokens, answers[:, 1:])
    with pytest.raises(InputError, match=r"plan is for \(1, 2\) but must be for \(2, 2\), \(layers, heads\)"):
        moa.use_spans(language_model(), Plan.of([[RULES[0]] * H], importance(layers=1), BLOCK))
    with pytest.raises(InputError, match="attention is not causal"):
        MoA.from_dense(Attention(D, H, causal=False), RULES[0])
    with pytest.raises(InputError, match="not causal or differ"):
        moa.attention_layers(nn.ModuleList([Attention(D, H, causal=False)]))
    with pytest.raises(InputError, match="rules has 3 entries but must have one for each head, 2"):
        MoA(D, H, RULES[:3])
    with pytest.raises(InputError, match=r"rules have the sinks \[0, 1\] but must share one"):
        MoA(D, H, [SpanRule(1, 0, 0), SpanRule(1, 0, 1)])


# 3. decoding


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.integers(1, 20),
    sink=st.integers(0, 5),
    alphas=st.lists(st.integers(1, 24), min_size=4, max_size=4),
    rope=st.booleans(),
)
def test_moa_decoding_equals_masked_attention_at_every_step(prompt, sink, alphas, rope):
    """Before the windows fill and after, with keys rotated at their positions in the text."""
    torch.manual_seed(0)
    layer, x, n = MoA(D, 4, [SpanRule(alpha, 0, sink) for alpha in alphas], rope=rope), torch.randn(2, 20, D), 20
    cache, whole = layer.cache(n), layer(x)
    steps = [layer.step(x[:, :prompt], cache)]
    for i in range(prompt, n):
        steps.append(layer.step(x[:, i : i + 1], cache))
        assert cache.nbytes == sum(min(i + 1, sink + span) for span in alphas) * 2 * (D // 4) * 2 * 4
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
    assert cache.length == n and sum(x.numel() * x.element_size() for x in (cache.k, cache.v)) == cache.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moa_cache_bytes(dtype):
    cache = HeteroKVCache([3, 50, 8], sink=2)
    assert cache.nbytes == 0
    for n in (1, 2, 4, 9, 30, 60):
        new = n - cache.length
        cache.append(torch.zeros(2, 3, new, 8, dtype=dtype), torch.zeros(2, 3, new, 8, dtype=dtype))
        assert cache.nbytes == 2 * sum(min(n, 2 + span) for span in (3, 50, 8)) * 8 * 2 * dtype.itemsize


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    sink=st.integers(0, 4),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    bounded=st.booleans(),
)
def test_moa_a_head_holds_the_sink_and_its_last_span_in_order(spans, sink, pieces, bounded):
    total = sum(pieces)
    cache = HeteroKVCache(spans, sink, total if bounded else None)
    text = torch.arange(total, dtype=torch.float32).view(1, 1, total, 1).expand(1, len(spans), total, 1)
    begin = 0
    for piece in pieces:
        cache.append(text[:, :, begin : begin + piece], -text[:, :, begin : begin + piece])
        begin += piece
        for head, span in enumerate(spans):
            held = [t for t in range(begin) if t < sink or begin - 1 - t < span]
            k, v = cache.view(head)
            assert k.flatten().tolist() == held and v.flatten().tolist() == [-t for t in held]


def test_moa_bad_input_of_the_cache_is_named():
    token = torch.zeros(1, 2, 1, 4)
    for message, arguments in {
        "spans is \\[\\] but must hold at least one entry": ([], 0),
        "spans is \\[0, 1\\] but must hold": ([0, 1], 0),
        "sink is -1": ([1], -1),
        "max_length is 0": ([1], 0, 0),
    }.items():
        with pytest.raises(InputError, match=message):
            HeteroKVCache(*arguments)
    cache = HeteroKVCache([2, 3], 1, max_length=2)
    with pytest.raises(InputError, match="the cache is empty"):
        cache.view(0)
    with pytest.raises(InputError, match=r"must both be \(batch, 2, new, d\)"):
        cache.append(token[:, :1], token[:, :1])
    with pytest.raises(InputError, match="k brings 3 tokens to 0 but max_length is 2"):
        cache.append(token.expand(1, 2, 3, 4), token.expand(1, 2, 3, 4))
    cache.append(token, token)
    with pytest.raises(
        InputError, match=r"k is torch.float64 of shape \(1, 2, 1, 4\) but the cache holds torch.float32"
    ):
        cache.append(token.double(), token.double())
    with pytest.raises(InputError, match="head is 2 but must be between 0 and 1"):
        cache.view(2)
    layer = MoA(D, H, SpanRule(2, 0, 1))
    cache = layer.cache(5)
    layer.step(torch.zeros(1, 3, D), cache)
    with pytest.raises(InputError, match="exactly one once the cache holds text"):
        layer.step(torch.zeros(1, 2, D), cache)


def test_moa_the_example_maps_tokens_to_tokens():
    assert moa.example()(torch.randn(5, 32)).shape == (5, 32)


COMPILED = """
import torch
from workbench.lib.attention.moa import MoA, SpanRule
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM

rules = [SpanRule(4, 0, 2), SpanRule(0, 0.5, 2)]
model = DecoderLM(20, 16, 2, 2, lambda _: GLU(16, 8), 64, lambda _: MoA(16, 2, rules, rope=True), False)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
for time in (16, 13, 11):
    tokens = torch.randint(20, (3, time))
    outputs = model(tokens), compiled(tokens)
    gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in outputs]
    for one, other in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(one, other)
"""


def test_moa_compiles_without_a_graph_break():
    """In a process of its own, because the checks of shapes in the tests are what cannot be compiled."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
