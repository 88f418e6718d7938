"""Every plan on real processes computes what one process does, and a rank holds and sends what is counted."""

import itertools

import pytest
import torch

from tests.lib.distributed import frontier_ranks as ranks
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.distributed.frontier_memory import activations, layer_activations, memory, shard, stage_params
from workbench.lib.distributed.frontier_plans import GPT, DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import Pass, in_flight, orders
from workbench.lib.distributed.frontier_train import DTYPES, DenseLayer, drawn_weights

# -- on real processes


@pytest.fixture(scope="module", params=[2, 4, 8])
def found(request) -> list[list[dict]]:
    """For each rank, of each plan."""
    return run_processes(ranks.compared, request.param, timeout=240)


def test_every_plan_trains_as_one_process_does(found):
    """Losses of five steps of AdamW, and all weights after them, in double precision."""
    for rank in found:
        for run in rank:
            assert run["loss"] < 1e-12 and run["weights"] < 1e-12, run["plan"]
            assert run["losses"][-1] < run["losses"][0]


def test_a_rank_holds_and_sends_what_is_counted(found):
    for run in itertools.chain(*found):
        for what in ("params", "held", "sent", "most"):
            real, counted = run[what]
            assert real == counted, (what, run["plan"])


def test_in_single_precision_too():
    for rank in run_processes(ranks.compared, 2, 4, timeout=120):
        assert all(run["loss"] < 1e-5 and run["weights"] < 1e-5 for run in rank)


def test_sharded_states_are_those_of_the_whole_optimiser_bit_for_bit():
    for rank in run_processes(ranks.sharded, 3, timeout=120):
        assert rank["weights"] and rank["states"] and rank["padding"] > 0
        assert rank["numbers"][0] == rank["numbers"][1]


def test_what_does_not_fit_is_refused_with_what_does():
    expected = [
        "tp * pp * dp is 3 but must be the world of 2 ranks: each of them one of 1, 2",
        "tp * pp * dp is 4 but must be the world of 2 ranks",
        "interleave is 2 but must be 1 with one stage",
        "tokens has shape (3, 9) but must be (2, 9)",
    ]
    for said in run_processes(ranks.refused, 2, timeout=120):
        assert len(said) == len(expected) and all(part in one for part, one in zip(expected, said, strict=True)), said


