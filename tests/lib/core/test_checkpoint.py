"""Checkpoints: exact, atomic, checked, and without pickles."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fuzz import sidecars
from tests.fuzz.harness import try_all
from workbench.errors import InputError
from workbench.lib.core.checkpoint import load, save, weights_digest
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter


class Model(nn.Module):
    """One of everything: a shared parameter, a router with a bias, buffers of both kinds."""

    def __init__(self, seed: int = 0, width: int = 8):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight
        router = LinearRouter(width, 4, 2, coefficients={"lbl": 0.01}, bias_rate=0.1)
        self.layer = MoELayer(router, GLUExperts(4, width, 8))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("low", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(x)))


def adam(model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}], lr=0.1 / 3, betas=(0.9, 0.95))


def step(model: Model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randint(5, (32,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    model.layer.router.bias.after_step()


def trained(steps: int) -> tuple[Model, torch.optim.AdamW]:
    model = Model()
    optimizer = adam(model)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path):
    model, optimizer = trained(3)
    model.layer.router.set_top_k(1)
    model.layer.router.coefficients["lbl"] = 0.3
    extra = {"seen": torch.arange(6).view(2, 3)}
    path = save(tmp_path, 3, model, optimizer, lr_scale=1 / 3, controls={"balance": 0.3, "top_k": None}, extra=extra)
    assert path.name == "step-00000003"

    copy = Model(seed=1)
    other = adam(copy)
    found = load(tmp_path, copy, other)
    assert (found.path, found.step, found.lr_scale) == (path, 3, 1 / 3)
    assert found.controls == {"balance": 0.3, "top_k": None} and torch.equal(found.extra["seen"], extra["seen"])
    assert found.torch_version == torch.__version__ and found.skipped == ()
    assert weights_digest(copy) == weights_digest(model)
    assert copy.head.weight is copy.embedding.weight
    assert (copy.layer.router.top_k, copy.layer.router.coefficients) == (1, {"lbl": 0.3})
    assert copy.layer.router.bias.bias.any()
    assert other.param_groups[0]["lr"] == 0.1 / 3 and other.param_groups[0]["betas"] == (0.9, 0.95)
    for seed in (3, 4):
        step(model, optimizer, seed)
        step(copy, other, seed)
    assert weights_digest(copy) == weights_digest(model)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_any_torch_optimizer_is_kept(tmp_path: Path, kind: type):
    models = Model(), Model(seed=1)
    optimizers = [
        kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {})) for model in models
    ]
    step(models[0], optimizers[0], 0)
    save(tmp_path, 1, models[0], optimizers[0])
    load(tmp_path, models[1], optimizers[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 1)
    assert weights_digest(models[0]) == weights_digest(models[1])


def test_nothing_is_pickled(tmp_path: Path):
    model, optimizer = trained(1)
    path = save(tmp_path, 1, model, optimizer)
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.json",
        "extra.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    json.loads((path / "checkpoint.json").read_text())


def test_the_newest_two_are_kept(tmp_path: Path):
    model, optimizer = trained(1)
    for made in (8, 9, 10, 11):
        save(tmp_path, made, model, optimizer)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000011"]
    save(tmp_path, 10, model, optimizer)  # went back and came here again: what was ahead is no longer true
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: damage(path / "model.safetensors"),
        lambda path: damage(path / "optimizer.safetensors"),
        lambda path: damage(path / "extra.safetensors"),
        lambda path: damage(path / "checkpoint.json"),
        lambda path: (path / "optimizer.safetensors").unlink(),
        lambda path: (path / "checkpoint.json").unlink(),
        lambda path: (path / "checkpoint.json").write_text("[]"),
        lambda path: os.truncate(path / "model.safetensors", 100),
        lambda path: (path / "checkpoint.json").write_text(
            (path / "checkpoint.json").read_text().replace("0.25", "0.75")
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm):
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer)
    before = weights_digest(model)
    step(model, optimizer, 1)
    newest = save(tmp_path, 2, model, optimizer, lr_scale=0.25)
    harm(newest)
    found = load(tmp_path, model, optimizer)
    assert found.step == 1 and weights_digest(model) == before
    assert len(found.skipped) == 1 and found.skipped[0].startswith("step-00000002: ")


def test_a_sidecar_that_is_not_what_was_written_is_refused_in_words(tmp_path: Path):
    tally = try_all(itertools.islice(sidecars.cases(tmp_path, seed=1), 60))
    assert not tally.faults and min(tally.read["sidecars"], tally.refused["sidecars"]) > 5


def test_without_one_good_checkpoint_the_reasons_are_given(tmp_path: Path):
    model, optimizer = trained(1)
    assert load(tmp_path, model, optimizer) is None
    assert load(tmp_path / "nowhere", model, optimizer) is None
    damage(save(tmp_path, 1, model, optimizer) / "model.safetensors")
    with pytest.raises(
        InputError, match=r"no checkpoint in .* can be used: step-00000001: model.safetensors is damaged"
    ):
        load(tmp_path, model, optimizer)


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()

    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f".step-00000002.{killed.pid}.0123abcd.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert load(tmp_path, model, optimizer).step == 1
    save(tmp_path, 3, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path):
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer)
    wide = Model(width=16)
    with pytest.raises(InputError, match="does not fit this model"):
        load(tmp_path, wide, adam(wide))
    with pytest.raises(InputError, match="groups hold other parameters"):
        load(tmp_path, model, torch.optim.AdamW(model.layer.parameters()))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path):
    model, optimizer = trained(1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(InputError, match="holds a parameter that the model has not"):
        save(tmp_path, 1, model, optimizer)


def test_the_digest_sees_name_type_shape_and_every_bit():
    def digest(**tensors: torch.Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    zeros = torch.zeros(4)
    digests = [
        digest(a=zeros),
        digest(b=zeros),
        digest(a=zeros.view(2, 2)),
        digest(a=zeros.int()),
        digest(a=-zeros),
        digest(a=zeros, b=zeros),
        digest(a=torch.nextafter(zeros, zeros + 1)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(a=torch.arange(6.0).view(2, 3).T) == digest(a=torch.arange(6.0).view(2, 3).T.contiguous())
    assert digest(a=zeros, b=zeros + 1) == digest(b=zeros + 1, a=zeros)
