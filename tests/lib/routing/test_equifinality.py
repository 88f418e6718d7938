"""Cosine routing, rank-one experts and hops: the exact properties of the model and of its halting."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routers import HashRouter, LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Batch, LanguageModelling
from workbench.lib.core.train import TrainConfig, make_optimizer
from workbench.lib.data.types import TextDomains
from workbench.lib.measures.statistics import tost
from workbench.lib.routing.equifinality import (
    CosineRouter,
    GeometricMoE,
    RankOneExperts,
    example,
    iso_space,
    mean_saving,
)

D, E, M = 16, 12, 8


def block(hops=1, top_k=3, seed=0, dtype=torch.float64, coefficients=None, **options):
    torch.manual_seed(seed)
    router = CosineRouter(D, E, top_k, M, coefficients=coefficients)
    return GeometricMoE(router, RankOneExperts(E, D, top_k), hops, **options).to(dtype)


def tokens(n=7, dtype=torch.float64, seed=1):
    return torch.randn(n, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def model(hops):
    torch.manual_seed(0)
    return DecoderLM(
        vocab=256,
        d_model=D,
        n_layers=2,
        n_heads=2,
        ffn=lambda layer: GeometricMoE(CosineRouter(D, E, 3, M), RankOneExperts(E, D, 3), hops),
        seq_len=8,
    )


# 1. cosine invariance


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_cosine_router_ignores_the_norm_of_tokens_and_of_centroids(scale, seed):
    torch.manual_seed(seed)
    router = CosineRouter(D, E, 3, M).double()
    x = tokens(seed=seed)
    before = router(x)
    assert torch.allclose(router(scale * x).probs, before.probs, atol=1e-10)
    with torch.no_grad():
        router.centroids *= torch.rand(E, 1, dtype=torch.float64) * scale + 1e-2
    after = router(x)
    assert torch.allclose(after.probs, before.probs, atol=1e-10)
    assert torch.equal(after.indices, before.indices)


def test_linear_router_does_not_ignore_the_norm_of_tokens():
    torch.manual_seed(0)
    router = LinearRouter(D, E, 3).double()
    assert not torch.allclose(router(3 * tokens()).probs, router(tokens()).probs, atol=1e-3)


def test_scores_are_tau_times_the_cosine():
    router, x = block().hops[0].router, tokens()
    with torch.no_grad():
        router.tau.fill_(-4.0)  # its sign plays no part
    q = x @ router.projection.weight.T
    for n in range(len(x)):
        for e in range(E):
            expected = 4 * F.cosine_similarity(q[n], router.centroids[e], dim=0).item()
            assert math.isclose(router(x).logits[n, e].item(), expected, abs_tol=1e-12)


# 2. rank-one experts


def test_experts_with_all_gates_one_are_a_two_layer_perceptron():
    bank, x = block().hops[0].experts, tokens()
    routing = Routing.ragged(torch.ones(len(x), E, dtype=torch.bool), torch.ones(len(x), E, dtype=torch.float64))
    assert torch.allclose(bank(x, routing), F.gelu(x @ bank.u.T) @ bank.v, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(top_k=st.integers(1, E), n=st.integers(1, 9), seed=st.integers(0, 1000))
def test_experts_equal_the_sum_over_the_chosen_experts(top_k, n, seed):
    """For K = E this is sum_i p_i e_i exactly."""
    layer = block(top_k=top_k, seed=seed)
    x = tokens(n, seed=seed)
    routing = layer.hops[0].router(x, Context())
    bank = layer.hops[0].experts
    for t in range(n):
        chosen = zip(routing.indices[t].tolist(), routing.weights[t], strict=True)
        expected = sum(w * bank.v[i] * F.gelu(bank.u[i] @ x[t]) for i, w in chosen)
        assert torch.allclose(bank(x, routing)[t], expected, atol=1e-12)
    if top_k == E:
        assert torch.allclose(routing.dense(), routing.probs, atol=1e-12)


# 3. hops and alpha; halting has a file of its own


def test_hops_are_the_recurrence_of_the_paper():
    layer, x = block(hops=3), tokens()
    h, total = x, 0
    for _ in range(3):
        routing = layer.hops[0].router(h, Context())
        update = layer.hops[0].experts(h, routing)
        h, total = h + update, total + update
    assert torch.allclose(layer(x), total, atol=1e-12)
    assert torch.equal(layer(x.view(1, 7, D)), layer(x).view(1, 7, D))


def test_one_hop_with_alpha_one_is_one_hop():
    assert torch.equal(block(alpha=1.0)(tokens()), block()(tokens()))
    assert torch.allclose(block(alpha=2.5)(tokens()), 2.5 * block()(tokens()))


def test_alpha_is_learned_without_weight_decay():
    layer = block(alpha=1.0, dtype=torch.float32)
    groups = make_optimizer(layer, TrainConfig(steps=1)).param_groups
    (group,) = [g for g in groups if any(p is layer.alpha for p in g["params"])]
    assert group["weight_decay"] == 0
    layer(tokens(dtype=torch.float32)).sum().backward()
    assert layer.alpha.grad.abs() > 0


# 4. controls


def test_decoupled_hops_have_identical_gates():
    layer, x, gates = block(3, decoupled=True), tokens(), []
    for hop in layer.hops:
        hop.observe(lambda _, routing, context: gates.append(routing.dense()))
    layer(x)
    assert len(gates) == 3
    assert torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])
    coupled, other = block(3), []
    for hop in coupled.hops:
        hop.observe(lambda _, routing, context: other.append(routing.dense()))
    coupled(x)
    assert not torch.equal(other[0], other[1])


def test_a_random_fixed_router_gets_no_gradient():
    torch.manual_seed(0)
    router = CosineRouter(D, E, 3, M, trained=False)
    layer = GeometricMoE(router, RankOneExperts(E, D, 3), hops=2)
    layer(tokens(dtype=torch.float32)).square().sum().backward()
    assert router.projection.weight.grad is None and router.centroids.grad is None
    assert layer.hops[0].experts.u.grad.abs().sum() > 0


def test_a_top_1_router_has_a_gradient():
    """It has none where the single weight is renormalised to the constant 1."""
    layer = block(top_k=1)
    layer(tokens()).square().sum().backward()
    assert layer.hops[0].router.projection.weight.grad.abs().max() > 1e-8
    torch.manual_seed(0)
    dead = GeometricMoE(CosineRouter(D, E, 1, M, renormalize=True), RankOneExperts(E, D, 1)).double()
    dead(tokens()).square().sum().backward()
    assert dead.hops[0].router.projection.weight.grad.abs().max() < 1e-12


def test_probabilities_are_over_all_experts():
    routing = block(top_k=2).hops[0].router(tokens())
    assert routing.probs.shape == (7, E)
    assert torch.allclose(routing.probs.sum(-1), torch.ones(7, dtype=torch.float64))
    assert (routing.probs > 0).all()


# 5. parameter counts


@settings(max_examples=50, deadline=None)
@given(d=st.integers(2, 200), e=st.integers(1, 200))
def test_the_iso_parameter_width_matches_the_linear_router(d, e):
    assert abs(iso_space(d, e) * (d + e) - d * e) <= (d + e) / 2


def test_parameter_counts():
    assert count_params(CosineRouter(D, E, 3, M)) == M * (D + E) + 1
    assert count_params(LinearRouter(D, E, 3)) == D * E
    assert count_params(RankOneExperts(E, D, 3)) == 2 * E * D
    assert count_params(block(4)) == count_params(block(1))
    assert count_params(block(3, share_projection=False)) == count_params(block(1)) + 2 * M * D
    assert count_params(block(1, alpha=1.0)) == count_params(block(1)) + 1


def test_hop_variants_with_equal_k_times_h_have_equal_active_parameters():
    text = torch.randint(256, (400,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    splits = {split: {"noise": text} for split in ("train", "validation", "test")}
    task = LanguageModelling(TextDomains("noise", ("noise",), splits, {}), seq_len=8)
    batch = Batch(text[:16].view(2, 8).long(), text[1:17].view(2, 8).long(), torch.zeros(2, dtype=torch.int64))
    budgets = []
    for hops, top_k in [(1, 12), (2, 6), (3, 4), (4, 3)]:
        torch.manual_seed(0)
        router = CosineRouter(D, 24, top_k, M)
        layer = GeometricMoE(router, RankOneExperts(24, D, top_k), hops)
        lm = DecoderLM(256, D, 1, 2, lambda _, layer=layer: layer, 8)
        budgets.append(measure_budget(lm, task, batch))
    assert len({b.active_params for b in budgets}) == 1
    assert len({b.params for b in budgets}) == 1
    assert budgets[0].params - budgets[0].active_params == 2 * 24 * D // 2


# 6. equivalence


def test_a_large_p_of_a_t_test_is_not_equivalence():
    """Three noisy runs an arm: no significant difference, and no equivalence either. See the tests of `statistics`."""
    from scipy import stats

    a, b = [10.0, 14.0, 12.0], [12.5, 10.5, 13.5]
    assert stats.ttest_ind(a, b).pvalue > 0.5
    assert not tost(a, b, margin=0.5).equivalent
    assert tost(a, b, margin=50).equivalent


# 7. hash routing


def test_hash_routing_depends_on_the_token_id_alone():
    torch.manual_seed(0)
    layer = GeometricMoE(HashRouter(20, E, 3, seed=5), RankOneExperts(E, D, 3), hops=2)
    ids, seen = torch.tensor([3, 7, 3, 3, 7]), []
    layer.hops[1].observe(lambda _, routing, context: seen.append(routing.indices))
    layer(torch.randn(5, D), Context(token_ids=ids))
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer(torch.randn(5, D), Context(token_ids=ids))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][0], seen[0][2]) and torch.equal(seen[0][1], seen[0][4])
    assert not torch.equal(seen[0][0], seen[0][1])


# what a watcher sees, and the rest of the library


def test_every_hop_is_a_moe_layer_to_whoever_watches():
    lm = model(hops=2)
    layers = moe_layers(lm)
    assert list(layers) == [f"blocks.{b}.ffn.hops.{h}" for b in range(2) for h in range(2)]
    seen = []
    for name, layer in layers.items():
        layer.observe(lambda _, routing, context, name=name: seen.append((name, routing.n_tokens)))
    lm(torch.randint(256, (4, 8)))
    assert seen == [(name, 32) for name in layers]


def test_balance_losses_are_the_mean_over_hops():
    x = tokens()
    for options in ({}, {"decoupled": True}):
        context, losses = Context(aux=torch.tensor(0.5)), []
        layer = block(3, coefficients={"lbl": 0.4}, **options)
        for hop in layer.hops:
            hop.observe(lambda _, routing, context, losses=losses: losses.append(routing.losses["lbl"]))
        layer(x, context)
        assert torch.allclose(context.aux, 0.5 + 0.4 * torch.stack(losses).mean())


def test_hop_statistics_equal_the_definitions():
    layer, x, seen = block(2), tokens(), []
    handle = layer.observe(lambda _, stats: seen.append(stats))
    layer(x)
    first = block(1)(x)
    second = layer(x) - first
    handle.remove()
    layer(x)
    assert len(seen) == 2
    assert torch.allclose(seen[0].update_norms, torch.stack([first.norm(dim=-1), second.norm(dim=-1)]))
    assert torch.allclose(seen[0].hidden_norms, torch.stack([x.norm(dim=-1), (x + first).norm(dim=-1)]))
    assert torch.allclose(seen[0].cosines[0], F.cosine_similarity(first, second))
    assert torch.allclose(seen[0].decay[1], second.norm(dim=-1) / first.norm(dim=-1))
    assert (seen[0].used == 2).all() and mean_saving(seen) == 0


def test_the_cosine_of_a_zero_update_is_undefined():
    layer, seen = block(2), []
    torch.nn.init.zeros_(layer.hops[0].experts.v)
    layer.observe(lambda _, stats: seen.append(stats))
    layer(tokens())
    assert seen[0].cosines.isnan().all()


def test_own_projections_share_centroids_and_tau():
    layer = block(3, share_projection=False)
    first, second, third = (hop.router for hop in layer.hops)
    assert first.centroids is second.centroids is third.centroids and first.tau is third.tau
    assert not torch.equal(first.projection.weight, second.projection.weight)
    assert not torch.equal(second.projection.weight, third.projection.weight)


def test_shared_parts_survive_a_copy_and_a_file(tmp_path):
    layer, other = block(2, dtype=torch.float32), block(2, seed=9, dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    clone = copy.deepcopy(layer)
    assert clone.hops[0].experts is clone.hops[1].experts and clone.hops[0].router is clone.hops[1].router
    save_model(layer, str(tmp_path / "weights.safetensors"))
    assert not torch.equal(other(x), layer(x))
    load_model(other, str(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert other.hops[0].experts is other.hops[1].experts


def test_centroids_start_orthonormal_where_they_can():
    torch.manual_seed(0)
    few, many = CosineRouter(D, 6, 2, 8).centroids, CosineRouter(D, 20, 2, 8).centroids
    assert torch.allclose(few @ few.T, torch.eye(6), atol=1e-5)
    assert torch.allclose(many.norm(dim=-1), torch.ones(20))


def test_centroids_from_the_first_training_batch():
    torch.manual_seed(0)
    router = CosineRouter(D, E, 3, M, centroid_init="batch")
    x, before = tokens(30, torch.float32), router.centroids.clone()
    router.eval()(x)
    assert torch.equal(router.centroids, before)
    router.train()
    with pytest.raises(InputError, match='x has 5 tokens but centroid_init="batch"'):
        router(x[:5])
    router(x)
    directions = F.normalize(router.projection(x), dim=-1)
    assert (router.centroids @ directions.T).amax(-1).allclose(torch.ones(E))  # each is the direction of a token
    seeded = router.centroids.clone()
    router(x + 1)
    assert torch.equal(router.centroids, seeded)


def test_gradients_are_those_of_finite_differences():
    layer = block(2)
    assert torch.autograd.gradcheck(layer, tokens(3).requires_grad_(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 0}, "hops is 0"),
        ({"hops": 2, "alpha": 1.0}, r"alpha is 1.0 with hops = 2"),
        ({"hops": 2, "decoupled": True, "share_projection": False}, "share_projection must be True"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        block(**options)


def test_bad_router_arguments_are_named():
    with pytest.raises(InputError, match="d_space is 0"):
        CosineRouter(D, E, 3, 0)
    with pytest.raises(InputError, match="centroid_init 'bach' is unknown; did you mean 'batch'"):
        CosineRouter(D, E, 3, M, centroid_init="bach")
    with pytest.raises(InputError, match="top_k is 13"):
        RankOneExperts(E, D, 13)


def test_the_example_maps_tokens_to_tokens():
    assert example()(torch.randn(5, 32)).shape == (5, 32)
