"""Networks of a user's own on three processes: shared experts, frozen and unused parameters, ranks without rows."""

import pytest

from tests.lib.core.distributed import odd
from workbench.lib.core.distributed.processes import run_processes


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_processes(odd.everything, 3)


def test_every_layout_trains_them_as_one_process_does(found):
    for each in found:
        assert len(each["layouts"]) == 3 and max(each["layouts"].values()) < 1e-12, each["layouts"]


def test_so_do_expert_groups_and_what_states_in_a_row_cannot_hold_is_refused(found):
    for own in (each["together"] for each in found):
        assert max(own["plain"], own["zero"]) < 1e-12, own
        assert own["refused"].startswith("a parameter of shape (3,) has no gradient but must have one, or be frozen")


def test_states_that_are_shared_out_go_on_to_the_same_bits(found):
    for own in (each["resumed"] for each in found):
        assert own["equal"] and own["moved"]
        assert own["refused"].startswith("state_dict has parts of shapes [] but must have [(")


def test_ranks_without_rows_take_part_in_both_directions(found):
    for rank, each in enumerate(found):
        assert each["everything_to_one"] == [0.0] * (0 if rank == 1 else 8)
