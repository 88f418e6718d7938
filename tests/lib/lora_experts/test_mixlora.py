"""MixLoRA: experts that are whole blocks, what their routers learn from, and the balance of all layers together."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.adapt import LoRALinear, RoutedLayer, adapt, load_adapter
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward, expert_loras, set_expert
from workbench.lib.core.adapt.feed_forward import find_feed_forward
from workbench.lib.core.adapt.layer import Forward
from workbench.lib.core.adapt.peft import read_loras, write_peft
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.recompute import Call
from workbench.lib.core.routing import Context, Routing
from workbench.lib.lora_experts.mixlora import DoRAExperts, DoRALinear, MixLoRARouter, switch_value

X = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(3))


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


def put(kind: str = "gated", shake: bool = True, **options):
    """A model of one block in float64, adapted; and the handle."""
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[kind]()).double()
    adapted = adapt(model, "mixlora", **{"experts": 4, "rank": 2, "alpha": 3} | options)
    model.double()
    if shake:
        for name, p in adapted.named_parameters().items():
            nn.init.normal_(p, std=1.0 if "router" in name else 0.3)
    return adapted


def naive(layer: RoutedFeedForward, x: Tensor, routing: Routing) -> Tensor:
    """Each expert as a block of its own with dense weights; K of them for each token, one token after the other."""
    rows = []
    for n in range(len(x)):
        total = 0.0
        for k in range(routing.top_k):
            e = int(routing.indices[n, k])
            hidden = {}
            for name in dict.fromkeys((layer.block.gate, layer.block.up)):
                if name:
                    hidden[name] = dense(layer, name, e, x[n])
            up = hidden[layer.block.up]
            gate = hidden.get(layer.block.gate)
            if layer.block.fused:
                gate, up = up.chunk(2)
            a = layer.block.activation(up) if gate is None else layer.block.activation(gate) * up
            total = total + routing.weights[n, k] * dense(layer, layer.block.down, e, a)
        rows.append(total)
    return torch.stack(rows)


def dense(layer: RoutedFeedForward, name: str, e: int, x: Tensor) -> Tensor:
    linear, bank = layer.block.linears[name], layer.experts[name]
    weight = linear.weight + bank.delta(e)
    if isinstance(bank, DoRAExperts):
        weight = bank.magnitude[e][:, None] * weight / weight.norm(dim=1, keepdim=True).detach()
    return F.linear(x, weight, linear.bias)


def gradients(y: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(9)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), parameters, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dora", [False, True])
def test_mixlora_new_experts_are_the_frozen_block_whatever_the_router_says(kind, dora):
    adapted = put(kind, shake=False, dora=dora)
    layer = adapted.layers["0"]
    nn.init.normal_(layer.router.projection.weight, std=3.0)
    assert isinstance(layer, RoutedFeedForward)
    torch.testing.assert_close(adapted.model(X), layer.base(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_mixlora_shared_products_equal_dense_experts_in_outputs_and_all_gradients(kind, dora, top_k):
    adapted = put(kind, dora=dora, top_k=top_k)
    layer, x = adapted.layers["0"], X.clone().requires_grad_()
    y, expected = adapted.model(x), naive(layer, x, layer.router(x, Context()))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    wanted = [x, *adapted.parameters()]
    for ours, theirs in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert all(p.grad is None for p in layer.base.parameters())


def test_mixlora_equal_experts_are_one_lora_for_any_k():
    single = put(experts=1, top_k=1)
    for top_k in (1, 2, 4):
        adapted = put(top_k=top_k)
        with torch.no_grad():
            for name, bank in adapted.layers["0"].experts.items():
                one = single.layers["0"].experts[name]
                bank.a[:], bank.b[:] = one.a[0], one.b[0]
        torch.testing.assert_close(adapted.model(X), single.model(X), atol=1e-12, rtol=1e-12)
    torch.manual_seed(0)
    plain = nn.Sequential(Llama()).double()
    lora = adapt(plain, "lora", rank=2, alpha=3)
    plain.double()
    with torch.no_grad():
        for name, layer in lora.layers.items():
            one = single.layers["0"].experts[name.removeprefix("0.")]
            layer.experts.a.copy_(one.a), layer.experts.b.copy_(one.b)
    torch.testing.assert_close(plain(X), single.model(X), atol=1e-12, rtol=1e-12)


def test_mixlora_one_expert_a_token_leaves_the_router_to_the_balance_loss():
    adapted = put(top_k=1)
    layer = adapted.layers["0"]
    routing = layer.router(X, Context())
    assert torch.equal(routing.weight, torch.ones_like(routing.weight))
    weight = layer.router.projection.weight
    (task,) = gradients(adapted.model(X), [weight])
    assert task.abs().max() < 1e-12
    (balance,) = torch.autograd.grad(adapted.losses()["lbl"], [weight])
    assert balance.abs().max() > 1e-6
    adapted = put(top_k=2)
    (task,) = gradients(adapted.model(X), [adapted.layers["0"].router.projection.weight])
    assert task.abs().max() > 1e-3


@pytest.mark.parametrize(("top_k", "same"), [(1, True), (2, False)])
def test_mixlora_mixing_whole_blocks_is_not_mixing_inside_each_layer(top_k, same):
    adapted = put(top_k=top_k)
    layer = adapted.layers["0"]
    routing = layer.router(X, Context())
    assert torch.allclose(routing.weights.sum(1), torch.ones(len(X), dtype=torch.float64))

    def inside(name: str, x: Tensor) -> Tensor:
        return layer.block.linears[name](x) + layer.experts[name](x, routing)

    block = layer.block
    per_layer = inside(block.down, block.activate(inside(block.gate, X), inside(block.up, X)))
    assert torch.allclose(adapted.model(X), per_layer, atol=1e-10) is same


class Silent(nn.Module):
    """A bank that costs nothing."""

    def __init__(self, bank: LowRankExperts):
        super().__init__()
        self.shape = bank.n_experts, bank.d_out

    def forward(self, x: Tensor, pairs: Routing) -> Tensor:
        return x.new_zeros(len(x), self.shape[1])

    def row_scales(self, weight: Tensor) -> Tensor:
        return weight.new_ones(self.shape)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_mixlora_frozen_products_a_token_do_not_grow_with_k(top_k, dora):
    """3 D H for LoRA; (2 + K) D H for DoRA, whose rows are rescaled after the product; 3 K D H for separate blocks."""
    layer = put(dora=dora, top_k=top_k).layers["0"]
    routing = layer.router(X, Context())
    for name, bank in layer.experts.items():
        layer.experts[name] = Silent(bank)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.mix(X, routing)
    assert counter.get_total_flops() == len(X) * (2 + top_k if dora else 3) * 2 * 6 * 9


def test_mixlora_trains_as_many_parameters_as_the_formula_says():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    adapted = adapt(model, "mixlora", ["*.ffn.*", "*.attention.*"], experts=4, rank=3, attention_rank=5)
    experts, router = 4 * 3 * ((16 + 48) + (24 + 16)), 4 * 16
    attention = 5 * ((16 + 48) + (16 + 16))
    assert adapted.report()["trained"] == 2 * (experts + router + attention)
    assert all(type(adapted.layers[f"blocks.{i}.attention.qkv"]) is LoRALinear for i in (0, 1))
    dora = adapt(copy.deepcopy(adapted.remove()), "mixlora", "*.ffn.*", experts=4, rank=3, dora=True)
    assert dora.report()["trained"] == 2 * (experts + router + 4 * (48 + 16))


# the balance of all layers together


def routings(n_layers: int, n: int, seed: int = 0, top_k: int = 2) -> list[Routing]:
    torch.manual_seed(seed)
    return [MixLoRARouter(6, 4, top_k).double().route(torch.randn(n, 4).double() * 2) for _ in range(n_layers)]


def reported(adapted, decisions: list[Routing], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the balance makes of these decisions of one forward."""
    layer = next(layer for layer in adapted.layers.values() if isinstance(layer, RoutedFeedForward))
    other = RoutedLayer(nn.Linear(1, 1))  # which reports a loss of its own
    forward = Forward(calls=[Call(other, Context(), X[0], {"lbl": torch.tensor(5.0)}, ("lbl",))])
    for routing in decisions:
        call = Call(layer, Context(mask=None if mask is None else mask.bool().flatten()), X[0])
        layer.balance.add(call, x, routing, 0.5, None if mask is None else mask.bool())
        forward.calls.append(call)
    other, loss = forward.losses().values()
    assert other == 5.0
    return loss


