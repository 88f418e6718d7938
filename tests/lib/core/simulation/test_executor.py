"""Threads for resources: order, precedence and errors; a link that lets through no more than its bandwidth."""

import signal
import threading
import time

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.simulation.executor import Executor, ThrottledLink, pair_speedup
from workbench.lib.core.simulation.timeline import Timeline


def test_what_is_ready_runs_in_order_and_each_resource_is_a_thread():
    seen: list[tuple[str, str, int]] = []
    gate = threading.Event()

    def call(name: str):
        return lambda: seen.append((name, threading.current_thread().name, torch.get_num_threads())) or name

    before = torch.get_num_threads()
    with Executor(("device", "link"), "measured") as executor:
        load = executor.submit("load", "link", gate.wait, group="stream")
        use = executor.submit("use", "device", call("use"), after=[load])
        ready = executor.submit("ready", "device", call("ready"))
        last = executor.submit("last", "device", call("last"))
        assert (ready.result(), last.result(), use.done) == ("ready", "last", False)
        gate.set()
        assert use.result() == "use"
    assert seen == [(name, "device", 1) for name in ("ready", "last", "use")] and torch.get_num_threads() == before
    timeline = executor.timeline()
    assert isinstance(timeline, Timeline) and timeline.overlaps() == [] and timeline.resources == ("device", "link")
    assert {event.name for event in timeline.events} == {"load", "use", "ready", "last"} and load.end <= use.start
    assert {event.name: event.group for event in timeline.events}["load"] == "stream"


def test_two_resources_are_at_work_at_once():
    """Each waits for the other inside its call, so that one after the other they would never end."""
    meet = threading.Barrier(2, timeout=30)
    with Executor(("a", "b"), "measured") as executor:
        jobs = [executor.submit(name, name, meet.wait) for name in "ab"]
        assert sorted(job.result() for job in jobs) == [0, 1]


def test_an_error_is_raised_where_it_is_waited_for_and_what_follows_does_not_run():
    ran = []
    with Executor(("a", "b"), "measured") as executor:
        bad = executor.submit("bad", "a", lambda: 1 / 0)
        after = executor.submit("after", "b", lambda: ran.append(1), after=[bad])
        fine = executor.submit("fine", "a", lambda: 7)
        for job in (bad, after):
            with pytest.raises(ZeroDivisionError):
                job.result()
        assert fine.result() == 7 and ran == []
    assert [event.name for event in executor.timeline().events] == ["fine"]


def test_an_error_that_nobody_waited_for_is_raised_when_the_executor_closes():
    done = []
    with pytest.raises(ZeroDivisionError), Executor(("a",), "measured") as executor:
        executor.submit("bad", "a", lambda: 1 / 0)
        executor.submit("fine", "a", lambda: done.append(1))
    assert done == [1]


def test_ctrl_c_waits_for_what_has_begun_and_drops_the_rest():
    ran, main, before, go = [], threading.get_ident(), torch.get_num_threads(), threading.Event()

    def first():
        go.wait()
        time.sleep(0.3)  # a signal just before a thread blocks does not wake it
        signal.pthread_kill(main, signal.SIGINT)
        patience = time.perf_counter() + 30
        while executor._open and time.perf_counter() < patience:
            time.sleep(0.01)
        ran.append("first")

    with pytest.raises(KeyboardInterrupt), Executor(("a", "b"), "measured") as executor:
        begun = executor.submit("first", "a", first)
        queued = executor.submit("queued", "a", lambda: ran.append("queued"))
        after = executor.submit("after", "b", lambda: ran.append("after"), after=[begun])
        go.set()
        after.result()
    assert ran == ["first"] and torch.get_num_threads() == before
    assert not any(thread.is_alive() for thread in executor._threads)
    with pytest.raises(RuntimeError, match="'queued' was dropped"):
        queued.result()


def test_a_job_of_another_executor_is_refused_for_its_end_would_wake_nobody():
    with Executor(("a",), "measured") as one, Executor(("b",), "measured") as other:
        job = one.submit("there", "a", int)
        with pytest.raises(
            InputError, match="job 'here' comes after 'there', which was not submitted to this executor"
        ):
            other.submit("here", "b", int, after=[job])


def test_a_link_copies_exactly_and_no_faster_than_its_bandwidth():
    source = torch.arange(50_001, dtype=torch.float32)
    target = torch.zeros_like(source)
    link = ThrottledLink(bandwidth=4e6, chunk_bytes=1 << 14)
    start = time.perf_counter()
    link.copy(target, source)
    link.copy(target, source)
    assert time.perf_counter() - start >= 2 * source.nbytes / 4e6
    assert torch.equal(target, source)
    start = time.perf_counter()
    link.take(40_000), link.take(40_000)
    assert time.perf_counter() - start >= 0.02


def test_an_idle_link_saves_nothing_up():
    link = ThrottledLink(bandwidth=1e6)
    link.take(10_000)
    time.sleep(0.03)
    start = time.perf_counter()
    link.take(20_000)
    assert time.perf_counter() - start >= 0.02


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Executor((), "x"), "resources is"),
        (lambda: Executor(("a", "a"), "x"), "different names"),
        (lambda: Executor(("a",), "x").submit("t", "b", int), "resource is 'b' but must be one of a"),
        (lambda: Executor(("a",), "x").submit("t", "a", int), "not open"),
        (lambda: ThrottledLink(0), "bandwidth is 0"),
        (lambda: ThrottledLink(float("nan")), "bandwidth is nan"),
        (lambda: ThrottledLink(1, 0), "chunk_bytes is 0"),
        (lambda: ThrottledLink(1).copy(torch.zeros(2), torch.zeros(3)), "target is"),
        (lambda: ThrottledLink(1).copy(torch.zeros(2), torch.zeros(2).double()), "target is"),
        (lambda: ThrottledLink(1).copy(torch.zeros(2, 2).T, torch.zeros(2, 2)), "contiguous"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()


def test_a_pair_is_measured_apart_and_together():
    """What it gains is a matter of the machine, and no test: here only that both are called each time."""
    calls = []
    assert pair_speedup(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3) > 0
    assert sorted(calls) == ["a"] * 8 + ["b"] * 8
