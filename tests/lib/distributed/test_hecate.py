"""Hecate: gathers and their adjoint on real processes, any placement beside one process, plans beside the best."""

import itertools
import math

import pytest
import torch

from tests.lib.distributed.hecate_ranks import bank, batch, everything, plans
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.core.simulation.workload import Workload
from workbench.lib.distributed.hecate import FSSDPExperts
from workbench.lib.distributed.hecate_plans import (
    dispatch_plan,
    even_owners,
    level,
    makespan,
    plan_placement,
    plan_sharding,
)
from workbench.lib.distributed.hecate_sim import POLICIES, HecateSim, Machine, drawn, loads_of, simulate
from workbench.lib.distributed.sparse_shards import sparse_all_gather, transfers

# -- on real processes


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> list[dict]:
    return run_processes(everything, request.param, timeout=200)


@pytest.mark.parametrize("name", plans(2))
def test_a_gather_brings_what_is_wanted_and_its_adjoint_brings_gradients_back(ranks: list[dict], name: str):
    for found in (rank["collectives"][name] for rank in ranks):
        assert found["gap"] == 0 and found["adjoint"] < 1e-12 and found["autograd"]
        assert found["bytes"] == [found["formula"], found["formula"]]
    assert (ranks[0]["collectives"]["their own"]["formula"] == 0) and ranks[0]["collectives"]["all"]["formula"] > 0


def test_whatever_the_placement_outputs_and_gradients_are_those_of_one_process(ranks: list[dict]):
    assert len(ranks[0]["layers"]) == 2 * len(plans(2))
    for rank in ranks:
        for found in rank["layers"].values():
            assert max(found.values()) < 1e-12


def test_five_steps_with_owners_that_move_are_those_of_one_process(ranks: list[dict]):
    for found in (rank["steps"] for rank in ranks):
        assert found["gap"] < 1e-12 and found["states"] and found["moved"] > 0 and found["copied"] > 0


def test_what_is_gathered_again_is_not_kept(ranks: list[dict]):
    for found in (rank["live"] for rank in ranks):
        assert found["kept"] > 0 and found["again"] == 0


def test_alone_it_is_the_bank():
    x, routing, _ = batch(0, 0)
    layer = FSSDPExperts(bank())
    assert torch.allclose(layer(x, routing), bank()(x, routing), atol=1e-14)
    assert layer.sent == 0 and layer.plan().all() and layer.reshard(layer.owner) == 0


# -- plans


def loads(seed: int, *shape: int) -> torch.Tensor:
    return 100 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double() ** 3


@pytest.mark.parametrize(("layers", "experts", "devices"), [(3, 8, 4), (1, 7, 3), (5, 6, 4), (2, 3, 8)])
def test_every_expert_has_one_owner_and_devices_the_same_number_to_one(layers: int, experts: int, devices: int):
    owner = plan_sharding(loads(0, layers, experts), devices)
    totals = torch.bincount(owner.flatten(), minlength=devices)
    assert owner.shape == (layers, experts) and int(totals.max() - totals.min()) <= 1


def test_owners_share_out_the_load_better_than_in_order():
    for seed in range(5):
        seen = loads(seed, 4, 16)
        planned, even = plan_sharding(seen, 4), even_owners(4, 16, 4)

        def busiest(owner, seen=seen):
            pairs = zip(owner, seen, strict=True)
            return sum(float(torch.bincount(of, weights=load, minlength=4).max()) for of, load in pairs)

        assert busiest(planned) < busiest(even)


def test_tokens_are_shared_out_as_evenly_as_there_is():
    """Beside every split of two shared experts on a fine grid."""
    for seed in range(4):
        load = loads(seed, 4)
        placement = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
        shares = level(load, placement)
        assert torch.allclose(shares.sum(0), load) and not shares[~placement].any()
        best = min(
            max(load[0] + a * load[2], load[1] + (1 - a) * load[2] + b * load[3], (1 - b) * load[3])
            for a, b in itertools.product(torch.linspace(0, 1, 41), repeat=2)
        )
        assert best - 0.05 * load.sum() <= makespan(load, placement) <= best * 1.35


def test_copies_stay_within_budget_and_memory_and_never_make_it_slower():
    ratios = []
    for seed, (devices, experts, budget, memory) in enumerate(itertools.product((2, 3), (4, 5), (1, 2), (1, 2))):
        load, owner = loads(seed, experts), torch.arange(experts) % devices
        mine = owner == torch.arange(devices)[:, None]
        placement = plan_placement(load, owner, devices, budget, memory)
        assert bool((placement | ~mine).all()) and transfers(owner, placement) <= budget
        assert int((placement & ~mine).sum(1).max()) <= memory
        assert makespan(load, placement) <= makespan(load, mine)
        best = brute(load, mine, budget, memory)
        assert best <= makespan(load, placement) + 1e-9
        ratios.append(makespan(load, placement) / best)
        dear = plan_placement(load, owner, devices, budget, memory, cost=lambda placement: float(placement.sum()))
        assert torch.equal(dear, mine)
    assert max(ratios) < 1.02  # the best there is in all of them


