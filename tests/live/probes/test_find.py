"""What the probes look at in a model: blocks, parameter groups, matrices; in one of ours and in those of others."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.adapters.intrinsic_dimension import SubspaceModel
from workbench.lib.core.adapt import Adapter, RoutedLinear, adapt
from workbench.lib.core.experts import GLU
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Routing
from workbench.lib.modality.mixture_of_mamba import MixtureOfMambaBlock
from workbench.lib.subspaces.scalezero import add_stages
from workbench.live.probes import find
from workbench.live.probes.routing import RoutingProbe
from workbench.live.probes.spectra import SpectrumProbe
from workbench.live.records import SPECTRUM

E, K, D = 4, 2, 16


class OldBlock(nn.Module):
    """The shape of a block in transformers 4: the gate is a plain linear layer."""

    def __init__(self):
        super().__init__()
        self.top_k, self.num_experts = K, E
        self.gate, self.experts = nn.Linear(D, E, bias=False), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        self.gate(x.reshape(-1, D))
        return x + self.experts[0](x)


def test_the_parts_of_the_small_model_are_found(model):
    module = model()
    blocks = find.blocks(module)
    assert [(block.name, block.router, block.n_experts, block.top_k) for block in blocks] == [
        (f"blocks.{i}.ffn", "router", E, K) for i in range(3)
    ]
    groups = find.groups(module, blocks)
    assert list(groups)[:5] == [
        "trunk",
        "blocks.0.attention",
        "blocks.0.ffn.router",
        "blocks.0.ffn.experts",
        "blocks.0.ffn.shared",
    ]
    members = [id(p) for group in groups.values() for p in group]
    assert sorted(members) == sorted(id(p) for p in module.parameters())
    assert {id(p) for p in groups["blocks.1.ffn.experts"]} == {id(p) for p in module.blocks[1].ffn.experts.parameters()}
    attention = [*module.blocks[2].attention.parameters(), *module.blocks[2].attention_norm.parameters()]
    attention += module.blocks[2].ffn_norm.parameters()
    assert {id(p) for p in groups["blocks.2.attention"]} == {id(p) for p in attention}


def test_frozen_parameters_belong_to_no_group_and_no_sample(model):
    module = model()
    module.blocks[0].requires_grad_(False)
    names = [*find.groups(module, find.blocks(module)), *(m.name for m in find.matrices(module, find.blocks(module)))]
    assert names and not any(name.startswith("blocks.0.") for name in names)


def test_what_a_layer_with_stages_freezes_at_first_is_in_its_group():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_stages(module, "1", rank=2, alpha=1.0, n_adapters=2)
    module[0].requires_grad_(False)
    groups = find.groups(module, [])
    assert set(groups) == {"1"} and len(groups["1"]) == len(list(module[1].parameters()))


def test_a_model_without_experts_has_a_group_for_each_layer():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find.blocks(module) == []
    assert {name: len(group) for name, group in find.groups(module, []).items()} == {"0": 2, "2": 2}
    assert {m.name: m.shape for m in find.matrices(module, [])} == {"0": (4, 4), "2": (2, 4)}


def test_of_a_convolution_all_that_a_pixel_sees_is_one_side():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2))
    found = {m.name: m for m in find.matrices(module, [])}
    assert {name: m.shape for name, m in found.items()} == {"0": (8, 27), "2": (8, 16)}
    assert found["0"].pick(module[0].weight).data_ptr() == module[0].weight.data_ptr()


def test_matrices_are_sampled_from_the_first_middle_and_last_layer_and_taken_apart(model):
    module = model(n_layers=5)
    matrices = {matrix.name: matrix for matrix in find.matrices(module, find.blocks(module))}
    kinds = ["attention.q", "attention.k", "attention.v", "attention.out", "ffn.router.projection"]
    kinds += [f"ffn.{part}.{name}" for part in ("experts.0", "shared.glu") for name in ("gate", "up", "down")]
    assert set(matrices) == {"embedding"} | {f"blocks.{i}.{kind}" for i in (0, 2, 4) for kind in kinds}
    attention, experts = module.blocks[2].attention, module.blocks[2].ffn.experts
    x = torch.randn(3, D)
    q, k, v = attention.qkv(x).chunk(3, -1)
    for name, output in (("q", q), ("k", k), ("v", v)):
        matrix = matrices[f"blocks.2.attention.{name}"]
        assert torch.allclose(x @ matrix.pick(matrix.parameter).T, output, atol=1e-6)
    gate, up, down = (matrices[f"blocks.2.ffn.experts.0.{name}"] for name in ("gate", "up", "down"))
    weights = torch.zeros(3, E)
    weights[:, 0] = 1
    hidden = F.silu(x @ gate.pick(gate.parameter).T) * (x @ up.pick(up.parameter).T)
    only_first = experts(x, Routing.ragged(weights > 0, weights))
    assert torch.allclose(hidden @ down.pick(down.parameter).T, only_first, atol=1e-6)


@pytest.mark.parametrize("kind", [None, OldBlock], ids=["new", "old"])
def test_routers_of_other_libraries_are_recognised_by_their_shape(foreign, kind: type | None):
    torch.manual_seed(0)
    kind = kind or foreign
    module = nn.ModuleDict({"layers": nn.ModuleList([kind(), kind()])})
    blocks = find.blocks(module)
    assert [(b.name, b.router, b.n_experts, b.top_k) for b in blocks] == [
        ("layers.0", "gate", E, K),
        ("layers.1", "gate", E, K),
    ]
    assert set(find.groups(module, blocks)) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("router", "experts")}
    experts = [m.name for m in find.matrices(module, blocks) if "experts." in m.name]
    assert all(".experts.0" in name for name in experts)

    seen = []
    remove = blocks[0].observe(lambda block, routing, context: seen.append(routing), lambda block: True)
    x = torch.randn(2, 5, D)
    module["layers"][0](x)
    remove()
    module["layers"][0](x)
    (routing,) = seen
    logits = x.reshape(-1, D) @ module["layers"][0].gate.weight.T
    expected = logits.softmax(-1).topk(K, -1)
    assert torch.equal(routing.indices, expected.indices) and routing.n_tokens == 10
    assert torch.allclose(routing.probs, logits.softmax(-1), atol=1e-6)
    assert torch.allclose(routing.weights, expected.values, atol=1e-6)


@pytest.mark.parametrize("name", ["top_k", "k", "topk", "num_experts_per_tok"])
def test_a_block_may_call_its_k_as_it_likes(name: str):
    block = OldBlock()
    del block.top_k
    assert find.blocks(block) == [] and find.unread(block, []) == [""]
    setattr(block, name, K)
    assert [(b.router, b.n_experts, b.top_k) for b in find.blocks(block)] == [("gate", E, K)]


class OwnWay(OldBlock):
    """A gate whose choice is its block's own affair, on every second expert."""

    def forward(self, x):
        chosen = self.gate(x)[:, ::2].argmax(1) * 2
        return sum(self.experts[e](x[chosen == e]).sum() for e in chosen.unique().tolist())


