"""Ranks as the points of a grid: which of them form a group along which axes.

grid = RankGrid({"tp": 2, "cp": 2, "dp": 2})       # rank = tp + 2 (cp + 2 dp): the first axis is the fastest
grid.groups("tp")                                  # [[0, 1], [2, 3], [4, 5], [6, 7]]
grid.groups(("tp", "dp"))                          # [[0, 1, 4, 5], [2, 3, 6, 7]]
group = grid.process_group("tp")                   # torch's, of this process
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from workbench.errors import InputError, unknown


class RankGrid:
    """W ranks as a grid of named axes, the first axis fastest.

    Args:
        sizes: axis -> its size; they multiply to the world W.

    Raises:
        InputError: there is no axis, or a size is below 1.
    """

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = dict(sizes)
        if not self.sizes:
            raise InputError("sizes is empty but must name at least one axis")
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"sizes[{axis!r}] is {size!r} but must be a whole number of ranks, at least 1")
        self.world = math.prod(self.sizes.values())

    @classmethod
    def filled(cls, world: int, sizes: Mapping[str, int | None]) -> "RankGrid":
        """The grid of a world in which the one axis of size None takes what the others leave.

        Raises:
            InputError: the other sizes do not divide the world. The message has the products that do.
        """
        (rest,) = [axis for axis, size in sizes.items() if size is None]
        given = cls({axis: size for axis, size in sizes.items() if size is not None} | {rest: 1})
        if world < 1 or world % given.world:
            product = " * ".join(f"{axis} {size}" for axis, size in sizes.items() if size is not None)
            fit = ", ".join(map(str, divisors(world))) or "none"
            raise InputError(
                f"{product} = {given.world} ranks do not fit a world of {world}: those that divide it are {fit}"
            )
        return cls({axis: world // given.world if size is None else size for axis, size in sizes.items()})

    def __repr__(self) -> str:
        return f"RankGrid({self.sizes})"

    def coords(self, rank: int) -> dict[str, int]:
        """Axis -> where on it the rank is."""
        if not 0 <= rank < self.world:
            raise InputError(f"rank is {rank} but must be 0 to {self.world - 1}")
        found = {}
        for axis, size in self.sizes.items():
            rank, found[axis] = divmod(rank, size)
        return found

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank at a point; axes that are not named are at 0."""
        self._known(coords)
        found, stride = 0, 1
        for axis, size in self.sizes.items():
            at = coords.get(axis, 0)
            if not 0 <= at < size:
                raise InputError(f"coords[{axis!r}] is {at} but must be 0 to {size - 1}")
            found, stride = found + at * stride, stride * size
        return found

    def groups(self, axes: str | Iterable[str]) -> list[list[int]]:
        """The groups of ranks that differ along these axes alone, in order; each rank is in exactly one."""
        axes = self._known([axes] if isinstance(axes, str) else axes)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            key = tuple(at for axis, at in self.coords(rank).items() if axis not in axes)
            found.setdefault(key, []).append(rank)
        return list(found.values())

    def group(self, rank: int, axes: str | Iterable[str]) -> list[int]:
        """The group along these axes that a rank is in."""
        self.coords(rank)  # refuses one that is not there
        return next(group for group in self.groups(axes) if rank in group)

    def process_group(self, axes: str | Iterable[str]) -> Any:
        """This process's group along these axes. All ranks must ask for the same ones in the same order.

        Raises:
            InputError: the world of torch.distributed is not this grid's.
        """
        if dist.get_world_size() != self.world:
            raise InputError(f"{self} has {self.world} ranks but the world has {dist.get_world_size()}")
        mine, _ = dist.new_subgroups_by_enumeration(self.groups(axes))
        return mine

    def _known(self, axes: Iterable[str]) -> list[str]:
        axes = list(axes)
        for axis in axes:
            if axis not in self.sizes:
                raise unknown("axis", axis, self.sizes)
        return axes


def divisors(n: int) -> list[int]:
    """The numbers that divide n, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]
