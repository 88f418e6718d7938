"""``RunWriter``: the one process that writes a run, one transaction per commit.

- Rows wait in memory until ``commit``: a run read from outside, or after a kill, stands at a committed step, never
  between two.
- History is not rewritten. A step before the last commit, or a second value for the same name and step, is an error;
  a trainer that goes back to a checkpoint says so with ``truncate``.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from workbench.errors import InputError, unknown
from workbench.live import blobs, checks, schema
from workbench.live.control import Command, validate
from workbench.live.lock import NAME, Lock
from workbench.live.reader import Run
from workbench.sealed import sealed_file, sealed_folder

CHECKPOINTS = "checkpoints"
TIMEOUT = 30.0  # seconds; a command being sent holds the file for less than a millisecond
CHECKPOINT_PAGES = 4000  # of 4 KiB: the log goes into the main file, with its disk flush, every 16 MiB
_REFUSE = "UPDATE commands SET step = ?, error = 'the run ended' WHERE step IS NULL"


class _Series(NamedTuple):
    id: int
    dtype: str | None
    shape: tuple[int, ...] | None


class RunWriter:
    """Writes a run. Make one with ``create`` or ``open``; best used in ``with``, which records how the run ended."""

    def __init__(self, folder: Path, lock: Lock, db: sqlite3.Connection):
        self.folder, self.name = folder, folder.name
        self._lock, self._db = lock, db
        self._guard = threading.RLock()  # a notebook may train in one thread and add events from another
        self._closed, self._pid = False, os.getpid()
        self._last_command, self._data_version = 0, None
        self._inode = os.stat(folder / schema.DATABASE).st_ino
        self._load()

    @classmethod
    def create(cls, folder: str | Path, meta: Mapping[str, Any]) -> "RunWriter":
        """A new run in ``folder``, which may exist but not hold a run; ``meta`` is kept as JSON."""
        folder = Path(folder).expanduser().absolute()
        rows = [(key, _json(key, value)) for key, value in _complete(meta).items()]
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # who may write here may command the trainer
            (folder / CHECKPOINTS).mkdir(0o700, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(f"run folder {folder} cannot be made: {_why(error)}") from error
        lock = Lock(folder)
        try:
            if (folder / schema.DATABASE).exists():
                raise InputError(f"run folder {folder} holds a run already: resume it, or choose another folder")
            return cls(folder, lock, _connect(folder, rows))
        except BaseException:
            lock.release()
            raise

    @classmethod
    def replace(cls, folder: str | Path, meta: Mapping[str, Any]) -> "RunWriter":
        """A new run in place of the one in ``folder``, which goes once the new one is whole; or it stays as it was.

        InputError while another process writes it, and where the folder holds anything that would be lost with it.
        """
        folder = Path(folder).expanduser().absolute()
        parts = {NAME, CHECKPOINTS, *(f"{schema.DATABASE}{end}" for end in ("", "-wal", "-shm"))}
        more = [path for path in folder.iterdir() if path.name not in parts] + [*(folder / CHECKPOINTS).glob("*")]
        if more:
            names = ", ".join(sorted(path.name for path in more))
            raise InputError(f"run folder {folder} is not replaced: it holds {names}; move that, or take another name")
        lock = Lock(folder)
        try:
            with sealed_folder(folder) as new:
                new.chmod(folder.stat().st_mode & 0o777)
                cls.create(new, meta).close()
        except OSError as error:
            raise InputError(f"run folder {folder} cannot be replaced: {error.strerror}") from error
        finally:
            lock.release()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "RunWriter":
        """Go on writing a run that ended or died; InputError while another process writes it."""
        folder = Path(folder).expanduser().absolute()
        with Run(folder) as run:  # the checks of a reader: is it a run, of this format, undamaged
            if not os.access(folder, os.W_OK):
                raise InputError(f"run folder {folder} is read-only: a run is resumed where it can be written")
            lock = Lock(folder)
            try:
                run.check()
                writer = cls(folder, lock, _connect(folder))
                with writer._transaction() as db:  # what was asked of a process that died is not asked of this one
                    db.execute(_REFUSE, (writer.last_step,))
                    db.execute("UPDATE state SET state = 'running', message = ''")
            except BaseException:
                lock.release()
                raise
        return writer

    # -- recording

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers for ``step``; they are written by ``commit``. NaN and infinities are kept."""
        with self._guard:
            step = self._step(step)
            for name, value in values.items():
                self._new_row(self._scalars, self._series(name, None, None), name, step, float(value))

    def tensors(self, step: int, values: Mapping[str, Any]) -> None:
        """Record arrays for ``step``; a name keeps the dtype and shape it had first. They are copied here."""
        with self._guard:
            step = self._step(step)
            for name, value in values.items():
                array = blobs.typed(name, value)
                series = self._series(name, array.dtype.str, array.shape)
                self._new_row(self._tensors, series, name, step, blobs.encode(array))

    def commit(self, step: int) -> None:
        """Write everything recorded so far, at once: ``step`` is now the run's last step."""
        with self._guard:
            step = self._step(step)
            if self._newest > step:
                raise InputError(f"commit step is {step} but must be at least {self._newest}, which was recorded")
            with self._transaction() as db:
                db.executemany("INSERT INTO names VALUES (?, ?, ?, ?)", self._new_names)
                db.executemany("INSERT INTO scalars VALUES (?, ?, ?)", ((*key, v) for key, v in self._scalars.items()))
                db.executemany("INSERT INTO tensors VALUES (?, ?, ?)", ((*key, v) for key, v in self._tensors.items()))
                db.execute("UPDATE state SET last_step = ?", (step,))
            self.last_step = step
            for waiting in (self._new_names, self._scalars, self._tensors):
                waiting.clear()

    def event(self, step: int, kind: str, text: str) -> None:
        """Note something that happened at ``step``; readers see it at once, not only after a commit."""
        with self._transaction() as db:
            row = (index(step), kind, text, time.time())
            db.execute("INSERT INTO events (step, kind, text, time) VALUES (?, ?, ?, ?)", row)

    def set_meta(self, key: str, value: Any) -> None:
        """Add or replace one entry of the run's meta."""
        text = _json(key, value)
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, text))

    def status(self, state: str, message: str = "") -> None:
        """Say how the run stands: running, paused, finished, stopped or failed. Heard even where the disk is full."""
        if state not in checks.STATES:
            raise unknown("state", state, checks.STATES)
        try:
            with self._transaction() as db:
                db.execute("UPDATE state SET state = ?, message = ?", (state, message))
        except schema.RunStopped:
            self._lock.leave_word(state, message)

    def truncate(self, step: int) -> None:
        """Forget everything after ``step`` (-1: everything), and what was recorded but not committed."""
        step = index(step)
        with self._guard:
            with self._transaction() as db:
                for table in ("scalars", "tensors"):  # by name, so that the key is used
                    db.execute(f"DELETE FROM {table} WHERE name IN (SELECT id FROM names) AND step > ?", (step,))
                    kept = f"SELECT 1 FROM {table} WHERE {table}.name = names.id"
                    typed = "IS NULL" if table == "scalars" else "IS NOT NULL"
                    db.execute(f"DELETE FROM names WHERE dtype {typed} AND NOT EXISTS ({kept})")
                db.execute("DELETE FROM events WHERE step > ?", (step,))
                db.execute("UPDATE state SET last_step = min(last_step, ?)", (step,))
            self._load()

    # -- commands

    def commands(self) -> list[Command]:
        """The commands that came in since the last call, oldest first. Cheap enough to ask before every step."""
        with self._guard:
            # changes when another connection has committed, and all that others write is commands
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version == self._data_version:
                return []
            sql = "SELECT id, name, value FROM commands WHERE step IS NULL AND id > ? ORDER BY id"
            new = [Command(*row) for row in self._db.execute(sql, (self._last_command,)).fetchall()]
            self._data_version = version
            if new:
                self._last_command = new[-1].id
            return [command for command in new if self._is_allowed(command)]

    def _is_allowed(self, command: Command) -> bool:
        """Whether it is one that a reader would send; any other is refused here, before it reaches a trainer."""
        try:
            rows = self._db.execute("SELECT key, value FROM meta").fetchall()
            validate(command.name, command.value, checks.read_meta(rows))
        except ValueError as error:
            self.answer(command, self.last_step, error=str(error))
            return False
        return True

    def answer(self, command: Command, step: int, error: str | None = None) -> None:
        """Say that ``command`` was carried out at ``step``, or why not."""
        with self._transaction() as db:
            db.execute("UPDATE commands SET step = ?, error = ? WHERE id = ?", (index(step), error, command.id))

    # -- the end

    def close(self) -> None:
        """End writing: a run still running is finished, and commands still waiting are refused. Never raises."""
        with self._guard:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            with suppress(RuntimeError, sqlite3.Error), self._transaction() as db:
                db.execute("UPDATE state SET state = 'finished' WHERE state IN ('running', 'paused')")
                db.execute(_REFUSE, (self.last_step,))
            with suppress(sqlite3.Error):  # the whole run in the one file, so that it can be copied
                self._db.execute("PRAGMA busy_timeout = 1000")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            with suppress(sqlite3.Error):
                self._db.close()
            self._lock.release()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self._closed and os.getpid() == self._pid:
            known = isinstance(error, schema.RunStopped | InputError)  # these say all there is to say
            message = str(error) if known else f"{type(error).__name__}: {error}"
            self.status("stopped" if isinstance(error, KeyboardInterrupt) else "failed", message)
        self.close()

    # -- inside

    def _load(self) -> None:
        """Set what is kept in memory to what is in the file."""
        rows = self._db.execute("SELECT id, name, dtype, shape FROM names").fetchall()
        self._names = {name: _Series(id_, *checks.read_series(name, *kind)) for id_, name, *kind in rows}
        self._next_id = max((series.id for series in self._names.values()), default=0) + 1
        self.last_step = self._db.execute("SELECT last_step FROM state").fetchone()[0]
        self._newest = self.last_step  # the newest step recorded, committed or not
        self._new_names: list[tuple] = []
        self._scalars: dict[tuple[int, int], float] = {}
        self._tensors: dict[tuple[int, int], bytes] = {}

    def _check_place(self) -> None:
        """SQLite goes on writing a file that was deleted, and says nothing: all of it is gone when it closes."""
        try:
            there = os.stat(self.folder / schema.DATABASE).st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise schema.RunStopped(f"run {self.name} stopped: its folder {self.folder} was moved, replaced or deleted")

    def _step(self, step: int) -> int:
        step = index(step)
        if step < max(self.last_step, 0):
            raise InputError(f"step is {step} but must be at least {max(self.last_step, 0)}, the last committed step")
        return step

    def _series(self, name: str, dtype: str | None, shape: tuple[int, ...] | None) -> _Series:
        series = self._names.get(name)
        if series is None:
            try:
                checks.check_name(name)
            except ValueError as error:
                raise InputError(str(error)) from None
            series = self._names[name] = _Series(self._next_id, dtype, shape)
            self._next_id += 1
            self._new_names.append((series.id, name, dtype, None if shape is None else json.dumps(shape)))
        elif series.dtype != dtype or series.shape != shape:
            raise InputError(f"{name!r} is {_words(dtype, shape)} but was first {_words(series.dtype, series.shape)}")
        return series

    def _new_row(self, waiting: dict, series: _Series, name: str, step: int, value: object) -> None:
        key = (series.id, step)
        taken = key in waiting
        if not taken and step == self.last_step:
            table = "scalars" if series.dtype is None else "tensors"
            taken = self._db.execute(f"SELECT 1 FROM {table} WHERE name = ? AND step = ?", key).fetchone()
        if taken:
            raise InputError(f"{name!r} is recorded already for step {step}; one value per step")
        waiting[key] = value
        self._newest = max(self._newest, step)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise RuntimeError(f"run {self.name} is written by the process that opened it, not by a forked one")
        with self._guard:
            try:
                self._check_place()
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                with suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if schema.is_fault(error):
                    raise schema.write_error(self.folder, error) from error
                raise