# -- plans


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tp is 0 but must be a whole number, at least 1"),
        ({"accum": True}, "accum is True but must be"),
        ({"zero": 3}, "zero is 3 but must be 0 or 1"),
        ({"schedule": "1b1f"}, "schedule '1b1f' is unknown"),
    ],
)
def test_a_size_that_is_none_is_refused(sizes: dict, message: str):
    with pytest.raises(InputError) as error:
        ParallelPlan(**sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ParallelPlan(tp=5), "tp is 5 but must divide heads = 48"),
        (ParallelPlan(pp=5), "pp * interleave is 5 but must divide layers = 48"),
        (ParallelPlan(pp=4, interleave=2, accum=6), "accum is 6 but must be a multiple of pp = 4"),
        (ParallelPlan(pp=4, interleave=2, accum=4, schedule="gpipe"), "interleave is 2 but must be 1"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_says_why(plan: ParallelPlan, message: str):
    assert not plan.valid(GPT["22B"]) and message in plan.problem(GPT["22B"])


def test_a_world_that_does_not_fit_is_refused_with_those_that_do():
    assert ParallelPlan.fitted(24, tp=4, pp=2).dp == 3
    with pytest.raises(InputError, match=r"tp \* pp is 5 .* be one of 1, 2, 3, 4, 6, 8, 12, 24"):
        ParallelPlan.fitted(24, tp=5)
    with pytest.raises(InputError, match="size 'pt' is unknown"):
        ParallelPlan.fitted(24, pt=4)
    with pytest.raises(InputError, match="heads is 3 but must divide dim = 16"):
        DenseConfig("odd", 1, 16, 3)
    with pytest.raises(InputError, match="width is 3"):
        DenseConfig("odd", 1, 16, 4, width=3)


def test_published_sizes_have_their_parameters_and_a_trillion_takes_120_million_exaflop():
    assert {name: round(config.params / 1e9) for name, config in GPT.items()} == {"22B": 22, "175B": 175, "1T": 1008}
    config = GPT["1T"]
    steps = 20e12 / (1024 * config.time)
    assert steps * config.flops(1024) == pytest.approx(1.2e26, rel=0.05)


# -- schedules

ALL = [
    ParallelPlan(pp=pp, accum=m, interleave=v, schedule=schedule)
    for pp, m, v, schedule in itertools.product((1, 2, 3, 4), (1, 2, 4, 6, 8, 12), (1, 2, 3), ("1f1b", "gpipe"))
    if v == 1 or (pp > 1 and m % pp == 0 and schedule == "1f1b")
]


@pytest.mark.parametrize("plan", ALL, ids=str)
def test_every_order_does_every_pass_once_and_never_waits_for_ever(plan: ParallelPlan):
    lanes = [list(lane) for lane in orders(plan)]
    every = {Pass(b, c, k) for b, c, k in itertools.product((False, True), range(plan.chunks), range(plan.accum))}
    assert sorted(map(str, itertools.chain(*lanes))) == sorted(map(str, every))
    assert all(work.chunk % plan.pp == stage for stage, lane in enumerate(lanes) for work in lane)
    done: set[Pass] = set()
    while any(lanes):
        ready = [
            lane for lane in lanes
            if lane and (lane[0].before(plan.chunks) is None or lane[0].before(plan.chunks) in done)
            and (not lane[0].backward or Pass(False, lane[0].chunk, lane[0].micro) in done)
        ]  # fmt: skip
        assert ready, "all wait"
        done |= {lane.pop(0) for lane in ready}


def test_passes_in_flight_are_those_that_1f1b_and_gpipe_have():
    for plan in (plan for plan in ALL if plan.interleave == 1):
        for stage in range(plan.pp):
            most = min(plan.accum, plan.pp - stage) if plan.schedule == "1f1b" else plan.accum
            assert in_flight(plan, stage) == most


# -- memory


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("width", [4, 8])
def test_activations_are_those_that_autograd_keeps(width: int, flash: bool):
    config = DenseConfig("block", 1, 64, 4, vocab=8, time=32, width=width)
    plan = ParallelPlan(micro_batch=3, flash=flash)
    layer, kept = DenseLayer(config, flash=flash).to(DTYPES[width]), {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.dtype.is_floating_point:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return t

    x = torch.randn(3, 32, 64, dtype=DTYPES[width], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    unfused = 2 * 3 * 32 * 64 * width  # the norms of the CPU keep their rows before the weight too
    assert layer_activations(config, plan) + unfused == pytest.approx(sum(n for _, n in kept.values()), rel=0.02)


def test_memory_shrinks_by_what_is_split_and_by_nothing_else():
    config = GPT["22B"]
    alone, whole = ParallelPlan(), memory(GPT["22B"], ParallelPlan(), 0)
    n = stage_params(config, alone, 0)
    assert n == config.params and (whole.weights, whole.gradients, whole.states) == (2 * n, 2 * n, 12 * n)
    split = memory(config, ParallelPlan(dp=8), 0)
    assert split.weights == whole.weights and split.states == pytest.approx(whole.states / 8)
    assert memory(config, ParallelPlan(dp=8, zero=0), 0) == whole
    assert shard(n, ParallelPlan(dp=7)) == -(-n // 7)
    parts = sum(stage_params(config, ParallelPlan(pp=4), stage) for stage in range(4))
    assert parts == n + config.vocab * config.dim  # the first and the last stage have the embedding both
    assert activations(config, ParallelPlan(recompute=True), 0) < activations(config, alone, 0) / 4
    assert (
        activations(config, ParallelPlan(pp=4, accum=8), 0)
        > 3.9 * activations(config, ParallelPlan(pp=4, accum=8), 2) / 2
    )


def test_drawn_weights_are_the_same_again():
    a, b = (drawn_weights(ranks.config(), 3) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
