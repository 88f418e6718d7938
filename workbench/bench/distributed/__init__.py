"""Two processes over a link of 100 Mbit/s, in a network namespace of their own: what is waited for, and what is hidden.

Bounds: streaming DiLoCo's exposed communication beside data-parallel's (torch's DDP, which overlaps its own, and one
all-reduce after the backward pass); tokens dispatched to experts and combined again, beside the time of their bytes at
the rate that a plain socket has on this link. And for each system the predictions of its model beside what was
measured, as in `workbench.bench.serving`:

    python -m workbench.bench.distributed streaming-diloco --keep

Where a namespace or its shaping is not permitted, the table says why, and nothing is timed.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.bench.distributed import _shaped
from workbench.lib.core.distributed.shaped import available
from workbench.lib.core.simulation.validation import Validation

REPEATS = 1


def systems() -> dict[str, str]:
    """Slug -> the module that measures it."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem.replace("_", "-"): f"{__name__}.{file.stem}" for file in files}


def measure(slug: str, quick: bool = False) -> Validation:
    """Calibrate and validate one system here and now. An `InputError` where the link cannot be shaped."""
    return import_module(systems()[slug]).measure(quick)


def cases(quick: bool = False) -> list:
    """No contestants of one process; see `tables`."""
    return []


def tables(quick: bool = False) -> dict[str, Any]:
    """The timings as "rows", the link, for each system the configurations with their errors, and the medians of these.

    "records" has all of the latter, with the calibrations.
    """
    permitted, reason = available()
    if not permitted:
        return {"not measured": [{"why": reason}]}
    found = {slug: measure(slug, quick) for slug in systems()}
    accuracy = [
        {"system": slug, "configurations": len(record.rows), "median error": f"{record.median_error:.1%}"}
        for slug, record in found.items()
    ]
    rows = {slug: record.table() for slug, record in found.items()}
    seen = _shaped.seen(quick)
    return {
        "rows": seen.rows(),
        "link": seen.link_table(),
        **rows,
        "accuracy": accuracy,
        "records": {slug: record.to_dict() for slug, record in found.items()},
    }
