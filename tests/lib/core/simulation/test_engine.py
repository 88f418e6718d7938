"""The engine: no overlap on one resource, what comes before ends before, and no less time than any bound says."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.simulation.engine import Engine, Resource, Task, run
from workbench.lib.core.simulation.timeline import Event, Timeline

A, B, QUEUE = Resource("a"), Resource("b"), Resource("queue", in_order=True)
LANES = (A, B, QUEUE)
seconds = st.integers(0, 5).map(float)


@st.composite
def graphs(draw) -> list[Task]:
    """Tasks that come after some of those before them, on any resource."""
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, 14))):
        after = draw(st.lists(st.sampled_from(tasks), max_size=3, unique_by=id)) if tasks else []
        rest = {"priority": draw(st.integers(0, 2)), "earliest": draw(seconds)}
        tasks.append(Task(str(i), draw(st.sampled_from(LANES)), draw(seconds), after, **rest))
    return tasks


def longest_chain(tasks: list[Task]) -> float:
    ends: dict[Task, float] = {}
    for task in tasks:
        ends[task] = max([task.earliest, *(ends[before] for before in task.after)]) + task.seconds
    return max(ends.values())


@given(graphs())
def test_every_task_runs_once_alone_and_after_what_comes_before(tasks):
    timeline = run(tasks, "a test")
    assert sorted(event.name for event in timeline.events) == sorted(task.name for task in tasks)
    assert timeline.overlaps() == []
    for task in tasks:
        assert task.end == task.start + task.seconds and task.start >= task.earliest
        assert all(before.end <= task.start for before in task.after)


@given(graphs())
def test_the_makespan_lies_between_its_bounds(tasks):
    timeline = run(tasks, "a test")
    assert timeline.makespan >= longest_chain(tasks)
    assert timeline.makespan >= max(timeline.busy().values())
    # never idle all together but before something arrives
    assert timeline.makespan <= max(task.earliest for task in tasks) + sum(task.seconds for task in tasks)


@given(graphs())
def test_a_queue_keeps_the_order_of_submission(tasks):
    run(tasks, "a test")
    starts = [task.start for task in tasks if task.resource is QUEUE]
    assert starts == sorted(starts)


@given(graphs(), st.lists(seconds, max_size=4))
def test_stopping_on_the_way_changes_nothing(tasks, moments):
    engine = Engine("a test")
    engine.submit(tasks)
    for moment in sorted(moments):
        seen = engine.run(until=moment)
        assert engine.now == moment and all(event.start <= moment for event in seen.events)
    again = [Task(t.name, t.resource, t.seconds, (), t.priority, t.earliest) for t in tasks]
    for new, old in zip(again, tasks, strict=True):
        new.after = [again[int(before.name)] for before in old.after]
    assert engine.run() == run(again, "a test")


@given(graphs())
def test_nothing_ready_waits_for_a_free_resource(tasks):
    """Of a resource that is not in order: in each gap before a task, something of it was still to come."""
    timeline = run(tasks, "a test")
    for task in (t for t in tasks if t.resource is not QUEUE):
        ready = max([task.earliest, *(before.end for before in task.after)])
        waited = [e for e in timeline.on(task.resource.name) if e.start < task.start and e.end > ready]
        assert sum(min(e.end, task.start) - max(e.start, ready) for e in waited) == task.start - ready


def test_priority_decides_among_what_is_ready_and_submission_where_it_does_not():
    first, late, urgent = Task("first", A, 2), Task("late", A, 1, earliest=1), Task("urgent", A, 1, earliest=1.5)
    urgent.priority = -1
    assert [event.name for event in run([first, late, urgent], "a test").events] == ["first", "urgent", "late"]


def test_a_queue_waits_where_a_list_goes_on():
    def makespan(in_order: bool) -> float:
        lane = Resource("lane", in_order)
        load = Task("load", A, 3)
        return run([load, Task("needs it", lane, 1, [load]), Task("does not", lane, 3)], "a test").makespan

    assert (makespan(True), makespan(False)) == (7, 4)


def test_what_is_submitted_on_the_way_starts_no_earlier_than_now_and_may_follow_what_runs():
    engine = Engine("a test")
    running = Task("running", A, 5)
    engine.submit([running])
    engine.run(until=2)
    assert engine.free(A) == 5 and engine.free(B) == 2
    other, after = Task("other", B, 1), Task("after", B, 1, [running])
    engine.submit([other, after])
    assert engine.run().makespan == 6 and (other.start, after.start) == (2, 5)


def test_tasks_that_cannot_start_are_named_and_bad_ones_refused():
    a, b = Task("a", A, 1), Task("b", B, 1)
    a.after, b.after = [b], [a]
    with pytest.raises(InputError, match="'a', 'b' wait for one another"):
        run([a, b], "a test")
    with pytest.raises(InputError, match="'c' comes after 'd', which was not submitted"):
        run([Task("c", A, 1, [Task("d", A, 1)])], "a test")
    with pytest.raises(InputError, match="'e' twice"):
        run([(e := Task("e", A, 1)), e], "a test")
    with pytest.raises(InputError, match="in order and out of order"):
        run([Task("f", A, 1), Task("g", Resource("a", in_order=True), 1)], "a test")
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(InputError, match="seconds of task 'h'"):
            Task("h", A, bad)
    with pytest.raises(InputError, match="priority of task 'i' is nan"):
        Task("i", A, 1, priority=math.nan)
    run([again := Task("again", A, 1)], "a test")
    with pytest.raises(InputError, match="'again', which has run before"):
        run([again], "a test")
    engine = Engine("a test")
    engine.run(until=3)
    for moment in (2, math.nan):
        with pytest.raises(InputError, match=f"until is {moment}"):
            engine.run(until=moment)


def test_a_timeline_is_plain_json_and_says_who_was_busy():
    timeline = run([Task("x", A, 1, group="load"), Task("y", B, 4)], "simulated, calibrated by a test")
    assert Timeline.from_dict(json.loads(json.dumps(timeline.to_dict()))) == timeline
    assert timeline.busy_shares() == {"a": 0.25, "b": 1.0} and timeline.basis.startswith("simulated")
    assert [event.name for event in timeline.between(1, 2).events] == ["y"]
    with pytest.raises(InputError, match="must be before"):
        timeline.between(2, 2)
    assert run([], "a test").makespan == 0 and Timeline((), "a test", ("a",)).busy_shares() == {"a": 0}


def test_an_overlap_is_seen():
    events = (Event("x", "a", 0, 2), Event("nothing", "a", 1, 1), Event("y", "a", 1.5, 3), Event("z", "b", 0, 9))
    assert [(a.name, b.name) for a, b in Timeline(events, "a test").overlaps()] == [("x", "y")]


def test_advancing_to_a_moment_begins_what_can_begin_then_and_ends_where_running_does():
    first, second = Task("first", A, 2.0), Task("second", A, 3.0)
    engine = Engine("a test")
    engine.submit([first, second])
    engine.advance(0.0)
    assert (first.start, first.end, second.start) == (0.0, 2.0, None)
    engine.advance(2.0)
    assert (second.start, second.end, engine.now) == (2.0, 5.0, 2.0)
    engine.advance()
    assert engine.now == 5.0 and engine.run().makespan == 5.0
    with pytest.raises(InputError, match="must not be before now"):
        engine.advance(4.0)
