"""Merged LoRAs: the weighted sum, for every kind that is taken, through folders, and beside peft."""

import json
import warnings

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.peft import CONFIG, read_peft, write_peft
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.merge import Matrices, make_merger
from workbench.lib.core.merge.adapters import (
    LowRankDeltas,
    concatenate,
    linear,
    merge_adapters,
    read_deltas,
    truncate,
)
from workbench.lib.core.merge.files import open_models, write_model

WEIGHTS = [0.7, -1.5]
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(autouse=True, scope="module")
def _peft():
    """Only the process that runs these tests pays for the import."""
    global peft
    peft = pytest.importorskip("peft", minversion="0.21.2")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Turned(nn.Module):
    """Layers that hold (I, O), one of them square."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.first, self.second = Conv1D(6, 6), Conv1D(4, 6)

    forward = Net.forward


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
KINDS = {
    "plain": [{}, {}],
    "rslora": [{"use_rslora": True}, {"use_rslora": True, "r": 2}],
    "one of them rslora": [{"use_rslora": True}, {}],
    "unequal ranks": [{"r": 2}, {"r": 4}],
    "patterns": [{"rank_pattern": {"second": 2}}, {"alpha_pattern": {"first": 7}, "rank_pattern": {"first": 1}}],
    "different layers": [{"target_modules": ["first"]}, {}],
}


def theirs(*kinds: dict, build=Net) -> nn.Module:
    """A peft model with the adapters "0", "1", ... of random weights."""
    model = None
    for i, kind in enumerate(kinds):
        torch.manual_seed(10 + i)
        usual = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], "init_lora_weights": False}
        config = peft.LoraConfig(**usual | kind)
        if model is None:
            model = peft.get_peft_model(build(), config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    return model.eval()


def saved(model: nn.Module, folder) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder)
    return [folder / name for name in sorted(model.peft_config)]


def updates(model: nn.Module) -> list[dict]:
    """peft's own update (O, I) of each layer, adapter by adapter."""
    layers = {n: getattr(model.base_model.model, n) for n in ("first", "second")}
    turn = {name: getattr(layer, "fan_in_fan_out", False) for name, layer in layers.items()}
    return [
        {
            n: layer.get_delta_weight(a).T if turn[n] else layer.get_delta_weight(a)
            for n, layer in layers.items()
            if a in layer.lora_A
        }
        for a in sorted(model.peft_config)
    ]


def weighted_sum(model: nn.Module, weights=WEIGHTS) -> dict:
    found = updates(model)
    return {
        name: sum(w * u[name].detach() for w, u in zip(weights, found, strict=True) if name in u)
        for name in dict.fromkeys(n for u in found for n in u)
    }


def check_sum(deltas: LowRankDeltas, expected: dict) -> None:
    assert set(deltas) == set(expected)
    for name, update in expected.items():
        torch.testing.assert_close(deltas.dense(name), update, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_update_is_the_weighted_sum_through_folders_and_as_full_weights(tmp_path, kind):
    model = theirs(*KINDS[kind])
    expected = weighted_sum(model)
    merged = concatenate(read_deltas(saved(model, tmp_path)), WEIGHTS)
    check_sum(merged, expected)
    merged.save(tmp_path / "merged")
    check_sum(read_deltas([tmp_path / "merged"])[0], expected)
    base = Net()
    base.load_state_dict(merged.added_to(base.state_dict()))
    for name, update in expected.items():
        weight = Net().get_parameter(f"{name}.weight")
        torch.testing.assert_close(base.get_parameter(f"{name}.weight"), weight + update, **CLOSE)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "merged").eval()
    torch.testing.assert_close(again(X), base(X), **CLOSE)
    cut = truncate(merged, 3)  # a model adapted by us has one rank, which every layer must be wide enough for
    read_peft(ours := Net(), cut.save(tmp_path / "cut"))
    base.load_state_dict(cut.added_to(Net().state_dict()))
    torch.testing.assert_close(ours(X), base(X), **CLOSE)


def test_layers_that_hold_their_weight_turned_are_merged_turned(tmp_path):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft sets fan_in_fan_out itself, and says so
        model = theirs({}, {"r": 2}, build=Turned)
        merged = concatenate(read_deltas(saved(model, tmp_path)), WEIGHTS)
        check_sum(merged, weighted_sum(model))
        merged.save(tmp_path / "merged")
        again = peft.PeftModel.from_pretrained(Turned(), tmp_path / "merged").eval()
    base = Turned()
    base.load_state_dict(read_deltas([tmp_path / "merged"])[0].added_to(base.state_dict()))
    torch.testing.assert_close(again(X), base(X), **CLOSE)
    for name, update in weighted_sum(model).items():
        weight = Turned().get_parameter(f"{name}.weight")
        torch.testing.assert_close(base.get_parameter(f"{name}.weight"), weight + update.T, **CLOSE)


def test_square_weights_beside_turned_and_unturned_ones_are_refused():
    one = {n: (torch.ones(1, i), torch.ones(o, 1), 1.0) for n, o, i in [("a", 2, 3), ("b", 2, 3), ("c", 2, 2)]}
    state = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(3, 2), "c.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match=r"c\.weight may lie as \(O, I\) or as \(I, O\)"):
        LowRankDeltas(one).added_to(state)
    del one["c"]
    assert LowRankDeltas(one).added_to(state)["b.weight"].shape == (3, 2)


class Layers(nn.Module):
    """Layers of which some hold (O, I) and some (I, O), called "linear" and "turned"."""

    def __init__(self, **widths: tuple[str, int, int]):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        for name, (kind, d_in, d_out) in widths.items():
            layer = nn.Linear(d_in, d_out) if kind == "linear" else Conv1D(d_out, d_in)
            nn.init.normal_(layer.bias)
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


KINDS_OF_LAYERS = {
    # the layers, those adapted, whether a folder of peft says enough for the weights alone
    "turned, square": ({"a": ("turned", 6, 6), "b": ("turned", 6, 4)}, ["a"], True),
    "turned, both": ({"a": ("turned", 6, 6), "b": ("turned", 6, 4)}, ["a", "b"], True),
    "turned, alone": ({"a": ("turned", 6, 6)}, ["a"], True),
    "turned, not square": ({"a": ("turned", 6, 6), "b": ("turned", 6, 4)}, ["b"], True),
    "linear, square": ({"a": ("linear", 6, 6), "b": ("linear", 6, 4)}, ["a"], True),
    "linear, both": ({"a": ("linear", 6, 6), "b": ("linear", 6, 4)}, ["a", "b"], True),
    "linear beside turned": ({"a": ("linear", 6, 6), "b": ("turned", 6, 4)}, ["a"], False),
    "turned beside linear": ({"a": ("turned", 6, 6), "b": ("linear", 6, 4)}, ["a"], False),
    # as GPT-2 with its head: peft says of such a folder what it says of the last layer
    "both, linear last": ({"a": ("turned", 6, 6), "c": ("turned", 6, 8), "b": ("linear", 8, 4)}, ["a", "b"], False),
    # as an image encoder of linear layers with GPT-2 as its decoder
    "both, turned last": ({"a": ("linear", 6, 6), "c": ("linear", 6, 8), "b": ("turned", 8, 4)}, ["a", "b"], False),
}


@pytest.mark.parametrize("kind", KINDS_OF_LAYERS)
def test_updates_lie_as_the_weights_do_or_are_refused(tmp_path, kind):
    """Folders of both kinds by us and by peft, merged into bare weights: the function peft has of the same folder."""
    pytest.importorskip("transformers")
    widths, names, told = KINDS_OF_LAYERS[kind]
    adapted = adapt(ours := Layers(**widths), "lora", names, rank=2, alpha=3)
    for layer in adapted.layers.values():
        nn.init.normal_(layer.experts.b)
    adapted.save(tmp_path / "own")
    write_peft({name: layer.experts for name, layer in adapted.layers.items()}, tmp_path / "by us")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it sets fan_in_fan_out itself
        theirs = peft.PeftModel.from_pretrained(Layers(**widths), tmp_path / "by us").eval()
        torch.testing.assert_close(theirs(X), ours(X), **CLOSE)
        theirs.save_pretrained(tmp_path / "by peft")
    said = {name: json.loads((tmp_path / name / CONFIG).read_text())["fan_in_fan_out"] for name in ("by us", "by peft")}
    kinds = {widths[name][0] for name in names}
    assert said["by peft"] == (widths[names[-1]][0] == "turned") and said["by us"] == ("turned" in kinds)
    for folder in ("own", "by us", "by peft"):
        for model in (None, Layers(**widths)):
            base = Layers(**widths)
            deltas = read_deltas([tmp_path / folder], model)
            merged = truncate(concatenate(deltas, [1.0]), 2)
            if model is None and not told and folder != "own":
                for one in (deltas[0], merged):
                    with pytest.raises(InputError, match=r"a\.weight may lie as .*: give read_deltas the model"):
                        one.added_to(base.state_dict())
                continue
            for one in (deltas[0], merged):
                base.load_state_dict(one.added_to(Layers(**widths).state_dict()))
                torch.testing.assert_close(base(X), ours(X), **CLOSE)
            merged.save(tmp_path / "again")
            read_peft(again := Layers(**widths), tmp_path / "again")
            torch.testing.assert_close(again(X), ours(X), **CLOSE)
    assert (Layers(**widths)(X) - ours(X)).abs().max() > 1e-2


