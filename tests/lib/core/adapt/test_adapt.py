"""Adapters on any model: what is replaced, frozen and told, and how it comes off again; plain LoRA throughout."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.adapt import Adapter, LoRALinear, RoutedLinear, adapt
from workbench.lib.core.adapt.feed_forward import find_feed_forward
from workbench.lib.core.adapt.layer import AdaptedLayer, Forward, Side
from workbench.lib.core.adapt.put import match_targets
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context

TOKENS = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(3))


def decoder() -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(32, 16, 2, 2, lambda layer: GLU(16, 24), 9)


def shaken(adapted):
    """With updates that are not zero."""
    torch.manual_seed(5)
    for p in adapted.parameters():
        nn.init.normal_(p, std=0.2)
    return adapted


class Routed(Adapter):
    """A mixture with a balance loss, for the tests."""

    slug, facts, router_lr = "routed", ("task",), 5.0

    def linear(self, layer: nn.Linear, name: str) -> RoutedLinear:
        router = LinearRouter(layer.in_features, 4, 2, coefficients={"lbl": 0.5})
        return RoutedLinear(layer, router, LowRankExperts(4, layer.in_features, layer.out_features, 2))


@pytest.fixture
def routed(monkeypatch):
    """`adapt(model, "lora")` puts the mixture above on it."""
    monkeypatch.setattr("workbench.lib.core.adapt.put.LoRA", Routed)


def test_a_new_adapter_changes_no_output_and_only_it_is_trained():
    model = decoder()
    before, weights = model(TOKENS), copy.deepcopy(model.state_dict())
    adapted = adapt(model, targets="*.ffn.*", rank=3)
    assert list(adapted.layers) == [f"blocks.{i}.ffn.{part}" for i in (0, 1) for part in ("gate_up", "down")]
    assert torch.equal(model(TOKENS), before)
    shaken(adapted)
    model(TOKENS).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapted.named_parameters())
    assert all(p.grad.any() for p in adapted.parameters())
    assert not torch.equal(model(TOKENS), before)
    adapted.remove()
    assert torch.equal(model(TOKENS), before) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_report_counts_what_the_formula_says():
    adapted = adapt(decoder(), targets=["*.qkv", "*.out"], rank=3)
    assert adapted.report()["added"] == adapted.report()["trained"] == 2 * 3 * ((16 + 48) + (16 + 16))
    assert adapted.report()["base"] == sum(p.numel() for p in decoder().parameters())


def test_merging_back_keeps_the_function_and_nothing_else():
    model = decoder()
    adapted = shaken(adapt(model, alpha=4, rank=2))
    expected = model(TOKENS)
    assert adapted.merge_back() is model and not any(isinstance(m, AdaptedLayer) for m in model.modules())
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_a_mixture_does_not_merge_back_and_is_left_as_it_was(routed):
    model = decoder()
    adapted = shaken(adapt(model))
    before = model(TOKENS)
    with pytest.raises(InputError, match="cannot be merged back: in 8 layers"):
        adapted.merge_back()
    assert torch.equal(model(TOKENS), before)


def test_the_optimizer_gives_the_routers_their_own_rate(routed):
    adapted = adapt(decoder())
    experts, routers = adapted.optimizer(1e-2).param_groups
    assert (experts["lr"], experts["lr_scale"]) == (1e-2, 1.0) and (routers["lr"], routers["lr_scale"]) == (5e-2, 5.0)
    assert {id(p) for p in routers["params"]} == {
        id(p) for layer in adapted.layers.values() for p in layer.router.parameters()
    }


def test_losses_are_of_the_last_forward_and_go_to_a_context_as_well_where_there_is_one(routed):
    model = decoder()
    adapted = adapt(model)
    assert adapted.losses() == {}
    context = Context()
    model(TOKENS, context)
    assert context.aux.item() > 0
    torch.testing.assert_close(adapted.losses(), {"lbl": context.aux})
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    adapted = adapt(net)
    net(torch.randn(4, 6))
    first = adapted.losses()["lbl"]
    net(torch.randn(4, 6))
    assert first.item() > 0 and len(adapted.side.forward.losses()) == 2  # of two layers, and of one forward


def test_a_context_holds_the_losses_of_the_models_own_mixtures_as_well(routed):
    torch.manual_seed(0)
    router = LinearRouter(16, 4, 2, coefficients={"lbl": 0.3})
    model = DecoderLM(32, 16, 1, 2, lambda layer: MoELayer(router, GLUExperts(4, 16, 8)), 9)
    alone, both = Context(), Context()
    model(TOKENS, alone)
    adapted = adapt(model)  # which changes no output, so neither what the model's own router decides
    model(TOKENS, both)
    assert alone.aux > 0 and adapted.losses()["lbl"] > 0
    torch.testing.assert_close(both.aux, alone.aux + adapted.losses()["lbl"])


def test_mixtures_announce_themselves_with_the_task_they_were_told(routed):
    model = decoder()
    adapted, seen = adapt(model, targets="*.down"), []
    adapted.layers["blocks.1.ffn.down"].observe(lambda layer, routing, context: seen.append((routing, context)))
    with adapted.given(task=[4, 5, 6]):
        model(TOKENS, Context())
    model(TOKENS, Context())
    assert seen[0][0].n_tokens == 27 and seen[0][1].domain.tolist() == [4] * 9 + [5] * 9 + [6] * 9
    assert torch.equal(seen[0][1].token_ids, TOKENS.flatten()) and seen[1][1].domain is None


def test_facts_fit_rows_or_say_why_not(routed):
    side = Side(forward=Forward(Context(domain=torch.tensor([1, 2]))))
    assert (
        side.rows("task", torch.zeros(4, 3)).tolist() == [1, 1, 2, 2] and side.rows("label", torch.zeros(4, 3)) is None
    )
    side.given["task"] = torch.tensor(7)
    assert side.rows("task", torch.zeros(2, 3, 5)).tolist() == [7] * 6
    side.given["task"] = torch.arange(4)
    with pytest.raises(InputError, match="task has 4 values but a layer sees 6 rows"):
        side.rows("task", torch.zeros(2, 3, 5))
    adapted = adapt(decoder())
    with pytest.raises(InputError, match="fact of routed 'tsk' is unknown; did you mean 'task'"), adapted.given(tsk=1):
        pass
    with pytest.raises(KeyError), adapted.given(task=1):
        raise KeyError
    assert adapted.side.given == {}  # also after an error


def test_a_module_that_is_there_twice_is_adapted_once():
    shared = nn.Linear(5, 5)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    adapted = adapt(net)
    assert len(adapted.layers) == 1 and isinstance(net[0], LoRALinear) and net[0] is net[2]
    assert adapted.remove()[0] is shared and net[2] is shared


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: adapt(m, targets="blocks.*.fnn.*"),
            "targets 'blocks.*.fnn.*' is unknown; did you mean 'blocks.1.ffn.down'",
        ),
        (
            lambda m: adapt(m, targets=["*.ffn.*", "norm"]),
            "targets 'norm' matches 'norm', a RMSNorm, but must match linear",
        ),
        (lambda m: adapt(m, rank=17), "rank is 17 but must be between 1 and the layer's smaller width, 16"),
        (lambda m: adapt(m, "mixloar"), "slug 'mixloar' is unknown; did you mean 'mixlora'"),
        (lambda m: adapt(m, "rmoe"), "slug 'rmoe' is no adapter that stands; allowed: lora"),
        (lambda m: adapt(m, rnk=2), "option of lora 'rnk' is unknown; did you mean 'rank'"),
        (lambda m: adapt(nn.Linear(3, 3)), "targets"),
    ],
)
def test_wrong_input_is_named_and_the_model_is_as_it_was(call, message):
    model = decoder()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        call(model)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_hooks


def test_adapting_twice_is_refused():
    model = decoder()
    adapt(model, targets="*.down")
    with pytest.raises(InputError, match="model is adapted with 'lora' already; remove"):
        adapt(model)


def test_targets_are_found_in_the_order_of_the_model():
    assert list(match_targets(decoder(), ["*.down", "blocks.0.*.out"])) == [
        "blocks.0.attention.out",
        "blocks.0.ffn.down",
        "blocks.1.ffn.down",
    ]
    # the output layer of torch's own multi-head attention is read past any wrapper
    assert list(match_targets(nn.TransformerEncoderLayer(8, 2, 16), ["*"])) == ["linear1", "linear2"]


def test_feed_forward_blocks_are_recognised_and_computed_as_they_are():
    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
            self.act_fn = F.silu

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    x = torch.randn(4, 6)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.0), nn.GELU(), nn.Linear(9, 6))
    for module, gated in ((Llama(), True), (GLU(6, 9), True), (plain, False)):
        block = find_feed_forward(module)
        assert (block.gate is not None) is gated and (block.d_model, block.d_hidden) == (6, 9)
        torch.testing.assert_close(block.linears[block.down](block.activate(*block.hidden(x))), module(x))
    for other in (
        nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6)),
        nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 6)),
        nn.Linear(6, 6),
    ):
        assert find_feed_forward(other) is None


def test_a_report_says_what_was_put_where():
    """Rank, scale, how many experts, whether routers train; and where "*" took a router or experts of the model."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            return self.gate(x).sum() + sum(expert(x) for expert in self.experts)

    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "mixture": Mixture()})
    adapted = adapt(model, rank=2, alpha=3)
    plain = {"part": "", "rank": 2, "scale": 1.5, "experts": None, "router": None, "trained": 32}
    assert adapted.report()["targets"] == {
        "proj": plain,
        "mixture.gate": plain | {"part": "router", "trained": 2 * (8 + 3)},
        "mixture.experts.0": plain | {"part": "experts"},
        "mixture.experts.1": plain | {"part": "experts"},
    }
    adapted.layers["proj"].experts.scale.fill_(0.5)
    assert adapted.report()["targets"]["proj"]["scale"] == 0.5
    adapted.remove()
    mixed = adapt(model, "mhr", experts=3, rank=2, tasks=2, targets="proj")
    mixed.layers["proj"].experts.scale.copy_(torch.tensor([0.5, 1.0, 0.5]))
    trained = 3 * 32 + sum(p.numel() for p in mixed.layers["proj"].router.parameters())
    row = {"part": "", "rank": 2, "scale": [0.5, 1.0], "experts": 3, "router": "trained", "trained": trained}
    assert mixed.report()["targets"] == {"proj": row} and mixed.report()["trained"] == trained
    mixed.layers["proj"].router.requires_grad_(False)
    assert mixed.report()["targets"] == {"proj": row | {"router": "fixed", "trained": 3 * 32}}
    mixed.remove()
    shared = adapt(model, "lora-variants", variant="vera", rank=2).report()
    assert [row["trained"] for row in shared["targets"].values()] == [2 + 8, 2 + 3, 2 + 8, 2 + 8]
    assert shared["trained"] == 35  # A and B are drawn, and all layers'


