"""Trains one model in two processes, its parameters in parts (FSDP2), beside a whole copy in each. Prints JSON.

    python sharded_steps.py FOLDER

For every optimiser: the steps after which a parameter differed in any bit from that of the copy, which was given the
same gradients gathered; whether a gradient that is not finite in one process's part stopped both; what the state holds.
"""

import copy
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from workbench.lib.core.optim import GaLoreAdamW, parameter_groups
from workbench.lib.low_rank.muon_pp import MuonPP
from workbench.lib.low_rank.svd_free_dct import DCTAdamW, Trion

STEPS = 3
MAKE = {
    "galore": partial(GaLoreAdamW, rank=1, update_gap=2),
    "galore, dct": partial(GaLoreAdamW, rank=1, projector="dct", update_gap=2, remap=True),
    "svd-free-dct": partial(DCTAdamW, rank=1, error_feedback=True, ef_bits=8),
    "svd-free-dct, trion": partial(Trion, rank=1),
    "muon-pp": partial(MuonPP, lr=0.1),
    "muon-pp, full": partial(MuonPP, precision="full", exact_norm=True, weight_decay=0.1),
}


class Model(nn.Module):
    """A matrix of one row, of odd sides, a tall one, a bank of matrices, a convolution, vectors and an embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.plane = nn.Embedding(9, 5), nn.Conv2d(2, 3, 2)
        self.odd, self.tall, self.one = nn.Linear(5, 7), nn.Linear(7, 32), nn.Linear(32, 1)
        self.bank = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, tokens, images):
        x = self.tall(torch.tanh(self.odd(self.table(tokens)))).tanh()
        mixed = torch.einsum("ni,eoi->neo", x[:, :8], self.bank).square().mean((1, 2))
        return self.one(x).squeeze(1) + mixed + self.plane(images).tanh().sum((1, 2, 3))


def train(name: str, rank: int, mesh) -> dict:
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    optimizer, whole = (MAKE[name](parameter_groups(one)) for one in (model, reference))
    differ = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(10 * step + rank)  # each process has rows of its own
        tokens, images = torch.randint(9, (6,), generator=draw), torch.randn(6, 2, 3, 3, generator=draw)
        optimizer.zero_grad()
        model(tokens, images).square().mean().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            theirs.grad = ours.grad.full_tensor()
        optimizer.step()
        whole.step()
        differ += [
            (step, key)
            for (key, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True)
            if not torch.equal(ours.full_tensor(), theirs)
        ]
    before = [p.to_local().clone() for p in model.parameters()]
    local = model.tall.weight.grad.to_local()
    if rank == 1:
        local[-1, -1] = torch.nan
    try:
        optimizer.step()
        refused = False
    except FloatingPointError:
        refused = all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    return {"differ": differ, "refused": refused, "rows_here": len(model.one.weight.to_local())}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {name: train(name, rank, mesh) for name in MAKE}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
    print(json.dumps([json.loads((Path(sys.argv[1]) / f"{rank}.json").read_text()) for rank in range(2)]))