def test_a_square_layer_of_gpt2_is_merged_turned_from_files(tmp_path):
    """As `workbench merge` does it, with the adapter alone and with its own kind of folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, "lora", "*.attn.c_proj", rank=2)
    for layer in adapted.layers.values():
        nn.init.normal_(layer.experts.b)
    adapted.save(tmp_path / "own")
    write_peft({name: layer.experts for name, layer in adapted.layers.items()}, tmp_path / "peft")
    ids = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(4))
    expected = model(ids).logits
    for name in ("own", "peft"):
        vectors = open_models(tmp_path / "base", [tmp_path / name])
        write_model(vectors, make_merger("average", {}), tmp_path / "base", tmp_path / f"merged {name}")
        merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / f"merged {name}").eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_square_packed_experts_lie_as_the_model_has_them(tmp_path):
    """Those of gpt-oss are (I, O); with as many hidden units as inputs the shape does not say so."""
    transformers = pytest.importorskip("transformers")

    def oss():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
        model = transformers.GptOssForCausalLM(
            transformers.GptOssConfig(vocab_size=31, **sizes, layer_types=["full_attention"])
        )
        return model.eval()

    whole = "model.layers.0.mlp.experts.down_proj"
    adapted = adapt(ours := oss(), "lora", whole, rank=2)
    for layer in adapted.layers.values():
        nn.init.normal_(layer.experts.b)
    banks = {name: layer.experts for name, layer in adapted.layers.items()}
    write_peft(banks, tmp_path / "peft", packed=[whole])
    adapted.save(tmp_path / "own")
    ids = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(oss(), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    for name in ("own", "peft"):
        deltas = read_deltas([tmp_path / name], oss())[0]
        (base := oss()).load_state_dict(deltas.added_to(oss().state_dict()))
        torch.testing.assert_close(base(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"down_proj may lie as"):
        LowRankDeltas(deltas.layers, deltas.packed).added_to(oss().state_dict())


def test_the_adapters_of_packed_experts_are_summed_expert_by_expert(tmp_path):
    """A lies in blocks for each expert, B interleaved; against peft's own outputs."""
    transformers = pytest.importorskip("transformers")

    def mixtral():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "num_local_experts": 3, "vocab_size": 31}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()

    place, base = "model.layers.0.mlp.experts", mixtral()
    packed = [f"{place}.gate_up_proj", f"{place}.down_proj"]
    expected = {name: p.detach().clone() for name, p in base.named_parameters()}
    for i, weight in enumerate(WEIGHTS):
        banks = {}
        for key in packed:
            for e, matrix in enumerate(base.get_parameter(key)):
                name = f"{place}.{e}.{key.rpartition('.')[2]}"
                bank = banks[name] = LowRankExperts(1, matrix.shape[1], matrix.shape[0], 2 + i, alpha=5)
                nn.init.normal_(bank.b)
                expected[key][e] += weight * bank.delta(0).detach()
        write_peft(banks, tmp_path / str(i), packed=packed)
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(InputError, match=r"0 has target_parameters: give the model.*1 has target_parameters"):
        read_deltas(folders)
    merged = concatenate(read_deltas(folders, mixtral()), WEIGHTS)
    for made in (merged, truncate(merged, 5)):  # 2 + 3: nothing is cut
        state = made.added_to(base.state_dict())
        for name, weight in expected.items():
            torch.testing.assert_close(state[name], weight, atol=1e-5, rtol=1e-5)
    merged.save(tmp_path / "merged")
    full = mixtral()
    full.load_state_dict(state)
    ids = torch.randint(31, (3, 5), generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        public = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "merged").eval()
    torch.testing.assert_close(public(ids).logits, full(ids).logits, atol=1e-5, rtol=1e-5)


