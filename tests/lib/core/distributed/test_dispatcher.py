"""Tokens brought to experts on other ranks and back: the same as in one process, on real ones."""

import pytest

from tests.lib.core.distributed import dispatch_ranks as ranks
from workbench.lib.core.distributed.processes import run_processes

WORLD = len(ranks.ROWS)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_processes(ranks.everything, WORLD)


def test_every_layout_computes_what_one_process_does(found):
    for own in (each["layouts"] for each in found):
        assert len(own) == 6
        for row in own:
            gaps = {name: value for name, value in row.items() if name == "y" or name.endswith(".grad")}
            assert len(gaps) == 5 and max(gaps.values()) < 1e-12, (row["sizes"], row["form"], gaps)
            assert row["counts"]


def test_what_is_sent_is_what_the_formula_says(found):
    """Rows of pairs that leave for their owners and for the other slices, there and back, and the counts before; or all
    rows to all ranks and back, with token, expert and weight of each pair."""
    row, rows, pairs = ranks.D * 8, sum(ranks.ROWS), sum(ranks.ROWS) * ranks.K
    for all_ranks in zip(*(each["layouts"] for each in found), strict=True):
        etp, ep = all_ranks[0]["sizes"]["etp"], all_ranks[0]["sizes"]["ep"]
        total, away = sum(own["bytes"]["all_to_all"] for own in all_ranks), sum(own["away"] for own in all_ranks)
        if all_ranks[0]["form"] == "alltoall":
            counts = 8 * (ranks.E // ep) * ((ep - 1) + ep * (etp - 1)) * WORLD
            assert total == 2 * row * (away + pairs * (etp - 1)) + counts
        else:
            assert total == (2 * row * rows + 24 * pairs) * (WORLD - 1)


def test_rows_are_conserved_without_rows_and_without_experts(found):
    for each in found:
        assert each["conserves"] == {"alltoall": True, "allgather": True}


def test_places_of_the_whole_sequence_do_not_depend_on_its_split(found):
    for own in (each["drops"] for each in found):
        for policy in ("probability", "position"):
            kept, _ = own[policy, "sequence", 1]
            assert 0 < sum(kept) < len(kept)  # some is dropped
            for split in (2, 4):
                assert own[policy, "sequence", split][0] == kept
                assert sum(own[policy, "sequence", split][1]) == sum(kept)  # and only what is kept is sent
                assert own[policy, "local", split][0] != kept
            assert own[policy, "local", 1][0] == kept


def test_gradients_go_back_the_way_rows_came(found):
    for own in (each["adjoints"] for each in found):
        assert len(own) == 3 and max(own.values()) < 1e-12


def test_gradients_are_summed_over_copies_and_clipped_by_the_norm_of_the_whole(found):
    for small, large in (each["clips"] for each in found):
        assert max(small["norm"], small["gaps"], large["norm"], large["gaps"]) < 1e-12
        assert small["clipped"] and not large["clipped"]


def test_what_cannot_be_dispatched_is_refused(found):
    for said in (each["refusals"] for each in found):
        expected = [
            "6 experts do not divide evenly over 4 ranks of ep: sizes that fit are 1, 2, 3, 6",
            "form 'both' is unknown",
            "sequence is a group but there is no capacity",
            "'random', which ranks would draw differently",
            "routing is of 3 tokens and 8 experts but must be of 2 and 8",
            "ranks is 0",
            "max_norm is 0.0",
        ]
        assert len(said) == len(expected) and all(part in one for part, one in zip(expected, said, strict=True))
