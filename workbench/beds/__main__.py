"""What the prepared beds cost and what a plain model reaches on them, as a table in Markdown.

    python -m workbench.beds [BED ...] [--preset smoke|small|full]

Every bed is made in an empty home, beside the raw data that `workbench data get` brings, so that the first time is one;
and once more, from what it has kept. Times are of the processor and not of the clock, which shows what else is running.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from workbench.beds.baseline import Measured
from workbench.errors import InputError, unknown
from workbench.lib import data
from workbench.lib.data import store
from workbench.lib.data.sets import SETS

BEDS = (
    *("images", "digit_experts", "shifted_digits", "byte_model", "restoration", "tables", "dynamics"),
    *("glyph_stream", "spoken_stream", "router_traces"),
)
"""Modules with `NEEDS` (data sets), settings, `prepare(settings)` and `measure(settings)`."""


def report(bed: ModuleType, preset: str) -> tuple[float, float, list[Measured]]:
    """Core-seconds to make a bed the first time and again, and the rows that it measures."""
    for name in bed.NEEDS:
        data.get(name)
    raw = {name: store.folder(SETS[name]) for name in bed.NEEDS}
    settings, before = getattr(bed, preset.upper()), os.environ.get("WORKBENCH_HOME")
    with tempfile.TemporaryDirectory(prefix="workbench-beds-") as home:
        Path(home, "data").mkdir()
        for name, folder in raw.items():
            Path(home, "data", name).symlink_to(folder.resolve())
        os.environ["WORKBENCH_HOME"] = home
        try:
            times = []
            for _ in range(2):
                began = time.process_time()
                bed.prepare(settings)
                times.append(time.process_time() - began)
            return *times, bed.measure(settings)
        finally:
            os.environ.pop("WORKBENCH_HOME")
            if before is not None:
                os.environ["WORKBENCH_HOME"] = before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.beds", description=__doc__.splitlines()[0])
    parser.add_argument("beds", nargs="*", metavar="BED", help=f"default: {', '.join(BEDS)}")
    parser.add_argument("--preset", choices=("smoke", "small", "full"), default="small")
    args = parser.parse_args(arguments)
    try:
        for name in args.beds:
            if name not in BEDS:
                raise unknown("bed", name, BEDS)
        _show(args.beds or BEDS, args.preset)
    except InputError as error:
        parser.exit(2, f"{error}\n")


def _show(names: Sequence[str], preset: str) -> None:
    _line("bed", "first s", "again s", "case", "size", "plain model", "metric", "trivial", "reached", "best")
    _line(*["---"] * 10)
    for name in names:
        first, again, rows = report(import_module(f"workbench.beds.{name}"), preset)
        for number, row in enumerate(rows):
            head = (name, f"{first:.1f}", f"{again:.1f}") if number == 0 else ("", "", "")
            scores = ("" if math.isnan(value) else f"{value:.3g}" for value in (row.trivial, row.reached, row.best))
            _line(*head, row.case, row.size, row.model, row.metric, *scores)


def _line(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
