"""Work that is really done, on threads of its own for each resource, and timed as a simulation is: the same `Timeline`.

    with Executor(("device", "cpu", "link"), basis="measured here") as executor:
        load = executor.submit("load 1", "link", lambda: link.copy(there, here))
        done = executor.submit("compute 1", "device", lambda: x @ there, after=[load])
        y = done.result()
    executor.timeline()

Threads share one interpreter, but torch lets go of it inside its operators, so two threads with operators well above a
hundred microseconds work at once if there are two cores: `pair_speedup` says how much of that is had.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.simulation.timeline import Event, Timeline


class Job:
    """A call on a resource; `result()` waits for it."""

    def __init__(self, name: str, resource: str, call: Callable[[], Any], after: Iterable["Job"], group: str):
        self.name, self.resource, self.group = name, resource, group
        self.start: float | None = None
        self.end: float | None = None
        self._call, self._after = call, tuple(after)
        self._done, self._value, self._error = threading.Event(), None, None
        self._heard, self._executor = False, None

    @property
    def done(self) -> bool:
        """Whether it ended, or failed."""
        return self._done.is_set()

    def result(self) -> Any:
        """What the call returned; what it raised is raised, and what a job before it raised."""
        self._done.wait()
        self._heard = True
        if self._error is not None:
            raise self._error
        return self._value

    def _ready(self) -> bool:
        return all(before.done for before in self._after)

    def _run(self, epoch: float) -> None:
        try:
            for before in self._after:
                before.result()
            self.start = time.perf_counter() - epoch
            self._value = self._call()
            self.end = time.perf_counter() - epoch
        except BaseException as error:  # told to whoever waits, or when the executor closes
            self._error = error
        finally:
            self._end()

    def _drop(self) -> None:
        """It will not run."""
        self._error, self._heard = RuntimeError(f"job {self.name!r} was dropped, for the executor was left"), True
        self._end()

    def _end(self) -> None:
        self._call, self._after = None, ()  # what they hold is let go
        self._done.set()


class Executor:
    """One thread for each resource, which does what is ready in the order of submission. A context manager.

    While it is open, torch's operators take one thread each.
    """

    def __init__(self, resources: Sequence[str], basis: str):
        if not resources or len(set(resources)) < len(resources):
            raise InputError(f"resources is {tuple(resources)} but must be one or more different names")
        self.basis, self._jobs, self._open = basis, [], False
        self._lanes: dict[str, list[Job]] = {name: [] for name in resources}
        self._changed = threading.Condition()

    def __enter__(self) -> "Executor":
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._epoch, self._open = time.perf_counter(), True
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)
            for name, lane in self._lanes.items()
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Waits for what was submitted, and raises the first error that nobody was told of.

        Where the block is left by an exception, Ctrl-C for one, only for what has begun; the rest is dropped.
        """
        with self._changed:
            self._open = False
            for lane in self._lanes.values() if error is not None else ():
                for job in lane:
                    job._drop()
                lane.clear()
            self._changed.notify_all()
        try:
            for thread in self._threads:
                thread.join()
        finally:
            torch.set_num_threads(self._before)
        unheard = (job._error for job in self._jobs if job._error is not None and not job._heard)
        if error is None and (first := next(unheard, None)) is not None:
            raise first

    def submit(
        self, name: str, resource: str, call: Callable[[], Any], after: Iterable[Job] = (), group: str = ""
    ) -> Job:
        """Give a call to a resource; it starts after those that it comes `after`, which were submitted before.

        Raises:
            InputError: no such resource, a job of another executor, or the executor is not open.
        """
        if resource not in self._lanes:
            raise InputError(f"resource is {resource!r} but must be one of {', '.join(self._lanes)}")
        job = Job(name, resource, call, after, group)
        with self._changed:
            if not self._open:
                raise InputError(f"job {name!r} is submitted to an executor that is not open: use it in a with block")
            if strange := [before.name for before in job._after if before._executor is not self]:
                raise InputError(f"job {name!r} comes after {strange[0]!r}, which was not submitted to this executor")
            job._executor = self
            self._jobs.append(job)
            self._lanes[resource].append(job)
            self._changed.notify_all()
        return job

    def timeline(self) -> Timeline:
        """What has ended, in seconds since it was opened."""
        done = [job for job in self._jobs if job.end is not None]
        events = (Event(job.name, job.resource, job.start, job.end, job.group) for job in done)
        return Timeline(tuple(events), self.basis, tuple(self._lanes))

    def _work(self, lane: list[Job]) -> None:
        torch.set_num_threads(1)  # of OpenMP, each thread has a number of its own
        while (job := self._next(lane)) is not None:
            job._run(self._epoch)
            with self._changed:
                self._changed.notify_all()

    def _next(self, lane: list[Job]) -> Job | None:
        """The first job that is ready; waits for it. None when the executor closes and nothing is left."""
        with self._changed:
            while True:
                for at, job in enumerate(lane):
                    if job._ready():
                        return lane.pop(at)
                if not lane and not self._open:
                    return None
                self._changed.wait()


