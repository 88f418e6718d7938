"""Orders of reading, the cache of planes, and serving in simulated time."""

import random

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.serving.d2moe_orders import (
    BitTrace,
    Job,
    PlaneCosts,
    bit_trace,
    fifo_order,
    hebf_order,
    johnson_order,
    makespan,
    optimal_order,
    progressive_order,
)
from workbench.lib.serving.d2moe_schedule import POLICIES, D2Sim, LayerRun, PlaneCache

SIZES = {level: 10 * level for level in range(2, 9)}


def costs(read: float = 0.01, compute: float = 0.1, dense: float = 0.0) -> PlaneCosts:
    """Reading takes 0.01 s a byte; computing 0.1 s and a little by tokens and bits."""
    table = {level: RateTable((1.0, 8.0), (compute + 0.01 * level, 2 * compute + 0.01 * level)) for level in SIZES}
    return PlaneCosts(SIZES, LinkModel(0.0, read), table, dense, "simulated, by hand")


def jobs_of(seed: int, n: int = 6, layer: int = 0) -> list[Job]:
    draw = random.Random(seed)
    return [Job((layer, expert), draw.randint(1, 8), draw.choice((2, 3, 4, 8))) for expert in draw.sample(range(12), n)]


def trace_of(seed: int, steps: int = 6, layers: int = 2) -> BitTrace:
    found = [
        tuple(tuple(jobs_of(100 * seed + 10 * step + layer, 5, layer)) for layer in range(layers))
        for step in range(steps)
    ]
    return BitTrace(tuple(found), 8, "drawn")


def in_order(order: list, jobs: list[Job]) -> list[Job]:
    """Jobs in the order in which they are read; those that are there first."""
    place = {expert: at for at, (expert, _) in enumerate(order)}
    return sorted(jobs, key=lambda job: place.get(job.expert, -1))


def test_orders_by_hand():
    jobs = [Job((0, 0), 1, 4), Job((0, 1), 5, 2), Job((0, 2), 5, 3), Job((0, 3), 2, 4), Job((0, 4), 9, 2)]
    there = {(0, 2): 2, (0, 4): 2}
    assert fifo_order(jobs, there, costs()) == [((0, 0), 4), ((0, 1), 2), ((0, 2), 3), ((0, 3), 4)]
    assert hebf_order(jobs, there, costs()) == [((0, 2), 3), ((0, 1), 2), ((0, 3), 4), ((0, 0), 4)]
    assert progressive_order(jobs, there, costs()) == [
        ((0, 1), 2), ((0, 3), 2), ((0, 0), 2), ((0, 2), 3), ((0, 3), 3), ((0, 3), 4), ((0, 0), 3), ((0, 0), 4)
    ]  # fmt: skip


@pytest.mark.parametrize("read", [0.002, 0.005, 0.02])
def test_no_order_is_better_than_the_best_of_all_and_johnsons_is_it(read):
    better = 0
    for seed in range(20):
        jobs, priced = jobs_of(seed), costs(read, 0.05 + 0.01 * (seed % 5))
        there = {job.expert: 2 for job in jobs[:2]}
        times = {
            order: makespan(in_order(order(jobs, there, priced), jobs), there, priced)
            for order in (optimal_order, johnson_order, hebf_order, fifo_order)
        }
        assert times[johnson_order] == pytest.approx(times[optimal_order], rel=1e-12)
        assert times[hebf_order] >= times[optimal_order] - 1e-12
        read_all = sum(priced.load_seconds(job, there.get(job.expert, 0)) for job in jobs)
        compute_all = sum(priced.compute_seconds(job.tokens, job.bits) for job in jobs)
        assert times[optimal_order] >= max(read_all, compute_all) - 1e-12
        better += times[hebf_order] <= times[fifo_order] + 1e-12
    assert better > 10  # it is worse than first come, first served in some


def test_a_layer_that_fits_takes_the_makespan_of_its_order():
    for seed in range(10):
        for policy in ("fifo", "johnson", "hebf"):
            jobs, priced = jobs_of(seed), costs(0.005)
            run = D2Sim(BitTrace(((tuple(jobs),),), 8, ""), priced, policy, 10_000).run()
            order = POLICIES[policy].order(jobs, {}, priced)
            assert run.seconds == pytest.approx(makespan(in_order(order, jobs), {}, priced))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [80, 130, 240, 4000])
