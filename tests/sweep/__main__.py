"""Run a sweep and keep its outcomes.

    python -m tests.sweep adapters                    # every architecture with every adapter; writes adapters.tsv
    python -m tests.sweep adapters --only llama bert  # these, and their rows of the table
    python -m tests.sweep adapters --rest             # what the table lacks: after an interruption, for a new adapter
    python -m tests.sweep adapters --check            # compare with the table, and write nothing
    python -m tests.sweep adapters --jobs 2           # in two processes
    python -m tests.sweep watch                       # every mixture of experts, watched; writes watch.tsv

It ends with an error where an outcome is neither right nor a refusal, or, with --check, another than in the table.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch

from tests.sweep import adapters, table, watching
from tests.sweep.models import architectures

Outcomes = Callable[[str, Sequence[str]], table.Row]
SWEEPS: dict[str, tuple[Outcomes, Callable[[], list[str]], tuple[str, ...]]] = {
    "adapters": (adapters.row, architectures, tuple(adapters.ADAPTERS)),
    "watch": (watching.row, watching.mixtures, watching.COLUMNS),
}
"""By sweep the outcomes of an architecture in some columns, the architectures, and the columns."""


def rows(sweep: str, wanted: dict[str, list[str]], jobs: int) -> Iterator[tuple[str, table.Row]]:
    """The outcomes of each architecture in the columns wanted of it, as they come."""
    outcomes = SWEEPS[sweep][0]
    if jobs == 1:
        alone()
        yield from zip(wanted, map(outcomes, wanted, wanted.values()), strict=True)
        return
    with ProcessPoolExecutor(jobs, initializer=alone) as pool:
        yield from zip(wanted, pool.map(outcomes, wanted, wanted.values()), strict=True)


def lacking(row: table.Row | None, columns: Sequence[str]) -> list[str]:
    """The columns that a row of the table has not; none where its first one says why there are none."""
    if row is None:
        return list(columns)
    return [column for column in columns if column not in row] if len(row) > 1 else []


def alone() -> None:
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures; all of them without it")
    parser.add_argument("--rest", action="store_true", help="what the table lacks: architectures, and columns of them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--check", action="store_true", help="compare with the table, and write nothing")
    options = parser.parse_args()
    _, listed, columns = SWEEPS[options.sweep]
    unknown = set(options.only or ()) - set(architectures())
    if unknown:
        parser.error(f"no architecture is called {', '.join(sorted(unknown))}")
    file = Path(__file__).with_name(f"{options.sweep}.tsv")
    version, kept = table.read(file) if file.exists() else ("", {})
    known = kept if version == table.version() else {}
    wanted = {n: lacking(known.get(n) if options.rest else None, columns) for n in sorted(options.only or listed())}
    wanted = {name: lacks for name, lacks in wanted.items() if lacks}
    found: dict[str, table.Row] = {}
    for name, row in rows(options.sweep, wanted, options.jobs):
        found[name] = row
        said = ", ".join(f"{n} {outcome}" for outcome, n in table.counts([row]).items())
        print(f"{len(found)}/{len(wanted)} {name}: {said}", flush=True)
        if not options.check:
            known[name] = (known.get(name, {}) | row) if options.rest else row
            table.write(file, known, ("class", *columns))
    print("all: " + ", ".join(f"{n} {outcome}" for outcome, n in table.counts(found.values()).items()))
    wrong = table.failures(found)
    if options.check and version == table.version():
        wrong += table.differences(found, kept)
    elif options.check:
        print(f"the table is of {version} and this is {table.version()}: only failures are looked for")
    print("\n".join(wrong) or "nothing failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
