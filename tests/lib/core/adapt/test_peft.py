"""Plain LoRA against peft: the same outputs and gradients, and folders that either side reads."""

import copy
import json
import os

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.peft import CONFIG, TENSORS, read_loras, read_peft, write_peft


@pytest.fixture(autouse=True, scope="module")
def _peft():
    """Only the process that runs these tests pays for the import."""
    global peft
    peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def theirs(**options) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], init_lora_weights=False, **options)
    return peft.get_peft_model(Net(), config)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 7}}]
)
def test_peft_folders_are_read_to_the_same_function_and_written_back(tmp_path, options):
    model, ours, x = theirs(**options), Net(), torch.randn(7, 6)
    model.save_pretrained(tmp_path / "theirs")
    adapted = read_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), model(x), atol=1e-6, rtol=1e-6)
    ours(x).square().sum().backward()
    model(x).square().sum().backward()
    bank, layer = adapted.layers["first"].experts, model.base_model.model.first
    torch.testing.assert_close(bank.a.grad[0], layer.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bank.b.grad[0], layer.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-5)
    write_peft({name: layer.experts for name, layer in adapted.layers.items()}, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, num_key_value_heads=1, **sizes))


@pytest.mark.parametrize(
    ("build", "targets", "names", "x"),
    [
        (Net, ["first", "second"], "*", torch.randn(7, 6, generator=torch.Generator().manual_seed(4))),
        (
            llama,
            ["q_proj", "v_proj", "down_proj"],
            ["*.q_proj", "*.v_proj", "*.down_proj"],
            torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(4)),
        ),
    ],
    ids=["net", "llama"],
)
def test_a_fresh_lora_is_the_one_of_peft_in_outputs_and_gradients(build, targets, names, x):
    """Every output, and the gradient of the input and of every A and B, to 1e-6; nothing else has one."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), config)
    adapted = adapt(ours := build(), targets=names, rank=3, alpha=5)
    pairs = {
        name: (layer.experts, model.base_model.model.get_submodule(name)) for name, layer in adapted.layers.items()
    }
    assert len(pairs) == sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())
    with torch.no_grad():
        for bank, layer in pairs.values():
            bank.a[0], bank.b[0] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    results = []
    for net in (ours, model):
        inputs = x.clone().requires_grad_() if x.is_floating_point() else x
        y = net(inputs)
        y = y if isinstance(y, torch.Tensor) else y.logits
        y.square().mean().backward()
        results.append((y, inputs.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    for bank, layer in pairs.values():
        for mine, theirs in ((bank.a, layer.lora_A["default"]), (bank.b, layer.lora_B["default"])):
            assert theirs.weight.grad.any()
            torch.testing.assert_close(mine.grad[0], theirs.weight.grad, atol=1e-6, rtol=1e-6)
    assert sum(p.grad is not None for p in ours.parameters()) == 2 * len(pairs)


def test_what_is_no_plain_lora_is_refused_with_all_its_features(tmp_path):
    theirs(use_dora=True, bias="all").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is no plain LoRA: bias = 'all', use_dora = True"):
        read_loras(tmp_path)


def test_folders_that_do_not_fit_or_are_damaged_say_so(tmp_path):
    theirs().save_pretrained(tmp_path / "good")
    with pytest.raises(
        InputError, match=r"does not fit this model: the model has no linear layer 'first'; .* 'second'"
    ):
        read_peft(nn.Sequential(nn.Linear(6, 6)), tmp_path / "good")
    wider = Net()
    wider.first, wider.second = nn.Linear(6, 13), nn.Linear(13, 4)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(
        InputError, match=r"first is for a layer of shape \(12, 6\) but the model's is \(13, 6\); second"
    ):
        read_peft(wider, tmp_path / "good")
    assert before.keys() == wider.state_dict().keys()
    content = (tmp_path / "good" / TENSORS).read_bytes()
    (tmp_path / "good" / TENSORS).write_bytes(content[:100])
    with pytest.raises(InputError, match="damaged or half-written"):
        read_loras(tmp_path / "good")
    (tmp_path / "good" / CONFIG).write_text(json.dumps({"peft_type": "LOR"})[:10])
    with pytest.raises(InputError, match="damaged or half-written"):
        read_loras(tmp_path / "good")
    with pytest.raises(InputError, match="must hold adapter_config"):
        read_loras(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expert is 2 but first has 1 of them"):
        write_peft({"first": adapt(Net()).layers["first"].experts}, tmp_path / "x", expert=2)


def test_a_write_that_fails_leaves_the_lora_that_was_there_and_other_files_stay(tmp_path, monkeypatch):
    banks = {name: layer.experts for name, layer in adapt(Net(), rank=2).layers.items()}
    write_peft(banks, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = read_loras(tmp_path)
    other = {name: layer.experts for name, layer in adapt(Net(), rank=1).layers.items()}

    def full(*args):
        raise OSError("No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            write_peft(other, tmp_path)
        torch.testing.assert_close(read_loras(tmp_path), before)
    write_peft(other, tmp_path)
    assert all(a.shape[0] == 1 for a, _, _ in read_loras(tmp_path).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS]
