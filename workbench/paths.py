"""Where a person's own files are kept: runs, cached data and models, all below one folder."""

import os
from pathlib import Path


def home() -> Path:
    """The folder of the person's own files: ``$WORKBENCH_HOME``, or ``~/.workbench``. It may not exist yet.

    Below it are ``runs/`` (one folder a run), ``data/`` and ``models/`` (parsed data sets and trained bases, which
    can be made again), ``native/`` (compiled kernels, likewise) and ``bench/`` (records of timings).
    """
    return Path(os.environ.get("WORKBENCH_HOME") or "~/.workbench").expanduser().absolute()
