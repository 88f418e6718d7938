"""MoMa's exact properties: equal loads, modalities apart, skipped tokens, causality, upcycling."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.budget import count_params
from workbench.lib.core.expert_choice import AuxiliaryRouter, deciding, expert_choice_routers
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block, DecoderLM
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.modality.moma import MixtureOfDepths, ModalityExpertFFN, ModalityRouter, upcycle

D, H, N = 8, 6, 24
EXPERTS = {"text": 4, "image": 2}
MODALITY = torch.tensor([0, 1, 1, 0, 0, 1] * 4)


def seeded(make, seed: int = 0):
    """Made with weights large enough that choices are decided."""
    torch.manual_seed(seed)
    made = make()
    for router in expert_choice_routers(made).values():
        nn.init.normal_(router.projection.weight)
    return made


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def layer(experts=EXPERTS, **options) -> ModalityExpertFFN:
    return seeded(lambda: ModalityExpertFFN(D, H, experts, **options))


def expert(bank: nn.Module, j: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (bank.gate_up[j] @ x).chunk(2)
    return bank.down[j] @ (F.silu(gate) * up)


def naive(made: ModalityExpertFFN, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """A loop over tokens and experts, with the choice made by sorting."""
    y, first = [torch.zeros(D, dtype=x.dtype) for _ in x], 0
    for m, router in enumerate(made.router.groups.values()):
        mine = (modality == m).nonzero().flatten().tolist()
        each = -(-len(mine) // router.n_experts)
        for j in range(router.n_experts):
            scores = {t: torch.sigmoid(x[t] @ router.projection.weight[j]) for t in mine}
            for t in sorted(mine, key=lambda t: -scores[t].item())[:each]:
                y[t] = y[t] + scores[t] * expert(made.experts, first + j, x[t])
        first += router.n_experts
    return torch.stack(y)


def test_it_is_a_loop_over_tokens_and_experts_and_so_are_its_gradients(x):
    made = layer().double()

    def of(forward) -> list[torch.Tensor]:
        """What comes out, and the gradients of its squares by the input and by every parameter."""
        inputs = x.double().requires_grad_()
        y = forward(inputs)
        made.zero_grad()
        y.square().sum().backward()
        return [y.detach(), inputs.grad, *(p.grad.clone() for p in made.parameters())]

    found, expected = of(lambda x: made(x, Context(modality=MODALITY))), of(lambda x: naive(made, x, MODALITY))
    assert len(found) == 2 + 2 + 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10) and theirs.any()


def test_every_expert_of_a_group_has_the_same_load_and_a_token_one_expert_on_average(x):
    made = layer()
    with observing([made], lambda routing, _: routing) as seen:
        made(x, Context(modality=MODALITY))
    routing = seen[made][0]
    assert routing.counts.tolist() == [3, 3, 3, 3, 6, 6]  # 12 tokens of each modality
    assert routing.expert.numel() == N  # exactly one a token
    assert torch.equal(routing.mask()[MODALITY == 1][:, :4].any(), torch.tensor(False))
    assert torch.allclose(routing.probs.sum(1), torch.ones(N))
    few = ModalityRouter(D, {"text": 8, "image": 1})(x[:5], Context(modality=torch.tensor([0, 0, 0, 1, 1])))
    assert few.counts.tolist() == [1] * 8 + [2]  # ceil(3 / 8), and no more than there are


def test_a_token_that_nobody_takes_gets_exactly_zero(x):
    made = layer()
    with observing([made], lambda routing, _: routing) as seen:
        y = made(x, Context(modality=MODALITY))
    alone = seen[made][0].active_counts == 0
    assert alone.any() and not y[alone].any() and y[~alone].any(1).all()


@pytest.mark.parametrize("kind", [0, 1])
def test_the_other_modality_changes_no_bit(x, kind):
    made, other = layer(), kind != MODALITY
    y = made(x, Context(modality=MODALITY))
    changed = x.clone()
    changed[other] = torch.randn(int(other.sum()), D, generator=torch.Generator().manual_seed(5))
    z = made(changed, Context(modality=MODALITY))
    assert torch.equal(y[~other], z[~other]) and not torch.equal(y[other], z[other])


def test_one_expert_a_modality_is_its_block_times_the_score(x):
    made = layer({"text": 1, "image": 1})
    y = made(x, Context(modality=MODALITY))
    for t in range(N):
        m = int(MODALITY[t])
        score = torch.sigmoid(x[t] @ [*made.router.groups.values()][m].projection.weight[0])
        assert torch.allclose(y[t], score * expert(made.experts, m, x[t]), atol=1e-6)
    with deciding(made, "auxiliary"):  # no choice, so causal as it is
        assert torch.equal(made(x, Context(modality=MODALITY)), y)


def test_tokens_may_come_in_any_order_and_a_group_may_be_empty(x):
    made, order = layer(), torch.randperm(N, generator=torch.Generator().manual_seed(2))
    y = made(x, Context(modality=MODALITY))
    assert torch.allclose(made(x[order], Context(modality=MODALITY[order])), y[order], atol=1e-6)
    only = made(x, Context(modality=torch.zeros(N, dtype=torch.long)))
    only.sum().backward()
    assert not made.experts.down.grad[4:].any() and made.experts.down.grad[:4].any()
    assert made.router.groups["image"].projection.weight.grad is None


def test_padding_takes_no_capacity(x):
    made, mask = layer(), torch.arange(N) < 18
    y = made(x, Context(modality=MODALITY, mask=mask))
    assert torch.allclose(y[:18], made(x[:18], Context(modality=MODALITY[:18])), atol=1e-6) and not y[18:].any()


def test_it_has_the_parameters_of_the_paper():
    made = layer()
    assert count_params(made) == 3 * D * H * 6 + D * 6
    for router in made.router.groups.values():
        router.auxiliary = AuxiliaryRouter(D, router.n_experts)
    assert count_params(made) == 3 * D * H * 6 + D * 6 + sum(D * D // 2 + D * e // 2 for e in EXPERTS.values())


def test_what_it_cannot_route_is_refused(x, unchecked):
    made = layer()
    with pytest.raises(InputError, match="modality is None"):
        made(x)
    with pytest.raises(InputError, match="modality holds 2"):
        made(x, Context(modality=MODALITY + 1))
    with pytest.raises(InputError, match="modality has 24 ids"):
        made(x[:5], Context(modality=MODALITY))
    for mask in (torch.ones(len(x)), torch.ones(len(x) + 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"context.mask is"):
            layer()(x, Context(modality=torch.zeros(len(x), dtype=torch.long), mask=mask))
    with pytest.raises(InputError, match="experts is empty"):
        ModalityRouter(D, {})
    with pytest.raises(InputError, match="n_experts is 0"):
        ModalityRouter(D, {"text": 0})
    depths, rows = MixtureOfDepths(block()), torch.ones(3, 4, D)
    with pytest.raises(InputError, match=r"context.prefix is given"):
        depths(rows, Context(prefix=torch.tensor([1, 1, 1])))
    with pytest.raises(InputError, match=r"context.domain has 3 ids but must have one for each of"):
        depths(rows, Context(domain=torch.zeros(3, dtype=torch.long)))
    with pytest.raises(InputError, match="x has shape"):
        depths(rows[0], Context())
    with pytest.raises(InputError, match="without rope"):
        MixtureOfDepths(Block(D, GLU(D, H), Attention(D, 2, causal=True, rope=True)))


# -- depths


def block() -> Block:
    return Block(D, ModalityExpertFFN(D, H, EXPERTS), Attention(D, 2, causal=True))


def told(rows: int = 3) -> Context:
    return Context(modality=MODALITY.repeat(rows), mask=torch.ones(rows * N, dtype=torch.bool))


def test_a_skipped_token_is_unchanged_and_the_others_go_through_the_block_alone():
    made = seeded(lambda: MixtureOfDepths(block(), capacity=0.25))
    x = torch.randn(3, N, D, generator=torch.Generator().manual_seed(4))
    y = made(x, told())
    passed = made.router(x.flatten(0, 1)).mask().view(3, N)
    assert int(passed.sum()) == 18  # of all rows together
    assert len(set(passed.sum(1).tolist())) > 1  # not row by row
    assert torch.equal(y[~passed], x[~passed]) and (y[passed] != x[passed]).any(1).all()


def test_depths_are_attention_among_the_tokens_that_pass():
    """Against the block row by row on exactly these tokens; a dense layer, which has no choice of its own."""
    made = seeded(lambda: MixtureOfDepths(Block(D, GLU(D, H), Attention(D, 2, causal=True)), 0.4))
    x = torch.randn(3, N, D, generator=torch.Generator().manual_seed(4))
    y = made(x, told())
    r = torch.sigmoid(x @ made.router.projection.weight[0])
    passed = made.router(x.flatten(0, 1)).mask().view(3, N)
    expected = x.clone()
    for row in range(3):
        here = x[row][passed[row]][None]
        expected[row][passed[row]] += r[row][passed[row]][:, None] * (made.block(here, Context()) - here)[0]
    assert torch.allclose(y, expected, atol=1e-6)
    whole = seeded(lambda: MixtureOfDepths(Block(D, GLU(D, H), Attention(D, 2, causal=True)), 1.0))
    r = torch.sigmoid(x @ whole.router.projection.weight[0])[..., None]
    assert torch.allclose(whole(x, told()), x + r * (whole.block(x, Context()) - x), atol=1e-6)


def test_the_block_inside_is_told_of_its_own_tokens():
    made = seeded(lambda: MixtureOfDepths(block(), capacity=0.25))
    x = torch.randn(3, N, D, generator=torch.Generator().manual_seed(4))
    context = told()
    context.token_ids = torch.arange(3 * N)
    with observing([made.block.ffn]) as seen:
        made(x, context)
    routing, inside = seen[made.block.ffn][0]
    passed = made.router(x.flatten(0, 1)).mask().flatten()
    assert torch.equal(inside.token_ids[inside.mask], torch.arange(3 * N)[passed])
    assert torch.equal(inside.modality[inside.mask], MODALITY.repeat(3)[passed])
    assert not routing.mask()[~inside.mask].any()
    made.router.auxiliary = AuxiliaryRouter(D, 1)
    nn.init.zeros_(made.router.auxiliary.out.weight)  # takes nobody
    made.router.mode = "auxiliary"
    assert torch.equal(made(x, told()), x)


# -- the whole model


def model(depths: bool) -> DecoderLM:
    def make() -> DecoderLM:
        made = DecoderLM(50, D, 3, 2, lambda _: ModalityExpertFFN(D, H, EXPERTS), N)
        if depths:
            made.blocks[1] = MixtureOfDepths(made.blocks[1], 0.5)
        for router in expert_choice_routers(made).values():
            router.auxiliary = AuxiliaryRouter(D, router.n_experts)
        return made

    return seeded(make).double().eval()


def jacobian(made: DecoderLM, tokens: torch.Tensor, leaf: torch.Tensor, t: int) -> torch.Tensor:
    """|d logits_t / d embedding of every token|, (T,)."""
    handle = made.embedding.register_forward_hook(lambda *_: leaf)
    out = made(tokens, Context(modality=MODALITY))
    handle.remove()
    return torch.autograd.grad(out[0, t].square().sum(), leaf)[0][0].abs().sum(-1)


@pytest.mark.parametrize("depths", [False, True])
def test_nothing_depends_on_later_tokens_in_the_causal_mode_and_in_the_other_it_does(depths):
    made = model(depths)
    tokens = torch.randint(50, (1, N), generator=torch.Generator().manual_seed(6))
    leaf = made.embedding(tokens).detach().requires_grad_()
    leaks = dict.fromkeys(("expert_choice", "auxiliary"), 0.0)
    for mode, t in itertools.product(leaks, (5, 17)):
        with deciding(made, mode):
            assert not jacobian(made, tokens, leaf, t)[t + 1 :].any()  # choices have no derivative: steps tell
        with deciding(made, mode), torch.no_grad():
            said = made(tokens, Context(modality=MODALITY))[0, : t + 1]
            for later in range(t + 1, N, 3):
                other = tokens.clone()
                other[0, later] = (other[0, later] + 13) % 50
                moved = made(other, Context(modality=MODALITY))[0, : t + 1]
                leaks[mode] = max(leaks[mode], float((moved - said).abs().max()))
    assert leaks["auxiliary"] < 1e-12 < 1e-6 < leaks["expert_choice"]


class Oracle(nn.Module):
    """An auxiliary router that knows what the main one chose."""

    def __init__(self, chosen: torch.Tensor):
        super().__init__()
        self.chosen = chosen

    def forward(self, x):
        return torch.where(self.chosen, 1.0, -1.0)


@pytest.mark.parametrize("depths", [False, True])
def test_with_the_true_choice_the_causal_mode_is_the_training_mode(depths):
    made = model(depths)
    tokens = torch.randint(50, (2, N), generator=torch.Generator().manual_seed(6))
    seen = {}
    routers = expert_choice_routers(made)
    hooks = [
        router.register_forward_hook(lambda router, _, routing: seen.update({router: routing.mask()}))
        for router in routers.values()
    ]
    trained = made(tokens, Context(modality=MODALITY.repeat(2)))
    for hook in hooks:
        hook.remove()
    for router in routers.values():
        router.auxiliary = Oracle(seen[router])
    with deciding(made, "auxiliary"):
        assert torch.equal(made(tokens, Context(modality=MODALITY.repeat(2))), trained)


# -- upcycling


def test_upcycled_experts_are_copies_with_new_routers_and_the_seed_is_left_as_it_was():
    seed = seeded(lambda: DecoderLM(50, D, 2, 2, lambda _: ModalityExpertFFN(D, H, {"text": 1, "image": 1}), N))
    before = {name: value.clone() for name, value in seed.state_dict().items()}
    torch.manual_seed(3)
    grown = upcycle(seed, {"text": 3, "image": 2})
    assert all(torch.equal(seed.state_dict()[name], value) for name, value in before.items())
    for old, new in zip(seed.blocks, grown.blocks, strict=True):
        assert torch.equal(new.attention.qkv.weight, old.attention.qkv.weight)
        for weight, had in zip(new.ffn.experts.parameters(), old.ffn.experts.parameters(), strict=True):
            assert torch.equal(weight, had[[0, 0, 0, 1, 1]])
        assert [g.projection.weight.shape[0] for g in new.ffn.router.groups.values()] == [3, 2]
        assert all(router.gumbel for router in new.ffn.router.groups.values())
    # an oracle: where every expert takes every token with one weight, E copies are E times the one
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    old, new = seed.blocks[0].ffn, grown.blocks[0].ffn.eval()
    for router in (*old.router.groups.values(), *new.router.groups.values()):
        nn.init.zeros_(router.projection.weight)
        router.capacity = router.n_experts
    times = torch.tensor([3.0, 2.0])[MODALITY][:, None]
    assert torch.allclose(new(x, Context(modality=MODALITY)), times * old(x, Context(modality=MODALITY)), atol=1e-6)
    lone = upcycle(layer({"text": 1, "image": 1}), {"text": 2, "image": 2})
    assert isinstance(lone, ModalityExpertFFN) and lone.n_experts == 4


def test_a_layer_that_is_used_twice_is_upcycled_once():
    one = layer({"text": 1, "image": 1})
    made = upcycle(nn.ModuleList([one, one]), {"text": 2, "image": 3})
    assert made[0] is made[1]
    assert made[0].n_experts == 5


def test_what_cannot_be_upcycled_is_refused():
    with pytest.raises(InputError, match="without a ModalityExpertFFN"):
        upcycle(GLU(D, H), {"text": 2})
    with pytest.raises(InputError, match="not one each of the same"):
        upcycle(layer(), {"text": 4, "image": 4})
    with pytest.raises(InputError, match="not one each of the same"):
        upcycle(layer({"text": 1, "image": 1}), {"image": 4, "text": 4})