def test_a_decision_that_was_guessed_wrong_is_not_recorded_and_one_that_is_told_is():
    torch.manual_seed(0)
    module, x = nn.ModuleDict({"moe": OwnWay()}), torch.randn(20, D)
    module["moe"].top_k = 1
    expected = torch.bincount(module["moe"].gate(x)[:, ::2].argmax(1) * 2, minlength=E)
    probe = RoutingProbe(module, find.blocks(module), {}, None)
    probe.arm(True)
    module["moe"](x)
    assert probe.take(structure=False) == ({}, {})
    assert "its experts were called with" in probe.doubts["moe"]

    def chosen(gate: nn.Module, inputs: tuple, output: torch.Tensor) -> Routing:
        best = output[:, ::2].max(1, keepdim=True)
        return Routing.fixed(best.indices * 2, best.values, E)

    probe = RoutingProbe(module, find.blocks(module, {"*.gate": (E, chosen)}), {}, None)
    probe.arm(True)
    module["moe"](x)
    assert probe.take(structure=False)[1]["load/moe"].tolist() == expected.tolist()


def test_a_reader_has_to_give_the_routing_of_these_experts():
    block = OldBlock()
    (found,) = find.blocks(block, {"gate": (E, lambda module, inputs, output: output)})
    found.observe(lambda *seen: None, lambda block: True)
    with pytest.raises(InputError, match="what reads gate gave a Tensor but must give a Routing of 4 experts"):
        block(torch.randn(3, D))


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ({"*.gat": (E, print)}, r"module in routers '\*.gat' is unknown"),
        ({"moe.gate": print}, "must be a pair: the number of experts, and a function"),
        ({"moe.gate": (0, print)}, "must be a pair"),
    ],
)
def test_wrong_readers_are_refused(routers: dict, message: str):
    with pytest.raises(InputError, match=message):
        find.blocks(nn.ModuleDict({"moe": OldBlock()}), routers)


