"""Merging back: into weights that are used elsewhere, and updates that no weight can hold."""

import copy

import pytest
import torch
from torch import nn

from tests.lib.core.adapt.test_every_adapter import answer
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, adapt

MERGING = ("lora", "mixlora", "llava-mole", "dynamic-dino")  # without a block they are LoRA or tuning


class Tied(nn.Module):
    """Three layers, the first and the last of one weight, and an embedding of the second's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.words = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8)
        self.c.weight, self.words.weight = self.a.weight, self.b.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))) + self.words.weight.sum(0)


def put(slug: str, model: nn.Module, **options) -> Adapted:
    adapted = adapt(model, slug, **options)
    for p in adapted.parameters():
        with torch.no_grad():
            p += 0.1 * torch.randn_like(p)
    return adapted


@pytest.mark.parametrize("slug", MERGING)
def test_a_weight_that_is_used_elsewhere_is_untied_when_asked_and_else_refused(slug):
    adapted, x = put(slug, Tied()), torch.randn(3, 8)
    before, weights, y = copy.deepcopy(adapted.model.state_dict()), Tied().state_dict(), adapted.model(x)
    with pytest.raises(InputError, match=r"a with c\.weight, b with words\.weight, c with a\.weight; pass untie=True"):
        adapted.merge_back()
    assert torch.equal(adapted.model(x), y)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.model.state_dict().items())
    merged = adapted.merge_back(untie=True)
    torch.testing.assert_close(merged(x), y, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.words.weight, weights["words.weight"]) and not torch.equal(
        merged.b.weight, weights["b.weight"]
    )
    assert len({p.data_ptr() for p in merged.parameters()}) == 7 and all(p.requires_grad for p in merged.parameters())


@pytest.mark.parametrize("slug", MERGING)
def test_updates_that_are_not_finite_are_seen_before_anything_is_written(slug):
    for value, dtype in ((float("nan"), torch.float32), (float("inf"), torch.float32), (6e4, torch.float16)):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        adapted = put(slug, net.to(dtype))
        before = [layer.base.weight.clone() for layer in adapted.layers.values()]
        with torch.no_grad():
            layer = adapted.layers["1"]
            if slug == "dynamic-dino":
                layer.weight.fill_(value).mul_(2)  # 12e4 is too large for half precision
            else:
                layer.experts.a.fill_(1), layer.experts.b.fill_(value)  # and so is the sum of eight of them
        with pytest.raises(InputError, match="updated weight of 1 is not finite"):
            adapted.merge_back()
        assert all(torch.equal(w, layer.base.weight) for w, layer in zip(before, adapted.layers.values(), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert"])
def test_a_head_tied_to_the_embedding_is_merged_and_reloads_as_it_is(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids, two = torch.arange(14).view(2, 7), {"num_attention_heads": 2}
    inputs = {"input_ids": ids}
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    elif kind == "bert":
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | two
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
        nn.init.normal_(model.cls.predictions.bias)
    else:
        inputs["decoder_input_ids"] = ids
        sizes = {
            f"{part}_{key}": n
            for part in ("encoder", "decoder")
            for key, n in (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
        }
        config = transformers.BartConfig(vocab_size=32, d_model=16, max_position_embeddings=16, **sizes)
        model = transformers.BartForConditionalGeneration(config)
    adapted = put("lora", model.eval())
    y = answer(model, inputs)
    with pytest.raises(InputError, match="pass untie=True"):
        adapted.merge_back()
    merged = adapted.merge_back(untie=True)
    torch.testing.assert_close(answer(merged, inputs), y, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(answer(again, inputs), answer(merged, inputs))
