"""Models held to real runs, one file a system: `measure(quick) -> Validation` runs at least four configurations that
had no part in its calibration. What travels with the package is made by

    python -m workbench.bench.serving moe-lens --keep          # or workbench.bench.distributed

and lies beside the system's study, in `workbench/studies/<family>/measured/`.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.catalogue import PACKAGE
from workbench.errors import InputError
from workbench.lib.core.simulation.validation import Validation


def systems(package: str) -> dict[str, str]:
    """Slug -> the module of this package that measures it."""
    files = sorted(Path(import_module(package).__file__).parent.glob("[!_]*.py"))
    return {file.stem.replace("_", "-"): f"{package}.{file.stem}" for file in files}


def tables(slugs: Iterable[str], measure: Callable[[str, bool], Validation], quick: bool) -> dict[str, Any]:
    """For each system the configurations with their errors, and in "accuracy" the median of each.

    What cannot be measured on this machine is named there with the reason. "records" has all, with the calibrations.
    """
    found, accuracy = {}, []
    for slug in slugs:
        try:
            record = found[slug] = measure(slug, quick)
        except InputError as error:  # no shaped link, for one
            accuracy.append({"system": slug, "configurations": 0, "median error": f"not measured: {error}"})
            continue
        accuracy.append(
            {"system": slug, "configurations": len(record.rows)}
            | {"median error": f"{record.median_error:.1%}", "accuracy": f"{record.accuracy:.1%}"}
        )
    rows = {slug: record.table() for slug, record in found.items()}
    return rows | {"accuracy": accuracy, "records": {slug: record.to_dict() for slug, record in found.items()}}


def main(family: str) -> None:
    """`python -m workbench.bench.FAMILY SLUG [--quick] [--keep]`: one system; --keep writes it beside its study."""
    bench = import_module(f"workbench.bench.{family}")
    parser = argparse.ArgumentParser(prog=f"python -m {bench.__name__}", description="One system, measured now.")
    parser.add_argument("slug", choices=bench.systems())
    parser.add_argument("--quick", action="store_true", help="small problems: to see that it works")
    parser.add_argument("--keep", action="store_true", help="write the record beside the study")
    args = parser.parse_args()
    record = bench.measure(args.slug, args.quick)
    for row in record.table():
        print(json.dumps(row))
    print(f"median error {record.median_error:.1%}, accuracy {record.accuracy:.1%}")
    if args.keep:
        record.write(PACKAGE / "studies" / family / "measured" / f"{args.slug.replace('-', '_')}.json")
