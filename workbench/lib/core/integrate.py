"""Fixed-step Runge-Kutta of fourth order, of any number of fields and starts in one pass.

A field gives the rates of all states at once, so a bank of M experts over E environments is integrated as one: what
stands before the last dimension are as many systems, which share the steps and nothing else. Gradients flow through all
of it.

    x(t + h) = x + h (k1 + 2 k2 + 2 k3 + k4) / 6
    k1 = f(t, x),  k2 = f(t + h/2, x + h k1 / 2),  k3 = f(t + h/2, x + h k2 / 2),  k4 = f(t + h, x + h k3)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError

Field = Callable[[Tensor, Tensor], Tensor]
"""field(t, x (..., n)) -> dx/dt (..., n); t as `times` has it, one point of the grid of each system."""


class DivergedError(FloatingPointError):
    """A trajectory has left the finite numbers.

    Attributes:
        where: its indices in the dimensions before the last.
        point, time: the first of the grid at which it had.
    """

    def __init__(self, where: tuple[int, ...], point: int, time: float, name: str | None = None):
        super().__init__(
            f"{name or f'trajectory {list(where)}'} leaves the finite numbers by point {point} (time {time:.3g}): the "
            "system is too stiff for the step, or its field too steep; take more substeps"
        )
        self.where, self.point, self.time = where, point, time


def rk4(
    field: Field,
    x0: Float[Tensor, "*systems n"],
    times: Float[Tensor, "*grids points"],
    substeps: int = 1,
    check: bool = True,
) -> Float[Tensor, "points *systems n"]:
    """The states at every point of the grid, the first of them the start.

    Args:
        times: rising; one grid for all, or a grid for each system, in dimensions that broadcast to those of x0 before
            the last.
        substeps: equal steps from one point to the next.
        check: raise `DivergedError` where a state is not finite; otherwise such states are given back.

    Raises:
        InputError: a grid has one point or none, or does not rise, or fits no start.
    """
    check_grid(times, x0)
    if substeps < 1:
        raise InputError(f"substeps is {substeps} but must be at least 1")
    points, steps = times.movedim(-1, 0), times.diff(dim=-1).movedim(-1, 0) / substeps
    x, found = x0, [x0]
    for start, h in zip(points, steps, strict=False):
        h_of_x = h[..., None] if h.ndim else h
        for part in range(substeps):
            x = _step(field, start + part * h, h, h_of_x, x)
        found.append(x)
    states = torch.stack(found)
    if check and not bool(states.detach().isfinite().all()):
        point, *where = (~states.detach().isfinite().all(-1)).nonzero()[0].tolist()
        time = points.broadcast_to(states.shape[:-1])[(point, *where)] if times.ndim > 1 else points[point]
        raise DivergedError(tuple(where), point, float(time))
    return states


def _step(field: Field, t: Tensor, h: Tensor, h_of_x: Tensor, x: Tensor) -> Tensor:
    half = h_of_x / 2
    k1 = field(t, x)
    k2 = field(t + h / 2, torch.addcmul(x, k1, half))
    k3 = field(t + h / 2, torch.addcmul(x, k2, half))
    k4 = field(t + h, torch.addcmul(x, k3, h_of_x))
    return torch.addcmul(x, torch.add(k1, k4).add(k2 + k3, alpha=2), h_of_x / 6)


def check_grid(times: Tensor, x0: Tensor) -> None:
    """Raise `InputError` unless the grids rise, have two points or more, and are as many as the starts."""
    if times.ndim < 1 or times.shape[-1] < 2:
        points = times.shape[-1] if times.ndim else 0
        raise InputError(f"times has {points} point{'s' * (points != 1)} but must have at least 2")
    if not bool((times.diff(dim=-1) > 0).all()) or not bool(times.isfinite().all()):
        raise InputError("times does not rise from every point to the next, but must")
    grids, systems = times.shape[:-1], x0.shape[:-1]
    if len(grids) > len(systems) or any(a not in (1, b) for a, b in zip(grids[::-1], systems[::-1], strict=False)):
        raise InputError(f"times has grids of shape {tuple(grids)} but x0 has systems of shape {tuple(systems)}")
