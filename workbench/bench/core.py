"""Timing side by side: contestants take turns in one process, and what is reported are medians of ratios.

A ratio is taken within one round, between neighbours in time, so that a machine that slows down slows both. Each round
begins with another contestant. No figure is made from two processes or from two thread counts.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from workbench.errors import InputError
from workbench.kernels import native
from workbench.lib.core.threads import torch_threads
from workbench.paths import home

OURS = "workbench"
LIMIT = "limit"  # the contestant that stands for the bound: timed with the others, no row of its own
FORWARD, BOTH = "forward", "forward+backward"
Contestants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One problem that several implementations solve.

    Attributes:
        name: as it is printed, with the shape.
        make: direction -> the contestants by name, each a call that does the work once; `OURS` among them, and `LIMIT`
            where there is a bound. Called anew for every thread count and direction, so that nothing large outlives it.
        directions: those to time.
    """

    name: str
    make: Callable[[str], Contestants]
    directions: tuple[str, ...] = (FORWARD, BOTH)


def measure(
    contestants: Contestants, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `repeats` rounds, after one round that is not counted.

    With `time.thread_time` as the clock they are those of the processor: of what is computed in this thread alone, it
    says the same on a busy machine, where a short call is hardly ever interrupted and a long one is.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for turn in range(-1, repeats):
            first = max(turn, 0) % len(names)
            for name in names[first:] + names[:first]:
                start = clock()
                contestants[name]()
                spent = clock() - start
                if turn >= 0:
                    seconds[name].append(spent)
    return seconds


def rows_of(case: str, threads: int, direction: str, seconds: dict[str, list[float]]) -> list[dict]:
    """One row an implementation; see `timed`."""
    limit = seconds.get(LIMIT)
    peers = {name: spent for name, spent in seconds.items() if name != LIMIT}
    return [
        {
            "case": case,
            "threads": threads,
            "direction": direction,
            "implementation": name,
            "median_s": statistics.median(spent),
            "ratio_to_limit": None if limit is None else median_ratio(spent, limit),
            "speedup_over": {peer: median_ratio(theirs, spent) for peer, theirs in peers.items() if peer != name},
        }
        for name, spent in peers.items()
    ]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def timed(
    cases: Sequence[Case],
    *,
    threads: Sequence[int],
    repeats: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[list[dict]]:
    """Time every case at every thread count; what is timed is there before the next begins.

    Args:
        cases: what to time.
        threads: numbers of threads of torch's operators; the number from before is restored.
        repeats: rounds that count.
        progress: called as progress(done, all, what) before each measurement.

    Yields:
        The rows of one case, thread count and direction, one for each implementation: {case, threads, direction,
        implementation, median_s, ratio_to_limit: median of time / limit or None, speedup_over: {peer: median of peer's
        time / time}}.
    """
    check_counts(threads, repeats)
    plan = [(count, case, direction) for count in threads for case in cases for direction in case.directions]
    for done, (count, case, direction) in enumerate(plan):
        if progress is not None:
            progress(done, len(plan), f"{case.name}, {direction}, {count} thread{'s' * (count != 1)}")
        with torch_threads(count):
            seconds = measure(case.make(direction), repeats)
        yield rows_of(case.name, count, direction, seconds)


def check_counts(threads: Sequence[int], repeats: int) -> None:
    """Raise `InputError` unless all are at least 1."""
    if not threads or any(count < 1 for count in threads):
        raise InputError(f"threads is {tuple(threads)} but must be one or more numbers of at least 1")
    if repeats < 1:
        raise InputError(f"repeats is {repeats} but must be at least 1")


def machine() -> dict:
    """What the timings were taken on."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "compiler": native.compiler(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def save(name: str, result: dict) -> Path:
    """Keep `result` as ``$WORKBENCH_HOME/bench/<name>-<time in UTC>.json``; returns where it is."""
    folder = home() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside the block: it would fall on whoever is being timed."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
