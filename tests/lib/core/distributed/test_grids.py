"""Ranks on a grid: groups that partition them, and torch's own groups of processes."""

import itertools

import pytest

from tests.lib.core.distributed import ranks
from workbench.errors import InputError
from workbench.lib.core.distributed.grids import RankGrid, divisors
from workbench.lib.core.distributed.processes import run_processes


def grids(world: int) -> list[RankGrid]:
    sizes = itertools.product(divisors(world), repeat=4)
    return [
        RankGrid(dict(zip("abcd", own, strict=True))) for own in sizes if world == own[0] * own[1] * own[2] * own[3]
    ]


@pytest.mark.parametrize("world", [1, 6, 8, 16])
def test_the_groups_along_any_axes_partition_the_ranks(world: int):
    for grid in grids(world):
        assert grid.world == world
        for k in range(5):
            for axes in itertools.combinations("abcd", k):
                groups = grid.groups(axes)
                size = 1
                for axis in axes:
                    size *= grid.sizes[axis]
                assert sorted(itertools.chain(*groups)) == list(range(world)) and {len(g) for g in groups} == {size}
                for group in groups:  # they differ along these axes alone
                    places = [grid.coords(rank) for rank in group]
                    assert len({tuple(at[axis] for axis in "abcd" if axis not in axes) for at in places}) == 1


def test_the_first_axis_is_the_fastest_and_ranks_are_found_again():
    grid = RankGrid({"tp": 2, "cp": 3, "dp": 2})
    for rank in range(12):
        at = grid.coords(rank)
        assert rank == at["tp"] + 2 * (at["cp"] + 3 * at["dp"]) == grid.rank(at)
    assert grid.groups("cp")[:2] == [[0, 2, 4], [1, 3, 5]] and grid.group(9, "cp") == [7, 9, 11]
    assert grid.groups(("dp", "tp"))[0] == [0, 1, 6, 7] and grid.groups(()) == [[rank] for rank in range(12)]


def test_an_axis_takes_what_the_others_leave():
    assert RankGrid.filled(12, {"ep": 4, "edp": None}).sizes == {"ep": 4, "edp": 3}
    with pytest.raises(InputError, match=r"ep 4 = 4 ranks do not fit a world of 6: .* are 1, 2, 3, 6"):
        RankGrid.filled(6, {"ep": 4, "edp": None})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RankGrid({}), "sizes is empty"),
        (lambda: RankGrid({"tp": 0}), r"sizes\['tp'\] is 0"),
        (lambda: RankGrid({"tp": True}), r"sizes\['tp'\] is True"),
        (lambda: RankGrid({"tp": 2}).coords(2), "rank is 2 but must be 0 to 1"),
        (lambda: RankGrid({"tp": 2}).group(-1, "tp"), "rank is -1"),
        (lambda: RankGrid({"tp": 2}).rank({"tp": 2}), r"coords\['tp'\] is 2"),
        (lambda: RankGrid({"tp": 2}).groups("dp"), "axis 'dp' is unknown"),
    ],
)
def test_what_fits_no_grid_is_refused(call, said: str):
    with pytest.raises(InputError, match=said):
        call()


def test_processes_form_the_groups_of_the_grid():
    grid = RankGrid({"tp": 2, "cp": 1, "dp": 2})
    for rank, found in enumerate(run_processes(ranks.meets, 4)):
        assert "has 3 ranks but the world has 4" in found.pop("refused")
        assert found == {axes: grid.group(rank, axes) for axes in found} and len(found) == 4
