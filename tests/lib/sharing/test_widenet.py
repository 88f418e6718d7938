"""One attention and one mixture at every depth: what is shared, what is not, and limits that are something known."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Context
from workbench.lib.sharing.widenet import (
    CapacityTopKRouter,
    GELUExperts,
    WideNetEncoder,
    depth_routing_agreement,
    routings_by_depth,
)

D, H, E, K, L, HEADS = 16, 24, 4, 2, 4, 2


def encoder(seed: int = 0, depth: int = L, n_experts: int = E, top_k: int = K, **options) -> WideNetEncoder:
    torch.manual_seed(seed)
    return WideNetEncoder(D, depth, HEADS, H, n_experts, top_k, **options)


def perturbed(model: WideNetEncoder) -> WideNetEncoder:
    """With norms, biases and routers that are no longer at their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def sequences(batch: int = 3, time: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, D, generator=torch.Generator().manual_seed(seed))


# -- what is shared


@pytest.mark.parametrize("depth", [1, 4])
def test_the_parameters_are_those_of_the_formula(depth: int):
    attention, experts, router = 4 * D * D, E * (2 * D * H + H + D), D * E
    assert count_params(encoder(depth=depth)) == attention + experts + router + depth * 4 * D + 2 * D
    assert count_params(encoder(depth=depth, share_norms=True)) == attention + experts + router + 4 * D + 2 * D
    each = count_params(encoder(depth=depth, share_router=False))
    assert each == attention + experts + depth * router + depth * 4 * D + 2 * D
    assert count_params(encoder(depth=depth, group=1)) == depth * (attention + experts + router + 4 * D) + 2 * D


def test_all_depths_have_the_same_parts_but_for_the_norms():
    model = encoder()
    norm1, attention, norm2, moe = zip(*map(model.parts, range(L)), strict=True)
    assert len(set(attention)) == len(set(moe)) == 1 and len({m.router for m in moe} | {m.experts for m in moe}) == 2
    assert len(set(norm1) | set(norm2)) == 2 * L
    assert moe[0].depths == tuple(range(L))
    tied = encoder(share_norms=True)
    assert len({tied.parts(depth)[0] for depth in range(L)} | {tied.parts(depth)[2] for depth in range(L)}) == 2


