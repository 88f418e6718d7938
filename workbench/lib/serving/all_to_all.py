"""Sending tokens to the ranks of their experts and back: flat, over nodes, or together with tensor parallelism.

p ranks, of which a block of n rows goes from each to each (DeepSpeed-MoE, 2201.05596, section 5.3):

    Flat           p - 1 messages of n rows
    Hierarchical   within a node of G ranks, then between the p / G nodes: G - 1 messages of (p / G) n rows and
                   p / G - 1 of G n: far fewer, of twice the volume
    Coordinated    where L ranks of tensor parallelism hold the same tokens, each sends to ranks of its own number
                   only: p / L - 1 messages of n rows; on the way back the L ranks then gather what each has got, in
                   L - 1 of (p / L) n

An exchange has `dispatch`, x (p, n, ...) -> (S, n, ...), what comes from each of S sources, and `combine`, which brings
back to each rank what the p ranks have made of its rows. S is p, or p / L where the L copies of a source are one.
Numbers are moved and never added, so that all three give the same bits, forwards and backwards.

Of what L ranks hold in common, each has the whole gradient, as Megatron has it: the gradient of gathering is one's own
part, and that of taking one's own part is gathered.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.core.distributed.grids import RankGrid, divisors
from workbench.lib.core.distributed.rows import of_each
from workbench.lib.core.simulation.fits import LinkModel

FORMS = ("flat", "hierarchical", "coordinated")


@runtime_checkable
class Exchange(Protocol):
    """Blocks to the p ranks, and what these make of them back."""

    def dispatch(self, x: Float[Tensor, "ranks rows *dim"]) -> Float[Tensor, "sources rows *dim"]: ...

    def combine(self, y: Float[Tensor, "sources rows *dim"]) -> Float[Tensor, "ranks rows *dim"]: ...


@dataclass(frozen=True)
class Flat:
    """One all-to-all of all ranks of a group."""

    group: Any

    def dispatch(self, x: Float[Tensor, "ranks rows *dim"]) -> Float[Tensor, "ranks rows *dim"]:
        return flat_all_to_all(x, self.group)

    combine = dispatch


@dataclass(frozen=True)
class Hierarchical:
    """An all-to-all of the ranks of a node, then one of the ranks of the same number in all nodes."""

    intra_group: Any
    inter_group: Any

    def dispatch(self, x: Float[Tensor, "ranks rows *dim"]) -> Float[Tensor, "ranks rows *dim"]:
        return hierarchical_all_to_all(x, self.intra_group, self.inter_group)

    combine = dispatch


@dataclass(frozen=True)
class Coordinated:
    """All-to-alls of the ranks of one number in all groups of tensor parallelism, within which x is the same."""

    tp_group: Any
    ep_group: Any

    def dispatch(self, x: Float[Tensor, "ranks rows *dim"]) -> Float[Tensor, "sources rows *dim"]:
        return flat_all_to_all(_Own.apply(x, self.tp_group), self.ep_group)

    def combine(self, y: Float[Tensor, "sources rows *dim"]) -> Float[Tensor, "ranks rows *dim"]:
        return _Gathered.apply(flat_all_to_all(y, self.ep_group), self.tp_group)


def flat_all_to_all(x: Float[Tensor, "ranks rows *dim"], group: Any) -> Float[Tensor, "ranks rows *dim"]:
    """x[j] to rank j of the group; what rank i sent is in the i-th place.

    Raises:
        InputError: x has not a block for each rank.
    """
    n = dist.get_world_size(group)
    if x.ndim < 2 or len(x) != n:
        raise InputError(f"x has shape {tuple(x.shape)} but must have a block of rows for each of {n} ranks")
    return _AllToAll.apply(x, group)


def hierarchical_all_to_all(
    x: Float[Tensor, "ranks rows *dim"], intra_group: Any, inter_group: Any
) -> Float[Tensor, "ranks rows *dim"]:
    """The same in two steps, for ranks that are numbered node by node: rank = node G + number in the node.

    What is for rank (node, g) goes to the g-th of one's own node first, with all that is for others of that number.
    """
    local, nodes = dist.get_world_size(intra_group), dist.get_world_size(inter_group)
    if x.ndim < 2 or len(x) != local * nodes:
        raise InputError(f"x has shape {tuple(x.shape)} but must have a block for each of {nodes} x {local} ranks")
    rest = x.shape[1:]
    near = flat_all_to_all(x.reshape(nodes, local, *rest).transpose(0, 1), intra_group)  # (from g, to node, ...)
    far = flat_all_to_all(near.transpose(0, 1), inter_group)  # (from node, from g, ...)
    return far.reshape(nodes * local, *rest)


class _AllToAll(torch.autograd.Function):
    """Equal blocks; its own adjoint."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