def test_ranks_that_add_to_more_than_a_layer_has_are_held_in_its_width(tmp_path):
    model = theirs(*[{"r": 3}] * 3)
    merged = concatenate(read_deltas(saved(model, tmp_path)), [1.0, 2.0, 3.0])
    assert len(merged["second"][0]) == 4 and len(merged["first"][0]) == 6
    check_sum(merged, weighted_sum(model, [1.0, 2.0, 3.0]))


def test_our_own_folders_are_taken_and_mixtures_are_refused_by_name(tmp_path):
    expected = {"first": 0, "second": 0}
    for i, rank in enumerate((2, 3)):
        adapted = adapt(Net(), "lora", ["first", "second"], rank=rank, alpha=7)
        for layer in adapted.layers.values():
            nn.init.normal_(layer.experts.b)
        adapted.save(tmp_path / str(i))
        expected = {n: expected[n] + layer.fixed_update().detach() for n, layer in adapted.layers.items()}
    folders = [tmp_path / "0", tmp_path / "1"]
    check_sum(concatenate(read_deltas(folders), [1.0, 1.0]), expected)
    adapt(Net(), "mhr", ["first"]).save(tmp_path / "mixture")
    other = Net()
    nn.init.zeros_(other.first.weight)
    adapt(other, "lora", ["first", "second"], rank=2).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"is a 'mhr' but only plain LoRAs"):
        read_deltas([*folders, tmp_path / "mixture"])
    with pytest.raises(InputError, match="bases differ"):
        read_deltas([*folders, tmp_path / "other"])


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    model = theirs({"use_dora": True}, {"bias": "lora_only"}, {"r": 2})
    with pytest.raises(InputError, match=r"use_dora = True.*bias = 'lora_only'"):
        read_deltas(saved(model, tmp_path))
    one = (torch.ones(1, 3), torch.ones(2, 1), 1.0)
    other = (torch.ones(1, 4), torch.ones(2, 1), 1.0)
    pair = [
        LowRankDeltas({"a": one, "b": one}, base=(("name", "here"),)),
        LowRankDeltas({"a": other, "b": other}, base=(("name", "there"),)),
    ]
    with pytest.raises(InputError, match=r"'here'.*'there'.*a is \(2, 3\) in adapter 0, \(2, 4\) in adapter 1; b is"):
        concatenate(pair, [1, 1])
    with pytest.raises(InputError, match=r"no weight 'a\.weight'; b\.weight has shape \(5, 5\) but the update is"):
        pair[0].added_to({"b.weight": torch.zeros(5, 5)})
    for deltas, weights in (([], []), (pair[:1], [1, 2]), (pair[:1], [float("nan")])):
        with pytest.raises(InputError, match=r"deltas is empty|weights is"):
            concatenate(deltas, weights)
    for folders in ([], "folder", [tmp_path / "none"]):
        with pytest.raises(InputError, match="folder"):
            read_deltas(folders)
    for rank in (0, -1, True):
        with pytest.raises(InputError, match="rank is"):
            truncate(pair[0], rank)


class Rule(Matrices):
    """A rule for the updates (n, O, I) of one layer."""

    def __init__(self, rule):
        self.rule = rule

    def matrix(self, tau, name, facts):
        return self.rule(tau)


def ties(density: float):
    """peft's convention: a share of each tensor, signs elected without the weights, divided by the count."""

    def rule(tau: torch.Tensor) -> torch.Tensor:
        kept = []
        for t in tau:
            k = int(density * t.numel())
            kept.append(torch.where(t.abs() >= t.abs().flatten().topk(k).values[-1], t, 0))
        kept = torch.stack(kept)
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        agree = kept.sign() == sign
        weights = torch.tensor(WEIGHTS)[:, None, None]
        return (weights * kept * agree).sum(0) / agree.sum(0).clamp(min=1)

    return rule


