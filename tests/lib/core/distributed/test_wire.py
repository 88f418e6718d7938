"""Bytes that a rank sends, by the formulas, on three real processes."""

import pytest

from tests.lib.core.distributed import ranks
from workbench.lib.core.distributed.processes import run_processes

N = 3
B = 48 * N  # bytes of the tensor that is sent: (2 N, 3) numbers of 8


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_processes(ranks.sends, N)


def test_a_rank_counts_what_it_sends_to_others(found):
    for rank, own in enumerate(found):
        uneven = [(to + 1) * 3 * 4 for to in range(N) if to != rank] if rank else []
        assert own["uneven all_to_all"] == own["functional all_to_all"] == (sum(uneven), len(uneven))
        assert own["even all_to_all"] == (B * (N - 1) / N, N - 1)
        assert own["all_reduce"] == own["functional all_reduce"] == (2 * B * (N - 1) / N, 2 * (N - 1))
        assert own["all_gather"] == own["list all_gather"] == (B * (N - 1), N - 1)
        assert own["reduce_scatter"] == (B * (N - 1) / N, N - 1)
        assert own["broadcast"] == ((B * (N - 1), N - 1) if rank == 1 else (0, 0))
        assert own["send"] == ((B, 1) if rank == 0 else (0, 0))
        assert own["barrier"] == (0, 0)


def test_the_backward_pass_is_counted(found):
    forward, back = 16 * (N - 1), 16 * N * (N - 1) / N  # all_gather of 4 numbers, reduce_scatter of 4 N
    assert all(own["backward"] == (forward + back, 2 * (N - 1)) for own in found)


def test_what_has_no_formula_is_refused_and_not_left_out(found):
    assert all("gather_" in own["refused"] and "cannot be counted" in own["refused"] for own in found)
