"""Adaptations on disk: there and back, damaged, half-written, and on the wrong model."""

import copy
import json

import pytest
import torch
from torch import nn

from tests.fuzz.adapters import fingerprint
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.files import SIDECAR, TENSORS


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))


@pytest.fixture
def saved(tmp_path):
    model = net()
    adapted = adapt(model, rank=2, alpha=3)
    for p in adapted.parameters():
        nn.init.normal_(p)
    return model, adapted.save(tmp_path / "adapter")


def test_what_is_saved_is_loaded_bit_for_bit(saved):
    model, folder = saved
    again = net()
    adapted = load_adapter(again, folder)
    x = torch.randn(5, 6)
    assert torch.equal(again(x), model(x)) and adapted.options == {"rank": 2, "alpha": 3, "dropout": 0.0}
    adapted.save(folder)  # in place of what is there
    assert torch.equal(load_adapter(net(), folder).model(x), model(x))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_nothing_else_is_overwritten(saved, tmp_path):
    _model, _ = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    adapted = adapt(copy.deepcopy(net()))
    with pytest.raises(InputError, match="must be new, or hold an adaptation"):
        adapted.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter").read_text() == "one"


def test_all_that_does_not_fit_is_said_at_once_and_the_model_is_as_it_was(saved):
    _, folder = saved
    other = net(width=9)
    with pytest.raises(InputError) as error:
        load_adapter(other, folder)
    said = str(error.value)
    assert "0.experts.b is (1, 8, 2) but must be (1, 9, 2)" in said
    assert "2.experts.a is (1, 2, 8) but must be (1, 2, 9)" in said
    assert "the layers it was made on have other weights" in said
    assert type(other[0]) is nn.Linear and all(p.requires_grad for p in other.parameters())
    same = net()
    with torch.no_grad():
        same[0].weight[0, 0] += 1
    with pytest.raises(
        InputError, match=r"adapter does not fit this model: the layers it was made on have other weights"
    ):
        load_adapter(same, folder)


@pytest.mark.parametrize("damage", ["cut", "changed", "no sidecar", "half a sidecar", "newer"])
def test_damage_is_told(saved, damage):
    _, folder = saved
    content = (folder / TENSORS).read_bytes()
    if damage == "cut":
        (folder / TENSORS).write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        (folder / TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no sidecar":
        (folder / SIDECAR).unlink()
    elif damage == "half a sidecar":
        (folder / SIDECAR).write_text((folder / SIDECAR).read_text()[:40])
    else:
        (folder / SIDECAR).write_text(json.dumps(json.loads((folder / SIDECAR).read_text()) | {"format": 99}))
    model = net()
    with pytest.raises(InputError, match=r"damaged|must hold an adaptation|has format 99 but"):
        load_adapter(model, folder)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_sha256": None}, "base_sha256 of adapter.json is None but must be a SHA-256"),
        ({"targets": "*"}, r"targets of adapter.json is '\*' but must be a list of patterns"),
        ({"options": {"model": 1}}, "option of lora 'model' is unknown"),
        ({"options": {"rank": 2, "alpha": "x"}}, "option alpha of lora is 'x' but must be a finite number or None"),
        ({"options": {"rank": 10**7}}, "options of adapter.json is .* no number in it above a million"),
        ({"slug": "mhr", "options": {"experts": 10**6}}, "options ask for more than"),
        ({"slug": ["lora"]}, r"slug of adapter.json is \['lora'\] but must be the name of a system"),
        ({"format": True}, "format of adapter.json is True but must be a whole number from 1 to 1"),
        (None, "holds None but must hold an object"),
    ],
)
def test_a_sidecar_is_not_trusted_and_an_error_leaves_the_model_as_it_was(saved, change, said):
    _, folder = saved
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(change and sidecar | change))
    model = net()
    before = fingerprint(model)
    with pytest.raises(InputError, match=said):
        load_adapter(model, folder)
    assert fingerprint(model) == before
    torch.testing.assert_close(adapt(model).model(torch.ones(6)), net()(torch.ones(6)))  # it can be adapted