def _connect(folder: Path, meta: list[tuple[str, str]] | None = None) -> sqlite3.Connection:
    """The writing connection to the run in ``folder``, which is made first where ``meta`` is given."""
    path = folder / schema.DATABASE
    try:
        if meta is not None:
            _make(path, meta)
        db = schema.connect(path, "rw", TIMEOUT)
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}").fetchall()
        db.execute(f"PRAGMA journal_size_limit = {4 * CHECKPOINT_PAGES * 4096}").fetchall()
    except (OSError, sqlite3.Error) as error:
        raise schema.write_error(folder, error) from error
    return db


def _make(path: Path, meta: list[tuple[str, str]]) -> None:
    """Make the file under another name first: at ``path`` a reader finds a whole run or none."""
    with sealed_file(path) as part:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL, 0o600))  # SQLite gives its log the same mode
        _fill(part, meta)


def _fill(path: Path, meta: list[tuple[str, str]]) -> None:
    with closing(schema.connect(path, "rw", TIMEOUT)) as db:
        db.execute("PRAGMA journal_mode = WAL").fetchall()  # kept in the file
        db.execute("BEGIN IMMEDIATE")
        for statement in schema.TABLES:
            db.execute(statement)
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        db.execute("INSERT INTO state VALUES (0, 'running', '', -1)")
        db.execute("COMMIT")


def _complete(meta: Mapping[str, Any]) -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="microseconds")  # sorts as text
    return {**meta, "created": created, "format": schema.FORMAT}


def _json(key: str, value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"meta {key!r} cannot be kept as JSON: {error}") from error
    try:
        checks.check_meta({key: json.loads(text)})
    except ValueError as error:
        raise InputError(str(error)) from None
    return text


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _words(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    return "a scalar" if dtype is None else f"a tensor of {np.dtype(dtype).name} {list(shape)}"
