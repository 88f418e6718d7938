"""SMoRA: ranks as experts of one LoRA, its gates and their sum, its bias, and the mixture of LoRAs it is a form of."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.balance import LossFreeBias
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routing import Routing
from workbench.lib.lora_experts.smora import RankRoutedLoRA, RankRouter, SMoRA, example, indexed_low_rank

N, I, O, R, K = 23, 10, 7, 12, 3  # noqa: E741 - the letters of the module
ALPHA = 5.0


def layer(rank=R, active=K, block=1, seed=0, **options):
    torch.manual_seed(seed)
    made = RankRoutedLoRA(nn.Linear(I, O), rank, active, block, ALPHA, **options).double()
    nn.init.normal_(made.experts.b)
    return made


def tokens(n=N, seed=1):
    return torch.randn(n, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def put(model: nn.Module, **options) -> Adapted:
    """SMoRA on every linear layer, whatever the catalogue says of it."""
    adapter = SMoRA(**options)
    adapted = Adapted(model, adapter, ("*",), options)
    for name, linear in match_targets(model, ("*",)).items():
        adapted.put(name, linear, adapter.linear(linear, name))
    return adapted


def test_smora_is_the_equation_of_the_paper_in_a_loop():
    for block in (1, 3):
        made, x = layer(active=6, block=block).eval(), tokens()
        made.router.bias.bias.normal_(std=0.2)
        a, b = made.experts.a.flatten(0, 1), made.experts.b.transpose(0, 1).flatten(1)  # (R, I), (O, R)
        c = made.router.bias.bias.repeat_interleave(block)
        for u, y in zip(x, made(x), strict=True):
            z = torch.sigmoid(made.router.projection.weight @ u).repeat_interleave(block)
            chosen = (z + c).topk(6).indices
            total = z[chosen].sum()
            expected = made.base(u)
            for j in chosen:
                expected = expected + ALPHA / 6 * (6 * z[j] / total) * b[:, j] * (a[j] @ u)
            assert torch.allclose(y, expected, atol=1e-12)


def test_smora_is_a_mixture_of_loras_with_its_gates_repeated():
    """E LoRAs of rank r with renormalised top-2 softmax weights = one LoRA of rank E r, in outputs and gradients."""
    n_experts, rank, scale = 5, 3, 0.7
    torch.manual_seed(0)
    base, x = nn.Linear(I, O).double(), tokens().requires_grad_()
    a = torch.randn(n_experts, rank, I, dtype=torch.float64, requires_grad=True)
    b = torch.randn(n_experts, O, rank, dtype=torch.float64, requires_grad=True)
    w = torch.randn(n_experts, I, dtype=torch.float64, requires_grad=True)
    made = RankRoutedLoRA.from_lora_experts(base, a, b, 2, scale, gate="softmax", bias_rate=0.0)
    with torch.no_grad():
        made.router.projection.weight.copy_(w)

    top = torch.softmax(x @ w.T, -1).topk(2)
    gates = torch.zeros(N, n_experts, dtype=torch.float64)
    gates = gates.scatter(1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    mixture = base(x)
    for e in range(n_experts):
        mixture = mixture + gates[:, e : e + 1] * scale * (x @ a[e].T) @ b[e].T

    y, grad = made(x), torch.randn(N, O, dtype=torch.float64)
    assert torch.allclose(y, mixture, atol=1e-10)
    ours = torch.autograd.grad((y * grad).sum(), [x, made.experts.a, made.experts.b, made.router.projection.weight])
    for got, expected in zip(ours, torch.autograd.grad((mixture * grad).sum(), [x, a, b, w]), strict=True):
        assert torch.allclose(got, expected, atol=1e-10)

    flat_a, flat_b = made.one_lora()
    index, weight = made.rank_routing(made.router(x))
    one = base(x) + indexed_low_rank(x, flat_a, flat_b, index, weight)
    assert flat_a.shape == (n_experts * rank, I) and flat_b.shape == (O, n_experts * rank)
    assert torch.allclose(one, mixture, atol=1e-10)


def test_smora_with_all_ranks_and_equal_scores_is_the_plain_lora():
    made, x = layer(rank=7, active=7), tokens()
    nn.init.zeros_(made.router.projection.weight)
    routing = made.router(x)
    assert torch.allclose(routing.weights, torch.ones(N, 7, dtype=torch.float64), atol=1e-15)
    plain = made.base(x) + ALPHA / 7 * x @ made.experts.a[:, 0].T @ made.experts.b[:, :, 0]
    assert torch.allclose(made(x), plain, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3])
def test_smora_dense_and_gathered_ranks_agree(block):
    made = layer(active=6, block=block).eval()  # in training the bias would move between the three
    results = []
    for backend in ("layer", "dense", "gather"):
        x = tokens().requires_grad_()
        routing = made.router(x)
        routing.weight.retain_grad()
        if backend == "layer":
            y = made.experts(x, routing, "dense")
        else:
            y = indexed_low_rank(x, *made.one_lora(), *made.rank_routing(routing), backend)
        made.zero_grad()
        y.square().sum().backward()
        results.append([y, x.grad, made.experts.a.grad, made.experts.b.grad, routing.weight.grad])
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(results[0], other, strict=True))


def test_smora_gate_gradient_needs_no_output_of_a_rank():
    made, x, grad = layer(), tokens(), torch.randn(N, O, dtype=torch.float64)
    routing = made.router(x)
    routing.weight.retain_grad()
    made.experts(x, routing, "dense").backward(grad)
    a, b = made.experts.a[:, 0], made.experts.b[:, :, 0]  # (R, I), (R, O)
    expected = ALPHA / K * (grad @ b.T) * (x @ a.T)
    assert torch.allclose(routing.weight.grad.view(N, K), expected.gather(1, routing.indices), atol=1e-12)


def test_smora_ranks_that_no_token_chose_get_no_gradient():
    made, x = layer(rank=40), tokens(4)
    routing = made.router(x)
    idle = routing.counts == 0
    assert idle.any()
    made(x).square().sum().backward()
    for grad in (made.experts.a.grad, made.experts.b.grad):
        assert not grad[idle].any() and grad[~idle].flatten(1).any(1).all()


@pytest.mark.parametrize("options", [{}, {"bias_in_gate": True}, {"gate": "softmax"}, {"router_dim": 4}])
def test_smora_gates_have_the_sum_k_and_k_of_them_are_not_zero(options):
    made, x = layer(**options), tokens()
    made.router.bias.bias.uniform_(0, 0.1)
    for weight in (made.router.projection.weight.data, torch.zeros_like(made.router.projection.weight)):  # and ties
        made.router.projection.weight.data = weight
        routing = made.router(x)
        gates = routing.dense()
        assert torch.allclose(gates.sum(1), torch.full((N,), float(K), dtype=torch.float64))
        assert ((gates > 0).sum(1) == K).all()
        assert torch.allclose(routing.probs.sum(1), torch.ones(N, dtype=torch.float64))


def test_smora_scores_that_are_all_tiny_still_make_gates():
    made, x = layer().float(), tokens().abs().float()
    nn.init.constant_(made.router.projection.weight, -1e3)
    with torch.no_grad():
        made.router.projection.weight[2] = -9e2
    routing = made.router(x)
    assert torch.isfinite(routing.weight).all() and torch.allclose(routing.weights.sum(1), torch.full((N,), float(K)))


def test_smora_bias_moves_towards_the_mean_load_in_training_only():
    made, x = layer(bias_rate=0.01), tokens()
    bias = made.router.bias
    made.eval()(x)
    assert not bias.bias.any() and not bias.load.any()
    load = made.train().router(x).counts.double()
    assert torch.equal(bias.load, load.long()) and not bias.bias.any()  # this forward has seen the old one
    bias.after_step()
    assert torch.allclose(bias.bias, 0.01 * torch.sign(load.mean() - load))
    assert float(bias.bias.abs().sum()) == pytest.approx(0.01 * int((load != load.mean()).sum()))
    bias.after_step()
    assert torch.allclose(bias.bias, 0.01 * torch.sign(load.mean() - load))  # nothing more to count


def test_smora_bias_moves_in_a_loop_that_knows_of_no_end_of_a_step():
    made, x = layer(bias_rate=0.01), tokens()
    load = made.router(x).counts.double()
    made.router(x)
    assert torch.allclose(made.router.bias.bias, 0.01 * torch.sign(load.mean() - load))


def test_smora_a_checkpointed_forward_counts_once_and_repeats_its_choice():
    x = tokens()
    plain, again = layer(bias_rate=0.05), layer(bias_rate=0.05)
    for step in range(3):
        for made in (plain, again):
            made.zero_grad()
            y = made(x) if made is plain else checkpoint(made, x, use_reentrant=False)
            y.square().sum().backward()
        assert torch.equal(plain.router.bias.load, again.router.bias.load)
        assert torch.equal(plain.router.bias.bias, again.router.bias.bias) and bool(plain.router.bias.bias.any()) == (
            step > 0
        )
        assert torch.allclose(plain.experts.a.grad, again.experts.a.grad, atol=1e-12)


def test_smora_a_constant_added_to_the_bias_changes_nothing_unless_it_is_in_the_gate():
    for in_gate in (False, True):
        made, x = layer(bias_in_gate=in_gate).eval(), tokens()
        before = made(x)
        made.router.bias.bias += 0.3
        assert torch.allclose(made(x), before, atol=1e-12) is not in_gate


def test_smora_released_gates_are_those_of_score_plus_bias():
    made, x = layer(bias_in_gate=True).eval(), tokens()
    made.router.bias.bias.uniform_(0, 0.2)
    routing = made.router(x)
    z = torch.sigmoid(routing.logits) + made.router.bias.bias
    chosen = z.gather(1, routing.indices)
    assert torch.allclose(routing.weights, K * chosen / chosen.sum(1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_smora_parameter_counts(block):
    made = layer(rank=8, active=4, block=block)
    added = sum(p.numel() for p in made.parameters()) - I * O - O
    assert added == 8 * (I + O) + 8 // block * I
    assert made.n_experts == 8 // block and made.top_k == 4 // block
    reduced = layer(rank=8, active=4, block=block, router_dim=3)
    assert sum(p.numel() for p in reduced.router.parameters()) == 3 * (I + 8 // block)


def test_smora_zero_b_is_the_base_and_dropout_is_shared_with_the_router():
    made, x = layer(dropout=0.5), tokens()
    seen = []
    made.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(x)
    assert seen[0] is seen[1] and (seen[0] == 0).double().mean() > 0.3
    nn.init.zeros_(made.experts.b)
    assert torch.allclose(made(x), made.base(x))


def test_smora_is_watched_as_a_routed_layer():
    made, seen = layer(active=4, block=2), []
    made.observe(lambda layer, routing, context: seen.append((layer.n_experts, layer.top_k, routing)))
    made(tokens().view(1, N, I))
    ((n_experts, top_k, routing),) = seen
    assert (n_experts, top_k) == (6, 2) and isinstance(routing, Routing) and routing.indices.shape == (N, 2)
    assert isinstance(made.experts, LowRankExperts) and made.router.coefficients == {}


def test_smora_k_changes_on_a_trained_layer():
    made, x = layer(), tokens()
    made.router.set_top_k(5)
    assert made.top_k == 5 and torch.allclose(made.router(x).weights.sum(1), torch.full((N,), 5.0, dtype=torch.float64))
    with pytest.raises(InputError, match="top_k is 13"):
        made.router.set_top_k(13)


def test_smora_defaults_fit_layers_of_any_width():
    for width in (1, 4, 30, 100):
        (made,) = put(nn.Sequential(nn.Linear(width, width + 3))).layers.values()
        assert made.n_experts == min(64, width) and made.top_k == max(1, made.n_experts // 8)
        assert torch.allclose(made.experts.scale, torch.tensor(2.0))
    (made,) = put(nn.Sequential(nn.Linear(30, 40)), block_size=4).layers.values()
    assert (made.n_experts, made.top_k, made.experts.rank) == (7, 1, 4)
    (made,) = put(nn.Sequential(nn.Linear(64, 64))).layers.values()  # the paper's setting
    assert (made.n_experts, made.top_k, float(made.experts.scale[0] * made.top_k)) == (64, 8, 16.0)


def test_smora_state_holds_the_bias_and_comes_back():
    first, second = put(nn.Sequential(nn.Linear(8, 8))), put(nn.Sequential(nn.Linear(8, 8)))
    first.model.train()(torch.randn(20, 8))
    first.model(torch.randn(20, 8))
    (made,) = first.layers.values()
    assert made.router.bias.bias.any() and isinstance(made.router.bias, LossFreeBias)
    state = first.model.state_dict()
    assert "0.router.bias.bias" in state
    second.model.load_state_dict(state)
    x = torch.randn(5, 8)
    assert torch.equal(first.model.eval()(x), second.model.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 10, "block_size": 4}, "rank is 10 but must be a multiple of block_size = 4"),
        ({"rank": 12, "active_rank": 6, "block_size": 4}, "active_rank is 6 but must be a multiple"),
        ({"rank": 4, "active_rank": 5}, "active_rank is 5 but must be at most rank and the layer's widths: 4"),
        ({"rank": 999}, "active_rank is 124 but must be at most rank and the layer's widths: 8"),
        ({"rank": 0, "active_rank": 1}, "rank is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"gate": "sigmod"}, "gate 'sigmod' is unknown; did you mean 'sigmoid'"),
        ({"bias_rate": -1.0}, "bias_rate is -1.0"),
        ({"router_dim": 0}, "router_dim is 0"),
    ],
)
def test_smora_names_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        SMoRA(**options).linear(nn.Linear(8, 8), "layer")


def test_smora_names_bad_input():
    with pytest.raises(InputError, match="backend 'triton' is unknown"):
        indexed_low_rank(tokens(), *layer().one_lora(), *layer().rank_routing(layer().router(tokens())), "triton")
    with pytest.raises(InputError, match="a has shape"):
        RankRoutedLoRA.from_lora_experts(nn.Linear(4, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 2), 1)
    with pytest.raises(InputError, match="NaN or infinite"):
        layer().router(tokens() * math.nan)
    assert isinstance(layer().router, RankRouter)


def test_smora_example_maps_tokens_to_tokens():
    made = example()
    y = made(torch.randn(5, 32))
    assert y.shape == (5, 32)
    F.mse_loss(y, torch.zeros_like(y)).backward()
    assert all(p.grad.any() for p in (made.experts.a, made.experts.b, made.router.projection.weight))
