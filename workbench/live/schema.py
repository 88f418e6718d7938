"""The tables of a run's SQLite file, and what its errors mean to a person.

- Write-ahead log: readers see the last commit and never hold up the writer.
- ``synchronous=NORMAL``: a commit is not flushed to the disk, only a checkpoint is. Killing the process loses nothing
  that was committed; losing power may lose the last commits, and never damages what is there.
- Only SQLite opens the file. If a process opened it by itself too, closing that would drop the process's POSIX locks.
"""

import os
import sqlite3
from pathlib import Path

from workbench.errors import InputError

FORMAT = 1
DATABASE = "run.sqlite"
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",  # value: JSON
    "CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 0), state TEXT, message TEXT, last_step INTEGER)",
    # dtype and shape (JSON) hold for a series of tensors; both are NULL for a series of scalars
    "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, dtype TEXT, shape TEXT)",
    # value NULL is NaN, which SQLite cannot hold
    "CREATE TABLE scalars (name INTEGER, step INTEGER, value REAL, PRIMARY KEY (name, step)) WITHOUT ROWID",
    # a rowid table: blobs lie in the order they came, and the index of keys is scanned without touching them
    "CREATE TABLE tensors (name INTEGER, step INTEGER, data BLOB NOT NULL, UNIQUE (name, step))",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, step INTEGER, kind TEXT, text TEXT, time REAL)",
    # value has no type, so that an integer comes back as one; step NULL: not answered yet
    "CREATE TABLE commands (id INTEGER PRIMARY KEY, name TEXT, value, sent REAL, step INTEGER, error TEXT)",
)
NAMES = tuple(statement.split()[2] for statement in TABLES)
FAULTS = (sqlite3.OperationalError, sqlite3.InternalError)  # of the file or the disk; the others are mistakes in a call
BUSY, LOCKED, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, NOTADB = 5, 6, 8, 10, 11, 13, 14, 26


class RunStopped(RuntimeError):
    """The store can take no more (disk full, disk error): the run has to end. What was committed stays readable."""


def connect(path: Path, mode: str, timeout: float) -> sqlite3.Connection:
    """A connection to the file at ``path``; mode "ro", "rw", "rwc" or "ro&immutable=1"; timeout in seconds."""
    uri = f"{path.as_uri()}?mode={mode}"
    # autocommit: transactions are opened by name, and a read ends with its call
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def is_fault(error: BaseException) -> bool:
    """Whether the file or the disk is at fault, not the call."""
    # a damaged file has no class of its own: it is a plain DatabaseError
    return isinstance(error, FAULTS) or type(error) is sqlite3.DatabaseError


def code(error: Exception) -> int:
    """The primary SQLite result code of an error, 0 where it has none."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def write_error(folder: Path, error: sqlite3.Error | OSError) -> RunStopped:
    """What a failed write means."""
    kept = "what was committed is kept"
    if code(error) == FULL:
        return RunStopped(f"run {folder.name} stopped: no space left for {folder / DATABASE}; {kept}")
    if code(error) in (BUSY, LOCKED):
        return RunStopped(f"run {folder.name} stopped: another process holds {folder / DATABASE} for writing; {kept}")
    return RunStopped(f"run {folder.name} stopped: {folder / DATABASE} cannot be written ({error}); {kept}")


def read_error(folder: Path, error: Exception) -> InputError:
    """What a failed read means."""
    number = code(error) if isinstance(error, sqlite3.Error) else CORRUPT
    if not os.path.exists(folder / DATABASE):
        return InputError(f"{folder} is not a run folder (any more): it has no {DATABASE}")
    if number == NOTADB:
        return InputError(f"{folder} is not a run folder: its {DATABASE} is not an SQLite file")
    if number in (BUSY, LOCKED):
        return InputError(f"run {folder.name} cannot be read now: its {DATABASE} is busy; try again")
    if number in (CANTOPEN, READONLY, IOERR):
        return InputError(f"run {folder.name} cannot be read: {folder / DATABASE}: {error}")
    if "no such table" in str(error):
        return InputError(f"{folder} is not a run folder: its {DATABASE} is something else")
    return InputError(f"run {folder.name} is damaged: {error}")