def test_groups_and_routers_of_depths():
    model = encoder(group=2)
    assert [model.parts(depth)[3].depths for depth in range(L)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert model.parts(1)[1] is model.parts(0)[1] is not model.parts(2)[1]
    own = encoder(share_router=False)
    layers = [own.parts(depth)[3] for depth in range(L)]
    assert len({layer.router for layer in layers}) == L and len({layer.experts for layer in layers}) == 1
    assert all(layer.depths == () for layer in layers)
    mixed = encoder(group=2, share_router=False)
    pools = [mixed.parts(depth)[3].experts for depth in range(L)]
    assert pools[0] is pools[1] is not pools[2] is pools[3]
    assert len([name for name in mixed.state_dict() if name.endswith("bank.up")]) == 2


def test_the_gradient_of_what_is_shared_is_the_sum_over_untied_copies():
    shared = perturbed(encoder(noise_std=0.0))
    untied = encoder(group=1, noise_std=0.0)
    for depth in range(L):
        for mine, its in zip(shared.parts(depth), untied.parts(depth), strict=True):
            its.load_state_dict(mine.state_dict())
    untied.norm.load_state_dict(shared.norm.state_dict())
    for model in (shared, untied):
        context = Context()
        (model(sequences(), context).square().mean() + context.aux).backward()
    for part, name in ((1, "qkv.weight"), (1, "out.weight"), (3, "router.projection.weight"), (3, "experts.bank.up")):
        copies = [untied.parts(depth)[part].get_parameter(name).grad for depth in range(L)]
        total = shared.parts(0)[part].get_parameter(name).grad
        torch.testing.assert_close(total, sum(copies), atol=1e-5, rtol=1e-4)
        assert all(grad.any() for grad in copies)


def test_with_tied_norms_it_is_one_map_applied_again_and_again():
    model = perturbed(encoder(share_norms=True)).eval()
    x, whole = sequences(), model(sequences())
    norm1, attention, norm2, moe = model.parts(0)
    for _ in range(L):
        x = x + attention(norm1(x))
        x = x + moe(norm2(x))
    assert torch.equal(whole, model.norm(x))


def test_two_depths_that_are_given_the_same_decide_the_same():
    model = perturbed(encoder(share_norms=True)).eval()
    for attention in model.attentions:
        nn.init.zeros_(attention.out.weight)
    experts = model.moes[0].experts.bank
    for weight in (experts.down, experts.down_bias):
        nn.init.zeros_(weight)  # the stream never changes, so every depth sees one input
    routings = routings_by_depth(model, sequences())
    assert len(routings) == L and depth_routing_agreement(routings).eq(1).all()
    own = perturbed(encoder()).eval()
    for attention in own.attentions:
        nn.init.zeros_(attention.out.weight)
    for weight in (own.moes[0].experts.bank.down, own.moes[0].experts.bank.down_bias):
        nn.init.zeros_(weight)
    assert depth_routing_agreement(routings_by_depth(own, sequences())).lt(1).any()  # by the norms alone


@pytest.mark.parametrize("depth", range(L))
def test_a_norm_changes_its_depth_and_those_behind_it(depth: int):
    model, x = perturbed(encoder()).eval(), sequences()
    before = [routing.logits for routing in routings_by_depth(model, x)]
    with torch.no_grad():
        model.moe_norms[depth].weight.mul_(1.5)
        model.moe_norms[depth].bias.add_(0.3)
    after = [routing.logits for routing in routings_by_depth(model, x)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [d < depth for d in range(L)]


# -- what it is with one expert, or all


def test_with_one_expert_it_is_a_dense_feed_forward_bit_for_bit():
    model = perturbed(encoder(n_experts=1, top_k=1, capacity_factor=None)).eval()
    bank, x = model.moes[0].experts.bank, sequences()
    whole = model(x)
    for depth in range(L):
        norm1, attention, norm2, _ = model.parts(depth)
        x = x + attention(norm1(x))
        hidden = nn.functional.gelu(nn.functional.linear(norm2(x), bank.up[0], bank.up_bias[0]))
        x = x + nn.functional.linear(hidden, bank.down[0], bank.down_bias[0])
    assert torch.equal(whole, model.norm(x))


def albert(depth: int, groups: int) -> AlbertModel:
    torch.manual_seed(2)
    sizes = {"embedding_size": D, "hidden_size": D, "intermediate_size": H, "num_attention_heads": HEADS}
    config = AlbertConfig(
        vocab_size=9,
        num_hidden_layers=depth,
        num_hidden_groups=groups,
        hidden_act="gelu",
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        layer_norm_eps=1e-5,
        initializer_range=0.3,
        **sizes,
    )
    model = AlbertModel(config)
    for layer in model.encoder.albert_layer_groups:
        attention = layer.albert_layers[0].attention
        for linear in (attention.query, attention.key, attention.value, attention.dense):
            nn.init.zeros_(linear.bias)  # ours has none
    return model.eval()


@pytest.mark.parametrize("groups", [1, 2])
def test_with_one_expert_and_norms_behind_the_sum_it_is_the_albert_of_transformers(groups: int):
    """The oracle of sharing: outputs, and the gradients that arrive in the shared weights from all depths."""
    peer = albert(L, groups).encoder
    nn.init.eye_(peer.embedding_hidden_mapping_in.weight)
    options = {"n_experts": 1, "top_k": 1, "capacity_factor": None, "post_norm": True, "group": L // groups}
    model = encoder(**options)
    with torch.no_grad():
        for depth in range(L):
            norm1, attention, norm2, moe = model.parts(depth)
            its = peer.albert_layer_groups[depth * groups // L].albert_layers[0]
            theirs = its.attention
            attention.qkv.weight.copy_(torch.cat([theirs.query.weight, theirs.key.weight, theirs.value.weight]))
            attention.out.weight.copy_(theirs.dense.weight)
            bank = moe.experts.bank
            bank.up.copy_(its.ffn.weight[None])
            bank.up_bias.copy_(its.ffn.bias[None])
            bank.down.copy_(its.ffn_output.weight[None])
            bank.down_bias.copy_(its.ffn_output.bias[None])
            norm1.load_state_dict(theirs.LayerNorm.state_dict())
            norm2.load_state_dict(its.full_layer_layer_norm.state_dict())
    x = sequences()
    y, expected = model(x), peer(x).last_hidden_state
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    y.square().mean().backward()
    expected.square().mean().backward()
    for group in range(groups):
        its = peer.albert_layer_groups[group].albert_layers[0]
        depths = range(group * L // groups, (group + 1) * L // groups)
        bank, qkv = model.moes[group].experts.bank, model.attentions[group].qkv
        torch.testing.assert_close(bank.up.grad[0], its.ffn.weight.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(qkv.weight.grad[:D], its.attention.query.weight.grad, atol=1e-5, rtol=1e-3)
        norms = sum(model.moe_norms[depth].weight.grad for depth in depths)  # theirs are tied
        torch.testing.assert_close(norms, its.full_layer_layer_norm.weight.grad, atol=1e-5, rtol=1e-3)


def test_with_all_experts_it_is_the_dense_mixture():
    router, bank, x = CapacityTopKRouter(D, E, E, capacity_factor=None).eval(), GELUExperts(E, D, H), sequences(1)[0]
    p = torch.softmax(router.projection(x), -1)
    outputs = [
        nn.functional.linear(
            nn.functional.gelu(nn.functional.linear(x, bank.up[e], bank.up_bias[e])), bank.down[e], bank.down_bias[e]
        )
        for e in range(E)
    ]
    expected = sum(p[:, e, None] * outputs[e] for e in range(E))
    torch.testing.assert_close(bank(x, router(x)), expected, atol=1e-6, rtol=1e-5)


# -- the router


@pytest.mark.parametrize("factor", [0.3, 0.7, 1.2])
def test_no_expert_has_more_tokens_than_places_and_the_first_come_first(factor: float):
    torch.manual_seed(0)
    router, x = CapacityTopKRouter(D, E, K, capacity_factor=factor).eval(), sequences(1, 50)[0]
    routing = router(x)
    places = math.floor(factor * K * 50 / E)
    assert router.capacity(50) == places
    taken = torch.zeros(E, dtype=torch.long)
    for expert, kept in zip(routing.expert, routing.kept, strict=True):
        assert bool(kept) == bool(taken[expert] < places)
        taken[expert] += 1
    served = routing.served()
    assert served.counts.max() <= places and len(served.expert) + int((~routing.kept).sum()) == 50 * K
    assert routing.kept.all() == (factor == 1.2)


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 2), (4, 3), (3, 2), (7, 3)])
def test_a_factor_of_experts_a_choice_drops_nothing(n_experts: int, top_k: int):
    router = CapacityTopKRouter(D, n_experts, top_k, capacity_factor=n_experts / top_k)
    with torch.no_grad():
        router.projection.weight[0] += 10 * sequences(1, 1)[0, 0]  # all tokens prefer one expert
    for n in (1, 7, 49):
        assert router.capacity(n) == n and router(sequences(1, n)[0]).kept.all()


def test_a_dropped_token_passes_by_and_keeps_its_stream():
    model = encoder(depth=1, capacity_factor=0.3).eval()
    nn.init.zeros_(model.attentions[0].out.weight)
    x = sequences(1, 20)
    (routing,) = routings_by_depth(model, x)
    nothing = torch.zeros(20).index_add(0, routing.token, routing.kept.float()) == 0
    assert nothing.any() and not nothing.all()
    same = (model(x) == model.norm(x))[0].all(1)
    assert torch.equal(same, nothing)


def test_weights_are_probabilities_and_noise_is_for_training_alone():
    torch.manual_seed(0)
    router, x = CapacityTopKRouter(D, E, K), sequences(1, 400)[0]
    assert router.noise_std == 1 / E
    clean = router.eval()(x)
    assert torch.equal(clean.weights, torch.softmax(router.projection(x), -1).topk(K).values)
    assert torch.equal(router(x).logits, clean.logits)
    noisy = router.train()(x)
    assert (noisy.logits - clean.logits).std().item() == pytest.approx(1 / E, rel=0.1)
    router.noise_std = 0.0
    assert torch.equal(router(x).logits, clean.logits)


def test_padding_has_no_place():
    router = CapacityTopKRouter(D, E, K, noise_std=0.0)
    x, real = sequences(1, 40)[0], torch.arange(40) % 2 == 1
    routing = router(x, Context(mask=real))
    assert not routing.kept[~real[routing.token]].any()
    alone = CapacityTopKRouter(D, E, K, noise_std=0.0, capacity_factor=2.4)  # as many places for half the tokens
    alone.load_state_dict(router.state_dict())
    assert torch.equal(routing.kept[real[routing.token]], alone(x[real]).kept)


def test_the_balance_loss_has_a_term_for_every_depth():
    model = encoder(noise_std=0.0, coefficients={"lbl": 1.0})
    nn.init.zeros_(model.moes[0].router.projection.weight)  # uniform probabilities: each term is 1
    context = Context()
    model(sequences(), context)
    assert torch.as_tensor(context.aux).item() == pytest.approx(L)


def test_a_checkpoint_at_every_depth_changes_no_gradient():
    def train(model: WideNetEncoder, recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(4)
        context, x = Context(), sequences().requires_grad_()
        for depth in range(L):
            norm1, attention, norm2, moe = model.parts(depth)
            x = x + attention(norm1(x))
            y = checkpoint(moe, norm2(x), context, use_reentrant=False) if recompute else moe(norm2(x), context)
            x = x + y
        (x.square().mean() + 5 * context.aux).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, repeated = (train(perturbed(encoder()), recompute) for recompute in (False, True))
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_agreement_of_decisions_made_by_hand():
    model, x = perturbed(encoder()).eval(), sequences()
    routings = routings_by_depth(model, x)
    first = torch.stack([routing.probs.argmax(1) for routing in routings])
    expected = torch.tensor([[float((a == b).double().mean()) for b in first] for a in first], dtype=torch.float64)
    torch.testing.assert_close(depth_routing_agreement(routings), expected)
    assert not any(layer.observed for layer in moe_layers(model).values())


def test_a_copy_is_shared_as_the_model_is():
    model = encoder(share_router=False)
    copied = copy.deepcopy(model)
    assert len({copied.parts(depth)[3].experts for depth in range(L)}) == 1
    assert torch.equal(copied.eval()(sequences()), model.eval()(sequences()))


def test_bad_arguments():
    with pytest.raises(InputError, match="group is 3"):
        encoder(group=3)
    with pytest.raises(InputError, match="top_k is 5"):
        encoder(top_k=5)
    with pytest.raises(InputError, match="capacity_factor is 0"):
        CapacityTopKRouter(D, E, capacity_factor=0)
    with pytest.raises(InputError, match="noise_std is -1"):
        CapacityTopKRouter(D, E, noise_std=-1)
    with pytest.raises(InputError, match="without a MoELayer"):
        routings_by_depth(nn.Linear(D, D), sequences())
