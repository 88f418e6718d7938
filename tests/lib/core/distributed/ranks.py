"""What the tests of processes run in them."""

import os
import signal
import time

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from workbench.errors import InputError
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.distributed.wire import counted


def whole(a: torch.Tensor) -> dict:
    """Who this rank is, and what it and its world come to."""
    total = a.clone()
    dist.all_reduce(total)
    facts = {"rank": dist.get_rank(), "world": dist.get_world_size(), "threads": torch.get_num_threads()}
    return facts | {"pid": os.getpid(), "told": os.environ.get("TOLD"), "total": total}


def fails(who: int, how: str) -> None:
    if dist.get_rank() == who:
        if how == "raises":
            raise ValueError("a number that is none")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leaves":
            os._exit(3)
        if how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "sleeps":
            time.sleep(1000)
        if how == "cannot be pickled":
            return lambda: None
        if how == "late":  # the others have returned, and wait for it
            time.sleep(1000)
    if how != "late":
        dist.all_reduce(torch.ones(2))


def sends() -> dict[str, tuple[float, int]]:
    """Bytes and messages of each collective, in three ways of asking for it, and what came of it."""
    rank, n = dist.get_rank(), dist.get_world_size()
    found, x = {}, torch.arange(6.0 * n, dtype=torch.float64).view(2 * n, 3)  # 48 n bytes

    def note(name, call):
        with counted() as traffic:
            call()
        found[name] = (traffic.bytes, traffic.messages)

    rows = [to + 1 for to in range(n)] if rank else [0] * n  # rank 0 sends nothing, the others 1 row to 0, 2 to 1 ...
    come = [rank + 1 if other else 0 for other in range(n)]
    sent, taken = torch.ones(sum(rows), 3), torch.empty(sum(come), 3)
    note("uneven all_to_all", lambda: dist.all_to_all_single(taken, sent, come, rows))
    assert bool((taken == 1).all())
    note("even all_to_all", lambda: dist.all_to_all_single(torch.empty_like(x), x))
    note("functional all_to_all", lambda: functional.all_to_all_single(sent, come, rows, dist.group.WORLD).sum())
    note("all_reduce", lambda: dist.all_reduce(x.clone(), async_op=True).wait())
    note("functional all_reduce", lambda: functional.all_reduce(x, "sum", dist.group.WORLD).sum())
    # one and the same, by the name of torch 2.13 and on, and by the one that warns there
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    note("all_gather", lambda: all_gather(x.new_empty(2 * n * n, 3), x))
    note("list all_gather", lambda: dist.all_gather([torch.empty_like(x) for _ in range(n)], x))
    note("reduce_scatter", lambda: reduce_scatter(x.new_empty(2, 3), x))
    note("broadcast", lambda: dist.broadcast(x.clone(), src=1))
    note("send", lambda: dist.send(x, 1) if rank == 0 else dist.recv(x) if rank == 1 else None)
    note("barrier", dist.barrier)
    weight = torch.ones(4, requires_grad=True)
    note("backward", lambda: (functional.all_gather_tensor_autograd(weight, 0, dist.group.WORLD) ** 2).sum().backward())
    try:
        note("gather", lambda: dist.gather(x, [torch.empty_like(x) for _ in range(n)] if rank == 0 else None))
    except InputError as error:
        found["refused"] = str(error)
    return found


def meets() -> dict:
    """The groups that processes form along axes of a grid, by what reaches them."""
    grid = RankGrid({"tp": 2, "cp": 1, "dp": 2})
    found = {}
    for axes in ("tp", "dp", ("tp", "dp"), "cp"):
        group, ones = grid.process_group(axes), torch.zeros(grid.world)
        ones[dist.get_rank()] = 1
        dist.all_reduce(ones, group=group)
        found[axes] = ones.nonzero().flatten().tolist()
    try:
        RankGrid({"tp": 3}).process_group("tp")
    except InputError as error:
        found["refused"] = str(error)
    return found
