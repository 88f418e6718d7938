"""What holds for every adapter, whatever its rule: one test for each property, over the catalogue.

A system whose file names an `ADAPTER` is here by itself. What it must say of itself, its options for a small model, the
weights of a token and the number of its parameters, it says in the tables below.
"""

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, LoRA, RoutedLayer, adapt, load_adapter
from workbench.lib.core.adapt.files import own_state
from workbench.lib.core.adapt.matrix import tensors_of
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM, VisionClassifier
from workbench.lib.core.routing import Context, Routing

ADAPTERS = {"lora": LoRA} | {row.slug: import_module(row.module).ADAPTER for row in workbench.methods() if row.adapts}

# Five experts (flexmore: five beside the public one; dynamic-dino: three copies in two slices) of rank 2, two active.
FEW = {
    "lora": {"rank": 2},
    "charluma": {"rank": 2, "pool": 5},
    "dynamic-dino": {"experts": 6, "top_k": 2},
    "flexmore": {"experts": 6, "rank": 2, "top_k": 2},
    "llava-mole": {"experts": 5, "rank": 2},
    "lora-mixer": {"experts": 5, "rank": 2, "top_k": 2},
    "lora-variants": {"rank": 2},
    "mhr": {"experts": 5, "rank": 2, "heads": 2, "tasks": 3},
    "mixlora": {"experts": 5, "rank": 2, "top_k": 2},
    "mole-diffusion": {"experts": 5, "rank": 2},
    "mos-shards": {"rank": 2},
    "nola": {"rank": 2, "k": 5},
    "remix": {"experts": 5, "rank": 2, "top_k": 2},
    "smora": {"rank": 5, "active_rank": 2},
}
X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small() -> nn.Module:
    """A layer, a block of two layers and a layer, all of them wanted."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 10))


def put(slug: str, dtype: torch.dtype = torch.float64, shake: bool = True, **options) -> Adapted:
    """The small model with a system that has been trained, as far as one can tell from its weights."""
    adapted = adapt(small().to(dtype), slug, **FEW[slug] | options)
    for name, p in adapted.named_parameters().items() if shake else ():
        nn.init.normal_(p, std=1.0 if ".router." in name else 0.4)
    adapted.model.eval()
    return adapted


def routed(adapted: Adapted) -> dict[str, RoutedLayer]:
    return {name: layer for name, layer in adapted.layers.items() if isinstance(layer, RoutedLayer)}


MIXTURES = [slug for slug in ADAPTERS if routed(put(slug))]


def decisions(adapted: Adapted, x: Tensor) -> tuple[dict[str, Routing], Tensor]:
    """What each routed layer decides about x, and the output."""
    seen: dict[str, Routing] = {}
    for name, layer in routed(adapted).items():
        layer.observe(lambda layer, routing, context, name=name: seen.update({name: routing}))
    y = adapted.model(x)
    assert seen.keys() == routed(adapted).keys()
    return seen, y


def language_model(kind: str) -> nn.Module:
    """Of transformers, tiny and random."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    if kind == "bert":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertModel(transformers.BertConfig(**sizes, **off))
    if kind == "gpt2":
        off = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
        sizes = {"vocab_size": 32, "n_embd": 16, "n_inner": 24, "n_layer": 1, "n_head": 2, "n_positions": 16}
        return transformers.GPT2Model(transformers.GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=2))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))


@cache
def frozen(kind: str) -> tuple[nn.Module, dict, Tensor]:
    """A model, to be copied, what it is called with, and what it says."""
    torch.manual_seed(0)
    model, inputs = built(kind)
    return model, inputs, answer(model.eval(), inputs).detach()


