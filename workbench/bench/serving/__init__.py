"""Models of serving held to real runs: calibrated on this machine, then predictions beside what is measured.

One file a system: `measure(quick) -> Validation` runs at least four configurations that had no part in the calibration.
What travels with the package is made by

    python -m workbench.bench.serving moe-lens --keep

and lies beside the system's study, in `workbench/studies/serving/measured/`.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.lib.core.simulation.validation import Validation

REPEATS = 1


def systems() -> dict[str, str]:
    """Slug -> the module that measures it."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem.replace("_", "-"): f"{__name__}.{file.stem}" for file in files}


def measure(slug: str, quick: bool = False) -> Validation:
    """Calibrate and validate one system here and now."""
    return import_module(systems()[slug]).measure(quick)


def cases(quick: bool = False) -> list:
    """No contestants: what is measured are configurations, see `tables`."""
    return []


def tables(quick: bool = False) -> dict[str, Any]:
    """For each system the configurations with their errors, and in "accuracy" the median of each.

    What cannot be measured on this machine is named there with the reason. "records" has all, with the calibrations.
    """
    found, accuracy = {}, []
    for slug in systems():
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
