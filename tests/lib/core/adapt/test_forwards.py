"""What holds of the forwards of every adapter on models that others wrote: checkpoints, caches, padding, precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lib.core.adapt.test_every_adapter import ADAPTERS, FEW, small
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, RoutedLayer, adapt
from workbench.lib.core.balance import LossFreeBias
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.lora_experts.remix import ReMixLinear
from workbench.lib.routing.rmoe import recurrent_routers

IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(3))
OTHER = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(4))
BALANCED = ["dynamic-dino", "flexmore", "llava-mole", "lora-mixer", "mixlora"]  # by a loss


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0, eos_token_id=None))


def put(slug: str, model: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options) -> Adapted:
    """A system on a model, with updates that are not zero."""
    model = (llama() if model is None else model).to(dtype)
    targets = ("*.mlp.*", "*.q_proj", "*.v_proj", "lm_head") if isinstance(model, transformers.PreTrainedModel) else "*"
    adapted = adapt(model, slug, targets, **FEW[slug] | options)
    torch.manual_seed(1)
    for name, p in adapted.named_parameters().items():
        nn.init.normal_(p, std=1.0 if ".router." in name else 0.2)
    return adapted


def facts(adapted: Adapted, *values: int) -> dict[str, list[int]]:
    return {fact: list(values) for fact in adapted.adapter.facts}


def gradients(adapted: Adapted, total: Tensor) -> dict[str, Tensor]:
    adapted.model.zero_grad()
    total.backward()
    return {name: torch.zeros(()) if p.grad is None else p.grad for name, p in adapted.named_parameters().items()}


def two_passes(adapted: Adapted) -> Tensor:
    """A loss of two forwards of other inputs and facts, whose balance counts otherwise, and one in between."""
    total = 0.0
    for ids, told, weight in ((IDS, (0, 1), 1.0), (OTHER, (2, 0), 3.0)):
        torch.manual_seed(weight)
        with adapted.given(**facts(adapted, *told)):
            out = adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids).tril(7)).logits.sin().mean()
        total = total + out + weight * 10 * sum(adapted.losses().values())
        with torch.no_grad():
            adapted.model(IDS[:1])
    return total


@pytest.mark.parametrize("slug", ADAPTERS)
def test_checkpointed_gradients_are_those_without(slug):
    plain = put(slug)
    expected = gradients(plain, two_passes(plain))
    assert any(grad.any() for grad in expected.values())
    for reentrant in (False, True):
        kept, seen = put(slug), []
        kept.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        kept.model.enable_input_require_grads()
        routed = [layer for layer in kept.layers.values() if isinstance(layer, RoutedLayer)]
        for layer in routed:
            layer.observe(lambda layer, routing, context, seen=seen: seen.append(layer))
        total = two_passes(kept)
        torch.testing.assert_close(gradients(kept, total), expected, atol=1e-9, rtol=1e-6)
        assert len(seen) == 4 * len(routed)  # two forwards and one in between after each, and nobody heard a repeat
        biases = [[m for m in one.model.modules() if isinstance(m, LossFreeBias)] for one in (plain, kept)]
        for one, other in zip(*biases, strict=True):
            assert torch.equal(one.load, other.load) and torch.equal(one.bias, other.bias) and one.load.sum() > 0


# those whose gradient is by their own rule no derivative take the form in which it is one: a straight-through gate, and
# DoRA's norm, through which no gradient goes
DERIVED = [(slug, {}) for slug in ADAPTERS if slug not in ("llava-mole", "lora-variants")]
DERIVED += [("llava-mole", {"router_grad": how}) for how in ("dense", "balance_only")]
DERIVED += [("lora-variants", {"variant": name}) for name in ("lora", "pissa", "hira", "vera", "randlora", "adalora")]


@pytest.mark.parametrize(("slug", "options"), DERIVED, ids=[" ".join([s, *o.values()]) for s, o in DERIVED])
def test_checkpointed_gradients_are_the_slopes_of_the_loss(slug, options):
    """Of every trained tensor in a direction of its own, by central differences of a loss with the balance in it."""
    x, step = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1e-5

    def total(reentrant: bool | None = None, moved: str = "", by: Tensor | float = 0.0) -> tuple[Adapted, Tensor]:
        adapted = put(slug, small(), **options)
        if moved:
            adapted.named_parameters()[moved].data += by
        torch.manual_seed(7)  # of what routers draw
        with adapted.given(**facts(adapted, 0, 1, 2)):
            model, at = adapted.model, x.clone().requires_grad_()
            y = model(at) if reentrant is None else checkpoint(model, at, use_reentrant=reentrant)
        return adapted, y.sin().mean() + 5 * sum(adapted.losses().values())

    found = [gradients(*total(reentrant)) for reentrant in (False, True)]
    draws = torch.Generator().manual_seed(2)
    for name, first in found[0].items():
        direction = torch.randn(first.shape, dtype=torch.float64, generator=draws)
        up, down = (total(None, name, sign * step * direction)[1].item() for sign in (1, -1))
        for grad in (first, found[1][name]):
            assert float((grad * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8), name
    assert sum(grad.any() for grad in found[0].values()) > len(found[0]) / 2


@pytest.mark.parametrize("slug", BALANCED)
def test_a_reentrant_checkpoint_around_the_whole_model_keeps_the_gradient_of_the_balance(slug):
    """Where the checkpoint is outside of all that is listened to, and the loss is in a context."""
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    plain, kept = put(slug, small()), put(slug, small())
    expected = gradients(plain, plain.model(x).sin().mean() + 5 * sum(plain.losses().values()))
    y = checkpoint(kept.model, x, use_reentrant=True)
    losses = sum(kept.losses().values())
    torch.testing.assert_close(gradients(kept, y.sin().mean() + 5 * losses), expected, atol=1e-10, rtol=1e-7)
    assert sum(kept.losses().values()) == losses


class Unused(nn.Module):
    """A layer whose output goes where no gradient comes from."""

    def __init__(self):
        super().__init__()
        self.look, self.rest = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x) * (self.look(x) > 0)


@pytest.mark.parametrize("slug", ["flexmore", "lora-mixer"])
def test_a_loss_that_a_reentrant_checkpoint_cannot_hand_on_is_an_error_in_words(slug):
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    for reentrant in (False, True):
        adapted = put(slug, Unused())
        y = checkpoint(adapted.model, x, use_reentrant=reentrant)
        total = y.sum() + sum(adapted.losses().values())
        if not reentrant:
            total.backward()
            assert all(p.grad is not None for n, p in adapted.named_parameters().items() if "look.router" in n)
            continue
        with pytest.raises(InputError, match=r"has no gradient: .* on which no other loss depends"):
            total.backward()


@pytest.mark.parametrize("slug", BALANCED)
def test_a_loss_without_a_graph_is_an_error_in_words(slug):
    adapted = put(slug, small())
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        y = adapted.model(x)
        assert not sum(adapted.losses().values()).requires_grad
    losses = sum(adapted.losses().values())
    assert losses.item() != 0
    with pytest.raises(InputError, match=r"the loss \(.*\) of a \w+ has no graph: the layer ran without gradients"):
        losses.backward()
    y = checkpoint(adapted.model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(InputError, match="has no graph"):  # nothing runs the layers again
        sum(adapted.losses().values()).backward()
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_remix_learns_what_to_select_under_a_checkpoint(reentrant):
    adapted = put("remix", small())
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (adapted.model, lambda x: checkpoint(adapted.model, x, use_reentrant=reentrant)):
        logq: list[Tensor] = []
        handles = [m.observe(lambda m, r, c, to=logq: to.append(r.logq)) for m in adapted.layers.values()]
        torch.manual_seed(0)
        y = run(x)
        surrogate = sum((part * torch.arange(1, len(part) + 1)).sum() for part in logq)
        found.append(gradients(adapted, y.sin().mean() + surrogate))
        for handle in handles:
            handle.remove()
        assert len(logq) == sum(isinstance(m, ReMixLinear) for m in adapted.layers.values())
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-7)
    assert all(grad.any() for name, grad in found[0].items() if ".router." in name)


class Checkpointed(nn.Module):
    """A block that is checkpointed."""

    def __init__(self, block: nn.Module, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return checkpoint(self.block, x, context, use_reentrant=self.reentrant)


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"coefficients": {"lbl": 0.5, "z": 0.1}, "bias_rate": 0.01}
    routers = recurrent_routers(3, 16, 4, 2, 8, **options)
    if kind == "linear":
        routers = [LinearRouter(16, 4, 2, **options) for _ in range(3)]
    return DecoderLM(32, 16, 3, 2, lambda i: MoELayer(routers[i], GLUExperts(4, 16, 8)), 9).double()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "recurrent"])
def test_mixtures_of_the_workbench_may_be_checkpointed(kind, reentrant):
    plain, kept = mixture(kind), mixture(kind)
    kept.blocks = nn.ModuleList(Checkpointed(block, reentrant) for block in kept.blocks)
    seen: list[Context] = []
    for block in kept.blocks:
        block.block.ffn.observe(lambda layer, routing, context: seen.append(context))
    found = []
    for model in (plain, kept):
        context = Context()
        total = model(IDS, context).sin().mean() + context.aux
        aux = float(context.aux)
        if kind == "recurrent" and reentrant and model is kept:
            with pytest.raises(InputError, match="the state that routers hand on has no gradient"):
                total.backward()
            return
        total.backward()
        assert float(context.aux) == aux != 0
        found.append([p.grad for p in model.parameters()])
    assert len(seen) == 3
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-7)
    for one, other in zip(plain.blocks, kept.blocks, strict=True):
        assert torch.equal(one.ffn.router.bias.load, other.block.ffn.router.bias.load)


# -- what a forward leaves behind


@pytest.mark.parametrize("slug", ADAPTERS)
def test_losses_are_of_one_pass_whoever_is_called_and_a_copy_may_be_made(slug):
    adapted = put(slug)
    model = adapted.model.eval()

    def parts(ids: Tensor) -> None:  # the layers of the model in turn, without the modules around them
        x = model.model.embed_tokens(ids)
        for layer in adapted.layers.values():
            if layer.base is not model.lm_head and "gate_proj" in dict(layer.base.named_children()):
                x = layer(x)

    for call in (model, model.forward, model.model, model.model.forward, parts):
        values = []
        for _ in range(2):
            call(IDS)
            values.append({name: float(loss) for name, loss in adapted.losses().items()})
            calls = len(adapted.side.forward.calls)
        assert values[0] == values[1]
        assert calls <= sum(isinstance(layer, RoutedLayer) for layer in adapted.layers.values())
        assert bool(values[0]) is (slug in BALANCED) or call is parts
    optimizer = adapted.optimizer()
    (model(IDS).logits.sin().mean() + sum(adapted.losses().values())).backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits)
    whole = copy.deepcopy(adapted)
    whole.model(IDS)
    torch.testing.assert_close(whole.losses(), adapted.losses())
    assert whole.remove().generate.__func__ is type(model).generate and not whole.model._forward_pre_hooks


# -- generation


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("slug", ADAPTERS)
@torch.no_grad()
def test_generation_with_a_cache_is_that_without(slug, beams):
    adapted = put(slug)
    adapted.model.eval()
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams, "output_logits": True}
    with adapted.given(**facts(adapted, 0, 1)):
        for prompt in (IDS[:, :5], OTHER[:, :6])[: 3 - beams]:  # the second is not decided by the first
            found = [
                adapted.model.generate(prompt, **options, use_cache=cached, return_dict_in_generate=True)
                for cached in (True, False)
            ]
            assert torch.equal(found[0].sequences, found[1].sequences)
            torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-8, rtol=1e-6)
    assert adapted.side.decided is None


@pytest.mark.parametrize("slug", ADAPTERS)
@torch.no_grad()
def test_a_selection_stays_with_its_sequence_when_a_cache_is_copied_reordered_and_emptied(slug):
    adapted = put(slug)
    model, ids = adapted.model.eval(), torch.cat([IDS, OTHER[:1]])

    def uncached(rows: Tensor) -> Tensor:
        with adapted.generating():
            model(rows[:, :5])
            return model(rows[:, :7]).logits[:, 5:]

    def steps(rows: Tensor, cache: transformers.Cache) -> Tensor:
        return torch.cat([model(rows[:, t : t + 1], past_key_values=cache).logits for t in (5, 6)], 1)

    with adapted.given(**facts(adapted, 1, 1, 1)):
        first = model(ids[:, :5], use_cache=True).past_key_values
        second, order = copy.deepcopy(first), torch.tensor([2, 2, 0])
        second.reorder_cache(order)
        torch.testing.assert_close(steps(ids[order], second), uncached(ids[order]), atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(steps(ids, first), uncached(ids), atol=1e-8, rtol=1e-6)
        static = transformers.StaticCache(model.config, max_cache_len=9)
        for rows in (ids, ids.flip(0)):
            static.reset()
            model(rows[:, :5], past_key_values=static)
            torch.testing.assert_close(steps(rows, static), uncached(rows), atol=1e-8, rtol=1e-6)


# -- precision


@pytest.mark.parametrize("slug", ADAPTERS)
def test_what_is_trained_is_float32_on_a_half_and_every_entry_moves(slug):
    for dtype in (torch.bfloat16, torch.float16):
        adapted = adapt(small().to(dtype), slug, **FEW[slug])
        kinds = {p.dtype for layer in adapted.layers.values() for p in layer.base.parameters()}
        assert kinds == {dtype} and {p.dtype for p in adapted.parameters()} == {torch.float32}
        before = {name: p.detach().clone() for name, p in adapted.named_parameters().items()}
        touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.items()}
        optimizer, scaler = adapted.optimizer(lr=1e-4), torch.amp.GradScaler("cpu", init_scale=16.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(50 if dtype == torch.bfloat16 else 2):
            optimizer.zero_grad()
            with adapted.given(**facts(adapted, 0, 1, 2)):
                y = adapted.model(torch.randn(3, 4, 8, generator=generator).to(dtype))
            assert y.dtype == dtype
            scaler.scale(y.float().sin().mean() + sum(adapted.losses().values())).backward()
            for name, p in adapted.named_parameters().items():
                touched[name] |= torch.zeros_like(touched[name]) if p.grad is None else p.grad.abs() > 1e-5
            scaler.step(optimizer)
            scaler.update()
        for name, p in adapted.named_parameters().items():
            assert ((p != before[name]) | ~touched[name]).all(), name
        assert any(t.any() for t in touched.values())


def test_scales_and_biases_are_exact_on_a_half_and_what_was_there_keeps_its_type():
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    model[0].bias.data = model[0].bias.data.double()
    adapted = adapt(model, "lora", rank=24, alpha=16)
    assert adapted.layers["0"].experts.scale.item() == torch.tensor(16 / 24).item()
    assert model[0].base.weight.dtype == torch.bfloat16 and model[0].base.bias.dtype == torch.float64
    bias = nn.Sequential(LossFreeBias(3, rate=1e-3)).bfloat16()[0]
    for _ in range(30):
        bias.update(torch.tensor([4, 2, 0]))
    torch.testing.assert_close(bias.bias, torch.tensor([-0.03, 0.0, 0.03]))


@pytest.mark.parametrize("slug", ADAPTERS)
def test_under_autocast_the_type_and_the_start_are_a_plain_layers(slug):
    x, plain = torch.randn(3, 7, 8), small()
    adapted = adapt(small(), slug, **FEW[slug] | ({"renormalize": True} if slug == "flexmore" else {}))
    kinds: list[torch.dtype] = []
    for layer in adapted.layers.values():
        layer.register_forward_hook(lambda layer, inputs, y: kinds.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = plain(x), adapted.model(x)
    assert y.dtype == expected.dtype == torch.bfloat16 and set(kinds) == {torch.bfloat16}
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
    y.float().sum().backward()


# -- facts and padding


class Flat(nn.Module):
    """Hands its layer the tokens without an axis for the rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).view(x.shape)


