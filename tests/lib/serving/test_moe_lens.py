"""MoE-Lens's two stages: exact where they claim to be, bounds where they claim to bound, monotone in the machine."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.core.simulation.workload import Workload
from workbench.lib.serving import moe_lens
from workbench.lib.serving.costs import ATTENTION, DEVICE, HOST, MIXTRAL, STREAM, TERMS
from workbench.lib.serving.moe_lens import (
    HardwareSpec,
    MoESpec,
    PagedKV,
    PipelineSim,
    Requests,
    Scheduler,
    SpecCosts,
    finite_bound,
    n_star,
    pme,
    simulate,
    stage1,
    stage2,
)

SMALL = MoESpec(layers=3, dim=8, heads=2, kv_heads=1, head_dim=4, hidden=16, experts=4, top_k=2, vocab=10)
MACHINE = HardwareSpec(flops=1e6, link_bandwidth=1e6, host_bandwidth=4e6, attention_bandwidth=1e5, kv_bytes=4800)


def token_level(prompt: int, generate: int, memory: int, passes: int = 400) -> float:
    """Tokens a pass in the steady state, request by request: as many at each age, whatever of the memory they fill."""
    held = sum(prompt + age for age in range(generate))
    each, processed = memory / held, 0.0
    ages = [0.0] * generate  # requests in their pass i
    for _ in range(passes):
        ages = [each, *ages[:-1]]
        processed += ages[0] * prompt + sum(ages[1:])
    return processed / passes


@pytest.mark.parametrize(("prompt", "generate"), [(100, 32), (512, 64), (100, 128), (7, 1)])
def test_the_efficiency_is_that_of_a_token_level_simulation(prompt, generate):
    memory, warm = 200_000, 2 * generate
    steady = (token_level(prompt, generate, memory, 400) * 400 - token_level(prompt, generate, memory, warm) * warm) / (
        400 - warm
    )
    assert steady == pytest.approx(memory * pme(prompt, generate), rel=1e-9)
    assert pme(prompt, generate, exact=False) == pytest.approx(pme(prompt, generate), rel=0.06 if generate > 1 else 0.1)


@pytest.mark.parametrize(("prompt", "generate"), [(100, 32), (50, 16), (30, 30)])
def test_the_scheduler_comes_within_eight_percent_of_it_in_its_steady_state_and_not_above(prompt, generate):
    """In pages of one token, limited to the tokens that memory can have on average: prompts do not come all at once."""
    memory = 8_000
    wanted = memory * pme(prompt, generate)
    requests = Requests.uniform(prompt, generate, int(3.5 * memory / prompt))
    passes = list(Scheduler(requests, PagedKV(memory, 1), max_tokens=int(1.05 * wanted)))
    busy = [step.tokens for step in passes if step.waiting][2 * generate :]
    assert 0.92 * wanted < sum(busy) / len(busy) < 1.001 * wanted
    assert sum(step.tokens for step in passes) == requests.processed


def test_a_request_of_one_token_puts_through_all_that_it_holds():
    assert pme(100, 1) == 1
    assert pme(1, 1000) == pytest.approx(2 / 1001)  # g tokens, of which each is held half of g passes


lengths = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=8)
numbers = st.floats(1e4, 1e8)


@st.composite
def machines(draw) -> HardwareSpec:
    host = draw(numbers)
    longest = 27 * SMALL.kv_bytes_per_token
    return HardwareSpec(
        draw(numbers), host * draw(st.floats(0.01, 1)), host, draw(numbers), longest * draw(st.floats(1, 8))
    )


@given(machines(), lengths, st.integers(1, 4), st.integers(4, 60), st.sampled_from(["peak", "headroom"]))
@settings(max_examples=40)
def test_both_bounds_hold_for_what_is_foreseen_and_what_is_woven(machine, found, page, most, admission):
    requests, costs = Requests(*map(tuple, zip(*found, strict=True))), SpecCosts(machine, SMALL)
    n_pages = int(machine.kv_bytes / SMALL.kv_bytes_per_token / page)
    try:
        passes = list(Scheduler(requests, PagedKV(max(1, n_pages), page), most, admission))
    except InputError:
        return  # rounded up to pages, one request is too long
    bounds = stage1(machine, SMALL, requests).throughput, finite_bound(costs, requests, n_pages, page)
    foreseen = stage2(costs, requests, n_pages, page, most, admission=admission)
    woven = requests.generated / PipelineSim(costs).run(passes).makespan
    assert bounds[0] >= bounds[1] * (1 - 1e-9) >= max(foreseen.throughput, woven) * (1 - 2e-9)
    # Pass by pass, the woven tasks gain at most what the link brings ahead of time: two layers.
    ahead = len(passes) * 2 * costs.load()
    assert requests.generated / woven >= foreseen.seconds - ahead - 1e-9 * foreseen.seconds
    assert sum(foreseen.phases.values()) == pytest.approx(foreseen.seconds)
    assert foreseen.seconds == pytest.approx(requests.generated / foreseen.throughput)


def test_the_three_agree_for_endlessly_many_requests_in_pages_of_one_token():
    """Of one token each, so that all memory is used in every pass."""
    requests, costs = Requests.uniform(20, 1, 3000), SpecCosts(MACHINE, SMALL)
    memory = int(MACHINE.kv_bytes / SMALL.kv_bytes_per_token)
    whole = replace(MACHINE, kv_bytes=memory // 20 * 20 * SMALL.kv_bytes_per_token)
    bound = stage1(whole, SMALL, requests).throughput
    found = stage2(costs, requests, memory, 1, max_tokens=memory).throughput
    assert finite_bound(SpecCosts(whole, SMALL), requests, memory // 20 * 20, 1) == pytest.approx(bound, rel=1e-2)
    assert found == pytest.approx(bound, rel=1e-2)


@given(
    machines(),
    lengths,
    st.sampled_from(["flops", "host_bandwidth", "link_bandwidth", "attention_bandwidth", "kv_bytes"]),
)
@settings(max_examples=60)
def test_a_better_machine_is_never_slower_and_the_label_is_the_largest_term(machine, found, part):
    requests = Requests(*map(tuple, zip(*found, strict=True)))
    bound = stage1(machine, SMALL, requests)
    assert bound.terms[bound.bottleneck] == max(bound.terms.values()) and set(bound.terms) == set(TERMS)
    assert 0 < bound.utilisation <= 1
    more = {part: getattr(machine, part) * 1.7}
    if part == "link_bandwidth":
        more = {part: min(machine.host_bandwidth, more[part])}
    assert stage1(replace(machine, **more), SMALL, requests).throughput >= bound.throughput * (1 - 1e-12)
    if part != "kv_bytes":  # which decides who is admitted when
        pages = int(machine.kv_bytes / SMALL.kv_bytes_per_token)
        slow, fast = (
            stage2(SpecCosts(one, SMALL), requests, pages, 1, 40).throughput
            for one in (machine, replace(machine, **more))
        )
        assert fast >= slow * (1 - 1e-12)


def test_each_part_of_the_machine_can_be_what_bounds():
    requests = Requests.uniform(8, 8, 1)
    cases = {
        STREAM: {"link_bandwidth": 1e3},
        DEVICE: {"flops": 1e3},
        ATTENTION: {"attention_bandwidth": 1e2},
        HOST: {"link_bandwidth": 3.9e6, "kv_bytes": 1e5, "attention_bandwidth": 1e9, "flops": 1e12},
    }
    for label, change in cases.items():
        assert stage1(replace(MACHINE, **change), SMALL, requests).bottleneck == label


def test_memory_helps_in_proportion_until_the_pass_is_full():
    machine = HardwareSpec.of(Hardware.named("a40-pcie4"), MIXTRAL, 100e9)
    requests = Requests.uniform(512, 32, 1)
    full = n_star(SpecCosts(machine, MIXTRAL)) / pme(512, 32) * MIXTRAL.kv_bytes_per_token

    def found(part: float) -> float:
        return stage1(replace(machine, kv_bytes=part * full), MIXTRAL, requests).throughput

    assert found(0.5) == pytest.approx(2 * found(0.25))
    assert found(2) == pytest.approx(found(1.2))
    assert found(1) == pytest.approx(found(2), rel=0.05)
    assert stage1(replace(machine, kv_bytes=2 * full), MIXTRAL, requests).utilisation == 1


def test_the_tokens_that_hide_the_stream_are_those_of_the_formula():
    machine = HardwareSpec(150e12, 31.5e9, 205e9, 205e9, 1e10)
    wanted = machine.flops * MIXTRAL.total_bytes / (MIXTRAL.token_flops * machine.link_bandwidth)
    assert n_star(SpecCosts(machine, MIXTRAL)) == int(wanted)
    assert MIXTRAL.total_bytes == pytest.approx(2 * 46.4e9, rel=0.01)  # 46.7e9 with the embedding and the head
    assert MIXTRAL.token_flops == pytest.approx(2 * 12.6e9, rel=0.01) and MIXTRAL.kv_bytes_per_token == 131_072


def test_the_phases_are_fill_steady_and_drain():
    costs = SpecCosts(MACHINE, SMALL)
    found = stage2(costs, Requests.uniform(8, 6, 200), n_pages=60, page=4, max_tokens=40)
    assert min(found.phases.values()) > 0 and found.phases["steady"] > 2 * found.phases["drain"]
    assert found.preemptions == 0 and set(found.terms) == set(TERMS)
    alone = stage2(costs, Requests.uniform(8, 6, 1), n_pages=60, page=4, max_tokens=40)
    assert alone.passes == 6 and alone.phases["steady"] == 0


def test_the_terms_of_a_run_are_those_of_its_work():
    """What is counted pass by pass is what the formulas count request by request."""
    costs, requests = SpecCosts(MACHINE, SMALL), Requests((5, 9, 2), (3, 1, 6))
    found = stage2(costs, requests, n_pages=30, page=2, max_tokens=30)
    flops = requests.processed * SMALL.token_flops + (15 + 45 + 3) * SMALL.pair_flops
    flops += requests.generated * 2 * SMALL.dim * SMALL.vocab
    assert found.terms[DEVICE] == pytest.approx(flops / MACHINE.flops)
    read = sum(sum(range(p + 1, p + g)) for p, g in zip(requests.prompts, requests.generate, strict=True))
    assert found.terms[ATTENTION] == pytest.approx(read * SMALL.kv_bytes_per_token / MACHINE.attention_bandwidth)
    assert found.terms[STREAM] == pytest.approx(found.passes * SMALL.total_bytes / MACHINE.link_bandwidth)


def test_one_group_takes_the_stream_or_both_others_together():
    costs, requests = SpecCosts(replace(MACHINE, link_bandwidth=4e6), SMALL), Requests.uniform(8, 6, 30)
    one = stage2(costs, requests, 60, 4, 40, groups=1)
    assert one.seconds == pytest.approx(one.terms[DEVICE] + one.terms[ATTENTION], rel=0.2)
    assert one.seconds >= one.terms[DEVICE] + one.terms[ATTENTION]


def test_a_simulation_for_the_shell_is_plain_and_says_what_it_is(monkeypatch):
    monkeypatch.setattr(moe_lens, "SIMULATED", 100)
    workload = Workload(zipf_markov(seed=0, prompts=2, prompt=6, generated=3, layers=2, experts=4, top_k=2), 1e6, 8e6)
    found = simulate(Hardware.named("t4-pcie3"), workload)
    assert found.basis == "simulated, calibrated by t4-pcie3 (specified)" == found.timeline.basis
    rates = [row["tokens_per_second"] for row in found.rows]
    assert len({tuple(row) for row in found.rows}) == 1 and max(rates[:4]) <= rates[4] <= rates[5]
    json.dumps(found.to_dict())
    with pytest.raises(InputError, match="budget is 3,000,000 bytes but must hold all experts of 2 layers, 8,000,000"):
        simulate(Hardware.named("t4-pcie3"), replace(workload, budget_bytes=3e6))
    for size in (0.5, 1.5):
        with pytest.raises(InputError, match=f"weight_bytes is {size} but must be whole bytes"):
            simulate(Hardware.named("t4-pcie3"), replace(workload, weight_bytes=size))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: replace(MACHINE, flops=-1), "flops is -1"),
        (lambda: replace(MACHINE, kv_bytes=float("nan")), "kv_bytes is nan"),
        (lambda: replace(MACHINE, link_bandwidth=5e6), "link_bandwidth is 5e[+]06 but must be at most host_bandwidth"),
        (lambda: replace(SMALL, top_k=5), "top_k is 5 but must be at most experts = 4"),
        (lambda: replace(SMALL, dim=0), "dim is 0"),
        (lambda: HardwareSpec.of(Hardware.named("t4-pcie3"), MIXTRAL, 9e10), "must be above the 9.288e[+]10 bytes of"),
        (lambda: stage1(replace(MACHINE, kv_bytes=100), SMALL, Requests((9,), (2,))), "longest request has 10 tokens"),
        (lambda: pme(0, 1), "prompts holds 0"),
        (lambda: stage2(SpecCosts(MACHINE, SMALL), Requests((9,), (2,)), 1, 4, 10), "request 0 alone needs 3 pages"),
    ],
)
def test_what_makes_no_sense_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
