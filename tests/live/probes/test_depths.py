"""One layer that is applied at several depths is several layers to the probes, and their decisions are compared."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.pool import ExpertPool
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.measures.pools import chance_agreement, first_agreement
from workbench.live.probes import find
from workbench.live.probes.routing import RoutingProbe
from workbench.live.store import Run
from workbench.live.watch import watch

D, E, K, L = 8, 4, 2, 3


class Recurrent(nn.Module):
    """A block of layers applied again and again; `told` is whether all passes share one context."""

    def __init__(self, passes: int = L, inside: int = 1, told: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.passes, self.told = passes, told
        self.block = nn.ModuleList(MoELayer(LinearRouter(D, E, K), GLUExperts(E, D, 8)) for _ in range(inside))
        for i, layer in enumerate(self.block):
            nn.init.normal_(layer.router.projection.weight)
            layer.depths = tuple(range(i, passes * inside, inside))

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        context = Context()
        for _ in range(self.passes):
            for layer in self.block:
                one, y = context if self.told else Context(), F.layer_norm(x, (D,))
                x = x + (checkpoint(layer, y, one, use_reentrant=False) if recompute else layer(y, one))
        return x


def tokens(n: int = 30) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def probed(model: nn.Module) -> RoutingProbe:
    probe = RoutingProbe(model, find.blocks(model), {}, None)
    probe.arm(True)
    return probe


def decisions(model: nn.Module, x: torch.Tensor) -> list[Routing]:
    seen = []
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    handles = [layer.observe(lambda _, routing, context: seen.append(routing)) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_every_depth_is_a_block_in_the_order_of_depth():
    assert [block.name for block in find.blocks(Recurrent(inside=2))] == [
        *("block.0@0", "block.1@1", "block.0@2", "block.1@3", "block.0@4", "block.1@5")
    ]
    assert {block.path for block in find.blocks(Recurrent(inside=2))} == {"block.0", "block.1"}


def test_each_depth_has_its_own_counts():
    model, x = Recurrent(inside=2), tokens()
    seen, probe = decisions(model, x), probed(model)
    model(x)
    model(x)
    scalars, tensors = probe.take(structure=True)
    names = [block.name for block in find.blocks(model)]
    for i, (name, routing) in enumerate(zip(names, seen, strict=True)):
        np.testing.assert_array_equal(tensors[f"load/{name}"], 2 * routing.counts.numpy())
        assert f"router/{name}/confidence" in scalars
        if i + 1 < len(names):
            pairs = routing.mask().long().T @ seen[i + 1].mask().long()
            np.testing.assert_array_equal(tensors[f"transition/{name}"], 2 * pairs.numpy())
    assert not np.array_equal(tensors[f"load/{names[0]}"], tensors[f"load/{names[2]}"])


def test_agreement_is_that_of_the_first_experts_and_of_chance():
    model, x = Recurrent(), tokens()
    seen, probe = decisions(model, x), probed(model)
    model(x)
    model(x)
    _, tensors = probe.take(structure=True)
    same, chance, n = tensors["agreement/block.0.experts"].astype(float)
    first = torch.stack([routing.first for routing in seen])
    assert (n == 2 * len(x)).all()
    np.testing.assert_array_equal(same / n, first_agreement(first).numpy())
    np.testing.assert_allclose(chance / n, chance_agreement(first, E).numpy(), atol=0.5 / n[0, 0])
    assert not any(name.startswith("agreement") for name in probe.take(structure=False)[1])


def test_layers_of_one_pool_are_compared_and_others_are_not():
    torch.manual_seed(0)
    pool = ExpertPool(GLUExperts(E, D, 8))
    model = nn.ModuleDict(
        {
            "a": MoELayer(LinearRouter(D, E, K), pool),
            "own": MoELayer(LinearRouter(D, E, K), GLUExperts(E, D, 8)),
            "b": MoELayer(LinearRouter(D, E, K), pool),
        }
    )
    assert {name: [b.name for b in users] for name, users in find.pools(find.blocks(model)).items()} == {
        "a.experts": ["a", "b"]
    }
    probe, x = probed(model), tokens()
    first = [model["a"].router(x).first, model["b"].router(x).first]
    model["a"](x)
    model["own"](x)
    model["b"](x)
    model["a"](x[:3])  # the next pass; its second layer is not given the same tokens
    model["b"](x[:5])
    same, _, n = probe.take(structure=True)[1]["agreement/a.experts"]
    assert n.tolist() == [[33, 30], [30, 35]]
    assert same[0, 1] == int((first[0] == first[1]).sum()) and same[0, 0] == 33


def test_what_a_checkpoint_repeats_counts_once():
    plain, repeated = Recurrent(), Recurrent()
    counts = []
    for model, recompute in ((plain, False), (repeated, True)):
        probe = probed(model)
        model(tokens(), recompute).sum().backward()
        counts.append(probe.take(structure=True)[1])
    assert counts[0].keys() == counts[1].keys()
    for name, value in counts[0].items():
        np.testing.assert_array_equal(value, counts[1][name])


def test_passes_that_share_no_context_are_said_to_be_unseen():
    probe = probed(model := Recurrent(told=False))
    model(tokens())
    assert [block.name for block in probe.unseen()] == ["block.0@1", "block.0@2"]


def test_a_pass_that_has_no_depth_is_doubted():
    model = Recurrent()
    probe = probed(model)
    model.passes = L + 1
    model(tokens())
    assert probe.doubts == {
        f"block.0@{i}": "its decision cannot be read from its pass number 4 in one forward: it has the depths (0, 1, 2)"
        for i in range(L)
    }


def test_a_layer_that_says_nothing_is_one_layer():
    model = Recurrent()
    model.block[0].depths = ()
    probe = probed(model)
    model(tokens())
    tensors = probe.take(structure=True)[1]
    assert tensors["load/block.0"].sum() == L * K * 30 and not any(name.startswith("agreement") for name in tensors)


def test_parameters_of_a_layer_with_depths_are_in_its_groups_once():
    model = Recurrent(inside=2)
    sizes = {name: find.size(group) for name, group in find.groups(model, find.blocks(model)).items()}
    assert set(sizes) == {f"block.{i}.{part}" for i in range(2) for part in ("router", "experts")}
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("error")
def test_a_watched_run_has_every_depth(tmp_path):
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, tmp_path / "run", cadence={"structure": 1, "routing": 1}) as watched:
        for _ in range(2):
            loss = model(tokens()).square().mean()
            loss.backward()
            optimizer.step()
            watched.step(loss=loss.item())
            optimizer.zero_grad()
    with Run(tmp_path / "run") as run:
        names = [layer["name"] for layer in run.meta["model"]["layers"]]
        assert names == ["block.0@0", "block.0@1", "block.0@2"]
        assert run.meta["model"]["pools"] == {"block.0.experts": names}
        assert all(f"load/{name}" in run.names() for name in names)
        assert run.tensor("agreement/block.0.experts")[1].shape == (3, L, L)
