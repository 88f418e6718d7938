"""`workbench sweep`: a notebook at every point of a grid of parameters."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.cli.progress import progress_bar
from workbench.errors import InputError


def add_sweep(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command, but for those that say where."""
    sub.add_argument("notebook", metavar="NOTEBOOK", help="a path, or a name such as 01_routing")
    text = "values of parameters, separated by commas; a point for each combination"
    sub.add_argument("--grid", nargs="+", required=True, metavar="NAME=A,B,C", help=text)
    text = "where the executed notebooks are kept, and what is done is not done again (default: out/NOTEBOOK)"
    sub.add_argument("--out", metavar="FOLDER", help=text)


def sweep(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """The rows of the table, and the exit status."""
    from workbench.engines import Workers
    from workbench.notebook import find
    from workbench.notebook_grid import run_grid

    folder = Path(args.out) if args.out is not None else Path("out") / find(args.notebook).stem
    workers = Workers(args.jobs, args.engine, args.address)
    try:
        with progress_bar(f"sweep {args.notebook}") as progress:
            rows = run_grid(args.notebook, _grid(args.grid), folder, workers, progress)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"what is done is kept in {folder}; the same command goes on from there") from stop
    return [row.as_dict() for row in rows], int(any(row.state == "failed" for row in rows))


def _grid(words: Sequence[str]) -> dict[str, list[str]]:
    grid = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values):
            raise InputError(f"--grid has {word!r} but must have NAME=A,B,C")
        if name in grid:
            raise InputError(f"--grid has {name!r} twice")
        grid[name] = values.split(",")
    return grid
