"""Targets that are no `nn.Linear`: packed experts and Conv1D, against peft; what is left out, and what is refused."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from tests.lib.core.adapt.test_every_adapter import ADAPTERS, FEW, answer, frozen, language_model, small
from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.files import own_state

IDS = torch.arange(14).view(2, 7)
FACTS = [slug for slug, kind in ADAPTERS.items() if kind.facts]


def shaken(adapted: Adapted) -> Adapted:
    torch.manual_seed(5)
    for name, p in adapted.named_parameters().items():
        nn.init.normal_(p, std=1.0 if ".router." in name else 0.2)
    return adapted


def gpt_oss() -> nn.Module:
    """Packed the other way round, with biases, gate and up in turns and a clamp."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.GptOssConfig(**sizes, layer_types=["full_attention"], rope_parameters=rope)
    model = transformers.GptOssForCausalLM(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def llama4() -> nn.Module:
    """Every expert is called with every token, most of them zero."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def turned(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix if matrix.shape == like.shape else matrix.T


@pytest.mark.parametrize("make", [lambda: language_model("mixtral"), gpt_oss, llama4])
def test_a_lora_of_packed_experts_is_pefts(make):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = make().eval()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=names, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config).eval()
    adapted = adapt(ours, targets=[f"*.{name}" for name in names], rank=3, alpha=5)
    pairs = []
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            for e in range(4):
                (name,) = [n for n in adapted.layers if n.endswith(f"experts.{e}.{module.parameter_name}")]
                bank = adapted.layers[name].experts
                inner, outer = (bank.b, bank.a) if make is llama4 else (bank.a, bank.b)  # it takes (I, O) for (O, I)
                inner.data[0] = turned(a.unflatten(0, (4, 3))[e], inner[0])
                outer.data[0] = turned(b.unflatten(1, (3, 4))[:, :, e], outer[0])
                pairs.append((inner, outer, a, b, e))
    assert len(pairs) == len(adapted.layers) == 8
    y, expected = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    y.sin().mean().backward(), expected.sin().mean().backward()
    for inner, outer, a, b, e in pairs:
        theirs_a, theirs_b = a.grad.unflatten(0, (4, 3))[e], b.grad.unflatten(1, (3, 4))[:, :, e]
        if inner.grad is None:  # no token was sent there
            assert not theirs_a.any() and not theirs_b.any()
            continue
        torch.testing.assert_close(turned(inner.grad[0], theirs_a), theirs_a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(turned(outer.grad[0], theirs_b), theirs_b, atol=1e-6, rtol=1e-5)
    adapted.merge_back()
    torch.testing.assert_close(ours(IDS).logits, y, atol=1e-5, rtol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    assert ours.state_dict().keys() == merged.keys()
    torch.testing.assert_close(ours.state_dict(), merged, atol=1e-6, rtol=1e-6)


def test_a_lora_of_conv1d_is_pefts():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, kinds = language_model("gpt2").double().eval(), ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=kinds, init_lora_weights=False, fan_in_fan_out=True)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config).eval()
    adapted = adapt(ours, targets="*.c_*", rank=3, alpha=5)
    for name, layer in adapted.layers.items():
        module = theirs.base_model.model.get_submodule(name)
        layer.experts.a.data[0] = module.lora_A["default"].weight
        layer.experts.b.data[0] = module.lora_B["default"].weight
    expected = theirs(input_ids=IDS)[0]
    assert len(adapted.layers) == 4
    torch.testing.assert_close(ours(IDS)[0], expected, atol=1e-6, rtol=1e-6)
    adapted.merge_back()
    torch.testing.assert_close(ours(IDS)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "bert", "gpt2"])
@pytest.mark.parametrize("slug", ADAPTERS)
def test_packed_experts_conv1d_and_split_blocks_are_saved_and_loaded(slug, kind, tmp_path):
    model, inputs, before = frozen(kind)
    adapted = shaken(adapt(copy.deepcopy(model), slug, **{k: v for k, v in FEW[slug].items() if k != "heads"}))
    adapted.save(tmp_path / "adapter")
    again = workbench.load_adapter(copy.deepcopy(model), tmp_path / "adapter")
    y = answer(adapted.model.eval(), inputs)
    assert torch.equal(answer(again.model.eval(), inputs), y) and not torch.allclose(y, before, atol=1e-3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        ends = ("down_proj", "0.output.dense.weight", "mlp.c_proj.weight")
        next(p for name, p in other.named_parameters() if name.endswith(ends)).add_(1)
    with pytest.raises(InputError, match="other weights than this model's"):
        workbench.load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("slug", FACTS)
def test_packed_experts_know_whose_tokens_they_are_given(slug):
    model, inputs, _ = frozen("mixtral")
    adapted = shaken(adapt(copy.deepcopy(model), slug))
    alone = []
    for row in range(2):
        with adapted.given(**dict.fromkeys(adapted.adapter.facts, row)):
            alone.append(answer(adapted.model, {"input_ids": inputs["input_ids"][row : row + 1]}))
    with adapted.given(**{fact: [0, 1] for fact in adapted.adapter.facts}):
        together = answer(adapted.model, inputs)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    if slug == "lora-mixer":  # in use it goes by the input
        return
    with adapted.given(**{fact: [1, 0] for fact in adapted.adapter.facts}):
        assert not torch.allclose(answer(adapted.model, inputs), together, atol=1e-3)


@pytest.mark.parametrize("slug", ["mixlora", "llava-mole", "dynamic-dino", "flexmore"])
def test_packed_experts_count_no_padding(slug):
    """Whatever the padding is, the losses of all layers are the same; without the mask they are not."""
    adapted = shaken(adapt(copy.deepcopy(frozen("mixtral")[0]), slug))
    mask, losses = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), []
    for given in (mask, torch.ones_like(mask)):
        for padding in (0, 30):
            adapted.model(input_ids=torch.where(mask.bool(), IDS, padding), attention_mask=given)
            losses.append(sum(adapted.losses().values()))
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0] > 0 and not torch.allclose(losses[2], losses[3])


@pytest.mark.parametrize("slug", ADAPTERS)
def test_what_was_left_out_is_said(slug):
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(9, 8),
            "layer": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.LayerNorm(8),
            "image": nn.Conv2d(1, 8, 3),
            "experts": Packed(),
        }
    )
    adapted = adapt(model, slug)
    assert list(adapted.layers) == ["layer"]
    assert adapted.report()["left_out"] == {
        "words": "a Embedding",
        "attention": "a MultiheadAttention",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear",
        "image": "a Conv2d",
        "experts.up_proj": "packed in a Packed, which computes what is not known here",
        "experts.down_proj": "packed in a Packed, which computes what is not known here",
    }
    assert adapt(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Embedding(9, 8)}), slug, "a").left_out == {}
    with pytest.raises(InputError, match=r"matches 'experts.up_proj', packed in a Packed"):
        adapt(nn.ModuleDict({"experts": Packed()}), slug)


class Packed(nn.Module):
    """Named as packed experts are, and another function."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(3, 12, 8)), nn.Parameter(torch.randn(3, 8, 12))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("slug", ADAPTERS)
def test_models_that_are_adapted_compiled_or_wrapped_already_are_refused(slug):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["0"]))
    part = nn.Sequential(torch.compile(small()), nn.Linear(8, 8))
    for model, message in (
        (theirs, "adapted with peft already, itself"),
        (theirs.base_model.model, "adapted with peft already, at '0'"),
        (torch.compile(small()), "is compiled, itself; adapt it first"),
        (part, "is compiled, at '0'; adapt it first"),
        (nn.DataParallel(small()), "wrapped in a DataParallel, itself; adapt it first"),
    ):
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(InputError, match=message):
            adapt(model, slug)
        assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(InputError, match="targets is empty"):
        adapt(small(), slug, [])


@pytest.mark.parametrize("kind", ["mixtral", "bert", "gpt2"])
def test_save_pretrained_keeps_the_model_and_the_adaptation_apart(kind, tmp_path):
    model, inputs, before = frozen(kind)
    adapted = shaken(adapt(copy.deepcopy(model), "mixlora"))
    y, own = answer(adapted.model, inputs), {name: t.clone() for name, t in own_state(adapted.layers).items()}
    adapted.model.save_pretrained(tmp_path)
    assert torch.equal(answer(adapted.model, inputs), y) and own.keys() == own_state(adapted.layers).keys()
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again, inputs), before)
    workbench.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answer(again, inputs), y)
    with pytest.raises(InputError, match="state_dict is passed"):
        adapted.model.save_pretrained(tmp_path, state_dict=adapted.model.state_dict())
    assert "save_pretrained" not in vars(adapted.remove())
