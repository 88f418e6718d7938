"""One progress bar on stderr for everything that is long; nothing where stderr is no terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int, str], None]


@contextmanager
def progress_bar(text: str) -> Iterator[Report]:
    """Yield ``report(done, total, what is being done)``. The bar goes away when its block ends."""
    if os.environ.get("WORKBENCH_QUIET") or not sys.stderr.isatty():
        yield lambda done, total, now="": None
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