class _Own(torch.autograd.Function):
    """Of blocks for all ranks, those for ranks of this one's number t in their group: rank = (...) L + t."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, size = group, dist.get_world_size(group)
        if len(x) % size:
            raise InputError(f"x has {len(x)} blocks but must have as many for each of {size} ranks")
        return x[dist.get_rank(group) :: size].contiguous()

    @staticmethod
    def backward(ctx, grad):
        return _Gathered.apply(grad, ctx.group), None


class _Gathered(torch.autograd.Function):
    """The inverse of `_Own`: the blocks of all ranks of the group, each in its place."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return torch.stack(of_each(x, group), 1).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        return _Own.apply(grad, ctx.group), None


def make_exchange(form: str, world: int, size: int = 1) -> Exchange:
    """The exchange of all ranks of torch.distributed. All ranks must ask for the same ones in the same order.

    Args:
        form: one of `FORMS`.
        size: G ranks of a node for "hierarchical", L ranks of tensor parallelism for "coordinated".
    """
    check(form, world, size)
    if form == "flat":
        return Flat(RankGrid({"all": world}).process_group("all"))
    grid = RankGrid({"inner": size, "outer": world // size})
    inner, outer = grid.process_group("inner"), grid.process_group("outer")
    return Hierarchical(inner, outer) if form == "hierarchical" else Coordinated(inner, outer)


def messages(form: str, world: int, size: int = 1, back: bool = False) -> int:
    """Messages that a rank sends on the way to the experts, or `back`; arguments as in `make_exchange`."""
    return sum(steps for steps, _, _ in _stages(form, world, size, back))


def all_to_all_seconds(
    form: str,
    block: float,
    world: int,
    size: int,
    near: LinkModel,
    far: LinkModel,
    *,
    node: int = 1,
    back: bool = False,
    shared: bool = False,
) -> float:
    """Seconds of one way, a message after the other, each alpha + beta bytes.

    Args:
        form, world, size, back: as in `messages`.
        block: bytes from each rank to each.
        near, far: links within a node of `node` ranks and between nodes.
        shared: all ranks send through one medium (a loopback), and their bytes one after the other.
    """
    at_once = world if shared else 1
    return sum(
        (near if step * apart < node else far).seconds(blocks * block * at_once)
        for steps, blocks, apart in _stages(form, world, size, back)
        for step in range(1, steps + 1)
    )


def check(form: str, world: int, size: int) -> None:
    """Raise `InputError` unless the form is one, and groups of `size` fit the world."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if world < 1 or size < 1 or world % size:
        fit = ", ".join(map(str, divisors(max(world, 1))))
        raise InputError(f"size is {size} but must divide the world of {world} ranks: {fit}")


def _stages(form: str, world: int, size: int, back: bool) -> list[tuple[int, int, int]]:
    """Of each stage of one way: messages, blocks in each, and how far apart in rank its partners are."""
    check(form, world, size)
    outer = world // size
    if form == "flat":
        return [(world - 1, 1, 1)]
    if form == "hierarchical":
        return [(size - 1, outer, 1), (outer - 1, size, size)]
    return [(outer - 1, 1, size), *([(size - 1, outer, 1)] if back else [])]
