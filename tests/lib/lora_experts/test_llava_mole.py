"""LLaVA-MoLE: one expert a token with weight 1, and the four things its router may learn from."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.adapt import LoRALinear, adapt, load_adapter
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward, activated
from workbench.lib.core.adapt.layer import Forward
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM, VisionClassifier
from workbench.lib.core.recompute import Call
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.llava_mole import ROUTER_GRADS, Top1FeedForward, Top1Router, sample_value
from workbench.lib.lora_experts.mixlora import MixLoRARouter

X = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(3))
SPARSE = ("straight_through", "balance_only", "prob_scaled")


class Llama(nn.Module):
    """Three matrices with biases."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


BLOCKS = {
    "gated": Llama,
    "fused": lambda: GLU(6, 9),
    "plain": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
}


def put(rule: str = "straight_through", kind: str = "gated", shake: bool = True, **options):
    """A model of one block in float64, adapted; and the handle."""
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[kind]()).double()
    adapted = adapt(model, "llava-mole", **{"experts": 4, "rank": 2, "alpha": 3, "router_grad": rule} | options)
    model.double()
    if shake:
        for name, p in adapted.named_parameters().items():
            nn.init.normal_(p, std=1.0 if "router" in name else 0.3)
    return adapted


def router_gradients(adapted, y: Tensor) -> list[Tensor]:
    """The gradient of a loss of y by the router's weight and bias; zeros where there is none."""
    torch.manual_seed(9)
    router = adapted.layers["0"].router
    loss = (y * torch.randn_like(y)).sum()
    found = torch.autograd.grad(loss, list(router.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, router.parameters(), strict=True)]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rule", ROUTER_GRADS)
def test_llava_mole_new_experts_are_the_frozen_block_whatever_the_router_says(kind, rule):
    adapted = put(rule, kind, shake=False)
    layer = adapted.layers["0"]
    nn.init.normal_(layer.router.projection.weight, std=3.0)
    assert isinstance(layer, Top1FeedForward)
    torch.testing.assert_close(adapted.model(X), layer.base(X), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ROUTER_GRADS)
def test_llava_mole_one_expert_is_plain_lora_in_outputs_and_gradients(rule):
    adapted = put(rule, experts=1)
    torch.manual_seed(0)
    plain = nn.Sequential(Llama()).double()
    lora = adapt(plain, "lora", rank=2, alpha=3)
    plain.double()
    banks = adapted.layers["0"].experts
    with torch.no_grad():
        for name, layer in lora.layers.items():
            one = banks[name.removeprefix("0.")]
            layer.experts.a.copy_(one.a), layer.experts.b.copy_(one.b)
    torch.testing.assert_close(adapted.model(X), plain(X), atol=1e-12, rtol=1e-12)
    for model in (adapted.model, plain):
        model(X).sin().sum().backward()
    for name, layer in lora.layers.items():
        one = banks[name.removeprefix("0.")]
        torch.testing.assert_close(one.a.grad, layer.experts.a.grad, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(one.b.grad, layer.experts.b.grad, atol=1e-12, rtol=1e-12)
    assert all(g.abs().max() < 1e-12 for g in router_gradients(adapted, adapted.model(X)))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rule", ["straight_through", "balance_only"])
@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_llava_mole_sparse_equals_masked_dense_and_whole_blocks_as_experts(kind, rule, path):
    adapted = put(rule, kind)
    layer = adapted.layers["0"]
    layer.path = path
    routing = layer.router(X, Context())
    chosen = routing.probs.argmax(1)
    mask = torch.nn.functional.one_hot(chosen, 4).double()
    assert torch.equal(routing.dense(), mask)

    def masked(name: str, x: Tensor) -> Tensor:
        every = torch.stack([x @ layer.experts[name].delta(e).T for e in range(4)], 1)
        return layer.block.linears[name](x) + (mask[:, :, None] * every).sum(1)

    inputs = {name: masked(name, X) for name in layer.block.linears if name != layer.block.down}
    expected = masked(layer.block.down, activated(layer.block, inputs))
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(X), expected, atol=1e-12, rtol=1e-12)
        whole = RoutedFeedForward.mix(layer, X, routing)
        torch.testing.assert_close(whole, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(adapted.model(X), expected, atol=1e-12, rtol=1e-12)  # with gradients, the other path


def test_llava_mole_is_mixlora_with_one_expert_a_token():
    ours, theirs = put("balance_only"), adapt(nn.Sequential(Llama()), "mixlora", experts=4, rank=2, alpha=3, top_k=1)
    theirs.model.double()
    with torch.no_grad():
        ours.layers["0"].router.projection.bias.zero_()
        state = {k: v for k, v in ours.layers["0"].state_dict().items() if not k.endswith("projection.bias")}
        theirs.layers["0"].load_state_dict(state)
    assert isinstance(theirs.layers["0"].router, MixLoRARouter)
    torch.testing.assert_close(ours.model(X), theirs.model(X), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "same"),
    [("straight_through", True), ("balance_only", True), ("prob_scaled", False), ("dense", False)],
)
def test_llava_mole_a_sharper_router_changes_nothing_unless_the_rule_weighs_by_p(rule, same):
    adapted = put(rule)
    before = adapted.model(X)
    with torch.no_grad():
        for p in adapted.layers["0"].router.parameters():
            p *= 1.7
    assert torch.allclose(adapted.model(X), before, atol=1e-12) is same


