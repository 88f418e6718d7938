"""The run store: ``RunWriter`` writes a run, ``Run`` reads it, ``runs`` and ``find`` say which there are.

A run is a folder: ``run.sqlite`` (write-ahead log, crash-safe, many readers), ``lock`` (held by the writer while it
lives) and ``checkpoints/``. All processes that use a run must be on one machine; a network file system will not do.
"""

import os
import re
import secrets
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from workbench.errors import InputError, unknown
from workbench.live.control import Command
from workbench.live.reader import Answer, Event, Run, Status
from workbench.live.schema import DATABASE, FORMAT, RunStopped
from workbench.live.writer import CHECKPOINTS, RunWriter
from workbench.paths import home

__all__ = [
    "CHECKPOINTS",
    "DATABASE",
    "FORMAT",
    "Answer",
    "Command",
    "DamagedRun",
    "Event",
    "Run",
    "RunStopped",
    "RunWriter",
    "Status",
    "find",
    "kept",
    "new_folder",
    "newest",
    "run_name",
    "runs",
]


class DamagedRun(Run):
    """A folder in the list of runs that cannot be read: it has a name and says why; the rest raises that InputError."""

    def __init__(self, folder: Path, reason: str):
        self.folder, self.name, self.reason = folder, folder.name, reason
        self._guard, self._db, self._checked = threading.RLock(), None, {}
        self.created = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="microseconds")

    @property
    def status(self) -> Status:
        return Status("damaged", self.reason)

    def _reading(self):
        raise InputError(self.reason)


def runs(root: str | Path | None = None) -> list[Run]:
    """The runs in ``root`` (default: the user's), newest first; damaged ones are listed with state "damaged"."""
    found = []
    for database in _root(root).glob(f"*/{DATABASE}"):
        try:
            with Run(database.parent) as run:  # closed: a long list holds no files open, and a use opens again
                found.append(run)
        except InputError as error:
            with suppress(OSError):  # it is gone
                found.append(DamagedRun(database.parent, str(error)))
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True)


def find(name_or_path: str | Path, root: str | Path | None = None) -> Run:
    """A run as `kept` finds it, or by its path."""
    try:
        folder = Path(name_or_path).expanduser()
    except RuntimeError:
        raise InputError(f"run {str(name_or_path)!r} begins with a user that this machine does not know") from None
    if folder.is_absolute():
        return Run(folder)
    try:
        return kept(str(name_or_path), root)
    except InputError:
        if len(folder.parts) > 1 or os.path.isdir(folder):  # unlike Path's, never raises
            return Run(folder)
        raise


def kept(name: str, root: str | Path | None = None) -> Run:
    """A run in ``root`` by its name, by a prefix that only it has, or the newest as "latest"; by no path elsewhere."""
    known = {path.parent.name: path.parent for path in sorted(_root(root).glob(f"*/{DATABASE}"))}
    if name in known:
        return Run(known[name])
    if name == "latest":
        found = newest(root)
        if found is None:
            raise InputError(f"there is no run in {_root(root)} yet; workbench live starts one")
        return found
    starting = [other for other in known if name and other.startswith(name)]
    if len(starting) > 1:
        raise InputError(f"run {name!r} could be any of {', '.join(starting)}")
    if not starting:
        raise unknown("run", name, known)
    return Run(known[starting[0]])


def newest(root: str | Path | None = None) -> Run | None:
    """The newest run that can be read; None where there is none."""
    return next((run for run in runs(root) if not isinstance(run, DamagedRun)), None)


def run_name(folder: Path, root: str | Path | None = None) -> str:
    """What `find` finds the run in ``folder`` by: its name among those in ``root``, elsewhere its path."""
    return folder.name if folder.parent == _root(root) else str(folder)


def new_folder(kind: str, root: str | Path | None = None) -> Path:
    """A path for a new run, such as runs/2026-11-22-1405-lm-3f2a; it is not made yet."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", kind):
        raise InputError(f"kind is {kind!r} but must be at most 200 letters, digits, '.', '_' and '-'")
    while True:
        path = _root(root) / f"{time.strftime('%Y-%m-%d-%H%M')}-{kind}-{secrets.token_hex(2)}"
        if not path.exists():
            return path


def _root(root: str | Path | None) -> Path:
    return (home() / "runs" if root is None else Path(root)).expanduser().absolute()
