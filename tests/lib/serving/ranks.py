"""What single ranks do in the tests of the exchanges and of the plan; of a module, so that processes can import it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.lib.core.distributed.wire import Traffic, counted
from workbench.lib.serving.all_to_all import make_exchange
from workbench.lib.serving.deepspeed_moe import every_other, feed_forward

D, H = 8, 16


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sent(traffic: Traffic) -> dict[str, tuple[int, float]]:
    return {kind: (sent.messages, sent.bytes) for kind, sent in traffic.of.items()}


def exchanged(node: int, tp: int, rows: int) -> dict[str, Any]:
    """Blocks to all ranks, something done to them there, and back: outputs, gradients and messages of each form.

    x and the gradient are the same within a group of tensor parallelism.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for form, size in (("flat", 1), ("hierarchical", node), ("coordinated", tp)):
        exchange = make_exchange(form, world, size)
        x = drawn(rank // tp, world, rows, D).requires_grad_()
        grad = drawn(100 + rank // tp, world, rows, D)
        with counted() as there:
            came = exchange.dispatch(x)
        made = torch.sin(came) * (rank + 1)
        with counted() as back:
            y = exchange.combine(made)
        with counted() as again:
            y.backward(grad)
        found[form] = {
            "came": came.detach(),
            "y": y.detach(),
            "grad": x.grad,
            "there": _sent(there),
            "back": _sent(back),
            "again": _sent(again),
        }
    flat, steps = (make_exchange(form, world, node) for form in ("flat", "hierarchical"))
    x = drawn(200 + rank, world, rows, 3, 2)  # another one on every rank
    found["own"] = torch.equal(flat.dispatch(x), steps.dispatch(x))
    return found


def layers(experts: list[int]) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    blocks = feed_forward(every_other(experts), D, H)[1::2]
    for block in blocks:
        with torch.no_grad():
            block.router.projection.weight.mul_(50)  # decided, so that experts are full and tokens dropped
    return [block.double().eval() for block in blocks]