def test_llava_mole_balance_only_gives_the_router_no_gradient_of_the_task():
    adapted = put("balance_only")
    assert all(not g.any() for g in router_gradients(adapted, adapted.model(X)))
    balance = torch.autograd.grad(adapted.losses()["lbl"], list(adapted.layers["0"].router.parameters()))
    assert all(g.abs().max() > 1e-6 for g in balance)
    for rule in ("straight_through", "prob_scaled", "dense"):
        adapted = put(rule)
        assert all(g.abs().max() > 1e-3 for g in router_gradients(adapted, adapted.model(X)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_llava_mole_straight_through_is_the_slope_of_the_dense_surrogate(kind):
    """sum_j (onehot_j + p_j - c_j) delta_j in every linear layer, c the probabilities where the slope is taken."""
    adapted = put(kind=kind)
    layer, router = adapted.layers["0"], adapted.layers["0"].router
    fixed = router(X, Context())
    onehot, constant = fixed.dense(), fixed.probs.detach()
    torch.manual_seed(9)
    weights = torch.randn(23, 6, dtype=torch.float64)

    @torch.no_grad()
    def surrogate(move: float, direction: list[Tensor]) -> float:
        moved = [p.detach() + move * d for p, d in zip(router.parameters(), direction, strict=True)]
        probs = torch.softmax(X @ moved[0].T + moved[1], -1)
        gates = onehot + probs - constant

        def linear(name: str, x: Tensor) -> Tensor:
            every = torch.stack([x @ layer.experts[name].delta(e).T for e in range(4)], 1)
            return layer.block.linears[name](x) + (gates[:, :, None] * every).sum(1)

        inputs = {name: linear(name, X) for name in layer.block.linears if name != layer.block.down}
        return float((weights * linear(layer.block.down, activated(layer.block, inputs))).sum())

    gradients = router_gradients(adapted, adapted.model(X))
    for seed in range(3):
        torch.manual_seed(seed)
        direction = [torch.randn_like(g) for g in gradients]
        slope = (surrogate(1e-5, direction) - surrogate(-1e-5, direction)) / 2e-5
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert slope == pytest.approx(expected, rel=1e-6)


def test_llava_mole_prob_scaled_multiplies_the_chosen_update_alone():
    adapted = put("prob_scaled")
    layer = adapted.layers["0"]
    routing = layer.router(X, Context())
    p, e = routing.probs.max(1)
    x = X[4]

    def linear(name: str, value: Tensor) -> Tensor:
        return layer.block.linears[name](value) + p[4] * (layer.experts[name].delta(int(e[4])) @ value)

    expected = linear("down_proj", layer.block.activate(linear("gate_proj", x), linear("up_proj", x)))
    torch.testing.assert_close(adapted.model(X)[4], expected, atol=1e-12, rtol=1e-12)


def test_llava_mole_dense_adds_every_update_by_its_probability():
    adapted = put("dense")
    layer = adapted.layers["0"]
    probs = layer.router(X, Context()).probs

    def linear(name: str, x: Tensor) -> Tensor:
        mean = torch.einsum("ne,eoi->noi", probs, torch.stack([layer.experts[name].delta(e) for e in range(4)]))
        return layer.block.linears[name](x) + torch.einsum("noi,ni->no", mean, x)

    expected = linear("down_proj", layer.block.activate(linear("gate_proj", X), linear("up_proj", X)))
    torch.testing.assert_close(adapted.model(X), expected, atol=1e-12, rtol=1e-12)


def test_llava_mole_low_rank_products_a_token_do_not_depend_on_k():
    counts = []
    for experts in (1, 3, 8):
        adapted = put("balance_only", experts=experts)
        layer = adapted.layers["0"]
        layer.path = "grouped"
        routing = layer.router(X, Context())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.mix(X, routing)
        counts.append(counter.get_total_flops())
    base, low_rank = 3 * 6 * 9, 3 * 2 * (6 + 9)
    assert counts == [2 * len(X) * (base + low_rank)] * 3


# the balance loss


def layer_routing(logits: Tensor, rule: str = "straight_through"):
    return Top1Router(6, logits.shape[1], rule).double().route(logits)


def reported(decisions, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the balance makes of these decisions of one forward; its coefficient is 0.5."""
    adapted = put()
    layer, forward = adapted.layers["0"], Forward()
    for routing in decisions:
        call = Call(layer, Context(mask=None if mask is None else mask.bool().flatten()), X[0])
        layer.balance.add(call, x, routing, 0.5, None if mask is None else mask.bool())
        forward.calls.append(call)
    (loss,) = forward.losses().values()
    return loss


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_llava_mole_balance_loss_is_one_over_k_for_uniform_probabilities(experts):
    uniform = layer_routing(torch.zeros(21, experts, dtype=torch.float64))
    loss = reported([uniform] * 2, torch.zeros(3, 7, 6))
    assert experts * loss.item() == pytest.approx(0.5)
    assert sample_value(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.75, 0.25]])).tolist() == [0.75]


@pytest.mark.parametrize("rule", ROUTER_GRADS)
def test_llava_mole_balance_loss_is_by_sample_over_all_layers_and_without_padding(rule):
    x = torch.zeros(3, 4, 6)
    torch.manual_seed(5)
    logits = [2 * torch.randn(12, 4, dtype=torch.float64) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    loss = reported([layer_routing(one, rule) for one in logits], x, mask)
    expected = 0.0
    for b in range(3):
        rows = torch.cat([one.view(3, 4, 4)[b][mask[b].bool()] for one in logits])
        onehot = torch.nn.functional.one_hot(rows.argmax(1), 4).double()
        expected += (rows.softmax(1).mean(0) * onehot.mean(0)).sum() / 3
    torch.testing.assert_close(loss, 0.5 * expected)
    other = [one.clone() for one in logits]
    for one in other:
        one[~mask.flatten().bool()] = torch.tensor([9.0, -9.0, 3.0, 0.0]).double()
    assert torch.equal(reported([layer_routing(one, rule) for one in other], x, mask), loss)
    assert not torch.allclose(reported([layer_routing(one, rule) for one in other], x), loss)


def test_llava_mole_balance_loss_times_k_is_switch_s_of_each_sample():
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    torch.manual_seed(5)
    logits = 2 * torch.randn(12, 4, dtype=torch.float64)
    probs = logits.softmax(-1).view(3, 4, 4)
    theirs = switch.load_balancing_loss_func(probs, probs.argmax(-1))
    torch.testing.assert_close(4 * reported([layer_routing(logits)], torch.zeros(3, 4, 6)), 0.5 * theirs)


def test_llava_mole_a_row_of_padding_alone_does_not_count():
    x, mask = torch.zeros(2, 3, 6), torch.tensor([[1, 1, 1], [0, 0, 0]])
    torch.manual_seed(6)
    logits = torch.randn(6, 4, dtype=torch.float64)
    alone = reported([layer_routing(logits[:3])], x[:1])
    torch.testing.assert_close(reported([layer_routing(logits)], x, mask), alone)


def test_llava_mole_model_of_the_workbench_reports_its_loss_in_the_context():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    adapted = adapt(model, "llava-mole", balance=0.1)
    seen = []
    for layer in adapted.layers.values():
        if isinstance(layer, RoutedFeedForward):
            layer.observe(lambda layer, routing, context: seen.append(routing.probs))
    context = Context()
    model(TOKENS, context)
    probs = torch.cat([one.view(3, 9, 3) for one in seen], 1)  # both layers of a sample
    onehot = torch.nn.functional.one_hot(probs.argmax(-1), 3).float()
    torch.testing.assert_close(context.aux, 0.1 * (probs.mean(1) * onehot.mean(1)).sum(1).mean())
    assert torch.equal(adapted.losses()["lbl"], context.aux)


# on any model


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def mixtral():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config)


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=2))


@pytest.mark.parametrize("slug", ["llava-mole", "mixlora"])
@pytest.mark.parametrize(("build", "blocks"), [(llama, 2), (mixtral, 2 * 4), (bert, 2)])
def test_llava_mole_and_mixlora_adapt_models_of_transformers(slug, build, blocks):
    """Each of Mixtral's packed experts is a block, BERT's blocks are in two modules, and what is left gets LoRA."""
    model = build().eval()
    before = model(input_ids=TOKENS).logits
    adapted = adapt(model, slug)
    kinds = [isinstance(layer, RoutedFeedForward) for layer in adapted.layers.values()]
    assert sum(kinds) == blocks and len(kinds) > 4
    assert all(
        routed or type(layer) is LoRALinear for routed, layer in zip(kinds, adapted.layers.values(), strict=True)
    )
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, atol=1e-5, rtol=1e-5)
    optimizer = adapted.optimizer(1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (model(input_ids=TOKENS).logits.square().mean() + sum(adapted.losses().values())).backward()
        optimizer.step()
    # an expert of Mixtral to which no token was sent has none
    grads = [p.grad for p in adapted.parameters() if build is not mixtral or p.grad is not None]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and grads
    model.eval()
    assert not torch.equal(model(input_ids=TOKENS).logits, before)
    adapted.remove()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("slug", ["llava-mole", "mixlora"])
def test_llava_mole_and_mixlora_adapt_the_models_of_the_workbench(slug):
    torch.manual_seed(0)
    reader = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    seer = VisionClassifier((1, 8, 8), 4, 16, 2, 2, lambda layer: GLU(16, 24), 10)
    for model, inputs in ((reader, TOKENS), (seer, torch.rand(5, 1, 8, 8))):
        before = model(inputs)
        adapted = adapt(model, slug)
        assert sum(isinstance(layer, RoutedFeedForward) for layer in adapted.layers.values()) == 2
        torch.testing.assert_close(model(inputs), before)
        context = Context()
        (model(inputs, context).square().mean() + context.aux).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters())


def test_llava_mole_has_defaults_for_layers_of_any_width():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), nn.Linear(3, 2))
    adapted = adapt(net, "llava-mole", "*")
    assert [type(layer) for layer in adapted.layers.values()] == [Top1FeedForward, LoRALinear, LoRALinear]
    assert net(torch.randn(5, 4)).shape == (5, 2) and net(torch.randn(2, 5, 4)).shape == (2, 5, 2)
    assert adapted.adapter.facts == ()
    with pytest.raises(InputError, match="cannot be merged back"):
        adapted.merge_back()
    lone = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    adapted = adapt(lone, "llava-mole")
    nn.init.normal_(adapted.layers["0"].experts.b)
    expected = lone(x)
    torch.testing.assert_close(adapted.merge_back()(x), expected)


@pytest.mark.parametrize("rule", ROUTER_GRADS)
def test_llava_mole_is_saved_and_restored_bit_for_bit(tmp_path, rule):
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    clean = copy.deepcopy(model)
    adapted = adapt(model, "llava-mole", rank=2, router_grad=rule)
    for p in adapted.parameters():
        nn.init.normal_(p, std=0.2)
    adapted.save(tmp_path / "adapter")
    again = load_adapter(clean, tmp_path / "adapter")
    assert torch.equal(clean(TOKENS), model(TOKENS)) and again.options == adapted.options


def test_llava_mole_dropout_drops_what_the_updates_see_alone():
    adapted = put(dropout=0.5)
    layer = adapted.layers["0"]
    assert not torch.equal(adapted.model(X), adapted.model(X))
    adapted.model.eval()
    assert torch.equal(adapted.model(X), adapted.model(X))
    adapted.model.train()
    with torch.no_grad():
        for bank in layer.experts.values():
            bank.b.zero_()
    torch.testing.assert_close(adapted.model(X), layer.base(X))


def test_llava_mole_router_is_in_float32_and_has_a_bias():
    router = Top1Router(6, 4)
    assert router.projection.bias.shape == (4,) and router(X.bfloat16()).probs.dtype == torch.float32
    with pytest.raises(InputError, match="top_k is 2 but this rule always has 1"):
        router.set_top_k(2)
    router.set_top_k(1)
    assert Top1Router(6, 4, "dense").top_k == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_grad": "straight"}, "router_grad 'straight' is unknown; did you mean 'straight_through'"),
        ({"experts": 0}, "n_experts is 0 but must be at least 1"),
        ({"rank": 7}, "rank is 7 but must be between 1 and the layer's smaller width, 6"),
        ({"balance": -1.0}, r"coefficients\['lbl'\] is -1.0 but must be at least 0"),
        ({"top_k": 2}, "option of llava-mole 'top_k' is unknown"),
    ],
)
def test_llava_mole_names_wrong_options_and_leaves_the_model_as_it_was(options, message):
    model = nn.Sequential(GLU(6, 9))
    with pytest.raises(InputError, match=message):
        adapt(model, "llava-mole", **options)
    assert type(model[0]) is GLU and not model._forward_pre_hooks and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="router_grad"):
        Top1Router(6, 4, "hash")
