"""Serving in real time: what is computed is that of the levels that were there, from the bytes that were read."""

import signal
import threading
import time

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.serving.d2moe import by_rank
from workbench.lib.serving.d2moe_code import NestedQuantizer
from workbench.lib.serving.d2moe_executor import D2Executor, NestedBank, swiglu
from workbench.lib.serving.d2moe_orders import BitTrace, Job, PlaneCosts
from workbench.lib.serving.d2moe_schedule import POLICIES

LAYERS, EXPERTS = 2, 4


@pytest.fixture(scope="module")
def banks() -> list[NestedBank]:
    draw = torch.Generator().manual_seed(0)

    def coded(*shape: int):
        return NestedQuantizer(group=16).fit(torch.randn(EXPERTS, *shape, generator=draw))

    return [NestedBank(coded(48, 20), coded(20, 24)) for _ in range(LAYERS)]


@pytest.fixture(scope="module")
def executor(banks, tmp_path_factory) -> D2Executor:
    return D2Executor(banks, tmp_path_factory.mktemp("planes") / "experts.planes", 2e6)


@pytest.fixture(scope="module")
def costs(executor) -> PlaneCosts:
    return executor.calibrate(tokens=(1, 4), repeats=5)


@pytest.fixture(scope="module")
def trace() -> BitTrace:
    return by_rank(zipf_markov(0, prompts=3, prompt=0, generated=3, layers=LAYERS, experts=EXPERTS, top_k=2), (2, 5))


def test_the_file_holds_each_expert_once_level_after_level(executor, banks, tmp_path):
    D2Executor(banks, tmp_path / "planes", 1e9)
    stored = (tmp_path / "planes").read_bytes()
    assert len(stored) == LAYERS * EXPERTS * banks[0].nbytes(8)
    assert executor.sizes == {level: banks[0].nbytes(level) for level in range(2, 9)}
    first = banks[0].gate_up[0].planes[:2].numpy().tobytes()
    assert stored.startswith(first)


@pytest.mark.parametrize("level", [2, 3, 8])
def test_weights_of_the_bytes_that_were_read_are_those_of_the_code(executor, banks, level):
    for expert in ((0, 0), (1, 3)):
        held = executor._fetch(expert, 0, 2)
        if level > 2:
            held |= executor._fetch(expert, 2, level)
        assert sum(part.numel() for part in held.values()) == executor.sizes[level]
        bank = banks[expert[0]]
        for made, nested in zip(executor.weights(expert, level, held), (bank.gate_up, bank.down), strict=True):
            assert torch.equal(made, nested[expert[1]].dequant(level))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.15, 1.0])
def test_every_output_is_that_of_the_level_that_was_used(executor, banks, trace, costs, policy, share):
    budget = int(share * LAYERS * EXPERTS * executor.sizes[8])
    ran = executor.run(trace, costs, policy, budget, keep=True)
    served = ran.served
    assert served.peak_bytes <= budget and served.timeline.overlaps() == []
    wanted = [(at, job) for at, step in enumerate(trace.steps) for layer in step for job in layer]
    asked = {(at, job.expert): job for at, job in wanted}
    assert sorted(job[:2] for job in served.jobs) == sorted(asked)
    for (at, expert, tokens, level), output in zip(served.jobs, ran.outputs, strict=True):
        job = asked[at, expert]
        assert tokens == job.tokens
        assert level == (8 if policy == "whole" else job.bits) or (policy == "progressive" and 2 <= level < job.bits)
        bank = banks[expert[0]]
        exact = swiglu(
            executor.inputs(at, job), *(part[expert[1]].dequant(level) for part in (bank.gate_up, bank.down))
        )
        assert torch.equal(output, exact)
    assert served.read_bytes >= max(executor.sizes[level] for *_, level in served.jobs)


def test_reading_takes_the_time_of_its_bytes(banks, costs, tmp_path):
    """From a file that was just written, and so lies in memory."""
    slow = D2Executor(banks, tmp_path / "planes", 1e5)
    start = time.perf_counter()
    trace = BitTrace((((Job((0, 0), 1, 8),),),), 1, "one expert")
    ran = slow.run(trace, costs, "hebf", slow.sizes[8]).served
    assert time.perf_counter() - start > slow.sizes[8] / 1e5
    (read,) = ran.timeline.on("disk")
    assert read.seconds >= 0.99 * slow.sizes[8] / 1e5


def test_calibration_is_of_this_machine(executor, costs):
    assert costs.sizes == executor.sizes and costs.basis == "simulated, calibrated by this processor"
    assert costs.read.seconds(executor.sizes[8]) > 0.9 * executor.sizes[8] / 2e6
    assert all(table.seconds(1) > 0 for table in costs.compute.values())


def test_an_error_of_the_thread_that_reads_is_told(executor, trace, costs, monkeypatch):
    monkeypatch.setattr(executor, "_fetch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executor.run(trace, costs, "hebf", 8 * executor.sizes[8])


def test_an_error_of_the_thread_that_is_calibrated_is_told(executor, monkeypatch):
    monkeypatch.setattr(executor, "_fetch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executor.calibrate(tokens=(1,), repeats=5)


def test_ctrl_c_leaves_no_thread(executor, trace, costs, monkeypatch):
    main, fetch, readers = threading.get_ident(), executor._fetch, []

    def interrupted(*what):
        if not readers:  # once: a second would end the waiting for what has begun
            readers.append(threading.current_thread())
            signal.pthread_kill(main, signal.SIGINT)
        return fetch(*what)

    monkeypatch.setattr(executor, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.run(trace, costs, "hebf", 8 * executor.sizes[8])
    assert readers and not readers[0].is_alive()


def test_wrong_input_is_named(executor, banks, trace, costs, tmp_path):
    def one(expert, bits):
        return BitTrace((((Job(expert, 1, bits),),),), 1, "")

    whole = NestedQuantizer(4, base=4, group=16)
    one_level = NestedBank(whole.fit(torch.randn(2, 4, 8)), whole.fit(torch.randn(2, 8, 2)))
    budget = executor.sizes[8]
    for call, message in (
        (lambda: D2Executor([], tmp_path / "a", 1e6), "banks must be one or more"),
        (lambda: D2Executor(banks, tmp_path / "a", 0.0), "bandwidth is 0.0"),
        (lambda: executor.run(trace, costs, "lifo", budget), "policy 'lifo' is unknown"),
        (lambda: executor.run(trace, costs, "fifo", budget - 1), "must hold at least one whole expert"),
        (lambda: executor.run(one((0, 9), 2), costs, "fifo", budget), r"wants expert \(0, 9\)"),
        (lambda: executor.run(one((0, 0), 1), costs, "fifo", budget), "bits of a job"),
        (lambda: executor.calibrate(repeats=4), "repeats is 4"),
        (lambda: D2Executor([one_level], tmp_path / "b", 1e6).calibrate(), "banks have codes of 4 bits alone"),
    ):
        with pytest.raises(InputError, match=message):
            call()
