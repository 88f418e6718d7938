"""What the probes look at in a model: blocks, parameter groups, matrices; in one of ours and in those of others."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.lib.core.routing import Routing
from workbench.live.probes import find

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


def test_a_model_without_experts_has_a_group_for_each_layer():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find.blocks(module) == []
    assert {name: len(group) for name, group in find.groups(module, []).items()} == {"0": 2, "2": 2}
    assert {m.name: m.shape for m in find.matrices(module, [])} == {"0": (4, 4), "2": (2, 4)}


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