def built(kind: str) -> tuple[nn.Module, dict]:
    if kind == "narrow":
        blocks = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), nn.Linear(16, 4)]
        blocks += [nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)), nn.Linear(4, 7), nn.Linear(7, 5)]
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), *blocks), {"input": torch.randn(6, 4)}
    if kind == "decoder":
        return DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9), {"tokens": torch.arange(14).view(2, 7)}
    if kind == "vision":
        model = VisionClassifier((1, 8, 8), 4, 16, 2, 2, lambda layer: GLU(16, 24), 5)
        return model, {"images": torch.randn(3, 1, 8, 8)}
    return language_model(kind), {"input_ids": torch.arange(14).view(2, 7)}


def answer(model: nn.Module, inputs: dict) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def matrices(module: nn.Module) -> list[Tensor]:
    """Those of a linear layer or of packed experts."""
    return [part for p in module.parameters() if p.ndim > 1 for part in (p if p.ndim == 3 else [p])]


@pytest.mark.parametrize("kind", ["narrow", "decoder", "vision", "llama", "mixtral", "bert", "gpt2"])
@pytest.mark.parametrize("slug", ADAPTERS)
def test_any_model_starts_as_its_base_trains_nothing_of_it_and_gets_it_back(kind, slug):
    """With the defaults on every linear layer, and without a fact."""
    torch.manual_seed(0)
    first, inputs, before = frozen(kind)
    model = copy.deepcopy(first)
    next(model.parameters()).requires_grad_(False)
    base = {p: p.requires_grad for p in model.parameters()}
    kinds = [type(module) for module in model.modules()]
    wanted = {matrix.data_ptr() for layer in match_targets(model, ["*"]).values() for matrix in matrices(layer)}
    adapted = adapt(model, slug, "*")
    taken = [matrix for layer in adapted.layers.values() for matrix in tensors_of(layer.base).values()]
    assert wanted == {matrix.data_ptr() for matrix in taken if matrix.ndim == 2}
    torch.testing.assert_close(answer(model, inputs).detach(), before, atol=1e-5, rtol=1e-5)
    optimizer = adapted.optimizer(lr=0.1)
    for _ in range(2):  # the second time nothing is zero any more
        optimizer.zero_grad()
        (answer(model.train(), inputs).sin().mean() + sum(adapted.losses().values())).backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in base)
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())
    assert not torch.allclose(answer(model.eval(), inputs), before, atol=1e-4)
    assert adapted.remove() is model
    assert torch.equal(answer(model, inputs), before)
    assert [type(module) for module in model.modules()] == kinds
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert {p: p.requires_grad for p in model.parameters()} == base
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), first.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("slug", "options", "same"),
    [
        ("flexmore", {"renormalize": False}, False),
        ("flexmore", {"renormalize": True}, True),
        ("dynamic-dino", {"gate": "renorm"}, False),
        ("dynamic-dino", {"tie": False}, False),
        ("dynamic-dino", {"allocate": False}, False),
    ],
)
def test_the_start_is_another_where_a_system_documents_it(slug, options, same):
    adapted = put(slug, shake=False, **options)
    assert torch.allclose(adapted.model(X), small().double()(X), atol=1e-6) is same


def stirred(adapted: Adapted) -> Adapted:
    """With buffers, such as the scales of experts, that are what they are by no rule."""
    for tensor in own_state(adapted.layers).values():
        if not tensor.requires_grad and tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return adapted


@pytest.mark.parametrize("slug", ADAPTERS)
def test_saved_adaptations_are_restored_bit_for_bit_with_their_buffers(slug, tmp_path):
    adapted = stirred(put(slug))
    adapted.save(tmp_path / "adapter")
    fresh = small().double().eval()
    torch.manual_seed(5)
    again = workbench.load_adapter(fresh, tmp_path / "adapter")
    assert again.options == json.loads(json.dumps(adapted.options)) and again.report() == adapted.report()
    ours, theirs = adapted.model.eval().state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(again.model(X), adapted.model(X))


