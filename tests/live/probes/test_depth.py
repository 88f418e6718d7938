"""Depths are those of the tokens of a training batch and of an evaluation, for any model that announces recursions."""

import numpy as np
import pytest
import torch
from torch import nn

from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block, DecoderLM
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.sharing.mixture_of_recursions import ExpertChoiceMoR, RecursiveBlock
from workbench.live.probes import find
from workbench.live.probes.routing import TEXT, RoutingProbe
from workbench.live.store import Run
from workbench.live.watch import watch


class Counted(Announcing):
    """Somebody's own recursions: a token goes through as many as its id says, up to three."""

    n_experts, top_k, recursive = 3, None, True

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        mask = torch.arange(3) < context.token_ids[:, None] % 4
        self.announce(Routing.ragged(mask, mask.float()), context)
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep, self.weight = Counted(), nn.Parameter(torch.ones(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.deep(self.weight.expand(ids.numel(), 1), Context(token_ids=ids.flatten()))


def test_depths_are_counted_in_training_and_in_evaluation_apart():
    model = Model()
    probe = RoutingProbe(model, find.blocks(model), {}, 256)
    probe.arm(True)
    first, second = torch.arange(40).view(2, 20), torch.zeros(3, 5).long()
    model(first), model(second)  # gradient accumulation
    model.eval()
    model(second + 2)
    _, tensors = probe.take(structure=True)
    assert tensors["depth/deep"].tolist() == [10 + 15, 10, 10, 10] and tensors["depth/deep"].dtype == np.uint32
    text = tensors["depth_text/deep"]
    assert text.shape == (2, TEXT) and text.dtype == np.int32
    assert text[:, :40].tolist() == [list(range(40)), [i % 4 for i in range(40)]] and (text[:, 40:] == -1).all()
    assert "depth_text/deep" not in probe.take(structure=False)[1]
    valid = probe.take_evaluation()
    assert valid["valid/depth/deep"].tolist() == [0, 0, 15, 0]
    assert valid["valid/depth_text/deep"][:, :15].tolist() == [[2] * 15, [2] * 15]
    assert probe.take_evaluation() == {}


def test_a_long_batch_shows_its_beginning():
    model = Model()
    probe = RoutingProbe(model, find.blocks(model), {}, 256)
    probe.arm(True)
    model(torch.arange(2 * TEXT))
    assert probe.take(structure=True)[1]["depth_text/deep"][0].tolist() == list(range(TEXT))


@pytest.mark.parametrize("recursive", [True, False])
def test_a_run_says_which_layers_have_recursions(tmp_path, recursive):
    model = Model()
    model.deep.recursive = recursive
    with watch(model, tmp_path / "run", cadence={"routing": 1, "structure": 1}) as watched:
        assert ("3 recursions" in watched.found) == recursive
        model(torch.arange(9))
        watched.step(1.0)
    with Run(tmp_path / "run") as run:
        (layer,) = run.meta["model"]["layers"]
        assert layer.get("recursive", False) == recursive
        assert ("depth/deep" in run.names()) == recursive


def test_a_mixture_of_recursions_tells_its_own_depths(tmp_path):
    torch.manual_seed(0)
    model = DecoderLM(256, 16, 0, 2, GLU, 12, learned_positions=False)
    block = RecursiveBlock([Block(16, GLU(16, 16), Attention(16, 2, causal=True, rope=True))])
    model.blocks = nn.ModuleList([ExpertChoiceMoR(block, 3)])
    with watch(model, tmp_path / "run", cadence={"routing": 1, "structure": 1}) as watched:
        model(torch.randint(256, (4, 12))).mean().backward()
        watched.step(1.0)
    with Run(tmp_path / "run") as run:
        assert run.tensor("depth/blocks.0")[1].tolist() == [0, 4 * 4, 4 * 4, 4 * 4]  # 12, 8 and 4 of each sequence
        assert run.tensor("load/blocks.0")[1].tolist() == [48, 32, 16]
