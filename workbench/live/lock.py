"""Who writes a run: an advisory lock on ``<run>/lock``, held by the writing process for as long as it lives.

The kernel lets go of it when the process ends, however it ends, so a killed writer never leaves a run locked.
"""

import fcntl
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from workbench.errors import InputError
from workbench.live.checks import STATES

NAME = "lock"
LONGEST = 10_000  # bytes that are read of it
PATIENCE = 0.5  # seconds; a reader that asks who writes holds the lock for microseconds, so a writer asks again

_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """The right to write the run in ``folder``; InputError names the process that has it already."""

    def __init__(self, folder: Path):
        self._fd = None
        try:
            fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise InputError(f"run folder {folder} cannot be written: {error.strerror}") from error
        deadline = time.monotonic() + PATIENCE
        while not _try(fd, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(fd)
                raise InputError(f"run {folder.name} is being written by {owner(folder)}: a run has one writer")
            time.sleep(0.01)
        self._fd = fd
        _held.add(self)
        self._owner = f"{os.getpid()} {socket.gethostname()}\n"
        try:
            self._write(self._owner)
        except OSError as error:
            self.release()
            raise InputError(f"run folder {folder} cannot be written: {error.strerror}") from error

    def leave_word(self, state: str, message: str) -> None:
        """Say how the run ends where the run itself cannot take it: a full disk has room in a file that it has."""
        with suppress(OSError):
            self._write(f"{self._owner}{state} {' '.join(message.split())[:1000]}\n")

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = release

    def _write(self, text: str) -> None:
        os.pwrite(self._fd, text.encode(), 0)
        os.ftruncate(self._fd, len(text.encode()))


def held(folder: Path) -> bool:
    """Whether a process writes the run in ``folder`` now."""
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _try(fd, fcntl.LOCK_SH)  # shared: readers that ask at the same moment do not see each other
    finally:
        os.close(fd)


def owner(folder: Path) -> str:
    """The last writer of the run in ``folder``, for a message: "process 4711 on host"."""
    pid, _, host = _lines(folder)[0].partition(" ")
    named = pid.isascii() and pid.isdigit() and host.isprintable()
    return f"process {pid[:20]} on {host[:100]}" if named else "a process that left no name"


def last_word(folder: Path) -> tuple[str, str] | None:
    """(state, message) that the last writer left with ``leave_word``; None where it had no need to."""
    state, _, message = _lines(folder)[1].partition(" ")
    return (state, message) if state in STATES else None


def _lines(folder: Path) -> list[str]:
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return [*os.read(fd, LONGEST).decode(errors="replace").split("\n"), "", ""]
        finally:
            os.close(fd)
    except OSError:
        return ["", ""]


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave_to_parent() -> None:
    """A forked child shares the lock; it lets go of its copy, or it would keep a dead parent's run locked."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_leave_to_parent)