@pytest.mark.parametrize("slug", ADAPTERS)
def test_a_save_that_fails_leaves_the_adaptation_that_was_there(slug, tmp_path, monkeypatch):
    """Where the old folder cannot be moved aside, the new one cannot come, and the old one cannot be moved back."""
    adapted, usual = stirred(put(slug)), os.rename
    adapted.save(tmp_path / "adapter")
    before = adapted.model(X)
    stirred(adapted)
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.1
    for failing in ({1}, {2}, {2, 3}):
        calls = []

        def rename(source, target, failing=failing, calls=calls):
            calls.append(source)
            if len(calls) in failing:
                raise OSError("no rename")
            usual(source, target)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no rename"):
            patch.setattr(os, "rename", rename)
            adapted.save(tmp_path / "adapter")
        again = load_adapter(small().double().eval(), tmp_path / "adapter")
        assert len(calls) >= max(failing) and torch.equal(again.model(X), before)
    adapted.save(tmp_path / "adapter")
    again = load_adapter(small().double().eval(), tmp_path / "adapter")
    assert torch.equal(again.model(X), adapted.model(X)) and not torch.equal(again.model(X), before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("kind", ["decoder", "vision"])
@pytest.mark.parametrize("slug", ADAPTERS)
def test_losses_are_what_reaches_a_context_and_are_trained_alike(slug, kind):
    """A model of the workbench called without a `Context` and with one; its second forward, and a copy of it."""
    torch.manual_seed(0)
    first, inputs, _ = frozen(kind)
    adapted = adapt(copy.deepcopy(first), slug)

    def gradients(model: nn.Module, context: Context | None) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y = model(**inputs, context=context)
        losses = sum(adapted.losses().values(), torch.zeros(()))
        if context is not None:
            torch.testing.assert_close(torch.as_tensor(context.aux), losses)
        whole = y.sin().mean() + (losses if context is None else context.aux)
        trained = [model.get_parameter(name) for name in adapted.named_parameters()]
        return losses, *torch.autograd.grad(whole, trained, allow_unused=True)

    without = gradients(adapted.model, None)
    torch.testing.assert_close(gradients(adapted.model, Context()), without)
    torch.testing.assert_close(gradients(copy.deepcopy(adapted.model), Context()), without)
    told = {name for layer in routed(adapted).values() for name, c in layer.router.coefficients.items() if c}
    assert {name for name, loss in adapted.losses().items() if loss != 0} == told


def test_what_is_no_adapter_is_told_which_are():
    with pytest.raises(InputError, match="slug 'rmoe' is no adapter that stands; allowed: " + ", ".join(ADAPTERS)):
        adapt(small(), "rmoe")


@pytest.mark.parametrize("slug", MIXTURES)
@torch.no_grad()
def test_permuted_experts_are_the_same_function(slug):
    """With their rows of the router. flexmore's public expert is the first, and stays."""
    adapted = stirred(put(slug))
    with adapted.given(**{fact: torch.arange(3) for fact in adapted.adapter.facts}):
        before = adapted.model.eval()(X)
        order = torch.tensor([3, 0, 4, 1, 2])
        state = copy.deepcopy(own_state(adapted.layers))
        done: set[int] = set()
        for layer in routed(adapted).values():
            for module in (layer.router, layer.experts):
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    if id(tensor) not in done:
                        done.add(id(tensor))
                        tensor.copy_(permuted(slug, name, tensor, order, layer.n_experts))
        moved = [name for name, tensor in own_state(adapted.layers).items() if not torch.equal(state[name], tensor)]
        assert any(".router." in name for name in moved) and any(".experts." in name for name in moved)
        torch.testing.assert_close(adapted.model(X), before, atol=1e-10, rtol=1e-10)


def permuted(slug: str, name: str, tensor: Tensor, order: Tensor, n_experts: int) -> Tensor:
    """A tensor of a router or a bank with its experts in another order."""
    if n_experts == 6:  # one that is first, or one more
        order = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    if slug == "mhr" and name == "logits":
        return tensor.unflatten(1, (-1, n_experts))[:, :, order].flatten(1)
    if slug == "charluma" and name == "weight":
        return tensor[:, order]
    if slug == "flexmore" and name in ("rows", "handicap"):
        return tensor[order[1:] - 1]
    return tensor[order] if tensor.ndim and len(tensor) == n_experts else tensor


@pytest.mark.parametrize("slug", [slug for slug in MIXTURES if slug not in ("mhr", "mole-diffusion")])  # use all
def test_experts_that_no_token_uses_get_no_gradient(slug):
    adapted = put(slug, **({"phase": "hard"} if slug == "lora-mixer" else {}))
    adapted.model.train()
    with adapted.given(**dict.fromkeys(adapted.adapter.facts, 1)):
        seen, y = decisions(adapted, X[:1, :1])
    (y.sin().sum() + sum(adapted.losses().values())).backward()
    assert all(p.grad is not None for p in adapted.parameters())
    for name, layer in routed(adapted).items():
        used = torch.zeros(layer.n_experts, dtype=torch.bool).index_fill(0, seen[name].expert, True)
        assert 0 < used.sum() < layer.n_experts
        for key, p in layer.experts.named_parameters():
            assert torch.equal(p.grad.flatten(1).any(1), used), f"{name}.{key}"


@pytest.mark.parametrize("slug", ADAPTERS)
def test_rows_of_a_batch_do_not_meet(slug):
    """Neither whole rows, nor the tokens of a row, except where a row has one decision or one gate for all of them."""
    adapted = put(slug)
    model, y = adapted.model, adapted.model(X)
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(torch.cat([model(x[None]) for x in X]), y, **close)
    torch.testing.assert_close(torch.cat([model(x[None]) for x in X[0]]), model(X[0]), **close)  # (N, I): rows alone
    by_token = slug not in ("charluma", "mole-diffusion", "remix")
    assert torch.allclose(model(X[:, :4]), y[:, :4], **close) is by_token


def sums_to(total: float) -> Callable[[Routing, RoutedLayer], bool]:
    return lambda routing, layer: torch.allclose(routing.weights.sum(1), torch.tensor(total))


def constant(value: float) -> Callable[[Routing, RoutedLayer], bool]:
    return lambda routing, layer: bool((routing.weight == value).all())


NORMALISED: dict[str, Callable[[Routing, RoutedLayer], bool]] = {
    "charluma": lambda r, layer: sums_to(1.0)(r, layer) and bool((r.weights.diff(dim=1) <= 0).all()),  # by rank
    "dynamic-dino": sums_to(2.0),
    "flexmore": lambda r, layer: torch.equal(r.probs.gather(1, r.indices), r.weights),  # a rest is left to the others
    "llava-mole": lambda r, layer: r.top_k == 1 and constant(1.0)(r, layer),
    "lora-mixer": sums_to(1.0),
    "mhr": sums_to(1.0),
    "mixlora": sums_to(1.0),
    "mole-diffusion": lambda r, layer: bool(((r.weight > 0) & (r.weight < 1)).all()),
    "remix": constant(2 / (2 * 2)),
    "smora": lambda r, layer: sums_to(2.0)(r, layer) and bool((layer.experts.scale == 4 / 2).all()),  # alpha / k
}


@pytest.mark.parametrize("mode", ["training", "use"])
@pytest.mark.parametrize("slug", MIXTURES)
def test_weights_are_normalised_as_the_rule_says_in_float32_whatever_the_model_is_in(slug, mode):
    adapted = put(slug, torch.bfloat16)
    adapted.model.train(mode == "training")
    for facts in ({}, {fact: torch.arange(3) for fact in adapted.adapter.facts}):
        with adapted.given(**facts):
            seen, y = decisions(adapted, X.bfloat16())
        assert y.dtype == torch.bfloat16
        for name, routing in seen.items():
            assert routing.weight.dtype == torch.float32
            assert NORMALISED[slug](routing, adapted.layers[name]), routing.weights[0].tolist()
            if routing.probs is not None:
                assert routing.probs.dtype == torch.float32
                torch.testing.assert_close(routing.probs.sum(1), torch.ones(len(routing.probs)))


# Trained parameters of the small model: its layers (I, O) that are no part of the block, the block's, and all.
LONE, BLOCK = [(8, 8), (8, 10)], [(8, 12), (12, 8)]
EACH, R = [*LONE, *BLOCK], 2
COUNTS = {
    "lora": sum(R * (i + o) for i, o in EACH),
    # a matrix of scores for each of three languages; the block is one place
    "charluma": sum(5 * o + 3 * 5 * i for i, o in [*LONE, (8, 8)]),
    # three copies of the block with its biases and the second of them twice in halves; a router of 6 rows
    "dynamic-dino": 3 * (2 * 8 * 12 + 12 + 8 * 2) + 6 * 8 + sum(i * o for i, o in LONE),
    "flexmore": sum(5 * i * o for i, o in EACH) + 3 * 5 * (8 + 1),
    "llava-mole": sum(R * (i + o) for i, o in LONE) + sum(5 * R * (i + o) for i, o in BLOCK) + 5 * (8 + 1),
    "lora-mixer": sum(5 * R * (i + o) + 5 * i for i, o in EACH),
    "lora-variants": sum(R * (i + o) + o for i, o in EACH),  # DoRA, its default
    "mhr": sum(5 * R * (i + o) + 3 * 2 * 5 for i, o in EACH),
    "mixlora": sum(R * (i + o) for i, o in LONE) + sum(5 * R * (i + o) for i, o in BLOCK) + 5 * 8,
    "mole-diffusion": sum(5 * R * (i + o) + 5 * (i + 1) + 5 * (o + 1) for i, o in EACH),
    "mos-shards": sum(2 * (i + o) for i, o in EACH),  # pools of rank two, whatever the rank is
    "nola": sum(5 + 5 for _ in EACH),
    "remix": sum(5 * R * (i + o) + 5 * i for i, o in EACH),
    "smora": sum(5 * (i + o) + 5 * i for i, o in EACH),
}


@pytest.mark.parametrize("slug", ADAPTERS)
def test_report_counts_what_the_formula_says(slug):
    adapted = put(slug, **({"rank": 0} if slug == "flexmore" else {}))
    base = sum(p.numel() for p in small().parameters())
    own = {p for layer in adapted.layers.values() for p in layer.parameters()}
    added = sum(p.numel() for p in own) - sum(p.numel() for p in own & set(adapted._trained))
    constant = sum(R * i for i in (8, 8, 8)) if slug == "charluma" else 0  # its A is not trained
    trained, percent = COUNTS[slug], 100 * COUNTS[slug] / (base + added)
    assert added == trained + constant
    report = adapted.report()
    targets = report.pop("targets")
    counts = {"base": base, "added": added, "trained": trained, "percent": percent}
    assert report == counts | {"left_out": {}, "by_layer": {}}
    assert targets.keys() == adapted.layers.keys()
    for name, layer in adapted.layers.items():
        routed = hasattr(layer, "router")
        assert targets[name]["router"] == ("trained" if routed else None)
        assert targets[name]["experts"] == (layer.n_experts if routed else None)


ONE = {
    "llava-mole": {"experts": 1},
    "lora-mixer": {"experts": 1, "top_k": 1},
    "mhr": {"experts": 1, "alpha": 2.0},
    "mixlora": {"experts": 1, "top_k": 1},
    "mole-diffusion": {"experts": 1, "local_gate": False, "global_gate": False},
    "remix": {"experts": 1, "top_k": 1, "weight": 1.0},
    "smora": {"rank": R, "active_rank": R, "block_size": R, "alpha": 2.0},
}


@pytest.mark.parametrize("slug", [slug for slug in ONE if slug in ADAPTERS])
def test_one_expert_is_a_plain_lora(slug):
    single, lora, banks = put(slug, **ONE[slug]), put("lora"), {}
    for name, layer in single.layers.items():
        whole = isinstance(layer.experts, nn.ModuleDict)
        banks |= {f"{name}.{key}": bank for key, bank in layer.experts.items()} if whole else {name: layer.experts}
    assert banks.keys() == lora.layers.keys()
    with torch.no_grad():
        for name, bank in banks.items():
            bank.a.copy_(lora.layers[name].experts.a), bank.b.copy_(lora.layers[name].experts.b)
    for adapted in (single, lora):
        adapted.model.train()(X).sin().sum().backward()
    torch.testing.assert_close(single.model(X), lora.model(X), atol=1e-10, rtol=1e-10)
    for name, bank in banks.items():
        for ours, theirs in zip((bank.a, bank.b), lora.layers[name].experts.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("slug", [s for s in MIXTURES if "experts" in inspect.signature(ADAPTERS[s]).parameters])
def test_defaults_fit_any_number_of_experts(slug):
    for experts in range(2 if slug == "flexmore" else 1, 5):  # the public expert and another
        assert adapt(small(), slug, experts=experts).model(X.float()).shape == (3, 7, 10)


@pytest.mark.parametrize("slug", ADAPTERS)
def test_facts_may_be_absent_and_are_for_all_for_each_row_or_for_each_token(slug):
    adapted = put(slug)
    model, without = adapted.model, adapted.model(X)
    for fact in adapted.adapter.facts:
        outputs = []
        for value in (1, [1, 1, 1], torch.ones(3, 7, dtype=torch.int64)):
            with adapted.given(**{fact: value}):
                outputs.append(model(X))
        assert all(torch.allclose(y, outputs[0], atol=1e-12) for y in outputs)
        with adapted.given(**{fact: [0, 1, 2]}):
            torch.testing.assert_close(model(X)[1], outputs[0][1], atol=1e-12, rtol=1e-12)
        assert torch.equal(model(X), without)
        with pytest.raises(InputError, match=f"{fact} has 5 values"), adapted.given(**{fact: [0] * 5}):
            model(X)
    with pytest.raises(InputError, match=f"fact of {slug} 'modality' is unknown"), adapted.given(modality=0):
        model(X)


def refused(slug: str) -> Iterator[tuple[dict, str]]:
    """Options that do not fit the small model, and what the message says."""
    options = inspect.signature(ADAPTERS[slug]).parameters
    if "top_k" in options:
        yield {"experts": 3, "top_k": 4}, "top_k is 4"
    if "experts" in options:
        yield {"experts": 0}, "experts(, .* are .*| is )0"
    if slug == "smora":
        yield from (({"rank": rank, "active_rank": k}, f"active_rank is {k}") for rank, k in ((4, 5), (16, 9)))
    elif "rank" in options:
        yield {"rank": 9}, "rank is 9 but must be .*between 1 and the layer's smaller width, 8"
    if slug == "charluma":
        yield {"rank": 4, "pool": 3}, "pool is 3 but must be at least the rank, 4"
    yield {"expert_count": 3}, f"option of {slug} 'expert_count' is unknown"


@pytest.mark.parametrize("slug", ADAPTERS)
def test_wrong_input_is_named_and_leaves_the_model_as_it_was(slug):
    model = small()
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    for options, message in refused(slug):
        with pytest.raises(InputError, match=message):
            adapt(model, slug, **options)
    with pytest.raises(InputError, match=r"targets '1\.3' is unknown; did you mean '1\.[02]'"):
        adapt(model, slug, "1.3")
    with pytest.raises(InputError, match="matches '1', a Sequential, but must match linear layers"):
        adapt(model, slug, "1")
    assert [type(module) for module in model.modules()] == kinds and not model._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    adapt(model, slug)
    with pytest.raises(InputError, match=f"adapted with '{slug}' already"):
        adapt(model, slug)
