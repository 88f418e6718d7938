"""Plain LoRA against peft: the same outputs and gradients, and folders that either side reads."""

import copy
import json
import os
import warnings
from itertools import islice

import pytest
import torch
from torch import nn

from tests.fuzz.adapters import Net as Nested
from tests.fuzz.adapters import cases, fingerprint
from tests.fuzz.harness import try_all
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.peft import CONFIG, TENSORS, read_loras, read_peft, write_peft
from workbench.lib.core.adapt.peft_config import _literal, _matches
from workbench.lib.core.low_rank import LowRankExperts


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


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=31, **sizes))


IDS = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(4))


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


FEATURES = {
    "use_dora = True": {"use_dora": True},
    "bias = 'all'": {"bias": "all"},
    "init_lora_weights = 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights = 'olora'": {"init_lora_weights": "olora"},
    r"alora_invocation_tokens = \[3, 4\]": {"alora_invocation_tokens": [3, 4]},
    "lora_bias = True": {"lora_bias": True},
    "init_lora_weights = 'orthogonal'": None,  # changes no base: read
    "init_lora_weights = True": None,
}


@pytest.mark.parametrize(("said", "options"), FEATURES.items(), ids=list(FEATURES))
def test_a_folder_that_peft_makes_is_read_where_it_is_plain_and_else_refused_by_name(tmp_path, said, options):
    plain = options is None
    options = {"init_lora_weights": said.split(" = ")[1].strip("'")} if plain else options
    torch.manual_seed(1)
    task = {"task_type": "CAUSAL_LM"} if "alora_invocation_tokens" in options else {}
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": True} | task | options
    config["init_lora_weights"] = True if config["init_lora_weights"] == "True" else config["init_lora_weights"]
    model = peft.get_peft_model(llama(), peft.LoraConfig(**config))
    model.save_pretrained(tmp_path)
    before = fingerprint(ours := llama())
    if plain:
        read_peft(ours, tmp_path)
        torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
        return
    with pytest.raises(InputError, match=f"is no plain LoRA: .*{said}"):
        read_peft(ours, tmp_path)
    assert fingerprint(ours) == before


GONE = object()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_alpha": GONE}, "lora_alpha is None but must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None but must be a finite number"),
        ({"lora_alpha": [5]}, r"lora_alpha is \[5\] but must be a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan but must be a finite number"),
        ({"r": 4}, "first has rank 3, but its settings have only 4"),
        ({"rank_pattern": {"first": 2.5}}, "the rank 'first' is 2.5 but must be a whole number"),
        ({"alpha_pattern": {"(x+)+y": 3}}, r"alpha_pattern has '\(x\+\)\+y', of which only the names of layers"),
        ({"alpha_pattern": {"[": 3}}, r"alpha_pattern has '\[', of which only"),
        ({"alpha_pattern": ["first"]}, r"alpha_pattern is \['first'\] but must be an object"),
        ({"alpha_pattern": {"first": "x"}}, "alpha_pattern of 'first' is 'x' but must be a finite number"),
        ({"target_modules": ["first"]}, "holds a LoRA of second, which its settings do not name"),
        ({"a_new_feature": {"x": 1}}, "is no plain LoRA: a_new_feature = {'x': 1}"),
        ({"peft_type": "IA3"}, "is no plain LoRA: peft_type = 'IA3'"),
        ({"lora_dropout": 1}, "lora_dropout is 1.0 but must be at least 0 and below 1"),
        (None, "must hold an object"),
        ([{}], "must hold an object"),
    ],
)
def test_settings_that_are_not_as_they_must_be_say_so(tmp_path, change, said):
    theirs().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    if isinstance(change, dict):
        change = {key: value for key, value in (config | change).items() if value is not GONE}
    (tmp_path / CONFIG).write_text(json.dumps(change))
    before = fingerprint(ours := Net())
    with pytest.raises(InputError, match=said):
        read_peft(ours, tmp_path)
    assert fingerprint(ours) == before


def test_settings_that_say_nothing_of_the_function_are_read_over(tmp_path):
    theirs(lora_dropout=0.25).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    more = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "there", "new_and_off": None, "new_too": False}
    (tmp_path / CONFIG).write_text(json.dumps(config | more))
    adapted = read_peft(ours := Net(), tmp_path)
    x = torch.randn(7, 6)
    torch.testing.assert_close(ours.eval()(x), theirs().eval()(x), atol=1e-6, rtol=1e-6)
    assert all(layer.dropout.p == 0.25 for layer in adapted.layers.values())


def test_the_copy_of_a_head_that_peft_adds_is_compared_with_the_model_and_left_out(tmp_path):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    ours = llama()
    adapted = read_peft(ours, tmp_path)
    assert len(adapted.layers) == 3 and read_loras(tmp_path, llama()).keys() == adapted.layers.keys()
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    before = fingerprint(other)
    with pytest.raises(InputError, match=r"base weight lm_head.weight that is not this model's"):
        read_peft(other, tmp_path)
    assert fingerprint(other) == before
    with pytest.raises(InputError, match=r"copy of the base's lm_head.weight: give the model"):
        read_loras(tmp_path)


