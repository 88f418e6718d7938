"""Mixture-of-Recursions against its definition: a loop over tokens, full attention under a mask, and what is causal."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.errors import InputError
from workbench.lib.core.attention import Attention, rope
from workbench.lib.core.budget import UNCOUNTED, count_params
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import Block, DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import HashRouter
from workbench.lib.core.routing import Context
from workbench.lib.sharing import mixture_of_recursions as mor
from workbench.lib.sharing.mixture_of_recursions import (
    Decoding,
    ExpertChoiceMoR,
    MoRCache,
    RecursiveBlock,
    SharedStack,
    TokenChoiceMoR,
    mor_flops,
    shared_layers,
)
from workbench.lib.sharing.recursions import gathered

D, H = 16, 2


def layers(n: int, seed: int = 0, ffn=lambda: GLU(D, 24)) -> list[Block]:
    torch.manual_seed(seed)
    return [Block(D, ffn(), Attention(D, H, causal=True, rope=True)).double() for _ in range(n)]


def expert(depth: int = 2, n: int = 3, seed: int = 0, std: float = 1.0, **options) -> ExpertChoiceMoR:
    made = ExpertChoiceMoR(RecursiveBlock(layers(depth, seed)), n, **options).double()
    for name, p in made.named_parameters():
        if name.startswith(("routers", "samplers")):
            nn.init.normal_(p, std=std)
    return made


def token(depth: int = 2, n: int = 3, seed: int = 0, **options) -> TokenChoiceMoR:
    made = TokenChoiceMoR(RecursiveBlock(layers(depth, seed)), n, **options).double()
    nn.init.normal_(made.router.projection.weight, std=1.0)
    return made


def tokens(batch: int = 2, time: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: Block, x: torch.Tensor, present: torch.Tensor, positions: torch.Tensor, kv=None) -> torch.Tensor:
    """A layer for one sequence (T, D): every token by itself, over the present ones up to it, at their positions."""
    h, rows = layer.attention_norm(x), []
    q, k, v = layer.attention.qkv(h).unflatten(-1, (3, H, -1)).unbind(1)  # (T, H, d) each
    q, k = (rope(part.transpose(0, 1), positions=positions).transpose(0, 1) for part in (q, k))
    k, v = (k, v) if kv is None else kv
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if kv is not None or present[s]]
        heads = []
        for head in range(H):
            if not seen:
                heads.append(torch.zeros(D // H, dtype=x.dtype))
                continue
            weights = torch.softmax(k[seen, head] @ q[t, head] / math.sqrt(D // H), 0)
            heads.append(weights @ v[seen, head])
        rows.append(layer.attention.out(torch.cat(heads)))
    x = x + torch.stack(rows)
    return x + layer.ffn(layer.ffn_norm(x))


def keys_of(layer: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (T, H, d) that a layer makes of a whole sequence."""
    _, k, v = layer.attention.heads(layer.attention_norm(x))
    return k.transpose(0, 1), v.transpose(0, 1)


# -- 1. what it is at the ends, and by its definition


@pytest.mark.parametrize("kv", ["cache", "share"])
def test_residual_with_all_tokens_and_a_gate_of_one_is_the_recursive_transformer(kv):
    made = expert(capacities=[1, 1, 1], alpha=2.0, std=0.0, update="residual", kv="cache")  # 2 sigmoid(0) = 1
    plain = SharedStack(list(made.block.layers), shared_layers("cycle", 6, 3))
    torch.testing.assert_close(made(tokens()), plain(tokens(), Context()))
    once = expert(n=1, capacities=[1], alpha=2.0, std=0.0, update="residual", kv=kv)
    x = tokens()
    for layer in once.block.layers:
        x = layer(x, Context())
    torch.testing.assert_close(once(tokens()), x)
    released = expert(capacities=[1, 1, 1], alpha=2.0, std=0.0)
    assert not torch.allclose(released(tokens()), plain(tokens(), Context()), atol=0.1)


