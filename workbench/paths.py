"""Where files are: a person's own, all below one folder, and the notebooks and apps that come with the workbench."""

import os
from pathlib import Path


def home() -> Path:
    """The folder of the person's own files: ``$WORKBENCH_HOME``, or ``~/.workbench``. It may not exist yet.

    Below it are ``runs/`` (one folder a run), ``data/`` and ``models/`` (parsed data sets and trained bases, which
    can be made again), ``native/`` (compiled kernels, likewise), ``results/`` (rows of studies), ``searches/`` (of
    architectures) and ``bench/`` (records of timings).
    """
    return Path(os.environ.get("WORKBENCH_HOME") or "~/.workbench").expanduser().absolute()


def shipped(folder: str) -> Path:
    """The workbench's own "notebooks" or "apps": within the package where a wheel is installed, else beside it.

    An installed package looks nowhere else, because what lies beside it belongs to other packages.
    """
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder
