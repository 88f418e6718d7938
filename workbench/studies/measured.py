"""Real runs that travel with the package: `workbench/studies/<family>/measured/<system>.json`, read by its study.

They are measured by a command (`workbench bench serving`, `workbench bench distributed`), not by a study, whose rows
are the same on every machine. A machine's own record of such a command is under ``$WORKBENCH_HOME/bench``.
"""

from pathlib import Path

from workbench.catalogue import PACKAGE, Method
from workbench.lib.core.simulation.validation import Validation


def path_of(system: Method) -> Path:
    """Where the measurements of a system are."""
    return PACKAGE / "studies" / system.family / "measured" / f"{system.slug.replace('-', '_')}.json"


def read(system: Method) -> Validation:
    """The measurements that travel with the package; `InputError` where there are none."""
    return Validation.read(path_of(system))
