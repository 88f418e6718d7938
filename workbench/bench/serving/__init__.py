"""Models of serving held to real runs: calibrated on this machine, then predictions beside what is measured.

One file a system, see `workbench.bench.real_runs`.
"""

from importlib import import_module
from typing import Any

from workbench.bench import real_runs
from workbench.lib.core.simulation.validation import Validation

REPEATS = 1


def systems() -> dict[str, str]:
    """Slug -> the module that measures it."""
    return real_runs.systems(__name__)


def measure(slug: str, quick: bool = False) -> Validation:
    """Calibrate and validate one system here and now."""
    return import_module(systems()[slug]).measure(quick)


def cases(quick: bool = False) -> list:
    """No contestants: what is measured are configurations, see `tables`."""
    return []


def tables(quick: bool = False) -> dict[str, Any]:
    """For each system the configurations with their errors, and the medians; see `real_runs.tables`."""
    return real_runs.tables(systems(), measure, quick)