@pytest.mark.parametrize("build", [Flat, small])
@pytest.mark.parametrize("slug", ["mhr", "lora-mixer"])
@torch.no_grad()
def test_facts_are_for_all_for_each_row_or_for_each_token_and_nothing_else(slug, build):
    options = {"phase": "hard"} if slug == "lora-mixer" else {}
    torch.manual_seed(0)
    adapted = adapt(build().double(), slug, **FEW[slug] | options)
    for p in adapted.parameters():
        nn.init.normal_(p, std=0.5)
    model, x = adapted.model.eval(), torch.randn(2, 9, 8, dtype=torch.float64)
    for wrong in ([0, 1, 2], [0] * 9, [0] * 6, torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match="task has"), adapted.given(task=wrong):
            model(x)
    with adapted.given(task=[0, 2]):
        rows = model(x)
    for same in (torch.tensor([[0], [2]]).expand(2, 9), [0] * 9 + [2] * 9):
        with adapted.given(task=same):
            torch.testing.assert_close(model(x), rows)
    time_first = x.transpose(0, 1).contiguous()
    with pytest.raises(InputError, match=r"axis 0 \(say which with `given\(axis=...\)`\)"), adapted.given(task=[0, 2]):
        model(time_first)
    for task in ([0, 2], torch.tensor([[0, 2]]).expand(9, 2)):
        with adapted.given(axis=1, task=task):
            torch.testing.assert_close(model(time_first).transpose(0, 1), rows)


