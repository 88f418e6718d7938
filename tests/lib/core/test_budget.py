"""What a model costs: the parameters a token does not use, of every kind of layer that sends tokens to experts."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapter, RoutedLayer, RoutedLinear, adapt
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.lib.core.attention import Attention
from workbench.lib.core.budget import UNCOUNTED, count_params, measure_budget
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Routing

E, K, RANK = 4, 1, 2
TASK = SymbolMaps(range(2), 2, 4)
BATCH = TASK.batch("train", 6, torch.Generator().manual_seed(0))
ADAPT = "workbench.lib.core.adapt.put.LoRA"


def decoder(ffn=lambda layer: GLU(16, 24)) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(11 + 2, 16, 2, 2, ffn, 9)


def bank(layer: nn.Linear) -> LowRankExperts:
    return LowRankExperts(E, layer.in_features, layer.out_features, RANK)


class Each(Adapter):
    """A mixture in every linear layer."""

    slug = "each"

    def linear(self, layer: nn.Linear, name: str) -> RoutedLinear:
        return RoutedLinear(layer, LinearRouter(layer.in_features, E, K), bank(layer))


class Whole(Each):
    """A mixture of whole feed-forward blocks."""

    slug = "whole"

    def feed_forward(self, block, name: str) -> RoutedFeedForward:
        experts = {key: bank(layer) for key, layer in block.linears.items()}
        return RoutedFeedForward(block, LinearRouter(block.d_model, E, 2), experts)


class Averaged(RoutedLayer):
    """The mean of the experts' parameters: all are used, and announced."""

    n_experts, top_k = E, E

    def __init__(self, base: nn.Linear):
        super().__init__(base)
        self.experts = bank(base)

    def forward(self, x):
        n = x.shape[:-1].numel()
        even = Routing.fixed(torch.arange(E).expand(n, E), torch.full((n, E), 1 / E), E)
        self.tell(self.begin(x), even, {})
        a, b = self.experts.merged(torch.full((1, E), 1 / E))
        return self.base(x) + x @ a[0].T @ b[0].T


class Mean(Adapter):
    slug = "mean"

    def linear(self, layer: nn.Linear, name: str) -> Averaged:
        return Averaged(layer)


def budget(model):
    return measure_budget(model, TASK, BATCH)


@pytest.mark.parametrize(("adapter", "share"), [(Each, K / E), (Whole, 2 / E), (Mean, 1.0)])
def test_of_an_adapted_model_the_experts_that_a_token_is_not_sent_to_are_idle(monkeypatch, adapter, share):
    model = decoder()
    base = count_params(model)
    monkeypatch.setattr(ADAPT, adapter)
    adapted = adapt(model, targets="*.ffn.*")
    experts = 2 * E * RANK * ((16 + 48) + (24 + 16))  # two blocks
    routers = sum(count_params(layer.router) for layer in adapted.layers.values() if hasattr(layer, "router"))
    found = budget(model)
    assert found.params == base + experts + routers
    assert found.active_params == base + share * experts + routers
    assert not any(layer.observed for layer in adapted.layers.values())


def test_plain_lora_has_no_idle_parameters():
    model = decoder()
    adapt(model, rank=RANK)
    found = budget(model)
    assert found.active_params == found.params == count_params(model)


def test_a_bank_that_two_layers_share_is_used_as_often_as_both_say(monkeypatch):
    def active(share: bool) -> int:
        model = decoder()
        monkeypatch.setattr(ADAPT, Each)
        layers = adapt(model, targets="*.down").layers
        first, second = layers.values()
        if share:
            second.experts = first.experts
        found = budget(model)
        return found.params - found.active_params

    one = E * RANK * (24 + 16)
    assert active(False) == 2 * one * (1 - K / E) and active(True) == one * (1 - 2 * K / E)


def test_other_layers_that_route_count_as_before():
    """Of a mixture-of-experts layer the experts not chosen; attention that routes has no experts of its own."""

    def moe(layer: int) -> MoELayer:
        return MoELayer(LinearRouter(16, E, K), GLUExperts(E, 16, 8), shared=GLU(16, 8))

    model = decoder(moe)
    found = budget(model)
    assert found.params - found.active_params == 2 * E * 3 * 16 * 8 * (1 - K / E)

    class Told(Attention):
        n_experts, top_k = 3, None

    plain = DecoderLM(13, 16, 1, 2, lambda layer: GLU(16, 8), 9, attention=lambda layer: Told(16, 2, True))
    assert budget(plain).active_params == count_params(plain)


def test_the_operations_of_a_bank_are_counted(monkeypatch):
    """Rank twice as high, twice the operations, on either path: what an operator does inside is counted as it says."""

    def flops(rank: int, path: str) -> int:
        monkeypatch.setattr(f"{__name__}.RANK", rank)
        monkeypatch.setattr(ADAPT, Each)
        monkeypatch.setattr(
            LowRankExperts, "forward", lambda self, x, routing, run=LowRankExperts.forward: run(self, x, routing, path)
        )
        model = decoder()
        base = budget(model).flops
        adapt(model, targets="*.down")
        found = budget(model).flops - base
        monkeypatch.undo()
        return found

    for path in ("dense", "grouped"):
        one, two, four = (flops(rank, path) for rank in (1, 2, 4))
        assert four - two == 2 * (two - one) > 0
    assert flops(2, "dense") > flops(2, "grouped")


@pytest.mark.parametrize(
    ("a", "b", "offsets", "flops"),
    [
        ((12, 8), (3, 8, 4), [4, 4, 12], 2 * 12 * 8 * 4),  # rows to experts
        ((8, 12), (12, 4), [4, 4, 12], 2 * 12 * 8 * 4),  # their weights' gradients
        ((3, 4, 8), (8, 12), [4, 4, 12], 2 * 4 * 8 * 12),  # columns to experts
        ((3, 4, 8), (3, 8, 4), None, 3 * 2 * 4 * 8 * 4),  # each its own
    ],
)
def test_grouped_products_are_counted(a, b, offsets, flops):
    """torch's own counter takes them for nothing."""
    offsets = offsets and torch.tensor(offsets, dtype=torch.int32)
    with FlopCounterMode(display=False) as plain, FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        nn.functional.grouped_mm(torch.randn(a), torch.randn(b), offs=offsets)
    assert counter.get_total_flops() == flops and plain.get_total_flops() == 0


def test_packed_experts_of_transformers_count_the_same_whatever_computes_them():
    """By the formula: pairs times the experts' matrices, once forward and twice backward."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=13, num_key_value_heads=2, num_local_experts=4, **sizes)
    block = transformers.MixtralForCausalLM(config).model.layers[0].mlp
    router, found = 2 * 10 * 16 * 4, set()
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        block.experts.config._experts_implementation = implementation
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            block(torch.randn(1, 10, 16, requires_grad=True)).sum().backward()
        found.add(counter.get_total_flops())
    assert found == {3 * (router + 2 * 10 * 2 * (16 * 48 + 24 * 16))}
