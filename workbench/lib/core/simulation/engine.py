"""Tasks on resources, by a heap: each resource does one task at a time, and a task starts when all before it ended.

    device, link = Resource("device"), Resource("link", in_order=True)
    load = Task("load 1", link, 0.3)
    compute = Task("compute 1", device, 0.2, after=[load])
    timeline = run([load, compute], basis="simulated, calibrated by a guess")

A task is never interrupted. Whoever decides while time goes on has an `Engine`, runs it until the moment of the
decision, and submits what was decided.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workbench.errors import InputError
from workbench.lib.core.simulation.timeline import Event, Timeline


@dataclass(frozen=True)
class Resource:
    """What does one task at a time.

    Attributes:
        name: two of one name are the same.
        in_order: it takes tasks as they were submitted and waits for one that is not ready, as a queue of a device
            does; otherwise it takes what is ready, by priority and then by when it was submitted.
    """

    name: str
    in_order: bool = False


@dataclass(eq=False)
class Task:
    """Work of known duration.

    Attributes:
        seconds: how long it takes, at least 0.
        after: tasks that end before it starts.
        priority: of what is ready on a resource, the lowest number is next.
        earliest: the moment before which it is not there, in seconds.
        group: what a picture colours it by.
        start, end: when it ran; None until it did.
    """

    name: str
    resource: Resource
    seconds: float
    after: Sequence["Task"] = ()
    priority: float = 0.0
    earliest: float = 0.0
    group: str = ""
    start: float | None = field(default=None, init=False)
    end: float | None = field(default=None, init=False)

    def __post_init__(self):
        for key in ("seconds", "earliest"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{key} of task {self.name!r} is {value} but must be a finite number of at least 0")
        if math.isnan(self.priority):
            raise InputError(f"priority of task {self.name!r} is nan but must be a number")


class Engine:
    """Runs tasks as time goes on.

    Attributes:
        now: the moment up to which everything is decided, in seconds.
    """

    def __init__(self, basis: str):
        self.basis, self.now = basis, 0.0
        self._tasks: dict[Task, int] = {}  # in the order of submission
        self._waiting: dict[Task, int] = {}  # tasks before it that have not ended
        self._after: dict[Task, list[Task]] = {}
        self._lanes: dict[Resource, list[tuple]] = {}  # heaps of what may be next
        self._busy: dict[Resource, Task | None] = {}
        self._moments: list[tuple[float, int, int, Task]] = []  # heap of ends and of arrivals

    def submit(self, tasks: Iterable[Task]) -> None:
        """Add tasks; what they come after is submitted already or among them. None starts before `now`.

        Raises:
            InputError: one was submitted before, here or elsewhere, or comes after one that never was.
        """
        tasks = list(tasks)
        for task in tasks:
            if task in self._tasks:
                raise InputError(f"tasks holds {task.name!r} twice but each must be submitted once")
            if task.start is not None:
                raise InputError(f"tasks holds {task.name!r}, which has run before, but each must be submitted once")
            self._tasks[task] = len(self._tasks)
        names = {lane.name: lane for lane in self._lanes}
        for task in tasks:
            if strange := [before.name for before in task.after if before not in self._tasks]:
                raise InputError(f"task {task.name!r} comes after {strange[0]!r}, which was not submitted")
            if names.setdefault(task.resource.name, task.resource) != task.resource:
                raise InputError(
                    f"resource {task.resource.name!r} is in order and out of order but must be one of them"
                )
            left = [before for before in task.after if before.end is None or before.end > self.now]
            self._waiting[task] = len(left)
            for before in left:
                self._after.setdefault(before, []).append(task)
            lane = self._lanes.setdefault(task.resource, [])
            self._busy.setdefault(task.resource, None)
            if task.resource.in_order:
                heapq.heappush(lane, (self._tasks[task], task))
            if not left:
                self._arrive(task)

    def advance(self, until: float = math.inf) -> None:
        """Go on until a moment, or until nothing is left; what can begin at that moment has begun.

        Raises:
            InputError: without `until`: tasks that wait for one another, all named, so that none can start.
        """
        if not until >= self.now:
            raise InputError(f"until is {until} but must not be before now = {self.now}")
        while True:
            for resource in self._lanes:
                self._begin(resource)
            if not self._moments or self._moments[0][0] > until:
                break
            self.now = self._moments[0][0]
            while self._moments and self._moments[0][0] <= self.now:
                _, _, _, task = heapq.heappop(self._moments)
                self._end(task) if task.start is not None else self._arrive(task)
        if until < math.inf:
            self.now = until
        elif stuck := [task.name for task in self._tasks if task.end is None]:
            raise InputError(f"tasks {', '.join(map(repr, stuck[:6]))} wait for one another and can never start")

    def run(self, until: float = math.inf) -> Timeline:
        """`advance`, and return what has begun by then."""
        self.advance(until)
        events = (Event(t.name, t.resource.name, t.start, t.end, t.group) for t in self._tasks if t.start is not None)
        return Timeline(tuple(events), self.basis, tuple(resource.name for resource in self._lanes))

    def free(self, resource: Resource) -> float:
        """The moment from which a resource has nothing left of what has begun, not before `now`."""
        task = self._busy.get(resource)
        return self.now if task is None else max(self.now, task.end)

    def _arrive(self, task: Task) -> None:
        """All before it ended; it may still be too early."""
        if task.earliest > self.now:
            heapq.heappush(self._moments, (task.earliest, 1, self._tasks[task], task))
        elif not task.resource.in_order:
            heapq.heappush(self._lanes[task.resource], (task.priority, self._tasks[task], task))

    def _begin(self, resource: Resource) -> None:
        lane = self._lanes[resource]
        if self._busy[resource] is not None or not lane:
            return
        task = lane[0][-1]
        if resource.in_order and (self._waiting[task] or task.earliest > self.now):
            return
        heapq.heappop(lane)
        task.start, task.end = self.now, self.now + task.seconds
        self._busy[resource] = task
        heapq.heappush(self._moments, (task.end, 0, self._tasks[task], task))

    def _end(self, task: Task) -> None:
        self._busy[task.resource] = None
        for later in self._after.pop(task, ()):
            self._waiting[later] -= 1
            if not self._waiting[later]:
                self._arrive(later)


def run(tasks: Iterable[Task], basis: str) -> Timeline:
    """The timeline of tasks that are all known beforehand; see `Engine`."""
    engine = Engine(basis)
    engine.submit(tasks)
    return engine.run()