def brute(load: torch.Tensor, mine: torch.Tensor, budget: int, memory: int) -> float:
    """The least makespan of all placements within the limits."""
    free = (~mine).nonzero().tolist()
    found = []
    for count in range(budget + 1):
        for chosen in itertools.combinations(free, count):
            placement = mine.clone()
            for device, expert in chosen:
                placement[device, expert] = True
            if int((placement & ~mine).sum(1).max()) <= memory:
                found.append(makespan(load, placement))
    return min(found)


def test_tokens_are_conserved_go_to_who_has_their_expert_and_stay_where_they_are_if_they_may():
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        counts = torch.randint(0, 9, (4, 6), generator=draw)
        placement = (torch.arange(6) % 4 == torch.arange(4)[:, None]) | (torch.rand(4, 6, generator=draw) < 0.3)
        plan = dispatch_plan(counts, placement, per_node=2)
        assert torch.equal(plan.sum(2), counts) and not plan.sum(0)[~placement.T].any()
        ideal = level(counts.sum(0).double(), placement)
        given = plan.sum(0).T
        assert float((given - ideal).abs().max()) < 1
        stay = plan.diagonal(dim1=0, dim2=2).T
        assert torch.equal(stay, torch.minimum(counts, given))
    even = torch.full((2, 2), 5)
    assert dispatch_plan(even, torch.ones(2, 2).bool()).diagonal(dim1=0, dim2=2).sum() == 20  # all stay


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: plan_sharding(torch.tensor([[1.0, -1.0]]), 2), "not negative"),
        (lambda: plan_sharding(torch.tensor([[1.0, math.nan]]), 2), "finite"),
        (lambda: even_owners(1, 4, 0), "at least 1"),
        (lambda: plan_placement(torch.ones(2), torch.tensor([0, 1]), 2, -1, 0), "budget is -1"),
        (lambda: plan_placement(torch.ones(2), torch.tensor([0, 5]), 2, 1, 0), "must name one of 2 ranks"),
        (lambda: dispatch_plan(torch.ones(2, 2).long(), torch.zeros(2, 2).bool()), "each expert somewhere"),
        (lambda: sparse_all_gather(torch.ones(2, 3), torch.tensor([0, 0]), torch.tensor([[True, False]]), None), "[1]"),
        (lambda: sparse_all_gather(torch.ones(1, 3), torch.tensor([0, 0]), torch.ones(1, 2).bool(), None), "own has 1"),
        (
            lambda: sparse_all_gather(torch.ones(2, 3), torch.tensor([0, 0]), torch.ones(2, 2).bool(), None),
            "of 2 ranks",
        ),
        (lambda: FSSDPExperts(bank()).reshard(torch.tensor([0, 1])), "must name one of 1 ranks"),
    ],
)
def test_what_is_no_plan_is_refused(build, said: str):
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        build()


# -- simulated


def machine(**changes) -> Machine:
    parts = {
        "token_seconds": 1e-6,
        "before_seconds": 1e-3,
        "chunk_bytes": 1e6,
        "token_bytes": 1e3,
        "memory": 2,
        "tokens": 2.0,
    }
    link = LinkModel(1e-5, 1e-10)
    return Machine("simulated, by hand", 4, 4, link, link, **parts | changes)


def total(made: Machine, seen: torch.Tensor, policy: str, every: int = 50) -> float:
    return sum(layer.seconds for step in HecateSim(made, seen, policy, every).run() for layer in step)


def test_a_step_by_hand():
    seen = torch.tensor([[[8.0, 0, 0, 0]]])
    (only,) = HecateSim(machine(), seen, "ep").run()[0]
    assert only.parts["before"] == pytest.approx(3e-3) and only.parts["experts"] == pytest.approx(3 * 8e-6)
    assert only.parts["exchange"] == pytest.approx(4 * (1e-5 + 6e3 * 1e-10))  # two of eight are there already
    assert only.parts["copies"] == 0 and only.straggler == 4
    (all_,) = HecateSim(machine(), seen, "fsdp").run()[0]
    assert all_.parts["experts"] == pytest.approx(3 * 2e-6) and all_.parts["exchange"] == 0 and all_.copied == 12
    assert all_.parts["copies"] == 0  # 3 chunks of 1 MB in 0.3 ms hide behind 1 ms
    (slow,) = HecateSim(machine(before_seconds=1e-4), seen, "fsdp").run()[0]
    assert slow.parts["copies"] == pytest.approx((3.1e-4 - 1e-4) + 2 * (3.1e-4 - 2e-4))


