"""The rows of a plan: those that are there already, and the others run, each kept the moment it is done."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from operator import itemgetter

from workbench.engines import HERE, Crew, Workers
from workbench.studies import sheets
from workbench.studies.kept import Kept
from workbench.studies.rows import Row

Progress = Callable[[int, int, str], None]
"""Called as progress(rows done, rows in all, what was just done)."""

Run = Callable[[str, int, Mapping[str, object]], Row]
Key = tuple[str, int]  # arm, seed


def gather(
    slug: str,
    settings: Mapping[str, object],
    run: Run,
    plan: list[Key],
    workers: Workers = HERE,
    progress: Progress | None = None,
    given: Iterable[Row] = (),
    fresh: bool = False,
) -> tuple[list[Row], Counter]:
    """The rows of a plan in its order, and how many of them were "kept", are "stored", and were "run".

    Args:
        settings: what `run` is told.
        plan: seed by seed.
        workers: who runs them, one thread each. They are kept here, wherever they ran.
        given: stored rows. They serve a seed where all of its arms are there and not all are kept, so that the arms of
            a seed, which are compared, come from one machine.
        fresh: run all of them, whatever is kept.
    """
    kept = Kept.of(slug, settings, run)
    kept.sweep()
    found = {} if fresh else dict(_read(kept, plan))
    origin = dict.fromkeys(found, "kept")
    by_key = {(row.arm, row.seed): row for row in given}
    for _, group in groupby(plan, itemgetter(1)):
        keys = {*group}
        if not keys <= found.keys() and keys <= by_key.keys():
            found |= {key: by_key[key] for key in keys}
            origin |= dict.fromkeys(keys, "stored")
    missing = [key for key in plan if key not in found]
    if not fresh and (others := kept.of_other_code(missing)):
        _warn(f"other code than today's made {len(others)} of the kept rows of {slug}, the first is {others[0]}")
    if found and missing and progress is not None:
        progress(len(found), len(plan), f"{len(found)} are there")
    with workers.open(len(missing)) as crew:
        one = partial(_run_one, kept, crew, run, settings, fresh)
        for key, (row, how, problem) in crew.each(one, missing):
            found[key], origin[key] = row, how
            if problem is not None:
                warnings.warn(problem, sheets.NotUsed, stacklevel=2)
            if progress is not None:
                progress(len(found), len(plan), f"{key[0]}, seed {key[1]}: {row.metric:.4f}")
    return [found[key] for key in plan], Counter(origin.values())


def _read(kept: Kept, plan: list[Key]) -> Iterator[tuple[Key, Row]]:
    for key in plan:
        try:
            row = kept.read(*key)
        except sheets.Damaged as error:
            _warn(str(error))
        else:
            if row is not None:
                yield key, row


def _warn(what: str) -> None:
    warnings.warn(f"{what}; not used", sheets.NotUsed, stacklevel=3)


def _run_one(
    kept: Kept, crew: Crew, run: Run, settings: Mapping[str, object], fresh: bool, arm: str, seed: int
) -> tuple[Row, str, str | None]:
    """The row, whether it was "run" here or "kept" by a process that was faster, and why it could not be kept."""
    with kept.claim(arm, seed):
        if not fresh:
            with suppress(sheets.Damaged):
                if (row := kept.read(arm, seed)) is not None:
                    return row, "kept", None
        made = crew.call(_timed, run, arm, seed, settings)
        row = Row(**sheets.plain(asdict(made)))  # as a file gives it back, so that a rule sees the same in both cases
        try:
            kept.write(row)
        except OSError as error:
            return row, "run", f"{kept.path(arm, seed)} cannot be written, the row is not kept: {error.strerror}"
        return row, "run", None


def _timed(run: Run, arm: str, seed: int, settings: Mapping[str, object]) -> Row:
    from workbench.lib.core.threads import torch_threads

    with torch_threads(1):  # the same numbers on any machine, and no two runs fighting for a core
        began = time.perf_counter()
        row = run(arm, seed, settings)
    return replace(row, seconds=time.perf_counter() - began)
