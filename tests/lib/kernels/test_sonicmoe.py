"""SonicMoE: the router's weights, the layer's gradients and what it keeps; rounding is in test_sonicmoe_rounding."""

import pytest
import torch
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.moe_mlp import moe_mlp
from workbench.lib.core.balance import switch_lbl
from workbench.lib.core.experts import GLU, GLUExperts, plan_of
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.kernels.sonicmoe import (
    MODES,
    SonicMoE,
    SonicRouter,
    example,
    padded_fraction,
    predicted_saved_bytes,
    token_rounding,
    topk_routing,
)
from workbench.live.probes import find
from workbench.live.probes.routing import RoutingProbe

D, H = 8, 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def logits(n=48, e=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(-1, 1, e)  # experts of unequal load
    return torch.randn(n, e, generator=generator).to(dtype) + spread.to(dtype)


# the router


def test_sonicmoe_weights_are_a_softmax_over_the_chosen_logits():
    x = logits(dtype=torch.float64)
    routing = topk_routing(x, 3)
    values, indices = x.sort(dim=-1, descending=True)
    assert torch.equal(routing.indices, indices[:, :3])
    assert torch.allclose(routing.weights, torch.softmax(values[:, :3], -1), atol=1e-14)
    assert torch.allclose(routing.weights.sum(-1), torch.ones(len(x), dtype=x.dtype))
    assert torch.allclose(routing.probs, torch.softmax(x, -1), atol=1e-14)


def test_sonicmoe_weights_equal_renormalised_probabilities():
    """Softmax over the top K of the logits is softmax over all, cut to the top K and divided by its sum."""
    ours, torch_way = topk_routing(logits(), 2), LinearRouter(D, 6, 2).route(logits())
    assert torch.equal(ours.indices, torch_way.indices)
    assert torch.allclose(ours.weights, torch_way.weights, atol=1e-6)


def test_sonicmoe_weights_are_float32_for_bfloat16_logits():
    routing = topk_routing(logits(dtype=torch.bfloat16), 2)
    assert routing.weight.dtype == routing.probs.dtype == torch.float32


def test_sonicmoe_gradient_of_the_logits_is_that_of_the_closed_form():
    """dlogit = s (g - sum_k g_k s_k) on the chosen experts, zero elsewhere."""
    x = logits(5, dtype=torch.float64).requires_grad_()
    routing = topk_routing(x, 3)
    g = torch.randn(5, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    routing.weights.backward(g)
    s = routing.weights.detach()
    expected = torch.zeros_like(x).scatter(1, routing.indices, s * (g - (g * s).sum(-1, keepdim=True)))
    assert torch.allclose(x.grad, expected, atol=1e-14)


@pytest.mark.parametrize("routing", ["tc", "rounding"])
def test_sonicmoe_balance_loss_is_of_the_choice_before_rounding(routing):
    router = SonicRouter(D, 4, 2, routing=routing, tile=16, mode="down", coefficients={"lbl": 0.1})
    x = torch.randn(40, D)
    plain = topk_routing(router.projection(x), 2)
    assert torch.equal(router(x).losses["lbl"], switch_lbl(plain.probs, plain.counts))


def test_sonicmoe_balance_loss_is_finite_where_every_expert_loses_all_rows():
    router = SonicRouter(D, 8, 1, routing="rounding", tile=32, mode="down", coefficients={"lbl": 0.1})
    routing = router(torch.randn(32, D))
    assert routing.expert.numel() == 0 and routing.losses["lbl"].isfinite()


# evaluation, and the layer


def test_sonicmoe_rounds_in_training_only():
    router = SonicRouter(D, 4, 2, routing="rounding", tile=16)
    x = torch.randn(50, D)
    trained = router.train()(x)
    assert trained.top_k is None and (trained.counts % 16 == 0).all()
    evaluated = router.eval()(x)
    assert evaluated.top_k == 2 and torch.equal(
        evaluated.expert, SonicRouter.route(router, router.projection(x)).expert
    )
    assert not torch.equal(evaluated.counts, trained.counts)


def test_sonicmoe_a_tokens_evaluation_does_not_depend_on_its_batch():
    layer = SonicMoE(D, 4, 2, H, routing="rounding", tile=16).eval()
    x = torch.randn(40, D)
    assert torch.allclose(layer(x)[:3], layer(x[:3]), atol=1e-6)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_sonicmoe_outputs_and_all_gradients_equal_a_loop_over_pairs(mode):
    torch.manual_seed(0)
    options = {} if mode is None else {"routing": "rounding", "mode": mode}
    layer = SonicMoE(D, 4, 2, H, tile=8, **options).double()
    x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(30, D, dtype=torch.float64)

    def loop(x):
        routing, y = layer.router(x), torch.zeros_like(x)
        for t, e, w in zip(routing.token, routing.expert, routing.weight, strict=True):
            gate, up = (layer.experts.gate_up[e] @ x[t]).chunk(2)
            y = y.index_add(0, t[None], w * (layer.experts.down[e] @ (F.silu(gate) * up))[None])
        return y

    found = []
    for forward in (layer, loop):
        torch.manual_seed(1)  # of the stochastic mode
        y = forward(x)
        found.append((y, *torch.autograd.grad((y * wanted).sum(), (x, *layer.parameters()))))
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, atol=1e-10)


@pytest.mark.parametrize("routing", ["tc", "rounding"])
def test_sonicmoe_gradients_are_those_of_finite_differences(routing):
    layer = SonicMoE(4, 3, 2, 3, routing=routing, tile=3, mode="up").double()
    with torch.no_grad():
        layer.router.projection.weight *= 50  # no tie near enough for a finite difference to cross it
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    inputs = (torch.randn(6, 4, dtype=torch.float64), *(p.detach().clone() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, tuple(i.requires_grad_() for i in inputs), atol=1e-6)


# 2. what the backward pass does without


def test_sonicmoe_weight_gradients_need_no_expert_outputs():
    """dS = sum_i U_i A_i, which equals <dO, Y>; and dW2 = sum dO^T (s A), which equals sum (s dO)^T A."""
    routing = token_rounding(topk_routing(logits(30, 5, dtype=torch.float64), 2), 8)
    bank = GLUExperts(5, D, H).double()
    x, d_out = torch.randn(2, 30, D, dtype=torch.float64)
    score = routing.weight.detach().requires_grad_()
    y = moe_mlp(x, bank.gate_up, bank.down, plan_of(routing), score)
    d_score, d_down = torch.autograd.grad((y * d_out).sum(), (score, bank.down))
    by_outputs, by_hidden = torch.empty_like(d_score), torch.empty_like(d_score)
    scaled_d_out = torch.zeros_like(d_down)
    with torch.no_grad():
        for pair, (t, e, s) in enumerate(zip(routing.token, routing.expert, score, strict=True)):
            gate, up = (bank.gate_up[e] @ x[t]).chunk(2)
            hidden = F.silu(gate) * up
            by_outputs[pair] = d_out[t] @ (bank.down[e] @ hidden)
            by_hidden[pair] = (d_out[t] @ bank.down[e]) @ hidden
            scaled_d_out[e] += torch.outer(s * d_out[t], hidden)
    assert torch.allclose(by_hidden, by_outputs, atol=1e-13)
    assert torch.allclose(d_score, by_outputs, atol=1e-13)
    assert torch.allclose(d_down, scaled_d_out, atol=1e-13)


# 6. a variable number of experts that does not vary


def test_sonicmoe_a_constant_number_of_experts_is_bitwise_the_fixed_path():
    fixed = topk_routing(logits(50, 6), 3)
    ragged = token_rounding(fixed, 1)  # the same pairs as a list; its tokens name their experts in rising order
    order = torch.argsort(fixed.indices, dim=1)
    sorted_pairs = Routing.fixed(fixed.indices.gather(1, order), fixed.weights.gather(1, order), 6)
    assert torch.equal(ragged.expert, sorted_pairs.expert) and ragged.top_k is None
    bank, x = GLUExperts(6, D, H), torch.randn(50, D, requires_grad=True)
    found = []
    for routing in (sorted_pairs, ragged):
        score = routing.weight.detach().requires_grad_()
        y = moe_mlp(x, bank.gate_up, bank.down, plan_of(routing), score)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, score, *bank.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# 5. limits of the layer


def test_sonicmoe_one_expert_equals_a_dense_block():
    layer, dense = SonicMoE(D, 1, 1, H).double(), GLU(D, H).double()
    dense.gate_up.weight.data, dense.down.weight.data = layer.experts.gate_up[0].data, layer.experts.down[0].data
    x = torch.randn(9, D, dtype=torch.float64)
    assert torch.allclose(layer(x), dense(x), atol=1e-12)


@pytest.mark.parametrize("routing", ["tc", "rounding"])
def test_sonicmoe_permuted_tokens_give_permuted_outputs(routing):
    layer = SonicMoE(D, 4, 2, H, routing=routing, tile=8).double()
    x = torch.randn(30, D, dtype=torch.float64)
    order = torch.randperm(30)
    assert torch.allclose(layer(x)[order], layer(x[order]), atol=1e-12)


def test_sonicmoe_experts_without_tokens_get_exactly_zero_gradients():
    layer = SonicMoE(D, 4, 1, H, routing="rounding", tile=16, mode="down")
    with torch.no_grad():
        layer.router.projection.weight[2] = 0
        layer.router.projection.weight[:2] *= 100
        layer.router.projection.weight[3] *= 1e-3
    seen = []
    layer.observe(lambda _, routing, context: seen.append(routing.counts))
    layer(torch.randn(64, D)).square().sum().backward()
    empty = seen[0] == 0
    assert empty.any() and not empty.all()
    for weight in layer.experts.parameters():
        assert not weight.grad[empty].any()
        assert weight.grad.isfinite().all() and weight.grad[~empty].any()


def test_sonicmoe_a_batch_that_rounds_to_no_pair_at_all_gives_zeros():
    layer = SonicMoE(D, 8, 1, H, routing="rounding", tile=32, mode="down")
    x = torch.randn(32, D, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert all(w.grad is None or not w.grad.any() for w in layer.experts.parameters())


def test_sonicmoe_is_watched_like_any_layer():
    layer, seen = SonicMoE(D, 4, 2, H, routing="rounding", tile=16, balance=0.5), []
    layer.observe(lambda _, routing, context: seen.append((routing, context)))
    context = Context()
    layer(torch.randn(2, 24, D), context)
    ((routing, announced),) = seen
    assert announced is context and (routing.counts % 16 == 0).all() and routing.n_tokens == 48
    assert torch.equal(context.aux, 0.5 * routing.losses["lbl"])


def test_sonicmoe_rounded_loads_reach_the_live_probes():
    model = torch.nn.Sequential(SonicMoE(D, 4, 2, H, routing="rounding", tile=16))
    blocks = find.blocks(model)
    assert [(block.name, block.n_experts, block.top_k) for block in blocks] == [("0", 4, 2)]
    probe, seen = RoutingProbe(model, blocks, {}, None), []
    model[0].observe(lambda _, routing, context: seen.append(routing))
    probe.arm(True)
    model(torch.randn(50, D))
    _, tensors = probe.take(structure=True)
    mask = seen[0].mask().numpy().astype(int)
    assert (tensors["load/0"] % 16 == 0).all()
    assert (tensors["load/0"] == mask.sum(0)).all() and (tensors["coactivation/0"] == mask.T @ mask).all()


def test_sonicmoe_top_k_can_be_changed_while_training():
    layer = SonicMoE(D, 4, 2, H, routing="rounding", tile=1)
    layer.router.set_top_k(3)
    assert layer(torch.randn(10, D)).shape == (10, D)
    assert layer.router(torch.randn(10, D)).active_counts.tolist() == [3] * 10


# kept bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_sonicmoe_keeps_what_the_formula_says_and_nothing_else(rounded, dtype):
    routing, kept = topk_routing(logits(64, 6), 2), {}
    if rounded:
        routing = token_rounding(routing, 8)
    bank = GLUExperts(6, D, 12).to(dtype)
    x = torch.randn(64, D, dtype=dtype, requires_grad=True)
    plan, score = plan_of(routing), routing.weight.detach().requires_grad_()

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = moe_mlp(x, bank.gate_up, bank.down, plan, score)
    weights = sum(p.numel() * p.element_size() for p in bank.parameters())
    expected = predicted_saved_bytes(64, D, 12, 6, routing.expert.numel(), itemsize=x.element_size(), ragged=rounded)
    assert sum(kept.values()) - weights == sum(expected.values())
    assert y.requires_grad


def test_sonicmoe_kept_values_do_not_change_when_experts_get_finer():
    kept = [predicted_saved_bytes(4096, 256, 512 // k, 32, 4096 * k) for k in (2, 4, 8, 16)]
    assert all(one["x"] == kept[0]["x"] and one["hidden"] == kept[0]["hidden"] for one in kept)
    assert sum(kept[-1].values()) < 1.1 * sum(kept[0].values())  # the lists do grow


# padding, errors


def test_sonicmoe_padded_fraction_is_that_of_a_loop():
    counts = torch.tensor([[0, 1, 128, 129], [7, 0, 0, 0], [0, 0, 0, 0]])
    assert padded_fraction(counts, 128).tolist() == pytest.approx([(127 + 127) / 258, 121 / 7, 0])


def test_sonicmoe_bad_input_is_named():
    routing = topk_routing(logits(), 2)
    with pytest.raises(InputError, match="mode 'nearst' is unknown; did you mean 'nearest'"):
        token_rounding(routing, 16, "nearst")
    with pytest.raises(InputError, match="tile is 0 but must be at least 1"):
        token_rounding(routing, 0)
    with pytest.raises(InputError, match="n_tokens is 48 but must be at least tile = 64"):
        token_rounding(routing, 64)
    with pytest.raises(InputError, match="routing 'round' is unknown"):
        SonicRouter(D, 4, 2, routing="round")
    with pytest.raises(InputError, match="mode 'stoch"):
        SonicMoE(D, 4, 2, H, mode="stoch")
    with pytest.raises(InputError, match="top_k is 7"):
        topk_routing(logits(), 7)
    with pytest.raises(InputError, match="logits hold 1 values"):
        topk_routing(torch.tensor([[float("nan"), 0.0]]), 1)
    with pytest.raises(InputError, match=r"routing\.probs is None"):
        token_rounding(Routing.fixed(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), 2), 2)
    with pytest.raises(InputError, match="tile is -1"):
        padded_fraction(torch.tensor([1]), -1)


def test_sonicmoe_example_maps_tokens_to_tokens():
    assert example()(torch.randn(5, 32)).shape == (5, 32)