@pytest.mark.parametrize("update", ["paper", "residual"])
@pytest.mark.parametrize("kv", ["cache", "share"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacities", [(1, 2 / 3, 1 / 3), (0.7, 0.7, 0.3)])
def test_expert_choice_is_its_definition_token_by_token(update, kv, training, capacities):
    made = expert(update=update, kv=kv, alpha=0.7, seed=4, capacities=capacities).train(training)
    x, everywhere = tokens(4), torch.arange(12)
    y, stats = made.recur(x)
    for b in range(len(x)):
        h, active, kept = x[b], torch.ones(12, dtype=torch.bool), []
        for r in range(3):
            z = (h @ made.routers[r].weight.T).squeeze(1)
            if training:
                best = sorted(active.nonzero().flatten().tolist(), key=lambda t: -z[t].item())[: made.kept(r, 12)]
                taken = torch.tensor([t in best for t in range(12)])
            else:
                refuses = r == 2 or capacities[r] < (1, *capacities)[r]
                taken = active & (torch.sigmoid(z) > 0.5) if refuses else active
            f = h
            for i, layer in enumerate(made.block.layers):
                if kv == "share" and r == 0:
                    kept.append(keys_of(layer, f))
                present = torch.ones_like(taken) if kv == "share" else taken
                f = by_hand(layer, f, present, everywhere, kept[i] if kv == "share" else None)
            score = 0.7 * torch.sigmoid(z)[:, None]
            new = h + score * (f if update == "paper" else f - h)
            h, active = torch.where(taken[:, None], new, h), taken
            assert torch.equal(stats.active[r, b], taken)
        torch.testing.assert_close(y[b], h)
    if not training:  # unequal numbers of tokens, so that what fills up the shorter sequence is not seen
        assert len(set(stats.active[2].sum(1).tolist())) > 1


def test_token_choice_is_its_definition_token_by_token():
    made, x = token(alpha=0.6), tokens()
    y, stats = made.recur(x)
    for b in range(len(x)):
        p = torch.softmax(x[b] @ made.router.projection.weight.T, -1)
        depth = p.argmax(-1) + 1
        h = x[b]
        for r in range(3):
            active, f = depth > r, h
            for layer in made.block.layers:
                f = by_hand(layer, f, active, torch.arange(12))
            h = torch.where(active[:, None], f, h)
        torch.testing.assert_close(y[b], x[b] + 0.6 * p.amax(-1)[:, None] * h)
        assert torch.equal(stats.depth[b], depth)
    assert len(stats.depth.unique()) == 3


# -- 2. filtering


@pytest.mark.parametrize("time", [1, 2, 7, 12])
def test_each_recursion_takes_its_number_of_those_before(time):
    made = expert()
    _, stats = made.recur(tokens(3, time))
    k = [max(1, (3 - r) * time // 3) for r in range(3)]
    assert stats.active.sum(-1).tolist() == [[n] * 3 for n in k]
    assert not (stats.active[1:] & ~stats.active[:-1]).any()
    assert stats.depth.sum().item() == 3 * sum(k)
    assert (stats.scores != 0).equal(stats.active)


def test_capacities_that_rounding_would_cost_a_token_keep_it():
    made = expert(capacities=[0.29, 0.29, 0.1])
    assert [made.kept(r, 100) for r in range(3)] == [29, 29, 10]  # 0.29 * 100 is 28.999999999999996


def test_capacities_come_down_from_one_along_a_cosine():
    made = expert(warmup=10)
    seen = []
    for _ in range(12):
        seen.append([made.kept(r, 12) for r in range(3)])
        made.after_step()
    assert seen[0] == [12, 12, 12] and seen[5] == [12, 10, 8] and seen[10] == seen[11] == [12, 8, 4]
    assert all(a >= b for before, after in pairwise(seen) for a, b in zip(before, after, strict=True))
    again = expert(warmup=10)
    again.load_state_dict(made.state_dict())
    assert again.capacity(2) == made.capacity(2) == 1 / 3
    assert expert(warmup=10).eval().kept(2, 12) == 4


def test_a_random_choice_keeps_the_capacities_and_looks_at_no_token():
    made = expert(choice="random")
    torch.manual_seed(0)
    _, first = made.recur(tokens())
    _, second = made.recur(tokens())
    assert first.active.sum(-1).tolist() == [[12] * 2, [8] * 2, [4] * 2] and not first.active.equal(second.active)
    assert not first.losses
    shares = made.eval().recur(tokens(40, 100))[1].active.double().mean((1, 2))
    torch.testing.assert_close(shares, torch.tensor([1, 2 / 3, 1 / 3]).double(), atol=0.03, rtol=0)


# -- 3. gathered attention


def test_gathered_attention_is_full_attention_under_a_mask_at_the_original_positions():
    attention = layers(1)[0].attention
    x = tokens(3, 10)
    active = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.5
    places, real = gathered(active)
    assert real is not None and torch.equal(real.sum(1), active.sum(1))
    picked = x.gather(1, places[..., None].expand(-1, -1, D))

    def among(positions: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*attention.heads(picked, positions), is_causal=True)

    q, k, v = attention.heads(x)
    mask = torch.ones(10, 10).tril().bool() & active[:, None, :] | torch.eye(10, dtype=torch.bool)
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    wanted = full.gather(2, places[:, None, :, None].expand(-1, H, -1, D // H))
    ours, compact = among(places), among(torch.arange(places.shape[1]).expand_as(places))
    torch.testing.assert_close(ours.transpose(1, 2)[real], wanted.transpose(1, 2)[real], atol=1e-5, rtol=0)
    assert not torch.allclose(compact.transpose(1, 2)[real], wanted.transpose(1, 2)[real], atol=1e-3)


def test_only_the_tokens_that_take_part_are_computed():
    made, rows = expert(), []
    made.block.layers[0].ffn.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
    made(tokens())
    assert rows == [(2, 12, D), (2, 8, D), (2, 4, D)]


def test_a_mixture_of_experts_inside_is_told_the_gathered_tokens_and_its_loss_arrives():
    inner = MoELayer(HashRouter(256, 4, 1), GLUExperts(4, D, 8))
    made = ExpertChoiceMoR(RecursiveBlock(layers(1, ffn=lambda: inner)), 3).double()
    ids = torch.randint(256, (24,))
    _, stats = made.recur(tokens(), Context(token_ids=ids))
    with observing([inner], lambda routing, _: routing.expert) as seen:
        made(tokens(), Context(token_ids=ids))
    for r, experts in enumerate(seen[inner]):
        assert torch.equal(experts, inner.router.table[ids.view(2, 12)[stats.active[r]], 0])
    inner.router.coefficients = {"own": 0.5}
    route = inner.router.forward
    inner.router.forward = lambda x, context: _with_loss(route(x, context))
    context = Context(token_ids=ids)
    _, stats = made.recur(tokens(), context)
    torch.testing.assert_close(context.aux, 1e-3 * stats.losses["sampling"] + 3 * 0.5)


def _with_loss(routing):
    routing.losses["own"] = torch.ones((), dtype=torch.float64)
    return routing


# -- 4. who is not taken


@pytest.mark.parametrize("kv", ["cache", "share"])
def test_a_token_that_is_not_taken_is_the_same_bit_by_bit(kv):
    made = expert(kv=kv, capacities=[0.9, 0.5, 0.2]).eval()
    x = tokens(4, 20)
    y, stats = made.recur(x)
    out = stats.depth == 0
    assert out.any() and torch.equal(y[out], x[out])
    nobody = expert(kv=kv, capacities=[0.9, 0.5, 0.2]).eval()
    for router in nobody.routers:
        nn.init.zeros_(router.weight)
    assert torch.equal(nobody(x), x)


# -- 5. causality


def differs_before(module: nn.Module, t: int = 8, trials: int = 20) -> bool:
    """Whether anything before token t changes where later tokens do."""
    changed = False
    for seed in range(trials):
        x = tokens(1, 12, seed)
        other = torch.cat([x[:, :t], tokens(1, 12 - t, 100 + seed)], 1)
        changed |= not torch.allclose(module(x)[:, :t], module(other)[:, :t], atol=1e-9)
    return changed


@pytest.mark.parametrize("kv", ["cache", "share"])
def test_the_k_best_look_into_the_future_and_the_threshold_does_not(kv):
    made = expert(kv=kv)
    assert differs_before(made.train())
    assert not differs_before(made.eval())
    made.evaluate_by = "top-k"
    assert differs_before(made)


@pytest.mark.parametrize("kv", ["cache", "share"])
@pytest.mark.parametrize("training", [True, False])
def test_token_choice_is_causal_in_training_too(kv, training):
    made = token(kv=kv).train(training)
    assert not differs_before(made)
    assert not torch.allclose(made(tokens(1, 12, 0))[:, 8:], made(tokens(1, 12, 1))[:, 8:])


# -- 6. gradients of the routers


def test_routers_learn_through_the_gate_and_at_alpha_zero_from_the_sampling_loss_alone():
    made = expert()
    (made(tokens()) * tokens(seed=5)).sum().backward()
    assert all(router.weight.grad.abs().sum() > 1e-6 for router in made.routers)
    still = expert(alpha=0.0)
    x, context = tokens().requires_grad_(), Context()
    y, stats = still.recur(x, context)
    assert torch.equal(y, x)
    (y * tokens(seed=5)).sum().backward(retain_graph=True)
    assert not any(router.weight.grad.any() for router in still.routers)
    before = x.grad.clone()
    context.aux.backward()
    assert all(router.weight.grad.any() for router in still.routers)
    assert not torch.equal(x.grad, before)  # the hidden states are not cut off
    wanted = sum(
        F.binary_cross_entropy_with_logits(z[candidates], taken[candidates].double())
        for r, taken in enumerate(stats.active)
        for z in [(x @ still.routers[r].weight.T).squeeze(-1)]
        for candidates in [stats.active[r - 1] if r else torch.ones_like(taken)]
    )
    torch.testing.assert_close(stats.losses["sampling"], wanted)


def test_an_auxiliary_router_learns_by_itself_and_is_asked_in_evaluation():
    made = expert(sampling="aux_router", capacities=[0.9, 0.5, 0.2])
    x, context = tokens().requires_grad_(), Context()
    made.recur(x, context)[0].detach()
    context.aux.backward()
    assert x.grad is None and all(router.weight.grad is None for router in made.routers)
    assert all(sampler.weight.grad.any() for sampler in made.samplers)
    for sampler in made.samplers:
        nn.init.zeros_(sampler.weight)
    assert torch.equal(made.eval()(tokens()), tokens())  # nobody passes, whatever the first routers say


def test_sampling_accuracy_is_the_share_of_candidates_decided_alike():
    made = expert()
    _, stats = made.recur(tokens())
    once = ExpertChoiceMoR(made.block, 1).double()
    once.routers[0].load_state_dict(made.routers[0].state_dict())
    torch.testing.assert_close(stats.logits[1], (once(tokens()) @ made.routers[1].weight.T).squeeze(-1))
    assert stats.sampling_accuracy[0] == 1  # it takes all, and lets all pass
    for r in (1, 2):
        alike = ((stats.logits[r] > 0) == stats.active[r])[stats.active[r - 1]].double().mean()
        assert stats.sampling_accuracy[r] == alike < 1
    assert made.eval().recur(tokens())[1].sampling_accuracy is None


# -- balance of token choice


def test_the_balance_loss_is_its_formula_and_one_when_even():
    made = token()
    context = Context()
    _, stats = made.recur(tokens(), context)
    logits = tokens().flatten(0, 1) @ made.router.projection.weight.T
    p, f = torch.softmax(logits, -1).mean(0), torch.bincount(logits.argmax(-1), minlength=3) / 24
    torch.testing.assert_close(stats.losses["lbl"], 3 * (p * f).sum())
    torch.testing.assert_close(context.aux, 0.1 * 3 * (p * f).sum() + 1e-5 * logits.logsumexp(-1).square().mean())


def test_the_bias_moves_the_choice_towards_the_rare_depth_and_is_not_in_the_gate():
    made = token(balance="bias", bias_rate=0.05)
    with torch.no_grad():
        made.router.projection.weight.mul_(0.1)
        made.router.projection.weight[2] += tokens().mean((0, 1))
    before = made.recur(tokens())[1].depth.flatten().bincount(minlength=4)[1:]
    made.router.bias.load.zero_()
    for _ in range(40):
        made(tokens())
        made.router.bias.after_step()
    _, stats = made.eval().recur(tokens())
    after = stats.depth.flatten().bincount(minlength=4)[1:]
    assert after.max() + 5 < before.max() and after.min() > before.min() == 0 and not stats.losses
    p = torch.softmax(tokens() @ made.router.projection.weight.T, -1)
    torch.testing.assert_close(stats.scores.sum(0), p.gather(-1, stats.depth[..., None] - 1).squeeze(-1))


# -- 7. the cache


@pytest.mark.parametrize("kv", ["cache", "share"])
@pytest.mark.parametrize("make", [expert, token])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 1, 3, 2), (12,)])
def test_decoding_with_either_cache_is_the_full_forward(kv, make, pieces):
    made = make(kv=kv, seed=4).eval()
    x, cache = tokens(3), made.cache()
    y, stats = made.recur(x)
    steps = torch.cat([made.step(part, cache) for part in x.split(pieces, 1)], 1)
    torch.testing.assert_close(steps, y)
    assert cache.length == 12
    entry = 2 * D * 8 * len(made.block.layers)
    held = stats.active.sum().item() if kv == "cache" else 3 * 12
    assert cache.bytes() == held * entry
    assert 0 < stats.active[2].sum() < stats.active[1].sum() < 3 * 12


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_bytes_beside_a_transformer_of_the_same_depth(n):
    time, base = 30 * n, 2
    vanilla = MoRCache("cache", 1, n * base)
    ours = {policy: MoRCache(policy, n, base) for policy in ("cache", "share")}
    k = torch.zeros(1, H, time, 4)
    for layer in range(n * base):
        vanilla.append(0, layer, k, k, torch.arange(time)[None])
    for policy, cache in ours.items():
        for r in range(n if policy == "cache" else 1):
            kept = (n - r) * time // n
            for layer in range(base):
                cache.append(r, layer, k[:, :, :kept], k[:, :, :kept], torch.arange(kept)[None])
    assert ours["cache"].bytes() / vanilla.bytes() == pytest.approx((n + 1) / (2 * n))
    assert ours["share"].bytes() / vanilla.bytes() == pytest.approx(1 / n)


@pytest.mark.parametrize("kv", ["cache", "share"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_whole_decoder_grows_a_text_as_it_reads_one(kv, learned):
    torch.manual_seed(0)
    model = DecoderLM(256, D, 0, H, GLU, 16, learned_positions=learned)
    first, *middle, last = layers(4)
    block = ExpertChoiceMoR(RecursiveBlock(middle), 3, kv=kv)
    for router in block.routers:
        nn.init.normal_(router.weight, std=2.0)
    model.blocks = nn.ModuleList([first, block, last])
    model = model.double().eval()
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))
    text = Decoding(model)
    logits = torch.cat([text.step(ids[:, :5]), *(text.step(ids[:, t : t + 1]) for t in range(5, 16))], 1)
    torch.testing.assert_close(logits, model(ids))
    assert text.bytes() > 2 * 2 * 16 * 2 * D * 8  # the two plain layers, and what the recursions keep
    with pytest.raises(InputError, match="tokens brings 1 tokens to 16 but seq_len is 16"):
        text.step(ids[:, :1])


# -- 8. parameters and operations


def test_layers_are_shared_as_the_strategy_says():
    assert shared_layers("cycle", 6, 3) == [0, 1, 0, 1, 0, 1]
    assert shared_layers("sequence", 6, 3) == [0, 0, 0, 1, 1, 1]
    assert shared_layers("middle-cycle", 8, 3) == [0, 1, 2, 1, 2, 1, 2, 3]
    assert shared_layers("middle-cycle", 6, 1) == list(range(6))
    with pytest.raises(InputError, match=r"n_layers is 8 but must be 0 and a multiple of n_recursions = 3"):
        shared_layers("cycle", 8, 3)
    with pytest.raises(InputError, match="n_layers is 2 but must be 2 and a multiple"):
        shared_layers("middle-cycle", 2, 1)
    with pytest.raises(InputError, match="'midle-cycle' is unknown; did you mean 'middle-cycle'"):
        shared_layers("midle-cycle", 8, 3)
    with pytest.raises(InputError, match=r"order is \[0, 2\] but must use each of the 3 layers"):
        SharedStack(layers(3), [0, 2])


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_a_stack_of_shared_layers_is_copies_of_them_with_the_gradients_added_up(sharing):
    order = shared_layers(sharing, 4, 2)
    stack = SharedStack(layers(2), order)
    copies = SharedStack([copy.deepcopy(stack.layers[i]) for i in order], range(4))
    for module in (stack, copies):
        module(tokens(), Context()).square().sum().backward()
    for i, layer in enumerate(stack.layers):
        of = [list(other.parameters()) for j, other in zip(order, copies.layers, strict=True) if j == i]
        for p, *others in zip(layer.parameters(), *of, strict=True):
            torch.testing.assert_close(p.grad, sum(other.grad for other in others))


def test_parameters_are_the_unique_layers_and_one_row_a_router():
    one = count_params(layers(1)[0])
    first, *middle, last = layers(4)
    model = nn.ModuleList([first, ExpertChoiceMoR(RecursiveBlock(middle), 3), last])
    assert count_params(model) == (2 + 2) * one + 3 * D
    assert count_params(expert(sampling="aux_router")) == 2 * one + 2 * 3 * D
    assert count_params(token()) == 2 * one + 3 * D


@pytest.mark.parametrize("kv", ["cache", "share"])
def test_operations_are_those_that_are_counted(kv):
    made = expert(kv=kv)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        _, stats = made.recur(tokens().requires_grad_())
        forward = counter.get_total_flops()
        assert mor_flops(made, stats.active.sum(-1), 12) == forward
        assert mor_flops(made, torch.full((3, 2), 12), 12) > forward
    with pytest.raises(InputError, match=r"active has shape \(3, 2\) and values up to 13"):
        mor_flops(made, torch.full((3, 2), 13), 12)
    inner = MoELayer(HashRouter(256, 4, 1), GLUExperts(4, D, 8))
    with pytest.raises(InputError, match=r"matrices that are no nn\.Linear"):
        mor_flops(ExpertChoiceMoR(RecursiveBlock(layers(1, ffn=lambda: inner)), 1), torch.ones(1, 1).long(), 2)


# -- what it announces, and bad input


def test_it_announces_who_took_part_in_which_recursion():
    made = expert()
    with observing([made]) as seen:
        _, stats = made.recur(tokens())
    ((routing, _),) = seen[made]
    assert (made.n_experts, made.top_k, made.recursive) == (3, None, True)
    assert torch.equal(routing.mask(), stats.active.permute(1, 2, 0).flatten(0, 1))
    assert torch.equal(routing.active_counts, stats.depth.flatten())
    torch.testing.assert_close(routing.dense(), stats.scores.permute(1, 2, 0).flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 0}, "n_recursions is 0"),
        ({"kv": "shared"}, "kv 'shared' is unknown; did you mean 'share'"),
        ({"capacities": [1, 0.5]}, r"capacities is \[1.0, 0.5\] but must be 3 shares"),
        ({"capacities": [0.5, 0.6, 0.1]}, "none above the one before"),
        ({"capacities": [1, 1, 0]}, "must be 3 shares above 0"),
        ({"capacities": [1, math.nan, 0.1]}, "must be 3 shares above 0"),
        ({"alpha": -1.0}, "alpha is -1.0 but must be at least 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"update": "gated"}, "update 'gated' is unknown"),
        ({"sampling": "aux"}, "sampling 'aux' is unknown"),
        ({"choice": "hash"}, "choice 'hash' is unknown"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        expert(**options)


def test_blocks_and_inputs_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="layers is empty"):
        RecursiveBlock([])
    with pytest.raises(InputError, match="must hold blocks with causal, dense Attention"):
        RecursiveBlock([Block(D, GLU(D, 8), Attention(D, H, causal=False))])
    with pytest.raises(InputError, match="balance 'los' is unknown; did you mean 'loss'"):
        token(balance="los")
    made = expert()
    for shape in ((2, 0, D), (2, 3, D + 1), (D,)):
        with pytest.raises(InputError, match="x has shape"):
            made(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(InputError, match=r"context.mask leaves tokens out"):
        made(tokens(), Context(mask=torch.arange(24) < 20))
    with pytest.raises(InputError, match="logits hold 24 values that are NaN"):
        made(tokens() * math.nan)
    with pytest.raises(InputError, match="the k best of a text that still grows are not known"):
        made.step(tokens(), made.cache())
    made.evaluate_by = "topk"
    with pytest.raises(InputError, match="evaluate_by 'topk' is unknown; did you mean 'top-k'"):
        made.eval()(tokens())
    with pytest.raises(InputError, match="top_k is 2 but this rule always has 1"):
        token().router.set_top_k(2)


def test_caches_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="policy 'own' is unknown"):
        MoRCache("own", 3, 2)
    with pytest.raises(InputError, match="must both be at least 1"):
        MoRCache("cache", 0, 2)
    with pytest.raises(InputError, match="cache has the policy 'share' but must have 'cache'"):
        expert().eval().step(tokens(), MoRCache("share", 3, 2))
    cache, k, at = MoRCache("share", 3, 2), torch.zeros(2, H, 4, 8), torch.arange(4).expand(2, 4)
    with pytest.raises(InputError, match="recursion is 1 but must be 0: the others share"):
        cache.append(1, 0, k, k, at)
    with pytest.raises(InputError, match="recursion, layer are 3, 0 but must be below 3, 2"):
        cache.append(3, 0, k, k, at)
    with pytest.raises(InputError, match="k, v and positions have shapes"):
        cache.append(0, 0, k, k, at[:, :3])
    with pytest.raises(InputError, match="the cache holds nothing of layer 1 at recursion 2"):
        cache.read(2, 1)
    cache.append(0, 0, k, k, at)
    with pytest.raises(InputError, match="k holds 1 sequences but the cache holds 2"):
        cache.append(0, 0, k[:1], k[:1], at[:1])


def test_the_modules_are_there_under_their_public_names():
    assert all(hasattr(mor, name) for name in mor.METHOD.objects)