@pytest.mark.parametrize(
    ("slug", "options", "said"),
    [
        ("lora", {"rank": 2.5}, "option rank of lora is 2.5 but must be a whole number or None"),
        ("lora", {"rank": True}, "option rank of lora is True but must be a whole number or None"),
        ("lora", {"alpha": float("nan")}, "option alpha of lora is nan but must be a finite number or None"),
        ("lora", {"dropout": 1.0}, "option dropout of lora is 1.0 but must be at least 0 and below 1"),
        ("lora", {"ranks": 2}, "option of lora 'ranks' is unknown; did you mean 'rank'?"),
        ("mixlora", {"rslora": 1}, "option rslora of mixlora is 1 but must be True or False"),
        (
            "flexmore",
            {"rank": [1, "x"]},
            "rank of flexmore is .* must be a whole number or a list, each a whole number",
        ),
        ("lora-mixer", {"rank": {"0": 1.5}}, "must be a whole number or a dict, each value a whole number or None"),
        ("remix", {"weight": []}, r"option weight of remix is \[\] but must be a text or a finite number"),
        ("remix", {"rank": 0}, "rank is 0 but must be between 1 and"),
    ],
)
def test_options_are_of_the_kinds_that_the_signature_says(slug, options, said):
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(InputError, match=said):
        adapt(model, slug, **options)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
