"""Folded layouts compute what one process does, on eight real ones; grids, and what does not fit them."""

import itertools

import pytest

from tests.lib.distributed import folding_ranks as ranks
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.distributed.folding_layouts import Layout
from workbench.lib.distributed.parallel_folding import FoldedMesh


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_processes(ranks.eight, 8, timeout=240)


def test_every_layout_trains_as_one_process_does_in_double_precision(found):
    """Losses, gradients, norms over three clipped steps of AdamW, and the parameters after them."""
    for each in found:
        assert len(each["double"]) == 5
        for run in each["double"]:
            assert max(run["gaps"].values()) < 1e-12, run["gaps"]
            assert (
                run["loss"] == each["double"][0]["loss"]
                or max(abs(a - b) for a, b in zip(run["loss"], each["double"][0]["loss"], strict=True)) < 1e-12
            )
            assert run["loss"][-1] < run["loss"][0]


def test_every_layout_trains_as_one_process_does_in_single_precision(found):
    for each in found:
        for run in each["single"]:
            assert max(run["gaps"].values()) < 1e-5, run["gaps"]


def test_places_of_the_sequence_are_those_of_one_process_and_a_rank_s_own_are_not(found):
    for each in found:
        assert len(each["dropped"]) == 2
        for own in each["dropped"]:
            assert own["sequence"] < 1e-12
    assert all(max(each["dropped"][i]["local"] for each in found) > 1e-4 for i in range(2))


def test_shares_of_the_balance_loss_sum_to_that_of_their_scope(found):
    for each in found:
        own = each["scopes"]
        assert max(own[scope] for scope in ("local", "sequence", "global")) < 1e-12
        values = [own[f"{scope} value"] for scope in ("local", "sequence", "global")]
        assert values == sorted(values, reverse=True) and len(set(values)) == 3  # small scopes are never as even


def test_what_is_sent_is_what_the_formula_says(found):
    for each in found:
        for own in each["wired"]:
            assert own["sent"] == own["formula"] > 0


def test_what_cannot_be_split_is_refused():
    expected = [
        "balance 'all' is unknown",
        "drop 'all' is unknown",
        "tp is 2 but must divide the 3 heads of layer 0",
        "etp is 2 but must divide the 7 hidden units",
        "pp is 2 but must be 1",
        "only 'lbl' is split here",
        "must have an MoELayer of GLUExperts alone",
        "tokens has shape (1, 3)",
        "tokens has shape (0, 4)",
        "tokens has shape (1, 18) but must have rows in dp = 1 equal parts and columns in cp * tp = 2, of which "
        "there are at most seq_len = 16",
    ]
    for said in run_processes(ranks.refused, 2):
        assert len(said) == len(expected) and all(part in one for part, one in zip(expected, said, strict=True)), said


def test_evaluation_has_the_places_of_evaluation_and_what_is_frozen_stays_so():
    for found in run_processes(ranks.evaluated, 2):
        for training in (True, False):
            ours, theirs = found[training]
            assert abs(ours - theirs) < 1e-12
        assert abs(found[True][0] - found[False][0]) > 1e-4
        assert found["frozen"] == ["blocks.0.ffn.experts.down"] and found["norm"] > 0


@pytest.mark.parametrize("world", [8, 16])
def test_both_grids_of_every_layout_partition_the_ranks_and_share_the_stages(world: int):
    sizes = [2**i for i in range(world.bit_length())]
    fit = [(pp, a, b) for pp, a, b in itertools.product(sizes, repeat=3) if world % (pp * a * b) == 0]
    for pp, a, b in fit:  # every attention grid, and every grid of experts
        mesh = FoldedMesh(world, tp=a, cp=b, pp=pp, etp=b, ep=a)
        for grid, axes in ((mesh.attention, ("tp", "cp", "dp")), (mesh.experts, ("etp", "ep", "edp"))):
            for axis in axes:
                groups = grid.groups(axis)
                assert sorted(itertools.chain(*groups)) == list(range(world))
                assert {len(group) for group in groups} == {grid.sizes[axis]}
                [(stride, size)] = mesh.layout.axes(axis)  # what the model of a step takes the group for
                assert groups[0] == [i * stride for i in range(size)]
            stages = [[i + k * world // pp for k in range(pp)] for i in range(world // pp)]
            assert grid.groups("pp") == stages and mesh.layout.axes("pp") == [(world // pp, pp)]
    assert len(fit) == {8: 20, 16: 35}[world]


def test_groups_are_those_that_megatron_documents():
    """Examples in the comments of Megatron-LM's parallel_state.py: orders tp-pp-dp of 2-2-2, and tp-dp-pp of 2-3-4."""
    from workbench.lib.core.distributed.grids import RankGrid

    assert RankGrid({"tp": 2, "pp": 2, "dp": 2}).groups("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    groups = RankGrid({"tp": 2, "dp": 3, "pp": 4}).groups("dp")
    assert groups[:2] == [[0, 2, 4], [1, 3, 5]] and groups[7] == [19, 21, 23]


def test_experts_span_the_ranks_of_attention():
    mesh = FoldedMesh(8, tp=2, cp=2, ep=8, n_experts=8)
    assert mesh.experts.groups("ep") == [list(range(8))] and mesh.attention.groups("tp")[0] == [0, 1]
    before = Layout(2, 2, 2, 1, 2, 2, 2, folded=False)  # without folding ep is a part of dp, beside tp and cp
    assert before.axes("ep") == [(4, 2)] and before.axes("etp") == [(1, 2)] and before.axes("edp") == [(2, 2), (8, 1)]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"tp": 3},
            r"tp x cp = 3x1 does not fit the 8 ranks of a stage; what fits is 1x1, 1x2, 1x4, 1x8, 2x1, 2x2, 2x4",
        ),
        ({"tp": 4, "cp": 4}, "tp x cp = 4x4 does not fit the 8 ranks"),
        ({"etp": 2, "ep": 8}, r"etp x ep = 2x8 does not fit .* 4x2, 8x1"),
        ({"pp": 3}, "pp is 3 but must divide the world of 8: 1, 2, 4, 8"),
        ({"pp": 4, "tp": 4}, "does not fit the 2 ranks of a stage; what fits is 1x1, 1x2, 2x1"),
        ({"ep": 4, "n_experts": 6}, "ep is 4 but must divide the 6 experts evenly: 1, 2 with etp 1"),
        ({"tp": 0}, "tp is 0"),
        ({"ep": True}, "ep is True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(sizes: dict, said: str):
    with pytest.raises(InputError, match=said):
        FoldedMesh(8, **sizes)
