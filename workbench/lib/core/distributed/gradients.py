"""Gradients of parameters that some ranks copy and others split: summed where they are copies, clipped by one norm.

    sets = [GradientSet(dense, copies=everyone), GradientSet(experts, copies=edp, parts=ep)]
    loss.backward()                    # of this rank's tokens: the sum of their losses over the number of all tokens
    reduce_gradients(sets)
    norm = clip_gradients(sets, 1.0)   # of the whole model, the same on every rank

With losses that are sums over rows and collectives that have their adjoints as gradients (`rows`), what a rank finds is
the part of its own copy in the gradient of the sum of all ranks' losses. So every set is a plain sum over its copies,
experts too: that fewer ranks copy them, and more tokens reached each, needs no factor of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.rows import Group, ranks_of


@dataclass(frozen=True)
class GradientSet:
    """Parameters that are spread over the ranks alike.

    Attributes:
        copies: group of the ranks that hold the same values; None: no other does.
        parts: group of the ranks that hold other parts of these tensors, or other tensors of the same kind (other
            experts), each once; None: they are whole.
    """

    parameters: Sequence[nn.Parameter]
    copies: Group = None
    parts: Group = None


@torch.no_grad()
def reduce_gradients(sets: Sequence[GradientSet], ranks: int = 1) -> None:
    """Sums each gradient over the copies of its parameter, and divides all of them by `ranks`.

    A parameter without a gradient here counts as zero; one without a gradient on any of its copies still has none, so
    that an optimiser passes over it as in one process. Frozen ones are left alone.

    Args:
        ranks: 1 where losses are over the number of all tokens; where each rank takes the mean of its own, and all have
            as many, the number of ranks that split the tokens. It is the same for experts, whatever their group.
    """
    if ranks < 1:
        raise InputError(f"ranks is {ranks} but must be at least 1")
    for each in sets:
        for parameters in _by_dtype([p for p in each.parameters if p.requires_grad]):
            flat = torch.cat([_own(p) for p in parameters])  # one message for the set
            if ranks_of(each.copies) > 1:
                dist.all_reduce(flat, group=each.copies)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                if bool(((part == 0) & part.signbit()).all()):  # see `_own`
                    p.grad = None
                elif p.grad is None:
                    p.grad = (part / ranks).view_as(p)
                else:
                    p.grad.copy_((part / ranks).view_as(p))


@torch.no_grad()
def clip_gradients(sets: Sequence[GradientSet], max_norm: float) -> Tensor:
    """Scales all gradients so that the norm of the whole model's is at most `max_norm`, as torch's clip_grad_norm_ does
    in one process. Copies count once, parts each.

    Returns:
        The norm before, in float64.
    """
    if not max_norm > 0:
        raise InputError(f"max_norm is {max_norm} but must be above 0")
    total = torch.zeros((), dtype=torch.float64)
    for each in sets:
        squares = (p.grad.double().square().sum() for p in each.parameters if p.grad is not None)
        own = sum(squares, torch.zeros((), dtype=torch.float64))
        if ranks_of(each.parts) > 1:
            dist.all_reduce(own, group=each.parts)
        total += own
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in sets:
        for p in each.parameters:
            if p.grad is not None:
                p.grad.mul_(scale.to(p.grad.dtype))
    return norm


def _own(p: nn.Parameter) -> Tensor:
    """(n,) the gradient for a sum over ranks; where there is none negative zeros, and no others are in it.

    A sum of those alone is a negative zero, and of them and any number that number: so all ranks learn at once that
    none of them has a gradient, and nothing more is sent.
    """
    return torch.full_like(p, -0.0).reshape(-1) if p.grad is None else p.grad.reshape(-1) + 0.0


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return list(kinds.values())
