"""Progress on stderr for everything that is long: one bar on a terminal, and elsewhere a plain line now and then."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workbench.errors import InputError

Report = Callable[[int, int, str], None]
SECONDS = 10.0  # between two plain lines; what takes less says nothing
LOOK = 1.0  # seconds between two looks at a run that others make


@contextmanager
def progress_bar(text: str) -> Iterator[Report]:
    """Yield ``report(done, total, what is being done)``. The bar goes away when its block ends."""
    if os.environ.get("WORKBENCH_QUIET"):
        yield lambda done, total, now="": None
        return
    if not sys.stderr.isatty():
        yield _lines(text)
        return
    from rich import progress
    from rich.console import Console

    words, times = (
        progress.TextColumn("{task.description}"),
        (progress.TimeElapsedColumn(), progress.TimeRemainingColumn()),
    )
    columns = (words, progress.BarColumn(), progress.MofNCompleteColumn(), *times)
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=None)

        def report(done: int, total: int, now: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{text}: {now}" if now else text)

        yield report


@contextmanager
def progress_of(folder: Path, text: str) -> Iterator[None]:
    """The steps of a run that other processes make while the block lasts, read from its record."""
    from workbench.live.store import find

    ended = threading.Event()

    def follow(report: Report) -> None:
        while not ended.wait(LOOK):
            with suppress(InputError), find(folder) as run:  # one that is being written is not always readable
                report(run.last_step + 1, run.meta.get("total_steps"))

    with progress_bar(text) as report:
        looking = threading.Thread(target=follow, args=(report,), daemon=True)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()


def _lines(text: str) -> Report:
    last = time.monotonic()

    def report(done: int, total: int | None, now: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            print(" ".join(filter(None, (f"{text}: {done}" + (f"/{total}" if total else ""), now))), file=sys.stderr)

    return report