def test_of_a_state_space_the_projections_are_matrices_and_the_rates_are_not():
    model = nn.Sequential(MixtureOfMambaBlock(8, n_modalities=2, d_state=4, split=("in", "dt")))
    names = [matrix.name for matrix in find.matrices(model, find.blocks(model))]
    assert names == ["0.in_proj.parts.0", "0.in_proj.parts.1", "0.x_proj", "0.out_proj"]  # the step's has rank 1


def test_a_layer_with_lora_is_no_mixture_and_does_not_look_like_one():
    model = adapt(nn.Sequential(nn.Linear(D, D), nn.ReLU()), "lora", "*", rank=2).model
    assert find.blocks(model) == [] and find.unread(model, []) == []


def test_an_adapted_model_shows_its_mixtures_their_groups_and_every_expert():
    torch.manual_seed(0)
    model = DecoderLM(32, 16, 4, 2, lambda layer: GLU(16, 8), 9)

    class Mixture(Adapter):
        slug = "mixture"

        def linear(self, layer: nn.Linear, name: str) -> RoutedLinear:
            router, experts = LinearRouter(16, E, K), LowRankExperts(E, 16, 16, 2)
            return RoutedLinear(layer, router, experts)

    layers = {name: Mixture().linear(block.attention.out, name) for name, block in model.blocks.named_children()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.blocks[int(name)].attention.out = layer
        layer.base.requires_grad_(False)
    blocks = find.blocks(model)
    assert [(block.name, block.router, block.n_experts) for block in blocks] == [
        (f"blocks.{i}.attention.out", "router", E) for i in range(4)
    ]
    groups = find.groups(model, blocks)
    parts = ("router", *(f"experts.{e}" for e in range(E)))  # gradient conflict is seen within each expert
    assert list(groups) == [f"blocks.{i}.attention.out.{part}" for i in range(4) for part in parts]
    assert {find.size(members) for name, members in groups.items() if "experts" in name} == {2 * 16 + 16 * 2}
    assert sum(map(find.size, groups.values())) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = [matrix.name for matrix in find.matrices(model, blocks)]
    assert sorted(names) == sorted(  # every expert of the first, the middle and the last layer
        f"blocks.{i}.attention.out.{part}"
        for i in (0, 2, 3)
        for part in ("router.projection", *(f"experts.{e}" for e in range(E)))
    )


def test_a_block_that_decides_by_itself_is_a_block_and_a_group():
    class Chooser(Announcing):
        n_experts, top_k = 3, None

        def __init__(self):
            super().__init__()
            self.out = nn.Linear(D, D)

    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"attention": Chooser(), "ffn": nn.Linear(D, D)}) for _ in range(2))}
    )
    blocks = find.blocks(model)
    assert [(block.name, block.router, block.top_k) for block in blocks] == [
        (f"layers.{i}.attention", "", None) for i in (0, 1)
    ]
    assert list(find.groups(model, blocks)) == ["layers.0.attention", "layers.0", "layers.1.attention", "layers.1"]


def test_of_a_vector_that_trains_the_matrices_it_makes_are_found():
    torch.manual_seed(0)
    model = SubspaceModel(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), dims=7)
    found = find.matrices(model, find.blocks(model))
    assert [(matrix.name, matrix.shape) for matrix in found] == [("0", (5, 6)), ("2", (3, 5))]
    probe = SpectrumProbe(found)
    probe.remember()
    model(torch.randn(4, 6)).square().sum().backward()
    with torch.no_grad():
        model.vtheta -= model.vtheta.grad
    spectra = probe.take(seed=0)
    probe.close()
    change = model.change(model.vtheta.detach())["0.weight"]
    expected = torch.linalg.svdvals(change)
    for what in ("weight", "update", "gradient"):  # it began at 0, and went by its gradient
        assert torch.allclose(torch.from_numpy(spectra[SPECTRUM.name(what, "0")]), expected, rtol=1e-4, atol=1e-6), what
    model.requires_grad_(False)
    assert find.matrices(model, []) == []
