"""Models that read the weights of their layers, and layers called in all the ways a layer is called."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn

from tests.lib.core.adapt.test_every_adapter import ADAPTERS, X, answer, put
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.put import match_targets

IDS = torch.arange(14).view(2, 7)
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def t5() -> tuple[nn.Module, dict]:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def mamba() -> tuple[nn.Module, dict]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return transformers.MambaModel(transformers.MambaConfig(**sizes)), {"input_ids": IDS}


def mamba2() -> tuple[nn.Module, dict]:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
    }
    return transformers.Mamba2Model(transformers.Mamba2Config(**sizes, n_groups=1, chunk_size=4)), {"input_ids": IDS}


def wavlm() -> tuple[nn.Module, dict]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"conv_dim": [8], "conv_kernel": [5], "conv_stride": [20], "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    off = dict.fromkeys(
        ["hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"], 0
    )
    config = transformers.WavLMConfig(**sizes, **off)
    return transformers.WavLMModel(config), {"input_values": torch.randn(2, 200)}


def mobilebert() -> tuple[nn.Module, dict]:
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "embedding_size": 8, "intra_bottleneck_size": 8, "max_position_embeddings": 16}
    config = transformers.MobileBertConfig(**sizes, **OFF, true_hidden_size=8)
    return transformers.MobileBertForMaskedLM(config), {"input_ids": IDS}


def encoder() -> tuple[nn.Module, dict]:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 5, 16)}


@pytest.mark.parametrize("make", [t5, mamba, mamba2, wavlm, mobilebert, encoder])
@pytest.mark.parametrize("slug", ADAPTERS)
def test_a_model_that_reads_its_weights_sees_the_updates_or_is_refused(slug, make):
    """With the layers that the refusals name left out, every layer has an effect, whichever way the model takes."""
    torch.manual_seed(0)
    first, inputs = make()
    before, targets = answer(first.eval(), inputs).detach(), list(match_targets(first, ["*"]))
    while True:
        adapted = adapt(copy.deepcopy(first), slug, targets)
        for name, p in adapted.named_parameters().items():
            nn.init.normal_(p, std=1.0 if ".router." in name else 0.2)
        try:
            y = answer(adapted.model.eval(), inputs)
            break
        except InputError as error:
            (name,) = re.findall(r"computes with 'weight' of (\S+) itself", str(error))
            assert adapted.layers[name].fixed_update() is None
            targets.remove(name)
    assert not torch.allclose(y, before, atol=1e-3)
    y.sin().sum().backward()
    for name, layer in adapted.layers.items():
        own = [p for p in adapted.parameters() if any(p is q for q in layer.parameters())]
        assert any(p.grad is not None and p.grad.any() for p in own), name
    with torch.no_grad():  # where torch's encoder has a fast path
        torch.testing.assert_close(answer(adapted.model, inputs), y, atol=1e-5, rtol=1e-5)
        if slug in ("lora", "dynamic-dino"):  # whose training draws nothing
            torch.testing.assert_close(answer(adapted.model.train(), inputs), y, atol=1e-5, rtol=1e-5)


def test_what_is_read_of_a_layer_that_was_replaced():
    net = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)))
    adapted = adapt(net, "lora")
    nn.init.normal_(adapted.layers["0"].experts.b)
    assert net[0].in_features == 8 and net[0].bias is adapted.layers["0"].base.bias
    torch.testing.assert_close(net[0].weight, net[0].base.weight + net[0].experts.b[0] @ net[0].experts.a[0])
    adapted.remove()
    adapt(net, "mixlora", "1.*")
    with pytest.raises(AttributeError, match="'forwad'"):
        net[1].forwad  # noqa: B018
    adapt(nn.Sequential(net[0]), "smora")
    other = nn.Sequential(nn.Linear(8, 6))
    adapt(other, "smora")
    weight = other[0].weight
    assert weight.dtype == torch.float32 and weight.shape == (6, 8) and weight.device.type == "cpu"
    assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter)
    for compute in (lambda: weight @ torch.ones(8), lambda: nn.functional.linear(torch.ones(8), weight), weight.sum):
        with pytest.raises(InputError, match="computes with 'weight' of 0 itself"):
            compute()


@pytest.mark.parametrize("slug", ADAPTERS)
def test_one_axis_is_one_token_and_no_tokens_are_none(slug):
    adapted = put(slug)
    torch.testing.assert_close(adapted.model(X[0, 0]), adapted.model(X[0, :1])[0])
    assert adapted.model(X[:0]).shape == (0, 7, 10) and adapted.model(X[0, :0]).shape == (0, 10)
    torch.testing.assert_close(adapted.model[0](input=X), adapted.model[0](X))  # as `nn.Linear` can be called


@pytest.mark.parametrize("slug", ADAPTERS)
def test_blocks_may_give_less_than_they_are_given(slug):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 5)))
    before = model(X.float())
    adapt(model, slug)
    torch.testing.assert_close(model(X.float()), before, atol=1e-5, rtol=1e-5)
