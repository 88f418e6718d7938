"""VeRA, RandLoRA, HiRA and AdaLoRA in peft's folders: the same outputs on both sides, both ways."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.lib.adapters.test_lora_variants import X, put, small, trained
from workbench.errors import InputError
from workbench.lib.adapters.peft_variants import FORMATS, read_variant, write_variant
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.peft import CONFIG, TENSORS, read_peft

NAMES = ["0", "2", "3", "4"]
KINDS = {
    "vera": lambda **more: peft.VeraConfig(r=3, **more),
    "randlora": lambda **more: peft.RandLoraConfig(r=3, randlora_alpha=5, **more),
    "hira": lambda **more: peft.HiraConfig(r=3, **more),
    "adalora": lambda **more: peft.AdaLoraConfig(init_r=3, target_r=1, lora_alpha=5, total_step=6, **more),
}
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def turned() -> nn.Module:
    """Layers that hold (I, O), one of them square, and one that holds (O, I)."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(12, 12), nn.Linear(12, 6)).double()


def theirs(variant: str, build=small, **more) -> nn.Module:
    """A peft model whose trained numbers are not those it starts with."""
    more = {"target_modules": NAMES} | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft sets fan_in_fan_out itself, and says so
        torch.manual_seed(3)
        model = peft.get_peft_model(build(), KINDS[variant](**more)).double()
    for name, p in model.named_parameters():
        if p.requires_grad and "ranknum" not in name:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def loaded(folder, build=small) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return peft.PeftModel.from_pretrained(build(), str(folder)).double().eval()


@pytest.mark.parametrize("variant", FORMATS)
def test_what_is_written_peft_loads_to_the_same_function_and_we_read_again(variant, tmp_path):
    own = {"own": {"peft_order": 1}} if variant == "randlora" else {}
    adapted = trained(variant, steps=8, **own)  # of AdaLoRA some parts are dead by then
    for p in adapted.parameters() if variant != "adalora" else ():
        nn.init.normal_(p, std=0.5)
    y = adapted.model.eval()(X)
    assert variant != "adalora" or not all(layer.alive.all() for layer in adapted.layers.values())
    write_variant(adapted, tmp_path / "ours")
    torch.testing.assert_close(loaded(tmp_path / "ours")(X), y, **CLOSE)
    again = read_variant(small(), tmp_path / "ours")
    torch.testing.assert_close(again.model(X), y, atol=1e-10, rtol=1e-10)
    assert (small()(X) - y).abs().max() > 1e-3
    write_variant(again, tmp_path / "ours")
    torch.testing.assert_close(read_variant(small(), tmp_path / "ours").model(X), y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("build", [small, turned])
@pytest.mark.parametrize("variant", FORMATS)
def test_what_peft_writes_is_read_to_the_same_function_and_gradients_and_written_back(variant, build, tmp_path):
    names = [name for name, module in build().named_modules() if hasattr(module, "weight")]
    dropout = "lora_dropout" if variant == "adalora" else f"{variant}_dropout"
    model = theirs(variant, build, target_modules=names, **{dropout: 0.25})
    model.save_pretrained(tmp_path / "theirs")
    adapted = read_variant(build().eval(), tmp_path / "theirs")
    assert all(layer.dropout.p == 0.25 for layer in adapted.layers.values())
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = adapted.model(x)
    torch.testing.assert_close(y, model(other), **CLOSE)
    y.square().sum().backward(), model(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)
    assert (build()(X) - y).abs().max() > 1e-3
    write_variant(adapted, tmp_path / "ours")
    torch.testing.assert_close(loaded(tmp_path / "ours", build)(X), y, **CLOSE)


def test_ranks_that_adalora_took_away_in_peft_stay_away(tmp_path):
    model = theirs("adalora").train()
    for name, p in model.named_parameters():
        p.data.mul_(0.2 if "lora_" in name else 1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(6):
        model(X).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["rank_pattern"]
    adapted = read_variant(small(), tmp_path / "theirs")
    torch.testing.assert_close(adapted.model(X), loaded(tmp_path / "theirs")(X), **CLOSE)
    alive = {name: int(layer.alive.sum()) for name, layer in adapted.layers.items()}
    assert sum(alive.values()) < 12 and any(alive.values())
    write_variant(adapted, tmp_path / "ours")
    torch.testing.assert_close(loaded(tmp_path / "ours")(X), adapted.model(X), **CLOSE)


@pytest.mark.parametrize("variant", ["vera", "randlora"])
def test_layers_too_narrow_for_the_default_rank_share_what_fits_them(variant):
    adapted = adapt(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3)).double(), "lora-variants", variant=variant)
    assert [layer.rank for layer in adapted.layers.values()] == [8, 3]
    for p in adapted.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(adapted.model(x), adapted.model(x)) and adapted.model(x).isfinite().all()
    with pytest.raises(InputError, match=f"ranks 8 at 0, 3 at 1, but the folder of a {variant.upper()} has one"):
        write_variant(adapted, "nowhere")


