"""The pool of UniPool: its router, its loss over all layers, and the limits in which it is something known."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.balance import switch_lbl
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM, ResidualStack
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.pool import ExpertPool
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig, make_optimizer
from workbench.lib.sharing.unipool import (
    NormRouter,
    PoolBalance,
    PooledMoELayer,
    example,
    norm_router_scale,
    pool_diagnostics,
    pooled_layers,
    randomize_router,
)

L, D, M, K, H = 3, 16, 12, 2, 8


def tokens(n: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def stack(seed: int = 0, **options) -> ResidualStack:
    torch.manual_seed(seed)
    return ResidualStack(pooled_layers(L, D, M, K, H, **options))


def forward(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, Context]:
    context = Context()
    return model(x, context), context


# -- the router


def test_scores_are_those_of_the_formula_and_are_not_renormalised():
    router = NormRouter(D, M, K)
    with torch.no_grad():
        router.gamma.fill_(0.7)
    x = tokens()
    z = x @ router.projection.weight.T
    expected = norm_router_scale(M, K) * 0.7 * torch.relu(z / z.norm(dim=1, keepdim=True))
    routing = router(x)
    torch.testing.assert_close(routing.scores, expected)
    best = expected.topk(K, dim=1)
    assert torch.equal(routing.indices, best.indices)
    torch.testing.assert_close(routing.weights, best.values)
    torch.testing.assert_close(routing.probs, expected / expected.sum(1, keepdim=True))


def test_scores_know_the_direction_of_a_token_and_not_its_length():
    router, x = NormRouter(D, M, K), tokens()
    scores = router(x).scores
    for factor in (1e-2, 3.0, 1e3):
        torch.testing.assert_close(router(factor * x).scores, scores, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(router(-x).scores, scores)
    assert torch.equal((router(-x).scores > 0), ~(scores > 0))  # no logit is exactly 0 here


def test_a_score_is_zero_where_its_logit_is_not_positive_and_all_are_short():
    routing = (router := NormRouter(D, M, K))(tokens(500))
    assert torch.equal(routing.scores == 0, routing.logits <= 0)
    assert routing.scores.norm(dim=1).max().item() <= norm_router_scale(M, K) * router.gamma.item() + 1e-5


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 1), (16, 1), (16, 4), (96, 1)])
def test_the_selected_scores_have_unit_length_on_average_at_the_start(n_experts: int, top_k: int):
    torch.manual_seed(3)
    router = NormRouter(128, n_experts, top_k)  # nearly orthogonal rows
    x = torch.randn(20_000, 128)
    assert router(x).weights.norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("n_experts", "top_k", "value"), [(32, 1, 2.83), (32, 2, 2.18), (96, 1, 4.02), (16, 1, 2.4)])
def test_the_released_scale(n_experts: int, top_k: int, value: float):
    assert norm_router_scale(n_experts, top_k, "monte_carlo") == pytest.approx(value, abs=0.01)
    assert norm_router_scale(n_experts, top_k) < value  # Jensen


def test_the_released_scale_is_finite_for_few_experts_but_no_number():
    few = [norm_router_scale(8, 1, "monte_carlo", seed=seed) for seed in range(2)]
    assert all(map(math.isfinite, few)) and max(few) > 5 * min(few)
    mine = [norm_router_scale(8, 1, seed=seed) for seed in range(2)]
    assert mine[0] == pytest.approx(mine[1], rel=0.01)
    assert norm_router_scale(1, 1) == pytest.approx(2, rel=0.02)  # half of all directions have nothing
    assert norm_router_scale(8, 1, "one") == 1


def test_a_token_without_a_positive_logit_gets_nothing():
    router = NormRouter(D, M, K)
    with torch.no_grad():
        router.projection.weight.copy_(router.projection.weight.abs())
    layer = MoELayer(router, ExpertPool(GLUExperts(M, D, H)))
    x = torch.cat([-tokens().abs(), torch.zeros(1, D), tokens().abs()]).requires_grad_()
    y = layer(x)
    assert not y[:41].any() and y[41:].any(1).all()
    routing = router(x)
    assert routing.probs.sum(1).allclose(torch.ones(len(x))) and routing.probs[0].eq(1 / M).all()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_bad_routers():
    with pytest.raises(InputError, match="init"):
        NormRouter(D, M, K, init="two")(tokens())
    with pytest.raises(InputError, match="top_k is 13"):
        NormRouter(D, M, 13)
    with pytest.raises(InputError, match="NaN"):
        NormRouter(D, M, K)(tokens() * math.nan)
    with pytest.raises(InputError, match="router"):
        pooled_layers(L, D, M, K, H, router="hard")
    with pytest.raises(InputError, match="coefficient is -1"):
        pooled_layers(L, D, M, K, H, coefficient=-1)
    with pytest.raises(InputError, match="balance is of 5 experts"):
        PooledMoELayer(NormRouter(D, M, K), ExpertPool(GLUExperts(M, D, H)), PoolBalance(5, L))


def test_a_bias_chooses_and_does_not_weigh():
    router = NormRouter(D, M, 1, bias_rate=0.1)
    router.bias.bias[3] = 100.0
    routing = router(tokens())
    assert routing.expert.eq(3).all()
    torch.testing.assert_close(routing.weight, routing.scores[:, 3])
    router.bias.after_step()
    assert router.bias.bias[3] == pytest.approx(99.9)


# -- the pool


@pytest.mark.parametrize("n_layers", [1, 4])
def test_expert_parameters_do_not_grow_with_depth(n_layers: int):
    layers = nn.ModuleList(pooled_layers(n_layers, D, M, K, H))
    pool = layers[0].experts
    assert all(layer.experts is pool for layer in layers)
    assert count_params(pool) == M * 3 * D * H
    assert count_params(layers) == count_params(pool) + n_layers * (M * D + 1)
    stored = [name for name in layers.state_dict() if "experts" in name]
    assert stored == ["0.experts.bank.gate_up", "0.experts.bank.down"]
    given = [p for group in make_optimizer(layers, TrainConfig(1)).param_groups for p in group["params"]]
    assert len(given) == len(set(map(id, given))) == 2 + 2 * n_layers


@pytest.mark.parametrize(("group", "pools"), [(None, 1), (6, 1), (3, 2), (2, 3), (1, 6)])
def test_groups_have_pools_and_losses_of_their_own(group: int | None, pools: int):
    layers = pooled_layers(6, D, M, K, H, group=group)
    assert len({id(layer.experts) for layer in layers}) == len({id(layer.balance) for layer in layers}) == pools
    model = ResidualStack(layers)
    forward(model, tokens())
    size = 6 // pools
    for layer in layers:
        own = [other for other in layers if other.balance is layer.balance]
        assert len(own) == size == layer.balance.n_layers
        assert float(layer.balance.shares.sum()) == pytest.approx(1)
    if pools > 1:
        assert not torch.equal(layers[0].balance.shares, layers[-1].balance.shares)


def test_with_its_own_experts_for_each_layer_a_pool_is_a_bank_a_layer():
    """M = E L, router l sees its own E columns only: the mask makes logits 0 before they are normalised."""

    class Masked(NormRouter):
        def scores(self, x, context):
            return super().scores(x, context) * self.own

    torch.manual_seed(0)
    per_layer = M // L
    pool = ExpertPool(GLUExperts(M, D, H))
    pooled, vanilla = [], []
    for layer in range(L):
        own = slice(layer * per_layer, (layer + 1) * per_layer)
        masked, router = Masked(D, M, 1), NormRouter(D, per_layer, 1)
        masked.own = torch.zeros(M).index_fill(0, torch.arange(M)[own], 1.0)
        bank = GLUExperts(per_layer, D, H)
        with torch.no_grad():
            router.projection.weight.copy_(masked.projection.weight[own])
            router.gamma.fill_(norm_router_scale(M, 1) / norm_router_scale(per_layer, 1))  # the same c0
            bank.gate_up.copy_(pool.bank.gate_up[own])
            bank.down.copy_(pool.bank.down[own])
        pooled.append(MoELayer(masked, pool))
        vanilla.append(MoELayer(router, bank))
    x = tokens()
    torch.testing.assert_close(ResidualStack(pooled)(x), ResidualStack(vanilla)(x), atol=1e-6, rtol=1e-5)


# -- the loss


def test_the_lagged_loss_is_the_formula_with_the_traffic_of_the_pass_before():
    model, x, coefficient = stack(coefficient=0.5), tokens(), 0.5
    first = forward(model, tokens(seed=2))[1]
    assert float(first.aux) == 0  # nothing is known yet
    shares = model.layers[0].balance.shares.clone()
    seen = []
    for layer in model.layers:
        layer.observe(lambda _, routing, context: seen.append(routing))
    _, context = forward(model, x)
    mean = torch.stack([routing.scores.mean(0) for routing in seen]).mean(0)
    torch.testing.assert_close(context.aux, coefficient * M * (shares * mean).sum())
    now = torch.stack([routing.counts / routing.counts.sum() for routing in seen]).mean(0)
    torch.testing.assert_close(model.layers[0].balance.shares, now)
    assert not model.layers[0].balance.shares.requires_grad


def test_the_exact_loss_is_that_of_the_pass_and_agrees_when_traffic_stands_still():
    x = tokens()
    exact, lagged = stack(lagged=False), stack()
    forward(lagged, x)  # the same batch again: the traffic of the pass before is that of this one
    (_, here), (_, there) = forward(exact, x), forward(lagged, x)
    torch.testing.assert_close(here.aux, there.aux)
    here.aux.backward()
    there.aux.backward()
    for (name, a), (_, b) in zip(exact.named_parameters(), lagged.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-4, msg=name)


def test_the_pool_sees_sums_and_a_loss_a_layer_does_not():
    """Layer 0 on expert A and layer 1 on B, or both on both halves: the same to the pool."""
    one, two = torch.tensor([[1.0, 0], [0, 1]]), torch.full((2, 2), 0.5)
    values = []
    for shares in (one, two, one.flip(0)):
        balance, context = PoolBalance(2, 2, lagged=False), Context()
        scores, counts = shares[:, None].expand(2, 10, 2), (10 * shares).long()
        values.append([float(balance.observe(s, n, context)) for s, n in zip(scores, counts, strict=True)])
    assert values[0] == values[1] == values[2] == [0, pytest.approx(1)]
    apart, together = (
        sum(float(switch_lbl(f.expand(10, 2), (10 * f).long())) for f in shares) for shares in (one, two)
    )
    assert apart == pytest.approx(2 * together)


def test_the_loss_is_lowered_by_smaller_scales():
    model = stack(lagged=False)
    before = forward(model, tokens())[1].aux.item()
    with torch.no_grad():
        for layer in model.layers:
            layer.router.gamma.fill_(0.5)
    assert forward(model, tokens())[1].aux.item() < 0.75 * before


def test_only_complete_passes_in_training_count():
    model = stack()
    balance = model.layers[0].balance
    forward(model.eval(), tokens())
    assert not balance.shares.any()
    context = Context()
    model.train()
    x = model.layers[0](tokens(), context)
    model.layers[1](x, context)
    assert not balance.shares.any()  # this pass never reached the last layer
    forward(model, tokens())
    kept = balance.shares.clone()
    assert kept.any()
    model.layers[0](tokens(seed=3), Context())
    assert torch.equal(balance.shares, kept)
    balance.reset()
    assert float(forward(model, tokens())[1].aux) == 0


def test_an_exact_loss_of_an_unfinished_pass_has_no_gradient():
    model, context = stack(lagged=False), Context()
    model.layers[0](tokens(), context)
    with pytest.raises(InputError, match="n_layers is 3 but 1 layers"):
        context.aux.backward()


def test_tokens_that_are_padding_count_nowhere():
    model, padded = stack(), stack()
    x, real = tokens(), torch.arange(60) < 40
    for _ in range(2):
        _, plain = forward(model, x)
        masked = Context(mask=real)
        padded(torch.cat([x, tokens(20, seed=9)]), masked)
    torch.testing.assert_close(masked.aux, plain.aux)
    torch.testing.assert_close(padded.layers[0].balance.shares, model.layers[0].balance.shares)
    nobody = Context(mask=torch.zeros(40, dtype=torch.bool))
    padded(x, nobody)
    assert torch.as_tensor(nobody.aux).isfinite()


@pytest.mark.parametrize("lagged", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_changes_no_gradient_and_counts_nothing_twice(lagged: bool, reentrant: bool):
    def train(model: ResidualStack, recompute: bool) -> list[torch.Tensor]:
        for seed in range(3):  # traffic moves between the micro-batches, whose gradients add up
            context, x = Context(), tokens(seed=seed).requires_grad_()
            for layer in model.layers:
                part = nn.functional.rms_norm(x, x.shape[-1:])
                if recompute:
                    x = x + checkpoint(layer, part, context, use_reentrant=reentrant)
                else:
                    x = x + layer(part, context)
            (x.square().mean() + context.aux).backward()
        return [p.grad for p in model.parameters()] + [model.layers[0].balance.shares]

    plain, repeated = (train(stack(lagged=lagged, coefficient=2.0), recompute) for recompute in (False, True))
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_loss_goes_on_from_a_state_dict():
    model, other = stack(), stack(seed=4)
    forward(model, tokens())
    other.load_state_dict(model.state_dict(), strict=True)
    assert [name for name in model.state_dict() if "balance" in name] == ["layers.0.balance.shares"]
    for _ in range(2):
        assert torch.equal(forward(model, tokens(seed=5))[1].aux, forward(other, tokens(seed=5))[1].aux)


def test_softmax_routers_have_the_loss_of_the_pool_by_their_probabilities():
    model = stack(router="softmax", lagged=False, coefficient=1.0, coefficients={"z": 0.0})
    assert isinstance(model.layers[0].router, LinearRouter)
    aux = float(forward(model, tokens(4000))[1].aux)
    assert aux == pytest.approx(1, abs=0.01)  # probabilities that are nearly uniform, as ever
    assert model.layers[0].router.coefficients == {"z": 0.0, "pool": 1.0}


def test_a_language_model_with_a_pool_learns():
    torch.manual_seed(0)
    layers = pooled_layers(2, D, 8, 1, H)
    model = DecoderLM(32, D, 2, 2, lambda layer: layers[layer], seq_len=8)
    optimizer = make_optimizer(model, TrainConfig(60, lr=1e-2))
    text = torch.arange(9).repeat(4, 1)
    losses = []
    for _ in range(60):
        context = Context()
        loss = nn.functional.cross_entropy(model(text[:, :-1], context).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + context.aux).backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


# -- what is read off it


def test_diagnostics_of_traffic_made_by_hand():
    counts = torch.tensor([[6, 2, 0, 0, 0], [0, 2, 6, 0, 0]])
    found = pool_diagnostics(counts, top=1)
    assert found["coverage"] == [0.75, 0.75] and found["jaccard"] == 0 and found["union"] == pytest.approx(2 / 5)
    assert found["dead"] == 2
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert found["entropy_bits"] == [pytest.approx(bits)] * 2
    assert pool_diagnostics(counts, top=2)["jaccard"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="top is 16"):
        pool_diagnostics(counts)


def test_a_random_router_is_another_and_goes_again():
    model, x = example(), torch.randn(64, 32)
    layer = next(iter(moe_layers(model).values()))
    before, weight = model(x), layer.router.projection.weight.detach().clone()
    with randomize_router(layer, 0):
        inside = layer.router.projection.weight.detach().clone()
        changed = model(x)
    with randomize_router(layer, 0):
        assert torch.equal(layer.router.projection.weight, inside)
    assert not torch.allclose(changed, before) and torch.equal(model(x), before)
    assert torch.equal(layer.router.projection.weight, weight)
    assert float(inside.std()) == pytest.approx(float(weight.std()), rel=0.2)
    with pytest.raises(RuntimeError), randomize_router(layer, 1):
        raise RuntimeError
    assert torch.equal(layer.router.projection.weight, weight)