@pytest.mark.parametrize("dense", [0.0, 0.07])
def test_what_is_served_holds_to_channel_processor_budget_and_planes(policy, budget, dense, monkeypatch):
    trace, priced = trace_of(budget), costs(0.004, dense=dense)
    sim, held, begin = D2Sim(trace, priced, policy, budget), [], PlaneCache.begin
    monkeypatch.setattr(PlaneCache, "begin", lambda own, *load: (begin(own, *load), held.append(own.used))[0])
    run = sim.run()
    assert run.timeline.overlaps() == [] and run.timeline.basis == "simulated, by hand"
    assert max(held) == run.peak_bytes <= budget
    wanted = [(at, job) for at, step in enumerate(trace.steps) for layer in step for job in layer]
    assert sorted((at, job.expert, job.tokens) for at, job in wanted) == sorted(job[:3] for job in run.jobs)
    asked = {(at, job.expert): job.bits for at, job in wanted}
    for at, expert, _, level in run.jobs:
        if policy == "progressive":
            assert 2 <= level <= asked[at, expert]
        else:
            assert level == (8 if policy == "whole" else asked[at, expert])
    busy = run.timeline.busy()
    assert run.seconds >= busy["compute"] - 1e-9
    assert run.read_bytes == pytest.approx(busy["disk"] / 0.004)
    # an expert computes when the last plane that it needs has come
    read = {}
    for event in run.timeline.on("disk"):
        read.setdefault(event.name.split(",")[0], []).append(event)
    for event in run.timeline.on("compute"):
        loads = read.get(event.name.split(",")[0], ())
        if policy == "progressive":
            loads = [load for load in loads if load.group == "base"]
        assert all(load.end <= event.start + 1e-9 for load in loads)
    assert 0 <= run.bubbles < 1 and sim.run() == run  # nothing is left of the first
    if policy != "progressive":
        assert run.bits_used == pytest.approx(8 if policy == "whole" else run.bits_wanted)


def test_with_room_for_all_nothing_is_read_twice():
    trace = trace_of(3)
    run, most = D2Sim(trace, costs(), "hebf", 10_000).run(), {}
    for job in trace.jobs():
        most[job.expert] = max(most.get(job.expert, 0), job.bits)
    assert run.read_bytes == run.peak_bytes == sum(SIZES[level] for level in most.values())


def test_progressive_is_faster_and_says_what_it_gave_up():
    trace, priced = trace_of(1), costs(0.02)
    progressive, hebf = (D2Sim(trace, priced, policy, 10_000).run() for policy in ("progressive", "hebf"))
    assert progressive.bits_used < progressive.bits_wanted == hebf.bits_used
    assert progressive.seconds < hebf.seconds


def test_the_coldest_expert_loses_its_top_plane_first_and_its_base_last():
    dropped = []
    cache = PlaneCache(100, costs(), drop=lambda expert, level: dropped.append((expert, level)))
    for expert, level in (((0, 0), 4), ((0, 1), 3), ((0, 2), 3)):
        assert cache.begin(expert, level) == SIZES[level]
        cache.finish()
    assert cache.used == cache.peak == 100
    cache.observe(0, {0: 9, 1: 1, 2: 5})
    assert cache.make_room(40, {(0, 2): 3})
    assert dropped == [((0, 1), 3), ((0, 1), 2), ((0, 0), 4)]
    assert cache.levels == {(0, 0): 3, (0, 2): 3} and cache.used == 60 and cache.dropped == 3
    assert not cache.make_room(80, {(0, 2): 3})  # what is needed stays
    assert cache.levels == {(0, 2): 3}


def test_what_is_on_its_way_has_its_room_and_is_not_there():
    cache = PlaneCache(100, costs())
    cache.begin((0, 0), 6)
    assert cache.used == 60 and cache.level((0, 0)) == 0
    with pytest.raises(InputError, match="nothing else on its way"):
        cache.begin((0, 1), 2)
    cache.finish()
    with pytest.raises(InputError, match="fit into 40"):
        cache.begin((0, 1), 5)
    cache.begin((0, 0), 8)
    assert not cache.make_room(40, {})  # the first six planes are a part of what comes
    assert cache.level((0, 0)) == 6 and cache.peak == 80


