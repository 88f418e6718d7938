"""Two processes over a link of 100 Mbit/s, in a network namespace of their own: what is waited for, and what is hidden.

Bounds: streaming DiLoCo's exposed communication beside data-parallel's (torch's DDP, which overlaps its own, and one
all-reduce after the backward pass); tokens dispatched to experts and combined again, beside the time of their bytes at
the rate that a plain socket has on this link. And for each system the predictions of its model beside what was
measured, see `workbench.bench.real_runs`. Bytes of sparse gathers and of what returns, counted beside the formula, need
no such link.

Where a namespace or its shaping is not permitted, the table says why, and nothing is timed.
"""

from importlib import import_module
from typing import Any

from workbench.bench import real_runs
from workbench.bench.distributed import _ranks, _shaped
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.distributed.shaped import available
from workbench.lib.core.simulation.validation import Validation

REPEATS = 1


def systems() -> dict[str, str]:
    """Slug -> the module that measures it."""
    return real_runs.systems(__name__)


def measure(slug: str, quick: bool = False) -> Validation:
    """Calibrate and validate one system here and now. An `InputError` where the link cannot be shaped."""
    return import_module(systems()[slug]).measure(quick)


def cases(quick: bool = False) -> list:
    """No contestants of one process; see `tables`."""
    return []


def tables(quick: bool = False) -> dict[str, Any]:
    """The timings as "rows", the link, and what `real_runs.tables` has; or why nothing could be measured."""
    copies = {"sparse materialisation": run_processes(_ranks.sparse_bytes, 2)[0]}
    permitted, reason = available()
    if not permitted:
        return copies | {"not measured": [{"why": reason}]}
    seen = _shaped.seen(quick)
    found = real_runs.tables(systems(), measure, quick)
    return copies | {"rows": seen.rows(), "link": seen.link_table()} | found
