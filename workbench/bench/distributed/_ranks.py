"""What the two processes of the bench do: pieces that all of them run alike, timed on each."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.lib.core.distributed.dispatcher import TokenDispatcher
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routing import Routing
from workbench.lib.distributed.hecate_plans import even_owners, plan_placement
from workbench.lib.distributed.sparse_shards import sparse_all_gather, transfers
from workbench.lib.distributed.streaming_diloco import E3M0Codec, StreamingDiLoCo, fragments

WARM = 2  # steps, or rounds, that are not counted


def network(shape: Mapping[str, int]) -> DecoderLM:
    torch.manual_seed(0)
    d, layers = shape["d_model"], shape["n_layers"]
    return DecoderLM(256, d, layers, 4, lambda layer: GLU(d, shape["d_hidden"]), shape["seq_len"])


def gathers(sizes: Sequence[int], rounds: int) -> list[float]:
    """Seconds of an all-gather of so many bytes from each rank, the median of the rounds."""
    found = []
    for size in sizes:
        message = torch.zeros(size, dtype=torch.uint8)
        into = [torch.empty_like(message) for _ in range(dist.get_world_size())]
        found.append(statistics.median(timed(lambda m=message, i=into: dist.all_gather(i, m), rounds)))
    return found


def trainings(shape: Mapping[str, int], arms: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Seconds a step of each arm, and of the same steps without any exchange, in turn before it and after it."""
    alone = [_training(shape, {"kind": "alone", "steps": shape["steps"]})]
    found = []
    for arm in arms:
        spent = _training(shape, arm)
        alone.append(_training(shape, {"kind": "alone", "steps": shape["steps"]}))
        found.append({"seconds": spent, "alone": statistics.fmean(alone[-2:])})
    return found


def _training(shape: Mapping[str, int], arm: Mapping[str, Any]) -> float:
    model, kind = network(shape), arm["kind"]
    trained: nn.Module = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    part = None
    if kind == "streaming":
        settings = {name: arm[name] for name in ("sync_every", "delay", "mix")}
        codec = E3M0Codec() if arm["codec"] else None
        part = StreamingDiLoCo(model, fragments(model, arm["count"]), codec=codec, **settings)
    tokens = torch.randint(256, (shape["batch_size"], shape["seq_len"]))

    def step() -> None:
        logits = trained(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if kind == "all-reduce":
            _average(list(model.parameters()))
        optimizer.step()
        if part is not None:
            part.step()

    for _ in range(arm.get("warm", WARM)):
        step()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(arm["steps"]):
        step()
    spent = (time.perf_counter() - began) / arm["steps"]
    if part is not None:
        part.flush()
    return spent


def _average(parameters: list[Tensor]) -> None:
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, (flat / dist.get_world_size()).split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view(p.shape))


def dispatches(tokens: int, dim: int, n_experts: int, top_k: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of dispatch and combine, and the bytes that this rank sends; forward, and with the backward pass."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, dim, generator=draw, requires_grad=True)
    scores = torch.rand(tokens, n_experts, generator=draw)
    routing = Routing.fixed(scores.topk(top_k).indices, torch.full((tokens, top_k), 1 / top_k), n_experts)
    dispatcher = TokenDispatcher(n_experts, dist.group.WORLD)

    def forward() -> Tensor:
        sent = dispatcher.dispatch(x, routing)
        return dispatcher.combine(sent.rows, sent)

    def both() -> None:
        forward().sum().backward()

    found = {}
    for direction, call in (("forward", torch.no_grad()(forward)), ("forward+backward", both)):
        seconds = statistics.median(timed(call, rounds))
        with counted() as traffic:
            call()
        found[direction] = (seconds, traffic.bytes)
    return found


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, which all ranks begin together."""
    found = []
    for turn in range(-WARM, rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        if turn >= 0:
            found.append(time.perf_counter() - began)
    return found


def sparse_bytes(n_experts: int = 16, dim: int = 64, hidden: int = 128) -> list[dict[str, float | str]]:
    """Of sparse gathers and their adjoints, what all ranks sent, counted, and what the formula says.

    A row for each number of copies that the busiest experts get: none, some, all.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunk = 3 * dim * hidden
    owner = even_owners(1, n_experts, world)[0]
    load = torch.arange(n_experts, 0, -1).double() ** 2
    rows = []
    for budget in (0, 2, 6, n_experts * (world - 1)):
        placement = plan_placement(load, owner, world, budget, n_experts)
        if budget == n_experts * (world - 1):
            placement = torch.ones_like(placement)
        own = torch.zeros(int((owner == rank).sum()), chunk, requires_grad=True)
        with counted() as traffic:
            sparse_all_gather(own, owner, placement, dist.group.WORLD).sum().backward()
        sent = torch.tensor([traffic.bytes])
        dist.all_reduce(sent)
        formula = 2 * 4.0 * chunk * transfers(owner, placement)
        rows.append({"copies": transfers(owner, placement), "bytes": float(sent), "by formula": formula})
    return rows
