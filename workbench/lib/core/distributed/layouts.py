"""One model trained by all processes of torch.distributed, in one of three layouts, with the numbers of one process.

    "data"     every process has the whole model; gradients are summed (data parallelism)
    "sharded"  every process has a part of every matrix, and borrows the rest while it computes (FSDP2)
    "experts"  every process has some of the experts, and tokens travel to them; the rest is as in "data"

    replicas = Processes(model, "experts")            # changes the model in place; on every rank the same model
    train(model, task, config, replicas=replicas)     # the loop of one process, on every rank

The batch is that of one process, its rows shared out in order. What is computed over the whole batch and is no mean
over rows is asked of all ranks: the load in the balance loss, the load that a loss-free bias follows, the norm of the
gradient. What would decide over the whole batch otherwise is refused: experts that choose tokens, a capacity.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from workbench.errors import InputError, unknown
from workbench.lib.core.balance import SHARED_OUT
from workbench.lib.core.distributed.experts import check_banks, split_experts
from workbench.lib.core.distributed.gradients import GradientSet, clip_gradients, reduce_gradients
from workbench.lib.core.distributed.shares import Ranks
from workbench.lib.core.models import Block
from workbench.lib.core.observe import routed_layers
from workbench.lib.core.task import device_of

LAYOUTS = ("data", "sharded", "experts")

T = TypeVar("T")


def check_model(model: nn.Module, layout: str) -> None:
    """Raise `InputError` where a part of the model decides over the whole batch in a way that shares of it cannot."""
    for name, layer in routed_layers(model).items():
        router, why = layer.router, None
        if getattr(layer, "capacity_factor", None) is not None:
            why = "a capacity, whose places the tokens of the whole batch compete for"
        elif layer.top_k is None:
            why = f"a {type(router).__name__}, which does not choose token by token"
        elif others := set(router.coefficients) - set(SHARED_OUT):
            why = f"the balance loss {min(others)!r}, which is none of a share of the batch"
        if why:
            raise InputError(f"{name} has {why}: it trains in one process only")
    if layout == "experts":
        check_banks(model)


def led(function: Callable[[], T]) -> T:
    """What a function returns on rank 0, or the error that it raises there, on every rank; it runs there alone."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = function()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


class Processes(Ranks):
    """All ranks of torch.distributed, training `model` in a layout. Every rank makes one, of the same whole model.

    The model is changed in place: an optimizer is made after. Parameters are DTensors where they are "sharded".

    Args:
        layout: one of `LAYOUTS`.

    Raises:
        InputError: the layout is unknown, or cannot be had with this model or this many ranks.
    """

    def __init__(self, model: nn.Module, layout: str):
        if layout not in LAYOUTS:
            raise unknown("layout", layout, LAYOUTS)
        check_model(model, layout)
        super().__init__()
        self.layout = layout
        self.mesh = init_device_mesh(device_of(model).type, (self.world,))
        self._split: set[nn.Parameter] = set()
        if layout == "sharded":
            _shard(model, self.mesh)
        elif layout == "experts":
            self._split.update(split_experts(model, self.mesh.get_group()))
        for module in model.modules():
            if hasattr(module, "replicas"):
                module.replicas = self

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        if self.layout == "sharded":  # the backward pass has summed them
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).full_tensor()
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            return float(norm)
        copies = GradientSet([p for p in parameters if p not in self._split], copies=dist.group.WORLD)
        parts = GradientSet([p for p in parameters if p in self._split], parts=dist.group.WORLD)
        reduce_gradients([copies, parts], ranks=self.world)
        return float(clip_gradients([copies, parts], max_norm))

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Those of a model that this was made of, by the names of the whole one; as an optimizer has them."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after an evaluation it would show what it has borrowed
        return dict(model.named_parameters())

    def as_whole(self, of: nn.Parameter, tensor: Tensor) -> Tensor:
        """A tensor in the shape of a parameter (itself, its gradient, a moment) as a part of the whole one.

        A DTensor where this rank has a part, which shares the memory of `tensor`; else the tensor.
        """
        if of not in self._split or isinstance(tensor, DTensor):
            return tensor
        shape = torch.Size((self.world * tensor.shape[0], *tensor.shape[1:]))
        # without shape and stride the ranks would disagree on them where shares are not even
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=strides)

    @torch.no_grad()
    def whole(self, of: nn.Parameter, tensor: Tensor) -> Tensor:
        """The whole of it, on every rank; all must ask, in the same order."""
        tensor = self.as_whole(of, tensor.detach())
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard(model: nn.Module, mesh: Any) -> None:
    """Each block a unit that is fetched for itself, and the rest another."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not set(_in_several(blocks)):  # FSDP2 wants what units share in one of them: then all is one
        for block in blocks:
            fully_shard(block, mesh=mesh)
            _keep_context(block)
    fully_shard(model, mesh=mesh)


def _keep_context(block: Block) -> None:
    """Give a block the very context that it is called with.

    FSDP2 hands on a copy of a dataclass that holds a tensor with a gradient: what the block adds to it would be lost.
    """
    given: list[tuple] = []
    block.register_forward_pre_hook(lambda block, args: given.append(args[1:]), prepend=True)
    block.register_forward_pre_hook(lambda block, args: (args[0], *given.pop()))


def _in_several(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    seen: set[nn.Parameter] = set()
    for module in modules:
        own = set(module.parameters())
        yield from own & seen
        seen |= own
