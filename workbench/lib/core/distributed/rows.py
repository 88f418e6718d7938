"""Rows that move between the ranks of a group, with gradients that move back.

Every function takes a group of torch.distributed, or None where this process is alone in it.

Tensor letters: n rows of this rank, r ranks of the group, H width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Num
from torch import Tensor

Group = Any
"""A process group, or None for this process alone. (torch may be built without torch.distributed's types.)"""


def ranks_of(group: Group) -> int:
    """How many ranks a group has."""
    return 1 if group is None else group.size()


def sizes_of(n: int, group: Group) -> list[int]:
    """The n of each rank."""
    if ranks_of(group) == 1:
        return [n]
    return torch.cat(of_each(torch.tensor([n]), group)).tolist()


def of_each(x: Num[Tensor, " *shape"], group: Group) -> list[Num[Tensor, " *shape"]]:
    """The x of every rank, in their order; all have one shape. Without gradients: `gathered` has them.

    By all_gather's list: what gathers into one tensor has another name from torch 2.13 on, and warns of its old one.
    """
    if ranks_of(group) == 1:
        return [x.detach()]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks_of(group))]
    dist.all_gather(found, x.detach().contiguous(), group=group)
    return found


def all_to_all(
    x: Num[Tensor, " n *rest"], give: Sequence[int], take: Sequence[int], group: Group
) -> Num[Tensor, " m *rest"]:
    """Sends the first `give[0]` rows to rank 0, the next to rank 1, and so on; what came, from rank 0 first.

    Args:
        take: how many come from each rank.
    """
    return x if ranks_of(group) == 1 else _AllToAll.apply(x, list(give), list(take), group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, give: list[int], take: list[int], group: Group) -> Tensor:
        ctx.back = (take, give, group)
        found = x.new_empty(sum(take), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), take, give, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, *ctx.back), None, None, None


def gathered(x: Num[Tensor, " n *rest"], sizes: Sequence[int], group: Group) -> Num[Tensor, " all *rest"]:
    """The rows of all ranks, of `sizes[i]` from rank i. Its gradient is `summed`.

    By all_to_all of a copy for each: gloo's all_gather takes equal sizes only. The bytes are the same.
    """
    r = ranks_of(group)
    return x if r == 1 else all_to_all(x.repeat(r, *[1] * (x.dim() - 1)), [len(x)] * r, sizes, group)


def summed(x: Num[Tensor, " all *rest"], sizes: Sequence[int], group: Group) -> Num[Tensor, " n *rest"]:
    """This rank's rows of the sum over all ranks (a reduce-scatter), added in the order of the ranks: `gathered` turned
    round, and its gradient."""
    r = ranks_of(group)
    if r == 1:
        return x
    mine = sizes[group.rank()]
    return all_to_all(x, sizes, [mine] * r, group).view(r, mine, *x.shape[1:]).sum(0)
