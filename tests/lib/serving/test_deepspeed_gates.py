"""The gate with places beside DeepSpeed's own: who is chosen, who is kept, counts, gates and the auxiliary loss.

DeepSpeed runs in a Python of its own, and the tests are skipped where none is named:

    python -m venv peers && peers/bin/pip install deepspeed==0.19.8 torch
    WORKBENCH_PEERS=peers/bin/python python -m pytest tests/lib/serving/test_deepspeed_gates.py
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.lib.core.balance import switch_lbl
from workbench.lib.core.capacity import POLICIES, capacity_of, first, keep, slots
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Routing

N, E = 60, 6
#: K, capacity factor, least capacity, whether tokens are dropped, and by which of our policies.
CASES = (
    (1, 1.0, 4, True, "random"),
    (1, 0.5, 4, True, "random"),
    (1, 0.25, 7, True, "random"),  # the least capacity decides
    (1, 1.0, 4, False, "random"),
    (2, 1.0, 4, True, "probability"),
    (2, 0.6, 4, True, "position"),
    (3, 0.5, 4, True, "probability"),
    (2, 1.0, 4, False, "probability"),
)
SCRIPT = """
import sys, torch
from deepspeed.moe import sharded_moe as ds
given, found = torch.load("given.pt"), []
for (k, factor, least, drop, policy), logits, u in given:
    if k == 1:
        ds.exp_selection_uniform_map[logits.device] = lambda shape: u  # what it would draw
        aux, combine, mask, counts = ds.top1gating(logits, factor, least, drop_tokens=drop, use_rts=True)
    else:
        policy = {"probability": "probs", "position": "position"}[policy]
        aux, combine, mask, counts = ds.topkgating(logits, k, factor, least, drop_tokens=drop, drop_policy=policy)
    found.append((aux, combine, mask, counts))
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Each case with its logits, what is drawn, and DeepSpeed's loss, combine weights (N, E, C), mask and counts."""
    python = os.environ.get("WORKBENCH_PEERS")
    if (
        not python
        or subprocess.run([python, "-c", "import deepspeed"], capture_output=True, env=environment()).returncode
    ):
        pytest.skip("WORKBENCH_PEERS names no Python that has deepspeed")
    folder = tmp_path_factory.mktemp("gates")
    generator = torch.Generator().manual_seed(0)
    given = [
        (case, 2 * torch.randn(N, E, generator=generator), torch.rand(N, E, generator=generator)) for case in CASES
    ]
    torch.save(given, folder / "given.pt")
    done = subprocess.run([python, "-c", SCRIPT], cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return [(*one, found) for one, found in zip(given, torch.load(Path(folder) / "found.pt"), strict=True)]


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}


def test_masks_counts_gates_and_loss_are_those_of_deepspeed(beside: list):
    for (k, factor, least, drop, policy), logits, u, (aux, combine, mask, counts) in beside:
        routing = TopKRouter(E, k, renormalize=False).route(logits)
        places = capacity_of(N * k, E, factor, least) if drop else int(routing.counts.max())
        case = f"K={k}, factor {factor}, least {least}, drop {drop}, {policy}"
        assert mask.shape == (N, E, places), case
        assert torch.equal(routing.counts, counts), case
        torch.testing.assert_close(switch_lbl(routing.probs, routing.counts), aux, msg=case)
        routing.kept = kept(routing, places, policy, u)
        assert torch.equal(table(routing, places).bool(), mask), case
        assert drop == (not routing.kept.all()), case
        ours = table(routing, places)
        if k > 1:  # the weights of what is kept are made to sum to one
            ours = ours / ours.sum((1, 2), keepdim=True).clamp(min=torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, combine, msg=case)


def kept(routing: Routing, places: int, policy: str, u: Tensor) -> Tensor:
    """As `keep`, with the given draws in the place of its own."""
    assert policy in POLICIES
    if policy == "random":
        return first(routing.expert, E, places, u[routing.token, routing.expert])
    return keep(routing, places, policy)


def table(routing: Routing, places: int) -> Tensor:
    """(N, E, C) the weight of each token in each place."""
    found = torch.zeros(N, E * places + 1)
    found[routing.token, slots(routing, places)] = routing.weight
    return found[:, :-1].view(N, E, places)