def test_hotness_is_of_steps_that_are_over():
    cache = PlaneCache(100, costs(), decay=0.5)
    cache.observe(0, {3: 8})
    cache.observe(1, {3: 2})
    cache.observe(0, {4: 4})
    assert cache.heat == {(0, 3): 2.0, (1, 3): 1.0, (0, 4): 2.0}


def test_parts_of_experts_that_cannot_compute_make_room_for_one_that_can():
    """Two experts are half there and neither's rest fits: the one that is read last gives way."""
    cache = PlaneCache(80, costs())
    for expert in ((0, 0), (0, 1)):
        cache.begin(expert, 4)
        cache.finish()
    run = LayerRun([Job((0, 0), 1, 8), Job((0, 1), 5, 8)], cache, POLICIES["hebf"])
    assert run.next_job() is None
    assert run.next_load() == ((0, 1), 4, 8)
    cache.finish()
    assert cache.levels == {(0, 1): 8} and cache.used == 80
    assert run.next_job() == (Job((0, 1), 5, 8), 8)
    assert run.next_load() is None  # until that has computed
    run.done()
    assert run.next_load() == ((0, 0), 0, 8)


def test_a_trace_of_requests_loads_an_expert_once_at_the_most_bits():
    experts = torch.tensor([[[[3, 1]], [[1, 0]]], [[[2, 0]], [[0, 2]]]])  # (steps 2, requests 2, layers 1, k 2)
    bits = torch.tensor([[[[4, 2]], [[3, 2]]], [[[2, 8]], [[4, 3]]]])
    trace = bit_trace(experts, bits, "by hand")
    assert trace.steps == (
        ((Job((0, 3), 1, 4), Job((0, 1), 2, 3), Job((0, 0), 1, 2)),),
        ((Job((0, 2), 2, 3), Job((0, 0), 2, 8)),),
    )
    assert trace.requests == 2 and trace.mean_bits() == 4


def test_costs_are_plain_values_and_back():
    priced = costs(dense=0.25)
    assert PlaneCosts.from_dict(priced.to_dict(), priced.basis) == priced


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PlaneCache(79, costs()), "budget is 79 bytes but must hold at least one whole expert, 80"),
        (lambda: PlaneCache(float("nan"), costs()), "budget is nan"),
        (lambda: PlaneCache(80, costs(), decay=1.0), "decay is 1.0"),
        (lambda: BitTrace((((Job((0, 0), 1, 2),),),), 0, ""), "requests is 0"),
        (lambda: BitTrace((((Job((0, 0), 1, 2), Job((0, 0), 1, 3)),),), 1, ""), "must have each expert once"),
        (lambda: BitTrace((((Job((1, 0), 1, 2),),),), 1, ""), "layer 0 has jobs of .* of this layer"),
        (lambda: BitTrace((((Job((0, 0), 0, 2),),),), 1, ""), "tokens is 0"),
        (lambda: PlaneCosts({2: 5, 4: 9}, LinkModel(0, 1), {}, 0.0, ""), "no bit left out"),
        (lambda: BitTrace((), 8, ""), "steps is empty"),
        (lambda: BitTrace((((),),), 8, ""), "at least one step with a job"),
        (lambda: D2Sim(trace_of(0), costs(), "hbf", 100), "policy 'hbf' is unknown; did you mean 'hebf'"),
        (lambda: D2Sim(BitTrace((((Job((0, 0), 1, 1),),),), 1, ""), costs(), "hebf", 100), "bits of a job '?1'? is"),
        (lambda: PlaneCosts({2: 5, 3: 5}, LinkModel(0, 1), {}, 0.0, ""), "more bytes for each further bit"),
        (lambda: PlaneCosts({2: 5}, LinkModel(0, 1), {}, 0.0, ""), "no times for level 2"),
        (lambda: costs(dense=-1.0), "dense is -1.0"),
        (lambda: optimal_order(jobs_of(0, 8), {}, costs()), "jobs has 8 but every order is tried of at most 7"),
        (lambda: bit_trace(torch.zeros(0, 1, 1, 2).long(), torch.zeros(0, 1, 1, 2).long(), ""), "steps is empty"),
    ],
)
def test_wrong_input_is_named(call, message, unchecked):
    with pytest.raises(InputError, match=message):
        call()
