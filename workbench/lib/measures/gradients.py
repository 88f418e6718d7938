"""Gradients of several tasks' losses, each by itself, by groups of parameters and of places in a model.

A group has members of three kinds: a parameter; (parameter, i), its slice i along the first dimension, as one expert of
a packed bank; and a `Place`, the hidden states that a module is given or gives. Those of two tasks are of other tokens
and cannot be compared one by one. What can is the gradient of a vector added to every one of them, the sum of
d loss / d x over the tokens: how all tasks together would move that activation, were it free to move.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError


@dataclass(frozen=True)
class Place:
    """The hidden states (..., width) that a module is given as its first argument, or with `output` what it returns."""

    module: nn.Module = field(repr=False)
    width: int
    output: bool = False


Member = nn.Parameter | tuple[nn.Parameter, int] | Place
Groups = Mapping[str, Sequence[Member]]
Gradients = dict[int, Tensor | None]
"""By the id of a parameter or of a place; None where nothing of the loss depends on it, or it is frozen."""


def task_gradients(
    losses: Mapping[str, Callable[[], Tensor]], groups: Groups
) -> dict[str, Float[Tensor, "tasks parameters"]]:
    """The gradient of every task's loss by every group, one row a task in the order of `losses`; `.grad` is untouched.

    A row of zeros is a task whose loss does not depend on the group: it has no direction there, and
    `conflict.cosine_matrix` says NaN of it, no overlap, and not 0. For more parameters than fit n times in memory
    there is `meters.ConflictMeter`, which keeps inner products alone.

    Args:
        losses: by task, a function that runs the model on a batch of the task and returns its mean loss. One backward
            pass each.
        groups: members by name; they may overlap.
    """
    check_groups(groups)
    found = [gradients(loss, groups) for loss in losses.values()]
    return {
        name: torch.stack([torch.cat([_dense(member, row).flatten() for member in group]) for row in found])
        for name, group in groups.items()
    }


def gradients(loss: Callable[[], Tensor], groups: Groups) -> Gradients:
    """The gradient of one loss by everything that the groups have members of."""
    members = [member for group in groups.values() for member in group]
    wholes = {id(whole): whole for whole in map(_whole, members)}
    parameters = {key: p for key, p in wholes.items() if not isinstance(p, Place) and p.requires_grad}
    with _moved(member for member in members if isinstance(member, Place)) as shifts:
        wanted = parameters | shifts
        found = torch.autograd.grad(loss(), list(wanted.values()), allow_unused=True)
    return dict.fromkeys(wholes) | dict(zip(wanted, found, strict=True))


def of_member(member: Member, found: Gradients) -> Tensor | None:
    """What `gradients` found for one member; None for zero."""
    gradient = found[id(_whole(member))]
    return gradient if gradient is None or not isinstance(member, tuple) else gradient[member[1]]


def size(group: Iterable[Member]) -> int:
    """Number of parameters in a group; a place counts its width."""
    return sum(_shape(member).numel() for member in group)


def check_groups(groups: Groups) -> None:
    """Raise `InputError` unless every group has a member."""
    if not groups or not all(groups.values()):
        raise InputError(f"groups is {list(groups)} but must name at least one parameter in each")


@contextmanager
def _moved(places: Iterable[Place]) -> Iterator[dict[int, Tensor]]:
    """A vector of zeros on the hidden states of every place, by the id of the place."""
    shifts: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for place in places:
            if id(place) not in shifts:
                like = next(place.module.parameters(), torch.empty(0))
                shift = torch.zeros(place.width, dtype=like.dtype, device=like.device, requires_grad=True)
                shifts[id(place)] = shift
                hooks.enter_context(_shifted(place, shift))
        yield shifts


def _shifted(place: Place, shift: Tensor):
    def given(module: nn.Module, inputs: tuple) -> tuple:
        return (_plus(inputs[0], shift), *inputs[1:])

    def gives(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (_plus(output[0], shift), *output[1:]) if isinstance(output, tuple) else _plus(output, shift)

    add = place.module.register_forward_hook if place.output else place.module.register_forward_pre_hook
    return add(gives if place.output else given)


def _plus(x: Tensor, shift: Tensor) -> Tensor:
    if x.shape[-1] != len(shift):
        raise InputError(f"width of a place is {len(shift)} but its hidden states have shape {tuple(x.shape)}")
    return x + shift


def _whole(member: Member) -> nn.Parameter | Place:
    return member[0] if isinstance(member, tuple) else member


def _shape(member: Member) -> torch.Size:
    if isinstance(member, Place):
        return torch.Size((member.width,))
    return member[0][member[1]].shape if isinstance(member, tuple) else member.shape


def _dense(member: Member, found: Gradients) -> Tensor:
    gradient = of_member(member, found)
    if gradient is not None:
        return gradient
    like = next((g for g in found.values() if g is not None), torch.empty(0))
    return like.new_zeros(_shape(member))
