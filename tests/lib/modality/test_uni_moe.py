"""Uni-MoE: its connectors, its two softmax orders, and what each of the three stages leaves alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.freeze import moved
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.modality.uni_moe import (
    PAD,
    BlockExperts,
    LinearConnector,
    MultimodalLM,
    QFormerConnector,
    Signal,
    align,
    assemble,
    base_expert,
    gshard_loss,
    topk_moe,
    train_expert,
    tune,
)

D, E, LAYERS, T = 16, 4, 2, 6


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0, layers: int = LAYERS) -> MultimodalLM:
    torch.manual_seed(seed)
    lm = DecoderLM(256, D, layers, 2, lambda layer: GLU(D, 24), 20)
    return MultimodalLM(lm, {"image": LinearConnector(9, D), "sound": QFormerConnector(5, D, 3, 2, n_heads=2)})


def batch() -> tuple[torch.Tensor, dict[str, Signal]]:
    """Four rows, of which 0 and 3 are images of four states, and 1 and 2 sounds of up to seven."""
    text = torch.randint(1, 256, (4, T), generator=torch.Generator().manual_seed(1))
    text[1, 4:] = PAD
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    sound = Signal(torch.tensor([2, 1]), rand(2, 7, 5, seed=2), mask)
    return text, {"image": Signal(torch.tensor([0, 3]), rand(2, 4, 9)), "sound": sound}


def step(modality: str | None = None, steps: int = 1) -> Callable[[nn.Module], None]:
    """Steps of SGD on all that is trainable, without momentum or decay, for rows of one modality or of all."""

    def learn(made: nn.Module) -> None:
        text, signals = batch()
        if modality is not None:
            rows = signals[modality].rows
            text = text[rows]
            signals = {modality: Signal(torch.arange(2), signals[modality].states, signals[modality].mask)}
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            context = Context()
            loss = F.cross_entropy(made(text, signals, context).flatten(0, 1), text.flatten()) + context.aux
            loss.backward()
            optimizer.step()

    return learn


def experts(made: MultimodalLM, steps: int = 3) -> list:
    return [base_expert(made), *(train_expert(made, name, step(name, steps), rank=2) for name in made.connectors)]


def randomised(adapted) -> None:
    """Give every LoRA a B that is not zero."""
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.experts.b.normal_(std=0.1)


# -- connectors


def test_a_q_former_has_as_many_tokens_whatever_it_is_given_and_sees_no_padding():
    torch.manual_seed(0)
    connector, states = QFormerConnector(5, D, n_query=3, n_layers=2, n_heads=2), rand(2, 7, 5)
    full = connector(states)
    assert full.shape == (2, 3, D)
    assert connector(states[:, :1]).shape == (2, 3, D) and connector(rand(1, 100, 5)).shape == (1, 3, D)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    masked = connector(states, mask)
    torch.testing.assert_close(masked[0], full[0])
    torch.testing.assert_close(masked[1], connector(states[1:, :4])[0])
    spoiled = states.masked_fill(~mask[..., None], 1e4)
    assert torch.equal(connector(spoiled, mask), masked)
    assert not torch.allclose(masked[1], full[1])


def test_a_q_former_knows_no_order_unless_the_states_carry_it():
    torch.manual_seed(0)
    connector, states, order = QFormerConnector(5, D, 3, 2, 2), rand(2, 7, 5), torch.randperm(7)
    torch.testing.assert_close(connector(states[:, order]), connector(states))
    position = torch.linspace(-1, 1, 7)[:, None] * torch.ones(5)
    moved_on = connector(states[:, order] + position), connector(states + position)
    assert not torch.allclose(*moved_on, atol=1e-4)


def test_a_linear_connector_has_a_token_for_each_state():
    connector, states = LinearConnector(9, D), rand(2, 4, 9)
    torch.testing.assert_close(connector(states)[1, 2], connector(states[1:, 2:3])[0, 0])
    with pytest.raises(InputError, match="mask leaves out 1 states"):
        connector(states, torch.tensor([[True] * 4, [True] * 3 + [False]]))


# -- the model


def test_a_row_is_what_the_decoder_makes_of_its_soft_tokens_and_its_text():
    made, (text, signals) = model(), batch()
    logits = made(text, signals)
    assert logits.shape == (4, T, 256)
    for name, signal in signals.items():
        for at, row in enumerate(signal.rows.tolist()):
            mask = None if signal.mask is None else signal.mask[at : at + 1]
            soft = made.connectors[name](signal.states[at : at + 1], mask)
            x = torch.cat([soft, made.lm.embedding(text[row : row + 1])], 1)
            x = x + made.lm.position[: x.shape[1]]
            for block in made.lm.blocks:
                x = block(x, Context())
            torch.testing.assert_close(logits[row], (made.lm.norm(x) @ made.lm.embedding.weight.T)[0, -T:])


def test_rows_do_not_know_of_each_other_or_of_what_comes_later():
    made, (text, signals) = model(), batch()
    logits = made(text, signals)
    sounds = signals["sound"]
    alone = made(text[sounds.rows], {"sound": Signal(torch.arange(2), sounds.states, sounds.mask)})
    torch.testing.assert_close(alone, logits[sounds.rows])
    other = text.clone()
    other[:, 3:] = 7
    torch.testing.assert_close(made(other, signals)[:, :3], logits[:, :3])
    quiet = {"image": signals["image"], "sound": Signal(sounds.rows, sounds.states + 1, sounds.mask)}
    assert not torch.allclose(made(text, quiet)[sounds.rows], logits[sounds.rows])


def test_a_token_is_told_its_modality_its_row_s_and_whether_it_is_there():
    made, (text, signals), context = model(), batch(), Context()
    made(text, signals, context)
    modality, domain, mask = (part.view(4, -1) for part in (context.modality, context.domain, context.mask))
    assert made.modalities == ("text", "image", "sound")
    assert modality[0].tolist() == [1] * 4 + [0] * T and modality[2].tolist() == [2] * 3 + [0] * (T + 1)
    assert domain[:, 0].tolist() == [0, 1, 1, 0] and (domain == domain[:, :1]).all()
    assert mask[3].all() and mask[2].tolist() == [True] * (3 + T) + [False]
    assert mask[1].tolist() == [True] * (3 + 4) + [False] * 3  # its text has four bytes
    made(text, signals, told := Context(domain=torch.tensor([5, 6, 7, 8])))
    assert torch.equal(told.domain, torch.arange(5, 9).repeat_interleave(4 + T))
    assert torch.equal(told.modality, context.modality)
    with pytest.raises(InputError, match=r"context.domain has shape \(40,\) but must be that of 4 rows"):
        made(text, signals, told)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"video": s["image"]}, "modality 'video' is unknown"),
        (lambda s: {"image": s["image"]}, r"signals are of the rows \[0, 3\] but must be of each of 4 rows once"),
        (lambda s: s | {"image": Signal(torch.tensor([0, 2]), s["image"].states)}, "signals are of the rows"),
        (lambda s: {}, r"signals are of the rows \[\]"),
        (lambda s: s | {"image": Signal(s["image"].rows, rand(3, 4, 9))}, r"signals\['image'\] has states of 3 rows"),
        (lambda s: s | {"image": Signal(s["image"].rows, rand(2, 4, 8))}, r"states has shape \(2, 4, 8\)"),
        (lambda s: s | {"image": Signal(s["image"].rows, rand(2, 9))}, r"states has shape \(2, 9\)"),
        (
            lambda s: s | {"sound": Signal(s["sound"].rows, s["sound"].states, torch.ones(2, 7))},
            r"mask is torch.float32 of shape \(2, 7\) but must be bool \(2, 7\)",
        ),
        (
            lambda s: s | {"sound": Signal(s["sound"].rows, s["sound"].states, torch.ones(2, 4, dtype=torch.bool))},
            r"mask is torch.bool of shape \(2, 4\)",
        ),
        (
            lambda s: s | {"image": Signal(s["image"].rows, rand(2, 30, 9))},
            "36 tokens but must be at most seq_len = 20",
        ),
        (
            lambda s: s | {"sound": Signal(s["sound"].rows, s["sound"].states, torch.zeros(2, 7, dtype=torch.bool))},
            "every row must have a state that is unmasked",
        ),
    ],
)
def test_signals_that_do_not_fit_are_named(change, said, unchecked):
    text, signals = batch()
    with pytest.raises(InputError, match=said):
        model()(text, change(signals))
    for wrong in (text - 300, text + 300, text.float()):
        with pytest.raises(InputError, match=r"text is .* but must hold ids 0 to"):
            model()(wrong, signals)
    for none in (text[:0], text[:, :0]):
        with pytest.raises(InputError, match="text has shape"):
            model()(none, signals)


def test_a_batch_of_one_modality_is_a_batch():
    text, signals = batch()
    image = Signal(torch.arange(2), signals["image"].states)
    assert model()(text[:2], {"image": image}).shape == (2, T, 256)


# -- the router


def blocks(n: int = E) -> list[nn.Module]:
    torch.manual_seed(3)
    return [GLU(D, 24) for _ in range(n)]


def routed(normalize: str = "topk", top_k: int = 2, made: list[nn.Module] | None = None, **options) -> MoELayer:
    layer = topk_moe(blocks() if made is None else made, D, top_k, normalize, **options)
    nn.init.normal_(layer.router.projection.weight, generator=torch.Generator().manual_seed(4))
    return layer


@pytest.mark.parametrize("normalize", ["topk", "all"])
def test_gather_and_scatter_are_the_loop_over_tokens(normalize):
    layer, x = routed(normalize).double(), rand(30, D).double().requires_grad_()
    wanted = [x, *layer.parameters()]
    y = layer(x)
    logits = x @ layer.router.projection.weight.T
    p = logits.softmax(-1)
    slow = []
    for t in range(len(x)):
        best = logits[t].topk(2).indices
        w = logits[t, best].softmax(-1) if normalize == "topk" else p[t, best]
        slow.append(sum(w[k] * layer.experts[int(e)](x[t]) for k, e in enumerate(best)))
    torch.testing.assert_close(y, torch.stack(slow))
    r = rand(30, D, seed=5).double()
    for found, expected in zip(
        torch.autograd.grad((y * r).sum(), wanted),
        torch.autograd.grad((torch.stack(slow) * r).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_identical_experts_are_the_one_block_whatever_the_router_says_or_a_shrunk_one():
    one = blocks(1)[0]
    copies = [copy.deepcopy(one) for _ in range(E)]
    x = rand(50, D)
    torch.testing.assert_close(routed("topk", made=copies)(x), one(x))
    layer = routed("all", made=copies)
    total = layer.router(x, Context()).weights.sum(1, keepdim=True)
    assert (total < 1).all()
    torch.testing.assert_close(layer(x), total * one(x))


@pytest.mark.parametrize("normalize", ["topk", "all"])
def test_with_all_experts_both_are_the_dense_mixture(normalize):
    layer, x = routed(normalize, top_k=E), rand(20, D)
    p = (x @ layer.router.projection.weight.T).softmax(-1)
    dense = sum(p[:, e, None] * layer.experts[e](x) for e in range(E))
    torch.testing.assert_close(layer(x), dense)


def test_one_expert_a_token_teaches_the_router_nothing_unless_it_is_weighted_or_balanced():
    def gradient(**options) -> torch.Tensor:
        layer, context = routed(top_k=1, **options).double(), Context()
        y = layer(rand(40, D).double(), context)
        ((y - 1).square().mean() + context.aux).backward()
        return layer.router.projection.weight.grad.abs().max()

    assert gradient(normalize="topk") < 1e-14
    assert gradient(normalize="all") > 1e-4
    assert gradient(normalize="topk", balance=0.1) > 1e-4


def test_the_balance_loss_is_one_at_uniform_and_e_where_all_are_sure_of_one():
    one_hot = F.one_hot(torch.arange(40) % E, E).double()
    assert gshard_loss(torch.full((40, E), 1 / E)).item() == pytest.approx(1)
    assert gshard_loss(one_hot).item() == pytest.approx(1)
    assert gshard_loss(one_hot[:1].expand(40, -1)).item() == pytest.approx(E)


def test_the_balance_loss_counts_the_likeliest_expert_of_tokens_that_are_there():
    layer, x, mask = routed(balance=0.5), rand(40, D), torch.arange(40) < 25
    context = Context(mask=mask)
    layer(x, context)
    p = (x @ layer.router.projection.weight.T).softmax(-1)[mask]
    share = torch.stack([(p.argmax(-1) == e).double().mean() for e in range(E)])
    assert context.aux.item() == pytest.approx(0.5 * E * (share * p.mean(0)).sum().item(), rel=1e-5)
    layer(x, none := Context(mask=torch.zeros(40, dtype=torch.bool)))
    assert none.aux.item() == 0
    routed()(x, off := Context())
    assert off.aux == 0


def test_router_and_loss_are_those_of_transformers():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    layer, x = routed(), rand(60, D)
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2))
    theirs.weight.data.copy_(layer.router.projection.weight)
    logits, weights, index = theirs(x)
    routing = layer.router(x, Context())
    assert torch.equal(routing.indices, index)
    torch.testing.assert_close(routing.weights, weights)
    logits = x @ layer.router.projection.weight.T
    expected = load_balancing_loss_func((logits,), E, top_k=1)
    torch.testing.assert_close(gshard_loss(logits.softmax(-1)), expected)


def test_a_wrong_option_is_named():
    with pytest.raises(InputError, match="normalize 'top' is unknown"):
        topk_moe(blocks(), D, normalize="top")
    with pytest.raises(InputError, match="top_k is 5"):
        topk_moe(blocks(), D, 5)
    with pytest.raises(InputError, match="at least one modality but text"):
        MultimodalLM(model().lm, {})
    made = model()
    with pytest.raises(InputError, match="modality 'video' is unknown"):
        align(made, "video", step())
    made.lm.blocks[1] = nn.Identity()
    with pytest.raises(InputError, match="layer 1 of the decoder is a Identity, without a feed-forward block"):
        train_expert(made, "image", step("image"))
    made = model()
    with pytest.raises(InputError, match="layers 'some' is unknown"):
        assemble(made, [base_expert(made)], layers="some")


# -- the stages


def test_nothing_is_trained_before_a_stage_or_after_one():
    made = model()
    assert not any(p.requires_grad for p in made.parameters())
    align(made, "sound", step("sound"))
    mixed = assemble(made, experts(made))
    assert not any(p.requires_grad for m in (made, mixed) for p in m.parameters())
    tune(mixed, step(), rank=2)
    assert not any(p.requires_grad for p in mixed.parameters())


@pytest.mark.parametrize("modality", ["image", "sound"])
def test_stage_one_changes_one_connector_all_of_it_and_nothing_else(modality):
    made = model()
    changed = moved(made, lambda m: align(m, modality, step(modality, 2)))
    assert changed == {f"connectors.{modality}.{name}" for name in made.connectors[modality].state_dict()}


def test_stage_two_changes_the_low_rank_factors_in_blocks_and_a_projection(monkeypatch):
    made, seen = model(), set()

    def learn(inside: nn.Module) -> None:
        seen.update(moved(inside, step("sound", 2)))

    before = {name: p.clone() for name, p in made.state_dict().items()}
    expert = train_expert(made, "sound", learn, rank=2)
    projection = {f"connectors.sound.projection.{name}" for name in ("weight", "bias")}
    linears = [f"lm.blocks.{i}.ffn.{name}" for i in range(LAYERS) for name in ("gate_up", "down")]
    assert seen == projection | {f"{name}.experts.{factor}" for name in linears for factor in "ab"}
    after = made.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == projection
    assert all(
        not torch.equal(e.down.weight, b.ffn.down.weight) for e, b in zip(expert.blocks, made.lm.blocks, strict=True)
    )


@pytest.mark.parametrize("layers", ["all", "interval"])
def test_stage_three_changes_adapters_routers_and_projections(layers):
    made = assemble(model(layers=3), experts(start := model(layers=3)), layers=layers)
    assert start.lm.blocks[0].ffn is not made.lm.blocks[0].ffn
    seen = set()
    torch.manual_seed(0)
    for layer in moe_layers(made).values():  # sure enough to reach all experts with so few tokens
        nn.init.normal_(layer.router.projection.weight)
    adapted = tune(made, lambda inside: seen.update(moved(inside, step(steps=3))), rank=2)
    mixed = [0, 1, 2] if layers == "all" else [0, 2]
    assert sorted(moe_layers(made)) == [f"lm.blocks.{i}.ffn" for i in mixed]
    wanted = {f"connectors.image.{name}" for name in made.connectors["image"].state_dict()}
    wanted |= {f"connectors.sound.projection.{name}" for name in ("weight", "bias")}
    wanted |= {f"lm.blocks.{i}.ffn.router.projection.weight" for i in mixed}
    ffns = [f"lm.blocks.{i}.ffn.experts.{e}" for i in mixed for e in range(3)]
    ffns += [f"lm.blocks.{i}.ffn" for i in range(3) if i not in mixed]
    linears = [f"{ffn}.{name}" for ffn in ffns for name in ("gate_up", "down")]
    linears += [f"lm.blocks.{i}.attention.{name}" for i in range(3) for name in ("qkv", "out")]
    assert sorted(adapted.layers) == sorted(linears)
    wanted |= {f"{name}.experts.{factor}" for name in linears for factor in "ab"}
    assert seen == wanted


def test_a_merged_expert_computes_what_its_adapter_did():
    made, kept = model(), {}
    text, signals = batch()

    def learn(inside: nn.Module) -> None:
        step("image", 2)(inside)
        kept["logits"] = inside(text, signals).detach()

    expert = train_expert(made, "image", learn, rank=2)
    plain = made(text, signals)
    for block, ffn in zip(made.lm.blocks, expert.blocks, strict=True):
        block.ffn = ffn
    torch.testing.assert_close(made(text, signals), kept["logits"], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain, kept["logits"], atol=1e-4)


def test_before_it_is_tuned_the_mixture_is_that_of_the_merged_blocks_and_merges_back_after():
    made = model()
    found = experts(made)
    mixed, (text, signals) = assemble(made, found), batch()
    by_hand = copy.deepcopy(made)
    for i, block in enumerate(by_hand.lm.blocks):
        block.ffn = MoELayer(mixed.lm.blocks[i].ffn.router, BlockExperts(expert.blocks[i] for expert in found))
    expected = by_hand(text, signals)
    assert torch.equal(mixed(text, signals), expected)
    adapted = tune(mixed, lambda inside: None, rank=2)  # B is 0
    assert torch.equal(mixed(text, signals), expected)
    randomised(adapted)
    tuned = mixed(text, signals)
    assert not torch.allclose(tuned, expected, atol=1e-4)
    adapted.merge_back()
    torch.testing.assert_close(mixed(text, signals), tuned, atol=1e-5, rtol=1e-4)


def test_copies_of_the_base_are_the_base():
    made, (text, signals) = model(), batch()
    mixed = assemble(made, [base_expert(made)] * E)
    torch.testing.assert_close(mixed(text, signals), made(text, signals))
    experts_of = [p for layer in moe_layers(mixed).values() for p in layer.experts.parameters()]
    assert len({p.data_ptr() for p in experts_of}) == len(experts_of)  # copies, not one block several times


def test_experts_of_another_base_and_a_mixture_of_mixtures_are_refused():
    made, other = model(), model(seed=1)
    with pytest.raises(InputError, match="experts base started from other feed-forward blocks"):
        assemble(made, [base_expert(made, "own"), base_expert(other)])
    mixed = assemble(made, [base_expert(made)] * 2)
    with pytest.raises(InputError, match="is a mixture already"):
        assemble(mixed, [base_expert(made)] * 2)
    with pytest.raises(InputError, match="is a mixture already"):
        train_expert(mixed, "image", step("image"))


def test_a_training_that_fails_leaves_the_decoder_as_it_was():
    made = model()
    text, signals = batch()
    before = made(text, signals)

    def fail(inside: nn.Module) -> None:
        step("image")(inside)
        raise RuntimeError("of the loop")

    state = copy.deepcopy(made.lm.state_dict())
    with pytest.raises(RuntimeError, match="of the loop"):
        train_expert(made, "image", fail, rank=2)
    assert made.lm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in made.lm.state_dict().items())
    assert not any(p.requires_grad for p in made.parameters())
    assert not torch.equal(made(text, signals), before)  # the projection has learned
    adapt(made, "lora", "lm.*", rank=2)  # and it can be adapted again


def test_observers_see_the_tokens_by_modality():
    made = model()
    mixed, (text, signals) = assemble(made, experts(made)), batch()
    with observing(moe_layers(mixed).values()) as seen:
        mixed(text, signals)
    for ((routing, context),) in seen.values():
        assert routing.n_tokens == len(context.modality) == len(context.mask) == 4 * (4 + T)
        assert set(context.modality.tolist()) == {0, 1, 2}
