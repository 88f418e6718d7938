"""What holds of the forwards of every adapter on models that others wrote: checkpoints, caches, padding, precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lib.core.adapt.test_every_adapter import ADAPTERS, FEW, MIXTURES, small
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


def put(slug: str, model: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Adapted:
    """A system on a model, with updates that are not zero."""
    model = (llama() if model is None else model).to(dtype)
    adapted = adapt(model, slug, "*", **FEW[slug])
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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("slug", ADAPTERS)
def test_checkpointed_gradients_are_those_without(slug, reentrant):
    plain, kept = put(slug), put(slug)
    kept.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    kept.model.enable_input_require_grads()
    expected = gradients(plain, two_passes(plain))
    seen: list[nn.Module] = []
    for layer in kept.layers.values():
        if isinstance(layer, RoutedLayer):
            layer.observe(lambda layer, routing, context: seen.append(layer))
    total = two_passes(kept)
    calls = len(seen)
    torch.testing.assert_close(gradients(kept, total), expected, atol=1e-9, rtol=1e-6)
    assert any(grad.any() for grad in expected.values())
    assert len(seen) == calls == 4 * sum(isinstance(layer, RoutedLayer) for layer in kept.layers.values())
    biases = [[m for m in one.model.modules() if isinstance(m, LossFreeBias)] for one in (plain, kept)]
    for one, other in zip(*biases, strict=True):
        assert torch.equal(one.load, other.load) and torch.equal(one.bias, other.bias) and one.load.sum() > 0