def test_even_loads_are_those_of_expert_parallelism_and_what_is_hidden_costs_nothing():
    even = torch.full((4, 2, 8), 10.0)
    assert total(machine(), even, "hecate") == pytest.approx(total(machine(), even, "ep"))
    skewed = torch.full((6, 1, 8), 10.0)
    skewed[:, :, 0] = 2000.0
    found = HecateSim(machine(token_seconds=1e-4), skewed, "hecate").run()
    assert all(layer.parts["copies"] == 0 for step in found for layer in step)
    assert found[0][0].copied == 0 < found[1][0].copied  # the first step has seen nothing
    assert found[-1][0].straggler < found[0][0].straggler
    assert total(machine(token_seconds=1e-4), skewed, "hecate") < total(machine(token_seconds=1e-4), skewed, "ep")


def test_what_is_gathered_again_may_have_the_memory_of_all_layers():
    skewed = torch.tensor([2000.0, 1500, 900, 500, 50, 40, 30, 20]).repeat(3, 2, 1)
    made = machine(token_seconds=1e-4, memory=2)
    kept, again = (HecateSim(made, skewed, policy).run()[-1][0] for policy in ("hecate", "remat"))
    assert kept.copied > 0 and kept.straggler > again.straggler  # one copy on a device, or two
    slow = machine(token_seconds=1e-4, memory=4, chunk_bytes=1e9)  # 0.1 s, where all experts take 0.2 s
    assert HecateSim(slow, skewed, "remat").run()[-1][0].copied < again.copied
    cheap = machine(token_seconds=1e-7, memory=4, chunk_bytes=1e9)
    assert HecateSim(cheap, skewed, "remat").run()[-1][0].copied == 0


def test_owners_that_move_are_paid_for_once():
    skewed = torch.tensor([20.0, 20, 1, 1, 1, 1, 1, 1]).repeat(6, 1, 1)  # the first two are on one device
    steps = HecateSim(machine(), skewed, "relayout", every=3).run()
    assert [step[0].parts["copies"] > 0 for step in steps] == [False] * 3 + [True] + [False] * 2
    assert steps[4][0].straggler < steps[0][0].straggler


def test_loads_go_on_through_the_trace_and_a_power_makes_them_more_skewed():
    trace = zipf_markov(0, prompts=2, layers=3)
    kinds = [loads_of(trace, 4, 100.0, power) for power in (0.0, 1.0, 4.0)]
    assert all(torch.allclose(kind.sum(2), torch.full((4, 3), 100.0).double()) for kind in kinds)
    peaks = [float(kind.amax(2).mean()) for kind in kinds]
    assert peaks[0] == pytest.approx(100 / trace.n_experts) and peaks == sorted(peaks)
    assert torch.equal(loads_of(trace, 4, 100.0, prompts=[0, 1]), kinds[1])
    assert not torch.equal(loads_of(trace, 4, 100.0, prompts=[0]), kinds[1])


def test_a_users_machine():
    workload = Workload(zipf_markov(0), 4e6, 4e9)
    found = simulate(Hardware.named("h100-sxm"), workload)
    assert [row["policy"] for row in found.rows] == list(POLICIES) and found.basis.startswith("simulated")
    assert all(math.isfinite(v) for row in found.rows for v in row.values() if not isinstance(v, str))
    assert not found.timeline.overlaps() and found.timeline.makespan > 0
    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: HecateSim(machine(), torch.ones(2, 2, 2), "magic"), "magic"),
        (lambda: HecateSim(machine(), torch.ones(2, 0, 2)), "loads has shape"),
        (lambda: HecateSim(machine(), -torch.ones(2, 2, 2)), "not negative"),
        (lambda: HecateSim(machine(), torch.ones(2, 2, 2), every=0), "every is 0"),
        (lambda: machine(chunk_bytes=-1.0), "chunk_bytes is -1.0"),
        (lambda: machine(token_seconds=math.inf), "token_seconds is inf"),
        (lambda: loads_of(zipf_markov(0), 0, 1.0), "steps is 0"),
        (lambda: loads_of(zipf_markov(0), 1, 1.0, power=-1.0), "power -1.0"),
        (lambda: loads_of(zipf_markov(0), 1, 1.0, prompts=[9]), "prompts are"),
        (lambda: simulate(Hardware.from_dict({"name": "x", "basis": "measured", "source": "y", "link":
            {"bandwidth": 1e9, "latency_seconds": 0}}), Workload(zipf_markov(0), 4e6, 4e9)), "must have device"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_is_refused(build, said: str):
    with pytest.raises(InputError, match=said):
        build()
