"""The simulator of frontier beside formulas, limits and the event engine, and its search beside the whole space."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.lib.distributed.test_frontier import ALL
from workbench.errors import InputError
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.workload import Training
from workbench.lib.distributed.frontier import simulate
from workbench.lib.distributed.frontier_plans import GPT, DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_sim import Pipe, StepSimulator
from workbench.lib.distributed.frontier_tuning import METHODS, Space, coded, importance, penalised, tune
from workbench.lib.distributed.frontier_work import cluster_of, drawn, frontier_cluster

SMALL = DenseConfig("small", layers=8, dim=1024, heads=16, vocab=1024, time=512)
FREE = LinkModel(0.0, 0.0)


@pytest.fixture(scope="module")
def simulator() -> StepSimulator:
    return StepSimulator(frontier_cluster())


# -- the pipeline


@pytest.mark.parametrize("plan", ALL, ids=str)
def test_the_bubble_of_equal_stages_is_the_formula_s(plan: ParallelPlan):
    pipe, v = Pipe(plan, ((1.0, 2.0),) * plan.chunks), plan.interleave
    assert pipe.bubble == pytest.approx((plan.pp - 1) / (v * plan.accum + plan.pp - 1), abs=1e-12)


@pytest.mark.parametrize("plan", ALL[::5], ids=str)
@pytest.mark.parametrize("message", [0.0, 0.7])
def test_uneven_stages_end_when_the_event_engine_says(plan: ParallelPlan, message: float):
    draw = np.random.default_rng(0)
    pipe = Pipe(plan, tuple((float(a), float(b)) for a, b in draw.uniform(0.5, 2, (plan.chunks, 2))), message)
    timeline = pipe.timeline("simulated")
    for stage, end in enumerate(pipe.ends):
        assert max(e.end for e in timeline.events if e.resource == f"stage {stage}") == pytest.approx(end, rel=1e-12)
    assert timeline.overlaps() == [] and pipe.bubble >= 0


# -- a step


def test_one_device_takes_what_its_products_and_its_memory_take(simulator: StepSimulator):
    """A second way to the same sum, of a device with endless memory rate: FLOPs over the rate of whole tiles."""
    machine = Hardware.named("frontier-gcd")
    cluster = cluster_of(replace(machine, device=replace(machine.device, memory_bandwidth=1e24)), 0.5)
    report = StepSimulator(cluster).run(SMALL, ParallelPlan(micro_batch=2, accum=3))
    rate, rows, d = 0.5 * machine.device.flops, 2 * 512, 1024

    def product(outer: int, inner: int) -> float:
        tiles = (rows // 128) * (outer // 128)
        return 2 * 128 * 128 * inner * 110 * math.ceil(tiles / 110) / rate

    layer = product(3 * d, d) + product(d, d) + product(4 * d, d) + product(d, 4 * d) + 2 * rows * 512 * d / rate
    assert report.seconds == pytest.approx(3 * (8 * 3 * layer + 3 * product(1024, d)), rel=1e-6)
    assert report.bubble == report.parts["tp"] == report.parts["dp"] == 0 and report.parts["waiting"] < 1e-12
    assert 0.3 < report.share < 0.5


@pytest.mark.parametrize("plan", [ParallelPlan(tp=4, pp=2, dp=4, accum=4), ParallelPlan(tp=2, pp=4, accum=8)], ids=str)
def test_parts_sum_to_the_step_and_no_step_is_shorter_than_its_bound(plan: ParallelPlan, simulator: StepSimulator):
    for recompute in (False, True):
        report = simulator.run(SMALL, replace(plan, recompute=recompute))
        assert min(report.parts.values()) >= 0 and (report.parts["recompute"] > 0) == recompute
        assert 0 < report.share <= simulator.bound(SMALL, report.plan) < 1
        assert report.seconds == pytest.approx(sum(report.parts.values()))


def test_links_that_cost_nothing_leave_no_communication(simulator: StepSimulator):
    free = StepSimulator(replace(simulator.cluster, node=FREE, network=FREE))
    report = free.run(SMALL, ParallelPlan(tp=2, pp=2, dp=4, accum=4))
    assert report.parts["tp"] == report.parts["dp"] == report.parts["tied"] == 0 < report.parts["waiting"]


def test_micro_batches_fill_the_pipeline_and_chunks_help_where_they_are_few(simulator: StepSimulator):
    shares = [simulator.run(SMALL, ParallelPlan(pp=4, accum=m)) for m in (4, 16, 64, 1024)]
    assert [r.share for r in shares] == sorted(r.share for r in shares) and shares[-1].bubble < 0.15
    equal = [Pipe(ParallelPlan(pp=4, accum=m), ((1.0, 2.0),) * 4).bubble for m in (4, 1024)]
    assert equal[0] > 0.4 and equal[1] < 3e-3
    gains = []
    for m in (4, 64):
        one, two = (Pipe(ParallelPlan(pp=4, accum=m, interleave=v), ((1 / v, 2 / v),) * 4 * v) for v in (1, 2))
        gains.append(one.bubble - two.bubble)
    assert gains[0] > 5 * gains[1] > 0


def test_doubling_copies_and_batch_changes_the_step_by_the_dp_term_alone(simulator: StepSimulator):
    one, two = (simulator.run(SMALL, ParallelPlan(tp=8, dp=dp, accum=4, zero=0)) for dp in (2, 4))
    assert two.seconds - one.seconds == pytest.approx(two.parts["dp"] - one.parts["dp"])
    halved = simulator.run(SMALL, ParallelPlan(tp=8, dp=4, accum=2, zero=0))
    assert one.seconds / 2 < halved.seconds < one.seconds  # the same batch on twice the devices


def test_what_the_paper_saw_of_single_settings(simulator: StepSimulator):
    def share(**sizes) -> float:
        given = {"tp": 1, "pp": 4, "dp": 2, "accum": 16, "recompute": True} | sizes
        return simulator.run(GPT["22B"], ParallelPlan(**given)).share

    tensors = [share(tp=tp) for tp in (1, 2, 4, 8, 16)]
    losses = [1 - b / a for a, b in itertools.pairwise(tensors)]
    assert min(losses) > 0 and losses == sorted(losses)  # the steeper the further they are split
    assert share(pp=2) > share(pp=4) > share(pp=8) and share(micro_batch=4) > share()
    assert share(flash=False) < share() and abs(share(zero=0) - share()) < 0.01
    assert share(pp=4, accum=16) - share(pp=8, accum=32) < 0.3 * (share(pp=4) - share(pp=8))  # kept up by m


def test_clusters_are_drawn_by_their_seed_alone():
    assert drawn(3) == drawn(3) != drawn(4)
    rates = [drawn(seed).compute.efficiency for seed in range(40)]
    assert 0.5 <= min(rates) < 0.53 and 0.67 < max(rates) <= 0.7
    assert {drawn(seed).peak_flops for seed in range(5)} == {191.5e12}


# -- the search


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of(GPT["1T"], 3072)


def test_the_optimum_is_that_of_the_whole_space(space: Space, simulator: StepSimulator):
    assert len(space.points) == 1400 and 50 < len(space.fitting(simulator)) < 400
    some = replace(space, settings=space.settings | {"accum": (8, 32), "zero": (1,)})
    values = some.all_values(simulator)
    assert some.optimum(simulator) == max(values.values())
    setting, share = some.best(simulator, lambda s: s["tp"] == 4)
    assert share == max(value for point, value in values.items() if point[0] == 4) and setting["tp"] == 4
    assert some.best(simulator, lambda s: s["tp"] == 3) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_search_tries_nothing_twice_pays_for_failures_and_is_its_seed_s(method: str, space: Space, simulator):
    objective = space.objective(simulator)
    found = tune(space.settings, objective, 16, method, 5)
    assert found == tune(space.settings, objective, 16, method, 5) != tune(space.settings, objective, 16, method, 6)
    assert len({tuple(t.setting.values()) for t in found.trials}) == len(found.trials) == 16
    assert found.failures + len(found.measured) == 16 and found.failures > 0
    assert all(t.reason for t in found.trials if t.value is None)
    assert found.curve == sorted(found.curve) and found.curve[-1] == (found.best.value if found.measured else 0)


def test_a_forest_begins_with_the_draws_of_random(space: Space, simulator: StepSimulator):
    forest, random = (tune(space.settings, space.objective(simulator), 30, m, 1) for m in ("forest", "random"))
    assert forest.trials[:10] == random.trials[:10] and forest.trials[10:] != random.trials[10:]


def test_a_forest_finds_the_only_setting_that_matters():
    settings = {"a": (1, 2, 4, 8, 16), "b": (1, 2, 4, 8, 16), "c": (0, 1)}

    def objective(setting) -> float:
        if setting["c"]:
            raise InputError("none of these")
        return -abs(math.log2(setting["a"]) - 3) - 0.01 * setting["b"]

    found = tune(settings, objective, 30, "forest", 0)
    assert found.best.setting["a"] == 8 and found.best.setting["b"] == 1
    ranks = importance(found)
    assert set(ranks) == {"a", "b", "c"} and list(ranks.values()) == sorted(ranks.values(), reverse=True)
    assert ranks["b"] < max(ranks["a"], ranks["c"])


def test_a_search_of_the_whole_space_is_exhaustive_by_every_method():
    settings = {"a": (1, 2, 4), "b": (False, True)}
    for method in METHODS:
        found = tune(settings, lambda s: float(s["a"] + s["b"]), 6, method)
        assert len(found.trials) == 6 and found.best.value == 5


def test_failures_are_told_as_the_least_that_was_measured():
    def objective(setting) -> float:
        if setting["a"] == 1:
            raise InputError("too large")
        return float(setting["a"])

    found = tune({"a": (1, 2, 4)}, objective, 3, "grid")
    assert sorted(penalised(found.trials)) == [2.0, 2.0, 4.0]
    assert [t.reason for t in found.trials if t.value is None] == ["too large"]
    assert coded([(1, 0), (8, 1)]).tolist() == [[0.0, -1.0], [3.0, 0.0]]
    nothing = tune({"a": (1,)}, objective, 1)
    with pytest.raises(InputError, match="all 1 trials failed, the last of them: too large"):
        _ = nothing.best


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "annealing"}, "method 'annealing' is unknown"),
        ({"budget": 0}, "budget is 0 but must be from 1 to the 4 settings"),
        ({"budget": 5}, "budget is 5 but must be"),
        ({"settings": {"a": ()}}, "settings['a'] is () but must have one value or more, each once"),
        ({"settings": {"a": (1, 1)}}, "settings['a'] is (1, 1)"),
        ({"objective": lambda s: math.nan}, "is nan but must be a finite number"),
    ],
)
def test_a_search_that_is_none_is_refused(given: dict, message: str):
    whole = {"settings": {"a": (1, 2), "b": (1, 2)}, "objective": lambda s: 1.0, "budget": 4, "method": "random"}
    with pytest.raises(InputError) as error:
        tune(**(whole | given))
    assert message in str(error.value)


# -- on a machine of a user's own


def test_a_user_s_machine_is_told_the_best_mix_and_what_others_cost():
    found = simulate(Hardware.named("frontier-gcd"), Training("22B", 16))
    rows = {row["mix"]: row for row in found.rows}
    assert found.basis == "simulated, calibrated by frontier-gcd (specified)" and found.timeline.overlaps() == []
    best = rows["best of all"]["of the peak (%)"]
    assert all(row["of the peak (%)"] <= best and row["memory (GB)"] <= 0.9 * 64 for row in found.rows)
    assert "dp alone" not in rows  # a whole copy fits on no device


@pytest.mark.parametrize(
    ("model", "world", "message"),
    [
        ("22B", 12, "world is 12 but must be 1, 2, 4, 8, or a multiple of 8"),
        ("22B", 3, "world is 3 but must be 1, 2, 4, 8, or a multiple of 8"),
        ("22B", 1, "world is 1 but no plan of '22B' fits on so few; on 8 one does"),
        ("22B", 10**7, "world is 10000000 but must be at most"),
        ("23B", 8, "model '23B' is unknown"),
    ],
)
def test_a_world_that_does_not_fit_a_machine_is_refused_with_those_that_do(model: str, world: int, message: str):
    with pytest.raises(InputError) as error:
        simulate(Hardware.named("frontier-gcd"), Training(model, world))
    assert message in str(error.value)
    with pytest.raises(InputError, match="world is 0 but must be a whole number of ranks"):
        Training(model, 0)


def test_a_machine_without_links_or_room_is_refused(monkeypatch):
    monkeypatch.setattr("workbench.lib.distributed.frontier.MOST_NODES", 2)
    machine = Hardware.named("frontier-gcd")
    with pytest.raises(InputError, match="must have network but says nothing of it"):
        simulate(replace(machine, network=None), Training("22B"))
    tiny = replace(machine, device=replace(machine.device, memory_bytes=1e6))
    with pytest.raises(InputError, match=r"no plan of it fits in 0\.0009 GB a device, on up to 2 nodes"):
        simulate(tiny, Training("22B"))