class ThrottledLink:
    """A link of a chosen bandwidth: a token bucket over copies, chunk by chunk; between chunks it sleeps.

    Args:
        bandwidth: bytes/s.
        chunk_bytes: what is copied at once; also what the bucket holds, so that a pause is worth one chunk at most.

    Raises:
        InputError: a number is not above 0.
    """

    def __init__(self, bandwidth: float, chunk_bytes: int = 1 << 20):
        for name, value in (("bandwidth", bandwidth), ("chunk_bytes", chunk_bytes)):
            if not value > 0:
                raise InputError(f"{name} is {value} but must be above 0")
        self.bandwidth, self.chunk_bytes = float(bandwidth), int(chunk_bytes)
        self._free_at = 0.0  # when all that was taken has gone through

    def take(self, n_bytes: int) -> None:
        """Sleep until so many bytes have gone through, from now or from when those before them have."""
        now = time.perf_counter()
        self._free_at = max(self._free_at, now) + n_bytes / self.bandwidth
        _sleep_until(self._free_at)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy a contiguous tensor into another of its shape and dtype; takes n / bandwidth, or the copy if slower.

        Raises:
            InputError: they differ in shape or dtype, or one is not contiguous.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise InputError(
                f"target is {target.dtype} {tuple(target.shape)} but must be {source.dtype} {tuple(source.shape)}"
            )
        if not (target.is_contiguous() and source.is_contiguous()):
            raise InputError("target and source must both be contiguous")
        there, here = target.view(-1), source.view(-1)
        step = max(1, self.chunk_bytes // source.element_size())
        start = max(self._free_at, time.perf_counter())
        for at in range(0, here.numel(), step):
            there[at : at + step].copy_(here[at : at + step])
            done = min(at + step, here.numel()) * source.element_size()
            _sleep_until(start + done / self.bandwidth)
        self._free_at = start + source.nbytes / self.bandwidth


def pair_speedup(first: Callable[[], object], second: Callable[[], object], repeats: int = 5) -> float:
    """How much two threads gain: the time of two calls after one another over that of both at once, a median.

    2 is all that two cores can give, if the calls take equally long; 1 is nothing. Where it stays well below 1.6, the
    interpreter is in the way, and one of the two has to go to a process of its own.
    """
    ratios = []
    for turn in range(-1, repeats):
        start = time.perf_counter()
        first(), second()
        apart = time.perf_counter() - start
        with Executor(("a", "b"), "measured") as both:
            jobs = [both.submit("first", "a", first), both.submit("second", "b", second)]
            for job in jobs:
                job.result()
        if turn >= 0:
            ratios.append(apart / both.timeline().makespan)
    return statistics.median(ratios)


def _sleep_until(moment: float) -> None:
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