def narrowing() -> nn.Module:
    """Three bases of rank 3 in each layer; peft makes A and B for the widest of both sides, which is wider than any."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 14), nn.Linear(14, 8), nn.Linear(8, 7)).double()


def test_randlora_in_our_own_order_is_written_where_all_layers_have_as_many_bases(tmp_path):
    adapted = adapt(narrowing(), "lora-variants", variant="randlora", rank=3, alpha=2.0)
    for p in adapted.parameters():
        nn.init.normal_(p, std=0.5)
    y = adapted.model(X)
    write_variant(adapted, tmp_path)
    torch.testing.assert_close(loaded(tmp_path, narrowing)(X), y, **CLOSE)
    again = read_variant(narrowing(), tmp_path)
    torch.testing.assert_close(again.model(X), y, atol=1e-10, rtol=1e-10)
    again.save(tmp_path / "kept")
    assert torch.equal(load_adapter(narrowing(), tmp_path / "kept").model(X), again.model(X))
    with pytest.raises(InputError, match=r"have 2, 3 bases, which peft pairs in another order .*: adapt with"):
        write_variant(put("randlora"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


REFUSED = [
    ("vera", {"save_projection": False}, "is more than a plain VERA: save_projection = False"),
    ("vera", {"bias": "all"}, "is more than a plain VERA: bias = 'all'"),
    ("vera", {"new": 1, "modules_to_save": ["x"]}, "modules_to_save = .*'x'.*, new = 1|new = 1, modules_to_save"),
    ("adalora", {"lora_alpha": None}, "lora_alpha is None but must be a number"),
    ("adalora", {"lora_alpha": 0}, "lora_alpha is 0 but must be above 0"),
    ("vera", {"peft_type": "FOURIERFT"}, "is a 'FOURIERFT' but what is read here is VERA, RANDLORA, HIRA, ADALORA"),
    ("randlora", {"save_projection": False}, "is more than a plain RANDLORA: save_projection = False"),
    ("randlora", {"r": 2}, r"0\.randlora_lambda is \(3, 3\) but must be \(2, 4\); 0.randlora_gamma"),
    ("hira", {"rank_pattern": {"0": 2}}, "is more than a plain HIRA: rank_pattern"),
    ("hira", {"hira_dropout": 1.0}, "hira_dropout is 1.0 but must be a number, at least 0 and below 1"),
    ("hira", {"r": True}, "r is True but must be a whole number"),
    ("adalora", {"use_dora": True}, "is more than a plain ADALORA: use_dora = True"),
    ("adalora", {"peft_type": "LORA"}, "is a 'LORA' but what is read here is VERA, RANDLORA, HIRA, ADALORA"),
    ("adalora", {"peft_type": None}, "is a None but what is read here"),
    ("hira", {"r": 2}, r"0\.hira_A is \(3, 8\) but must be \(2, 8\); 0\.hira_B"),
]


@pytest.mark.parametrize(("variant", "change", "said"), REFUSED)
def test_settings_that_are_not_as_they_must_be_say_so(variant, change, said, tmp_path):
    theirs(variant).save_pretrained(tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(small(), tmp_path, said)


def refused(model: nn.Module, folder, said: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=said):
        read_variant(model, folder)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    theirs("vera").save_pretrained(tmp_path / "vera")
    refused(nn.Sequential(nn.Linear(8, 8)), tmp_path / "vera", "it has no linear layer '2', '3', '4'")
    wider = small()
    wider[0], wider[2] = nn.Linear(8, 13).double(), nn.Linear(13, 8).double()
    said = r"0.vera_lambda_b is \(12,\) but must be \(13,\); vera_A is \(3, 12\) but must be at least \(3, 13\)"
    refused(wider, tmp_path / "vera", said)
    theirs("vera", save_projection=False).save_pretrained(tmp_path / "drawn")  # from a seed, by peft's own draws
    refused(small(), tmp_path / "drawn", "save_projection = False")
    theirs("randlora").save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own" / TENSORS)
    tensors["base_model.model.3.randlora_B"] += 1.0
    save_file(tensors, tmp_path / "own" / TENSORS)
    refused(small(), tmp_path / "own", "holds 'base_model.model.3.randlora_B' of .*, which is no part of a RANDLORA")
    content = (tmp_path / "vera" / TENSORS).read_bytes()
    (tmp_path / "vera" / TENSORS).write_bytes(content[:-9])
    refused(small(), tmp_path / "vera", "is damaged or half-written")
    with pytest.raises(InputError, match="peft_type = 'HIRA'"):
        theirs("hira").save_pretrained(tmp_path / "hira")
        read_peft(small(), tmp_path / "hira")
    for adapted, what in ((put("dora"), "'dora'"), (adapt(small(), "lora"), "'lora'")):
        with pytest.raises(InputError, match=f"adapted is with {what} but what is written here is vera, randlora"):
            write_variant(adapted, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(InputError, match="must be new, empty, or hold a LoRA"):
        write_variant(put("hira"), tmp_path / "full")