def pruned(density: float):
    def rule(tau: torch.Tensor) -> torch.Tensor:
        kept = [torch.where(t.abs() >= t.abs().flatten().topk(int(density * t.numel())).values[-1], t, 0) for t in tau]
        return sum(w * t for w, t in zip(WEIGHTS, kept, strict=True))

    return rule


def dropped(tau: torch.Tensor) -> torch.Tensor:
    kept = [t * torch.bernoulli(torch.full_like(t, 0.5)) / 0.5 for t in tau]
    return sum(w * t for w, t in zip(WEIGHTS, kept, strict=True))


def dropped_ties(tau: torch.Tensor) -> torch.Tensor:
    return ties(1.0)(torch.stack([t * torch.bernoulli(torch.full_like(t, 0.5)) / 0.5 for t in tau]))


SPACE = {
    "cat": lambda d: concatenate(d, WEIGHTS),
    "svd": lambda d: truncate(concatenate(d, WEIGHTS), 3),
    "linear": lambda d: linear(d, WEIGHTS),
    "ties_svd": lambda d: merge_adapters(d, Rule(ties(0.5)), rank=3),
    "magnitude_prune_svd": lambda d: merge_adapters(d, Rule(pruned(0.5)), rank=3),
    "dare_linear_svd": lambda d: merge_adapters(d, Rule(dropped), rank=3),
    "dare_ties_svd": lambda d: merge_adapters(d, Rule(dropped_ties), rank=3),
}


@pytest.mark.parametrize("name", SPACE)
def test_what_peft_combines_by_that_name(tmp_path, monkeypatch, name):
    model = theirs({}, {})
    deltas = read_deltas(saved(model, tmp_path))
    # the new adapter's initialisation draws as well, so only the masks are seeded
    draws, bernoulli = torch.Generator(), torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: bernoulli(p, generator=draws))
    draws.manual_seed(5)
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "merged", combination_type=name, density=0.5, svd_rank=3)
    draws.manual_seed(5)
    check_sum(SPACE[name](deltas), updates(model)[-1])


@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_peft_s_factor_wise_types_are_not_the_sum_of_updates(name):
    model = theirs({}, {})
    expected = weighted_sum(model)
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "merged", combination_type=name, density=0.999)
    got = updates(model)[-1]
    assert all((got[n] - expected[n]).norm() > 0.2 * expected[n].norm() for n in expected)


def test_peft_s_linear_doubles_two_equal_adapters(tmp_path):
    model = theirs({}, {})
    with torch.no_grad():
        for layer in (model.base_model.model.first, model.base_model.model.second):
            for half in (layer.lora_A, layer.lora_B):
                half["1"].weight.copy_(half["0"].weight)
    one, deltas = updates(model)[0], read_deltas(saved(model, tmp_path))
    model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "merged", combination_type="linear")
    for name, update in updates(model)[-1].items():
        torch.testing.assert_close(update, 2 * one[name], **CLOSE)
        torch.testing.assert_close(linear(deltas, [0.5, 0.5]).dense(name), 2 * one[name].detach(), **CLOSE)
        torch.testing.assert_close(concatenate(deltas, [0.5, 0.5]).dense(name), one[name].detach(), **CLOSE)


@pytest.mark.parametrize(("name", "rank"), [("cat", 6), ("svd", 3)])
def test_peft_s_merges_of_rslora_are_sqrt_r_too_large(name, rank):
    """`svd` cuts, so its result is compared with the cut sum."""
    model = theirs({"use_rslora": True}, {"use_rslora": True})
    model.add_weighted_adapter(["0", "1"], WEIGHTS, "merged", combination_type=name)
    merged = updates(model).pop()
    model.delete_adapter("merged")
    for layer, update in weighted_sum(model).items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(merged[layer], rank**0.5 * cut, atol=1e-4, rtol=1e-4)