@pytest.mark.parametrize("slug", ["charluma", "mole-diffusion", "remix"])
def test_a_layer_that_runs_twice_in_a_forward_decides_twice_with_a_cache_as_without(slug):
    """And in what a cache is not asked of: a training step with a checkpoint, which has none."""
    from transformers import DynamicCache

    adapted = put(slug, Twice())
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        whole = adapted.model(x)
        torch.manual_seed(0)
        assert torch.equal(adapted.model(x, past_key_values=DynamicCache()), whole)
        assert len(next(iter(adapted.layers.values())).side.forward.calls) == 2


class Twice(nn.Module):
    """Recurrent in depth, as some language models are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, past_key_values: object = None) -> Tensor:
        return self.layer(self.layer(x).sin() * 3)


@pytest.mark.parametrize("slug", ["charluma", "mole-diffusion", "remix"])
def test_who_decides_for_whole_sequences_wants_them_along_the_first_axis(slug):
    adapted = put(slug, small())
    with pytest.raises(InputError, match=f"axis is 1 but {slug} decides for whole sequences"), adapted.given(axis=1):
        adapted.model(torch.randn(9, 2, 8, dtype=torch.float64))


def test_a_checkpoint_that_cannot_know_which_of_two_forwards_it_repeats_says_so():
    adapted = put("mhr", small())
    x, total = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True), 0.0
    for tasks, message in (((1, 1, 1), None), ((1, 1, 1), None), ((0, 1, 2), "were told different things")):
        with adapted.given(task=list(tasks)):
            total = total + checkpoint(adapted.model, x, use_reentrant=False).sum()
        if message is None:
            total.backward(retain_graph=True)
        else:
            with pytest.raises(InputError, match=message):
                total.backward()


class Side(nn.Module):
    """An encoder or a decoder: a block on embedded tokens, and a mask in the middle of what it is called with."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.block(self.embed(ids) * scale)


