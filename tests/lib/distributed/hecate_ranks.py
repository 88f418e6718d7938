"""What the tests of Hecate run in processes, beside one process that has the whole bank and all rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.lib.core.distributed.rows import of_each
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.routing import Routing
from workbench.lib.distributed.hecate import FSSDPExperts, plan_sharding
from workbench.lib.distributed.sparse_shards import (
    held,
    owned,
    sparse_all_gather,
    sparse_reduce_scatter,
    transfers,
)

E, D, H, ROWS, TOP_K, P = 7, 6, 5, 9, 2, 11


def plans(world: int, n_experts: int = E) -> dict[str, tuple[Tensor, Tensor]]:
    """Owners and placements: drawn ones, one rank that owns nothing, the owners' own alone, and all."""
    draw = torch.Generator().manual_seed(3)
    owner = torch.randint(world, (n_experts,), generator=draw)
    mine = owner == torch.arange(world)[:, None]
    none = torch.randint(max(1, world - 1), (n_experts,), generator=draw)
    extra = torch.rand(world, n_experts, generator=draw) < 0.4
    return {
        "drawn": (owner, mine | extra),
        "a rank without experts": (none, (none == torch.arange(world)[:, None]) | extra),
        "their own": (owner, mine),
        "all": (owner, torch.ones_like(mine)),
    }


def collectives() -> dict[str, dict]:
    """Of each plan: the gap to what a gather is, the two inner products, and what went over the wire."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    whole = torch.randn(E, P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, (owner, placement) in plans(world).items():
        own = whole[owned(owner, rank)].clone().requires_grad_()
        with counted() as traffic:
            copies = sparse_all_gather(own, owner, placement, dist.group.WORLD)
        grads = torch.randn(copies.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank + 1))
        (back,) = torch.autograd.grad(copies, own, grads, retain_graph=True)
        with counted() as returned:
            sums = sparse_reduce_scatter(grads, owner, placement, dist.group.WORLD)
        products = torch.stack([(copies.detach() * grads).sum(), (own.detach() * sums).sum()])
        sent = torch.tensor([traffic.bytes, returned.bytes])
        dist.all_reduce(products), dist.all_reduce(sent)
        found[name] = {
            "gap": float((copies.detach() - whole[held(placement, rank)]).abs().max()) if len(copies) else 0.0,
            "adjoint": float((products[0] - products[1]).abs()),
            "autograd": bool(torch.equal(back, sums)),
            "bytes": sent.tolist(),
            "formula": 8.0 * P * transfers(owner, placement),
        }
    return found


def bank() -> GLUExperts:
    torch.manual_seed(0)
    return GLUExperts(E, D, H).double()


def batch(rank: int, step: int) -> tuple[Tensor, Routing, Tensor]:
    """Rows of a rank, of another number on each, their routing, which is skewed, and what multiplies the outputs."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    n = ROWS + 3 * rank if rank != 2 else 0  # one rank has no rows
    x = torch.randn(n, D, dtype=torch.float64, generator=draw)
    logits = torch.randn(n, E, dtype=torch.float64, generator=draw) + torch.linspace(3, 0, E, dtype=torch.float64)
    weight, index = logits.softmax(-1).topk(TOP_K)
    return x.requires_grad_(), Routing.fixed(index, weight, E), torch.randn(n, D, dtype=torch.float64, generator=draw)


def layers() -> dict[str, dict[str, float]]:
    """Of each plan, with copies and without: largest gaps to the whole bank in outputs and gradients."""
    rank, world, found = dist.get_rank(), dist.get_world_size(), {}
    for name, (owner, placement) in plans(world).items():
        for again in (False, True):
            layer = FSSDPExperts(bank(), dist.group.WORLD, owner, rematerialise=again)
            layer.placement = placement
            x, routing, factor = batch(rank, 0)
            y = layer(x, routing)
            (y * factor).sum().backward()
            whole = bank()
            for r in range(world):
                x_r, routing_r, factor_r = batch(r, 0)
                y_r = whole(x_r, routing_r)
                (y_r * factor_r).sum().backward()
                if r == rank:
                    rows = (float((y - y_r).detach().abs().sum()), float((x.grad - x_r.grad).abs().sum()))
            chunks = torch.cat([whole.gate_up.grad.flatten(1), whole.down.grad.flatten(1)], 1)[owned(owner, rank)]
            found[f"{name}, {again}"] = {
                "outputs": rows[0],
                "inputs": rows[1],
                "experts": float((layer.chunks.grad - chunks).abs().sum()),
            }
    return found


def steps() -> dict[str, float | int]:
    """Five steps of AdamW, owners planned anew between them and copies by what was seen, beside one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer, whole = FSSDPExperts(bank(), dist.group.WORLD, budget=4, memory=2), bank()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer, reference = (torch.optim.AdamW(m.parameters(), **options) for m in (layer, whole))
    moved, copied = 0, 0
    for step in range(5):
        optimizer.zero_grad(), reference.zero_grad()
        layer.plan()
        x, routing, factor = batch(rank, step)
        (layer(x, routing) * factor).sum().backward()
        copied += layer.sent
        for r in range(world):
            x_r, routing_r, factor_r = batch(r, step)
            (whole(x_r, routing_r) * factor_r).sum().backward()
        optimizer.step(), reference.step()
        if step in (1, 3):
            loads = torch.stack(list(layer.loads)).sum((0, 1)).double()
            moved += layer.reshard(
                plan_sharding(loads[None] if step == 1 else loads.flip(0)[None], world)[0], optimizer
            )
    flat = torch.cat([whole.gate_up.detach().flatten(1), whole.down.detach().flatten(1)], 1)
    gap = (layer.chunks.detach() - flat[owned(layer.owner, rank)]).abs().sum()
    states = {p.shape for p in optimizer.state[layer.chunks].values() if p.ndim} == {layer.chunks.shape}
    return {"gap": float(gap), "moved": moved, "copied": copied, "states": states}


def live() -> dict[str, int]:
    """Numbers of copies that are kept between the forward and the backward pass, gathered again and not."""
    found = {}
    for again in (False, True):
        owner, placement = plans(dist.get_world_size())["all"]
        layer = FSSDPExperts(bank(), dist.group.WORLD, owner, rematerialise=again)
        layer.placement = placement
        x, routing, _ = batch(dist.get_rank(), 0)
        kept: list[int] = []
        chunk = layer.chunks.shape[1]

        def pack(tensor: Tensor, kept: list[int] = kept, chunk: int = chunk) -> Tensor:
            if tensor.ndim > 1 and tensor.shape[0] == E:  # of the whole bank, in any form
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x, routing)
        y.sum().backward()
        found["again" if again else "kept"] = sum(kept)
    return found


def everything() -> dict:
    world = of_each(torch.tensor([dist.get_rank()]), dist.group.WORLD)
    assert len(world) == dist.get_world_size()
    return {"collectives": collectives(), "layers": layers(), "steps": steps(), "live": live()}