def test_patterns_match_what_they_match_in_peft():
    names = ["out", "block.out", "block.fout", "layers.1.out", "layers.11.out", "blockxout", "a-b.out", "out.q"]
    patterns = [
        "out",
        "^out",
        "out$",
        "^out$",
        r"block\.out",
        "block.out",
        "k.out",
        r"1\.out",
        "^block",
        r"a\-b\.out",
        ".",
    ]
    for pattern in patterns:
        for name in names:
            found = peft.utils.other.get_pattern_key([pattern], name) != name or pattern == name
            assert _matches(_literal(pattern), name) == found, (pattern, name)


@pytest.mark.parametrize(
    ("build", "ranks"),
    [
        (Nested, {"out": 2}),
        (Nested, {"block.out": 2}),
        (Nested, {"first": 1, "out": 2, "block.out": 3}),
        (Nested, {"block.out": 1, "out": 3}),
        ("llama", {"model.layers.1.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 4, "lm_head": 3}),
        ("mixtral", {"model.layers.1.self_attn.q_proj": 2, "model.layers.0.self_attn.o_proj": 3}),
    ],
    ids=["the end", "the longer", "three ranks", "two ranks", "llama", "mixtral"],
)
def test_what_is_written_peft_loads_to_the_same_function(tmp_path, build, ranks):
    """Also where the name of one layer is the end of another's, each with a rank and a scale of its own."""
    build = {"llama": llama, "mixtral": mixtral}.get(build, build)
    torch.manual_seed(2)
    base, banks = build(), {}
    for name, rank in ranks.items():
        layer = base.get_submodule(name)
        bank = LowRankExperts(1, layer.in_features, layer.out_features, rank, alpha=rank * (1 + rank / 7))
        nn.init.normal_(bank.b)
        banks[name] = bank
    write_peft(banks, tmp_path / "ours")
    x = torch.randn(7, 6) if build is Nested else IDS
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        public = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    read_peft(ours := build().eval(), tmp_path / "ours")
    for model in (ours, public, base.eval()):
        y = model(x)
        outputs.append(y if isinstance(y, torch.Tensor) else y.logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-6)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2))


PACKED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (mixtral, {"target_modules": ["q_proj"], "target_parameters": PACKED, "rank_pattern": {"down_proj": 2}}),
        (mixtral, {"target_modules": [], "target_parameters": PACKED[1:], "use_rslora": True}),
        (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["packed, two ranks", "packed, rsLoRA", "Conv1D"],
)
def test_folders_of_layers_that_are_no_linear_go_both_ways(tmp_path, build, options):
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **options)).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapted = read_peft(ours := build().eval(), tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
    assert (build().eval()(IDS).logits - model(IDS).logits).abs().max() > 1e-2
    packed = [name for name in adapted.targets if "experts" in name]
    write_peft({name: layer.experts for name, layer in adapted.layers.items()}, tmp_path / "ours", packed=packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("keys", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_loras_of_packed_experts_lie_as_peft_has_them(tmp_path, keys):
    """A in blocks for each expert, B interleaved; a wrapper for each parameter. Against peft's own update."""
    torch.manual_seed(2)
    base, banks, packed = mixtral(), {}, []
    for i, key in enumerate(keys):
        place = "model.layers.1.mlp.experts"
        packed.append(f"{place}.{key}")
        n_experts, d_out, d_in = base.get_parameter(packed[-1]).shape
        for e in range(n_experts):
            bank = banks[f"{place}.{e}.{key}"] = LowRankExperts(1, d_in, d_out, 2 + i, alpha=5 + i)
            nn.init.normal_(bank.b)
    attention = banks["model.layers.0.self_attn.q_proj"] = LowRankExperts(1, 16, 16, 4)
    nn.init.normal_(attention.b)
    write_peft(banks, tmp_path, packed=packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        public = peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    with torch.no_grad():
        for name, bank in banks.items():
            place, _, key = name.rpartition(".")
            place, _, e = place.rpartition(".")
            weight = base.get_parameter(f"{place}.{key}")[int(e)] if e.isdigit() else base.get_submodule(name).weight
            weight += bank.delta(0)
    torch.testing.assert_close(base.eval()(IDS).logits, public(IDS).logits, atol=1e-6, rtol=1e-6)
    for name, (a, b, scale) in (read := read_loras(tmp_path, mixtral())).items():
        torch.testing.assert_close((a, b, scale), (banks[name].a[0], banks[name].b[0], float(banks[name].scale[0])))
    assert read.keys() == banks.keys()
    with pytest.raises(InputError, match="has target_parameters: give the model"):
        read_loras(tmp_path)
    del banks[f"model.layers.1.mlp.experts.0.{keys[0]}"]
    with pytest.raises(InputError, match=r"has banks of .* but must have some"):
        write_peft(banks, tmp_path, packed=packed)


def test_a_share_of_spoiled_folders_is_refused_in_words_and_changes_nothing(tmp_path):
    """`python -m tests.fuzz adapters` tries them all."""
    tally = try_all(islice(cases(tmp_path), 40))
    assert not tally.faults, tally.faults
    assert sum(tally.refused.values()) > 20 and sum(tally.read.values()) > 2
    assert len(tally.read | tally.refused) == 4


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

    for name in ("fsync", "rename"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            write_peft(other, tmp_path)
        torch.testing.assert_close(read_loras(tmp_path), before)
    with pytest.raises(InputError, match="must be new, empty, or hold a LoRA"):
        write_peft(other, tmp_path.parent)
    write_peft(other, tmp_path)
    assert all(a.shape[0] == 1 for a, _, _ in read_loras(tmp_path).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS]