class Both(nn.Module):
    """Encoder and decoder, of sequences as long as each other."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Side(), Side()

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        x = self.encoder(input_ids, attention_mask).sum()
        return x + self.decoder(decoder_input_ids, attention_mask=decoder_attention_mask).sum()


class Wrapper(nn.Module):
    """Takes a batch, as loaders give it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch)


MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
SECOND = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


@contextmanager
def counted(adapted: Adapted) -> Iterator[list[Tensor]]:
    """What a forward inside adds to losses and to loads."""
    found: list[Tensor] = []
    biases = [m for m in adapted.model.modules() if isinstance(m, LossFreeBias)]
    for bias in biases:
        bias.load.zero_()
    yield found
    found += [loss.detach() for loss in adapted.losses().values()] + [bias.load.clone() for bias in biases]


WAYS = ("keyword", "position", "wrapper", "inside", "factor", "added", "two sides")
CASES = [(slug, way) for slug in (*BALANCED, "smora") for way in WAYS]


@pytest.mark.parametrize(("slug", "way"), [*CASES, *((slug, "torch") for slug in ("flexmore", "lora-mixer", "smora"))])
def test_padding_counts_in_no_balance_however_the_mask_is_given(slug, way):
    """What stands where padding is makes no difference, and would without the mask."""
    ids, mask = IDS[:, :6], MASK
    other = torch.where(mask.bool(), ids, OTHER[:, :6])
    if way == "two sides":
        adapted = put(slug, Both())
        reply, changed = ids.flip(1), torch.where(SECOND.bool(), ids.flip(1), OTHER[:, :6])
        calls = [
            lambda ids, reply=reply: adapted.model(ids, MASK, reply, SECOND),
            lambda ids, reply=changed: adapted.model(ids, MASK, reply, SECOND),
            lambda ids, reply=changed: adapted.model(ids, MASK, reply),  # the decoder has none then
        ]
    elif way == "torch":
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=False)
        adapted, table = (
            put(slug, nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)),
            torch.randn(32, 8).double(),
        )
        calls = [
            lambda ids, told=told: adapted.model(table[ids.T], src_key_padding_mask=told) for told in (mask == 0, None)
        ]
        calls.insert(0, calls[0])
    else:
        adapted = put(slug, Wrapper(Side()) if way in ("wrapper", "inside") else Side())
        called = {
            "keyword": lambda ids, told: adapted.model(ids, attention_mask=told),
            "position": lambda ids, told: adapted.model(ids, told, 1.0),
            "wrapper": lambda ids, told: adapted.model(
                {"ids": ids} | ({} if told is None else {"attention_mask": told})
            ),
            "inside": lambda ids, told: (
                adapted.model.model.forward(ids) if told is None else adapted.model.model(ids, told)
            ),
            "factor": lambda ids, told: adapted.model(ids, None if told is None else told.double()),
            "added": lambda ids, told: adapted.model(ids, None if told is None else told.double().log()),
        }[way]
        calls = [lambda ids, told=told: called(ids, told) for told in (mask, mask, None)]
    adapted.model.train()
    found = []
    for call, tokens in zip(calls, (ids, other, other), strict=True):
        with counted(adapted) as here:
            call(tokens)
        found.append(here)
    assert all(
        torch.equal(a, b) if a.dtype == torch.int64 else torch.allclose(a, b, atol=1e-12)
        for a, b in zip(*found[:2], strict=True)
    )
    assert not all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in zip(*found[1:], strict=True))
    if slug == "smora" and way == "keyword":  # two layers, of which each token uses two
        assert sum(int(load.sum()) for load in found[0]) == 2 * 2 * int(mask.sum())