def test_peft_s_merges_of_dora_depend_on_the_order_and_ours_refuse_them(tmp_path):
    model = theirs({"use_dora": True}, {"use_dora": True})
    with torch.no_grad():
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.lora_magnitude_vector["1"].weight.mul_(3)
    outputs = []
    for order in (["0", "1"], ["1", "0"]):
        model.add_weighted_adapter(order, [0.5, 0.5], "-".join(order), combination_type="cat")
        model.set_adapter("-".join(order))
        outputs.append(model(X).detach())
    magnitudes = model.base_model.model.first.lora_magnitude_vector
    mean = (magnitudes["0"].weight + magnitudes["1"].weight) / 2
    assert (magnitudes["0-1"].weight - mean).abs().max() > 0.1, "peft merges magnitudes now"
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3, "the order counts no more"
    with pytest.raises(InputError, match="use_dora = True"):
        read_deltas(saved(model, tmp_path))


def test_peft_s_linear_with_rank_patterns_cannot_be_reloaded_and_ours_can(tmp_path):
    model = theirs(*[{"rank_pattern": {"second": 2}}] * 2)
    deltas = read_deltas(saved(model, tmp_path))
    model.add_weighted_adapter(["0", "1"], [0.5, 0.5], "merged", combination_type="linear")
    saved(model, tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Net(), tmp_path / "merged")
    ours = linear(deltas, [0.5, 0.5])
    ours.save(tmp_path / "ours")
    check_sum(read_deltas([tmp_path / "ours"])[0], {name: ours.dense(name) for name in ours})
    peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    unequal = read_deltas(saved(theirs({"r": 2}, {}), tmp_path / "unequal"))
    with pytest.raises(InputError, match="first: 2, 3; second: 2, 3"):
        linear(unequal, [1, 1])


def test_peft_refuses_to_merge_the_adapters_of_packed_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(2, 3, 4))

        def forward(self, x):
            return x @ self.down_proj.sum(0).T

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.ModuleDict({"experts": Experts()}), config, adapter_name="0")
    with pytest.raises(ValueError, match="does not support targeting"):
        model.add_weighted_adapter(["0"], [1.0], "merged")


def test_peft_elects_signs_without_the_weights_and_keeps_nothing_of_very_small_tensors():
    from peft.utils.merge_utils import ties as theirs_ties

    tau, weights = [torch.tensor([1.0]), torch.tensor([-0.9])], torch.tensor([1.0, 10.0])
    assert theirs_ties(tau, weights, density=0.99999999).item() >= 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert theirs_ties(tau, weights, density=1.0).item() == 1.0
    assert not theirs_ties([torch.ones(10), torch.ones(10)], weights, density=0.09).any()
    assert theirs_ties([torch.ones(10), torch.ones(10)], weights, density=0.11).any()


def test_a_result_does_not_depend_on_the_order_and_a_lone_adapter_is_itself(tmp_path):
    model = theirs({}, {"r": 2})
    deltas = read_deltas(saved(model, tmp_path))
    one, other = concatenate(deltas, WEIGHTS), concatenate(deltas[::-1], WEIGHTS[::-1])
    for name in one:
        torch.testing.assert_close(one.dense(name), other.dense(name), **CLOSE)
    check_sum(concatenate(deltas[:1], [1.0]), updates(model)[0] | {})
    for rank in (None, 6):
        summed = merge_adapters(deltas, make_merger("task-arithmetic", {"weights": WEIGHTS}), rank)
        check_sum(summed, weighted_sum(model))
        assert len(summed["first"][0]) == 5  # 3 + 2
    weigh = Rule(lambda tau: (torch.tensor(WEIGHTS)[:, None, None] * tau).sum(0))
    check_sum(merge_adapters(deltas, weigh), weighted_sum(model))


def test_half_precision_is_summed_in_float32():
    one = {"a": (torch.full((1, 2), 1.0, dtype=torch.bfloat16), torch.full((2, 1), 1.0, dtype=torch.bfloat16), 1.0)}
    small = {"a": (one["a"][0], one["a"][1] * 2**-10, 1.0)}
    merged = concatenate([LowRankDeltas(one), LowRankDeltas(small)], [1.0, 1.0])
    assert merged.dense("a").dtype == torch.float32 and (merged.dense("a") == 1 + 2**-10).all()
    assert merged.added_to({"a.weight": torch.zeros(2, 2, dtype=torch.bfloat16)})["a.weight"].dtype == torch.bfloat16
