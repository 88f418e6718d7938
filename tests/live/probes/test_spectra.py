"""Spectra of weights, updates and gradients against numpy, and of adapters without forming their product."""

import numpy as np
import pytest
import torch
from torch import nn

from workbench.lib.core.low_rank import LowRankExperts
from workbench.live.probes import find
from workbench.live.probes.spectra import SpectrumProbe


def test_spectra_are_those_of_numpy(model, task):
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=0.1)
    spectra = SpectrumProbe(find.matrices(module, find.blocks(module)))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    loss, _ = task.loss(module, task.batch("train", 4, torch.Generator().manual_seed(0)))
    loss.backward()
    spectra.remember()
    optimizer.step()
    found = spectra.take(seed=0)

    def expected(matrix: torch.Tensor) -> np.ndarray:
        return np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)

    out = module.blocks[1].attention.out.weight
    gate_up, old = module.blocks[2].ffn.experts.gate_up, before["blocks.2.ffn.experts.gate_up"]
    for name, matrix in {
        "weight/blocks.1.attention.out": out,
        "update/blocks.1.attention.out": out - before["blocks.1.attention.out.weight"],
        "gradient/blocks.1.attention.out": out.grad,
        "weight/blocks.2.ffn.experts.0.up": gate_up[0, 8:],
        "update/blocks.2.ffn.experts.0.gate": (gate_up - old)[0, :8],
        "gradient/blocks.2.ffn.experts.0.gate": gate_up.grad[0, :8],
        "weight/embedding": module.embedding.weight,
    }.items():
        values = found[f"spectrum/{name}"]
        assert values.dtype == np.float32 and (np.diff(values) <= 0).all()
        np.testing.assert_allclose(values, expected(matrix), rtol=1e-4, atol=1e-6 * values[0])
    module.zero_grad()
    again = spectra.take(seed=0)
    assert {name.split("/")[1] for name in again} == {"weight"}


class Lora(nn.Module):
    """A LoRA layer in PEFT's layout: W x + scaling * B A x."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(12, 10).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(12, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 10, bias=False)})
        self.scaling = {"default": 2.0}

    def product(self) -> torch.Tensor:
        return 2.0 * self.lora_B["default"].weight.detach() @ self.lora_A["default"].weight.detach()


def test_the_product_of_an_adapter_is_watched_as_one_matrix():
    torch.manual_seed(0)
    module = nn.ModuleDict({"proj": Lora()})
    (matrix,) = find.matrices(module, [])
    assert (matrix.name, matrix.shape) == ("proj.lora", (10, 12))
    spectra = SpectrumProbe([matrix])
    old = module["proj"].product()
    spectra.remember()
    with torch.no_grad():
        for factor in module.parameters():
            if factor.requires_grad:
                factor.add_(torch.randn_like(factor))
    found = spectra.take(seed=0)
    new = module["proj"].product()
    for what, dense, rank in (("weight", new, 3), ("update", new - old, 6)):
        values = found[f"spectrum/{what}/proj.lora"]
        np.testing.assert_allclose(values, torch.linalg.svdvals(dense)[: len(values)], rtol=1e-4, atol=1e-4)
        assert len(values) == rank
    assert set(found) == {"spectrum/weight/proj.lora", "spectrum/update/proj.lora"}


@pytest.mark.parametrize("experts", [4, 20])
def test_lora_on_packed_experts_is_that_of_each_expert(experts: int):
    """`get_delta_weight` of peft 0.21.2 is the oracle: A lies in blocks, B interleaved."""
    peft = pytest.importorskip("peft")

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = experts
            self.gate_up_proj = nn.Parameter(torch.randn(experts, 8, 6))
            self.down_proj = nn.Parameter(torch.randn(experts, 6, 4))

        def forward(self, x):
            return x

    torch.manual_seed(0)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=names, init_lora_weights=False)
    model = peft.get_peft_model(nn.ModuleDict({"experts": Experts()}), config)
    matrices = find.matrices(model, [])
    shown = range(experts) if experts <= find.MOST_EXPERTS else (0, experts // 2, experts - 1)
    found = SpectrumProbe(matrices).take(seed=0)
    assert len(found) == 2 * len(shown)
    for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
        for expert in shown:
            name = f"base_model.model.experts.{wrapper.parameter_name}.lora.{expert}"
            delta = wrapper.get_delta_weight("default")[expert].detach()
            assert tuple(delta.shape) == next(m.shape for m in matrices if m.name == name)
            np.testing.assert_allclose(found[f"spectrum/weight/{name}"], torch.linalg.svdvals(delta)[:2], rtol=1e-4)


def test_every_expert_of_a_low_rank_bank_has_the_spectrum_of_its_update():
    torch.manual_seed(0)
    bank = LowRankExperts(3, 12, 10, 2, alpha=6)
    nn.init.normal_(bank.b)
    module = nn.ModuleDict({"experts": bank})
    spectra = SpectrumProbe(find.matrices(module, []))
    spectra.remember()
    before = [bank.delta(e).detach() for e in range(3)]
    with torch.no_grad():
        bank.a.mul_(1.5), bank.b.add_(0.25)
    found = spectra.take(seed=0)
    for e in range(3):
        for kind, matrix in (("weight", bank.delta(e)), ("update", bank.delta(e) - before[e])):
            values = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
            shown = found[f"spectrum/{kind}/experts.{e}"]
            np.testing.assert_allclose(shown, values[: len(shown)], rtol=1e-4, atol=1e-5)