def test_mixlora_balance_loss_is_that_of_transformers_over_all_layers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    adapted, x = put(), torch.zeros(3, 7, 6)
    decisions = routings(3, 21)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:], mask[2, 1:] = 0, 0
    logits = tuple(routing.logits for routing in decisions)
    theirs = mixtral.load_balancing_loss_func(logits, 4, 2)
    torch.testing.assert_close(reported(adapted, decisions, x), 0.5 * theirs.double())
    masked = mixtral.load_balancing_loss_func(logits, 4, 2, mask)
    torch.testing.assert_close(reported(adapted, decisions, x, mask), 0.5 * masked.double())
    assert abs(float(theirs - masked)) > 1e-4


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixlora_balance_loss_of_one_layer_is_that_of_transformers(top_k):
    """What the live views show of each layer, times K, since there the load sums to 1; for K = 1 it is Switch's."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    torch.manual_seed(0)
    logits = 2 * torch.randn(21, 4)
    routing = MixLoRARouter(6, 4, top_k, coefficients={"lbl": 1.0}).route(logits)
    torch.testing.assert_close(top_k * routing.losses["lbl"], mixtral.load_balancing_loss_func((logits,), 4, top_k))
    if top_k == 1:
        probs = logits.softmax(-1)
        theirs = switch.load_balancing_loss_func(probs[None], probs.argmax(-1)[None])
        torch.testing.assert_close(routing.losses["lbl"], theirs)


def test_mixlora_padding_does_not_move_the_balance_loss():
    adapted, x = put(), torch.zeros(2, 4, 6)
    (routing,) = routings(1, 8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    first = reported(adapted, [routing], x, mask)
    logits = routing.logits.clone()
    logits[~mask.flatten().bool()] = torch.tensor([9.0, -9.0, 3.0, 0.0]).double()
    assert torch.equal(reported(adapted, [MixLoRARouter(6, 4, 2).route(logits)], x, mask), first)
    assert not torch.allclose(reported(adapted, [MixLoRARouter(6, 4, 2).route(logits)], x), first)


def test_mixlora_balance_loss_is_k_for_uniform_probabilities_and_joint_over_layers():
    for top_k in (1, 2, 3):
        uniform = MixLoRARouter(6, 4, top_k).route(torch.zeros(21, 4).double())
        assert reported(put(), [uniform] * 2, torch.zeros(3, 7, 6)).item() == pytest.approx(0.5 * top_k)
    # two layers that lean opposite ways are balanced together, and not apart
    lean = torch.zeros(8, 2).double()
    lean[:, 0] = 5.0
    router = MixLoRARouter(6, 2, 1)
    together = reported(put(experts=2), [router.route(lean), router.route(-lean)], torch.zeros(2, 4, 6))
    alone = reported(put(experts=2), [router.route(lean)], torch.zeros(2, 4, 6))
    assert together.item() == pytest.approx(0.5) and alone.item() > 0.9
    load, probability = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert switch_value(load, probability).tolist() == [4.0]


def test_mixlora_model_reports_one_loss_of_its_last_forward():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 3, 2, lambda layer: GLU(16, 24), 9)
    adapted = adapt(model, "mixlora", balance=0.1)
    seen: list[Routing] = []
    for layer in adapted.layers.values():
        if isinstance(layer, RoutedFeedForward):
            layer.observe(lambda layer, routing, context: seen.append(routing))
    for _ in range(2):
        seen.clear()
        context = Context()
        model(TOKENS, context)
        logits = torch.cat([routing.logits for routing in seen])
        probs, n = logits.softmax(-1), len(logits)
        load = torch.bincount(probs.topk(2).indices.flatten(), minlength=8) / n
        torch.testing.assert_close(context.aux, 0.1 * 8 * (load * probs.mean(0)).sum())
    for layer in adapted.layers.values():  # a coefficient may change while a run goes on
        if isinstance(layer, RoutedFeedForward):
            layer.router.coefficients["lbl"] = 0.0
    context = Context()
    model(TOKENS, context)
    assert context.aux == 0.0
    adapt(adapted.remove(), "mixlora", balance=0.0)
    context = Context()
    model(TOKENS, context)
    assert context.aux == 0.0


def test_mixlora_honours_the_attention_mask_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    adapted = adapt(model, "mixlora", ["*.mlp.*", "*.self_attn.*"], experts=4, rank=2)
    assert sum(isinstance(layer, RoutedFeedForward) for layer in adapted.layers.values()) == 2
    mask = torch.ones_like(TOKENS)
    mask[:, 6:] = 0
    other = TOKENS.clone()
    other[:, 6:] = 1
    losses = []
    for tokens in (TOKENS, other):
        model(input_ids=tokens, attention_mask=mask)
        losses.append(adapted.losses()["lbl"])
    assert torch.equal(*losses)
    model(input_ids=other)
    assert not torch.equal(adapted.losses()["lbl"], losses[0])
    adapted.remove()
    assert not model._forward_pre_hooks


# the parts


def test_mixlora_jitter_changes_what_the_router_sees_and_nothing_else():
    router = MixLoRARouter(6, 4, 2, jitter=0.3)
    x = X.float()
    kept = x.clone()
    first, second = router(x), router(x)
    assert not torch.equal(first.logits, second.logits) and torch.equal(x, kept)
    router.eval()
    assert torch.equal(router(x).logits, router(x).logits)
    assert router(x.bfloat16()).weight.dtype == torch.float32
    with pytest.raises(InputError, match="jitter is 1 but must be at least 0 and below 1"):
        MixLoRARouter(6, 4, 2, jitter=1)


def test_mixlora_rank_stabilised_scale():
    for options, scale in (({}, 1.0), ({"alpha": 8.0}, 2.0), ({"alpha": 8.0, "rslora": True}, 4.0)):
        adapted = put(**{"rank": 4, "alpha": None} | options)
        assert adapted.layers["0"].experts["up_proj"].scale.tolist() == [scale] * 4
    lora = adapt(nn.Sequential(nn.Linear(6, 6)), "mixlora", attention_rank=4, attention_alpha=8, rslora=True)
    assert lora.layers["0"].experts.scale.item() == 4.0 and lora.layers["0"].experts.rank == 4


def test_mixlora_row_scales_are_those_of_the_dense_weights():
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    bank = DoRAExperts(3, weight, 2, alpha=3).double()
    torch.testing.assert_close(bank.row_scales(weight), torch.ones(3, 7).double())
    nn.init.normal_(bank.b)
    nn.init.normal_(bank.magnitude)
    for e in range(3):
        expected = bank.magnitude[e] / (weight + bank.delta(e)).norm(dim=1)
        torch.testing.assert_close(bank.row_scales(weight)[e], expected)
    weight[2] = 0.0
    assert DoRAExperts(2, weight, 2).double().row_scales(weight)[:, 2].tolist() == [0.0, 0.0]


def test_mixlora_dora_of_one_layer_is_peft_s_and_merges_back():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 7))
    theirs = peft.get_peft_model(
        copy.deepcopy(ours),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, init_lora_weights=False),
    )
    adapted = adapt(ours, "mixlora", rank=3, alpha=5, dora=True)
    layer, peers = adapted.layers["0"], theirs.base_model.model[0]
    assert isinstance(layer, DoRALinear)
    with torch.no_grad():
        layer.experts.a[0], layer.experts.b[0] = peers.lora_A["default"].weight, peers.lora_B["default"].weight
        length = torch.rand(7) + 0.5
        layer.experts.magnitude[0] = length
        peers.lora_magnitude_vector["default"].weight.copy_(length)
    x = X.float()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for a, b in (
        (layer.experts.a.grad[0], peers.lora_A["default"].weight.grad),
        (layer.experts.b.grad[0], peers.lora_B["default"].weight.grad),
        (layer.experts.magnitude.grad[0], peers.lora_magnitude_vector["default"].weight.grad),
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    expected = ours(x)
    torch.testing.assert_close(adapted.merge_back()(x), expected, atol=1e-5, rtol=1e-5)


class Reader(nn.Module):
    """A layer beside a block of three matrices."""

    def __init__(self):
        super().__init__()
        self.first, self.mlp = nn.Linear(6, 6), Llama()

    def forward(self, x):
        return self.mlp(self.first(x).tanh())


def reader(**options):
    torch.manual_seed(0)
    adapted = adapt(Reader(), "mixlora", **{"experts": 3, "rank": 2, "alpha": 3, "attention_rank": 4} | options)
    for name, p in adapted.named_parameters().items():
        nn.init.normal_(p, std=1.0 if "router" in name else 0.3)
    return adapted


@pytest.mark.parametrize("expert", [0, 2])
def test_mixlora_an_expert_is_a_lora_that_peft_loads(tmp_path, expert):
    peft = pytest.importorskip("peft")
    adapted = reader(top_k=1)
    with torch.no_grad():  # every token to one expert
        adapted.layers["mlp"].router.projection.weight.zero_()
    adapted.layers["mlp"].router.scores = lambda x, context: 9.0 * F.one_hot(torch.full((len(x),), expert), 3).float()
    folder = write_peft(expert_loras(adapted, expert), tmp_path / "adapter")
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(Reader(), folder, is_trainable=True)
    x = X.float()
    torch.testing.assert_close(adapted.model(x), theirs(x), atol=1e-6, rtol=1e-6)
    for model in (adapted.model, theirs):
        model(x).sin().sum().backward()
    for name, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            ours = adapted.layers["mlp"].experts[name[4:]] if name[:3] == "mlp" else adapted.layers[name].experts
            e = expert if name[:3] == "mlp" else 0
            torch.testing.assert_close(ours.a.grad[e], layer.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.b.grad[e], layer.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-5)
    for other in {0, 1, 2} - {expert}:
        assert all(not bank.a.grad[other].any() for bank in adapted.layers["mlp"].experts.values())


def test_mixlora_experts_can_be_loras_trained_apart(tmp_path):
    adapted = reader(rank=3)
    torch.manual_seed(1)
    single = adapt(Reader(), "lora", "mlp.*", rank=2, alpha=5)
    for p in single.parameters():
        nn.init.normal_(p)
    write_peft({name: layer.experts for name, layer in single.layers.items()}, tmp_path / "one")
    other = [bank.delta(0).clone() for bank in adapted.layers["mlp"].experts.values()]
    set_expert(adapted, 1, read_loras(tmp_path / "one"))
    for (key, bank), kept in zip(adapted.layers["mlp"].experts.items(), other, strict=True):
        torch.testing.assert_close(bank.delta(1), single.layers[f"mlp.{key}"].experts.delta(0))
        assert torch.equal(bank.delta(0), kept)
        torch.testing.assert_close(expert_loras(adapted, 1)[f"mlp.{key}"].delta(0), bank.delta(1))


def test_mixlora_loras_that_do_not_fit_are_all_named():
    adapted = reader()
    before = adapted.layers["mlp"].experts["up_proj"].a.clone()
    good = (torch.zeros(2, 6), torch.zeros(9, 2), 1.0)
    loras = {
        "mlp.up_proj": good,
        "first": (torch.zeros(2, 6), torch.zeros(6, 2), 1.0),
        "mlp.down_proj": (torch.zeros(3, 9), torch.zeros(6, 3), 1.0),
    }
    with pytest.raises(InputError) as error:
        set_expert(adapted, 1, loras)
    assert "no block has a linear layer 'first'" in str(error.value) and "mlp.down_proj has A (3, 9)" in str(
        error.value
    )
    assert torch.equal(adapted.layers["mlp"].experts["up_proj"].a, before)
    with pytest.raises(InputError, match=r"expert is 3 but mlp\.up_proj has 3 of them"):
        set_expert(adapted, 3, {"mlp.up_proj": good})
    with pytest.raises(InputError, match="expert is -1 but mlp has 3 of them"):
        expert_loras(adapted, -1)
    with pytest.raises(InputError, match="has DoRAExperts, which are no plain LoRAs"):
        expert_loras(reader(dora=True), 0)


def test_mixlora_dropout_drops_what_the_updates_see_alone():
    adapted = put(dropout=0.5)
    layer = adapted.layers["0"]
    assert not torch.equal(adapted.model(X), adapted.model(X))
    with torch.no_grad():
        for bank in layer.experts.values():
            bank.b.zero_()
    torch.testing.assert_close(adapted.model(X), layer.base(X))
    adapted.model.eval()
    assert torch.equal(adapted.model(X), adapted.model(X))


@pytest.mark.parametrize("dora", [False, True])
def test_mixlora_gradients_are_those_of_the_dropout_that_was_drawn(dora):
    adapted = put(dropout=0.4, dora=dora)
    layer = adapted.layers["0"]
    if dora:  # the norm has no gradient by rule, so that only those of the lengths are of the function
        wanted = [bank.magnitude for bank in layer.experts.values()]
    else:
        wanted = [parameter for bank in layer.experts.values() for parameter in (bank.a, bank.b)]

    def output(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(4)
        return adapted.model(x)

    assert torch.autograd.gradcheck(output, (X[:4].clone().requires_grad_(not dora), *wanted))


@pytest.mark.parametrize("dora", [False, True])
def test_mixlora_is_saved_and_restored_bit_for_bit(tmp_path, dora):
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)
    clean = copy.deepcopy(model)
    adapted = adapt(model, "mixlora", experts=4, rank=2, dora=dora)
    for p in adapted.parameters():
        nn.init.normal_(p, std=0.2)
    adapted.save(tmp_path / "adapter")
    again = load_adapter(clean, tmp_path / "adapter")
    assert torch.equal(clean(TOKENS), model(TOKENS)) and again.options == adapted.options


def test_mixlora_has_defaults_for_layers_of_any_width():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), nn.Linear(3, 2))
    adapted = adapt(net, "mixlora", "*")
    assert [type(layer) for layer in adapted.layers.values()] == [RoutedFeedForward, LoRALinear, LoRALinear]
    assert net(torch.randn(5, 4)).shape == (5, 2)
    assert adapted.adapter.facts == ()
    with pytest.raises(InputError, match="cannot be merged back"):
        adapted.merge_back()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "top_k": 3}, "top_k is 3 but must be between 1 and n_experts = 2"),
        ({"experts": 0}, "n_experts is 0 but must be at least 1"),
        ({"rank": 7}, "rank is 7 but must be between 1 and the layer's smaller width, 6"),
        ({"balance": -1.0}, r"coefficients\['lbl'\] is -1.0 but must be at least 0"),
        ({"jitter": -0.1}, "jitter is -0.1 but must be"),
        ({"topk": 2}, "option of mixlora 'topk' is unknown; did you mean 'top_k'"),
    ],
)
def test_mixlora_names_wrong_options_and_leaves_the_model_as_it_was(options, message):
    model = nn.Sequential(GLU(6, 9))
    with pytest.raises(InputError, match=message):
        adapt(model, "mixlora", **options)
    assert type(model[0]) is GLU and not model._forward_pre_hooks and all(p.requires_grad for p in model.parameters())


def test_mixlora_banks_must_fit_the_block():
    block = find_feed_forward(GLU(6, 9))
    router = MixLoRARouter(6, 4, 2)
    with pytest.raises(InputError, match="experts are for down but must be for gate_up, down"):
        RoutedFeedForward(block, router, {"down": LowRankExperts(4, 9, 6, 2)})
    banks = {"gate_up": LowRankExperts(3, 6, 18, 2), "down": LowRankExperts(4, 9, 6, 2)}
    with pytest.raises(InputError, match=r"experts\['gate_up'\] has \(experts, inputs, outputs\) \(3, 6, 18\)"):
        RoutedFeedForward(block, router, banks)
