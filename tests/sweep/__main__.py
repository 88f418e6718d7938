"""Run a sweep and keep its outcomes.

    python -m tests.sweep adapters                    # every architecture with every adapter; writes adapters.tsv
    python -m tests.sweep adapters --only llama bert  # these, and their rows of the table
    python -m tests.sweep adapters --rest             # those that the table lacks: a run that was interrupted goes on
    python -m tests.sweep adapters --check            # compare with the table, and write nothing
    python -m tests.sweep adapters --jobs 2           # in two processes
    python -m tests.sweep watch                       # every mixture of experts, watched; writes watch.tsv

It ends with an error where an outcome is neither right nor a refusal, or, with --check, another than in the table.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch

from tests.sweep import adapters, table, watching
from tests.sweep.models import architectures

SWEEPS: dict[str, tuple[Callable[[str], table.Row], Callable[[], list[str]]]] = {
    "adapters": (adapters.row, architectures),
    "watch": (watching.row, watching.mixtures),
}
"""By sweep the outcomes of an architecture, and the architectures."""


def rows(sweep: str, names: list[str], jobs: int) -> Iterator[tuple[str, table.Row]]:
    """The outcomes of each architecture, as they come."""
    if jobs == 1:
        alone()
        found: Iterable[table.Row] = map(SWEEPS[sweep][0], names)
        yield from zip(names, found, strict=True)
        return
    with ProcessPoolExecutor(jobs, initializer=alone) as pool:
        yield from zip(names, pool.map(SWEEPS[sweep][0], names), strict=True)


def alone() -> None:
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures; all of them without it")
    parser.add_argument("--rest", action="store_true", help="architectures that the table lacks")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--check", action="store_true", help="compare with the table, and write nothing")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(architectures())
    if unknown:
        parser.error(f"no architecture is called {', '.join(sorted(unknown))}")
    file = Path(__file__).with_name(f"{options.sweep}.tsv")
    version, kept = table.read(file) if file.exists() else ("", {})
    known = kept if version == table.version() else {}
    names = [n for n in sorted(options.only or SWEEPS[options.sweep][1]()) if not (options.rest and n in known)]
    found: dict[str, table.Row] = {}
    for name, row in rows(options.sweep, names, options.jobs):
        found[name] = row
        said = ", ".join(f"{n} {outcome}" for outcome, n in table.counts([row]).items())
        print(f"{len(found)}/{len(names)} {name}: {said}", flush=True)
        if not options.check:
            table.write(file, known | found)
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
