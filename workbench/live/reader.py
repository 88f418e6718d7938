"""``Run``: reads a run, while it is written or after. Any number of them, in any process or thread.

- A call reads one snapshot and lets go of it: nothing is held between calls, so the writer's log can always be cleared.
- One connection a ``Run``, used by one thread at a time; a call takes milliseconds, so it may be made from a callback.
"""

import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from workbench.errors import InputError, unknown
from workbench.live import blobs, checks, lock, schema, series
from workbench.live.control import validate

TIMEOUT = 5.0  # seconds
LIVE = ("running", "paused")


class Status(NamedTuple):
    """How a run stands: running, paused, finished, stopped, failed, or died (its process ended without a word)."""

    state: str
    message: str = ""

    @property
    def live(self) -> bool:
        """Whether a process is writing it."""
        return self.state in LIVE


class Event(NamedTuple):
    """Something that happened at a step; time in seconds since the epoch."""

    step: int
    kind: str
    text: str
    time: float


class Answer(NamedTuple):
    """A command and what became of it: step None while it waits, error where it was refused."""

    id: int
    name: str
    value: float | int | None
    sent: float
    step: int | None
    error: str | None


class Run:
    """A run in ``folder``. InputError where that is not a run, is damaged, or is of a newer format.

    Meta, state and names are looked through here, once, and what comes later when it is read: see ``checks``.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().absolute()
        self.name = self.folder.name
        self._guard = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._checked: dict[tuple, tuple[str | None, tuple[int, ...] | None]] = {}  # (dtype, shape) of rows of names
        if not os.path.isdir(self.folder):  # unlike Path's, never raises
            raise InputError(f"run folder {self.folder} does not exist, or cannot be entered")
        if not os.path.isfile(self.folder / schema.DATABASE):
            raise InputError(f"{self.folder} is not a run folder: it has no {schema.DATABASE}")
        self._check_tables()
        self._check_format()
        self.created: str = self.meta["created"]
        self._state()
        self.names()
        self._check_size()

    # -- what it is and how it stands

    @property
    def meta(self) -> dict[str, Any]:
        """Seed, recipe, versions, model, ...: all that was said about the run."""
        with self._reading() as db:
            return checks.read_meta(db.execute("SELECT key, value FROM meta").fetchall())

    @property
    def last_step(self) -> int:
        """The last committed step, -1 before the first."""
        return self._state()[2]

    @property
    def status(self) -> Status:
        """How the run stands now."""
        state, message, step = self._state()
        if state in LIVE and not lock.held(self.folder):
            state, message, step = self._state()  # it may have ended in order between the two looks
            if state in LIVE:
                if word := lock.last_word(self.folder):
                    return Status(*word)
                return Status("died", f"{lock.owner(self.folder)} ended without closing the run, after step {step}")
        return Status(state, message)

    def names(self, prefix: str = "") -> list[str]:
        """The names recorded so far that start with ``prefix``, in the order they first came."""
        with self._reading() as db:
            rows = db.execute("SELECT name, dtype, shape FROM names ORDER BY id").fetchall()
            for row in rows:
                self._check_series(*row)
        return [name for name, *_ in rows if name.startswith(prefix)]

    def events(self) -> list[Event]:
        """All events, oldest first."""
        with self._reading() as db:
            sql = "SELECT step, kind, text, time FROM events ORDER BY id"
            rows = db.execute(sql).fetchall()
            checks.check_rows(rows, {str}, {str}, checks.NUMBER, low=-1)
            return [Event(*row) for row in rows]

    # -- series

    def dtype(self, name: str) -> str | None:
        """The numpy dtype of a series of tensors, None for one of scalars; InputError where there is no such name."""
        with self._reading() as db:
            found = self._series(db, name)
        if found is None:
            raise unknown("name", name, self.names())
        return None if found[0] is None else np.dtype(found[0]).name

    def steps(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """The steps int64 (S,) at which a series has a row, from start to stop, both included."""
        with self._reading() as db:
            found = [series.steps(db, table, name, start, stop) for table in ("scalars", "tensors")]
        return np.array(found[0] or found[1], dtype=np.int64)  # a name is of one kind

    def scalars(
        self, name: str, start: int | None = None, stop: int | None = None, points: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 (S,), values float64 (S,)) of a series, of the steps from start to stop, both included.

        With ``points``, at most that many rows, evenly spaced over the steps, the first and the last among them.
        A name that is not recorded (yet) gives empty arrays.
        """
        with self._reading() as db:
            rows = series.rows(db, "scalars", name, start, stop, points)
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([np.nan if value is None else value for _, value in rows], dtype=np.float64)

    def tensors(
        self, name: str, start: int | None = None, stop: int | None = None, points: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 (S,), arrays (S, *shape)) of a series; arguments as in ``scalars``.

        Rows that ``points`` skips are not read. A name that is not recorded (yet) gives two empty arrays.
        """
        with self._reading() as db:
            dtype, shape = self._type(db, name)
            rows = series.rows(db, "tensors", name, start, stop, points)
            steps = np.array([step for step, _ in rows], dtype=np.int64)
            return steps, blobs.decode([data for _, data in rows], dtype, shape)

    def tensor(self, name: str, step: int | None = None) -> tuple[int, np.ndarray] | None:
        """The newest array of a series at or before ``step`` (None: of all) and its step; None where there is none."""
        with self._reading() as db:
            dtype, shape = self._type(db, name)
            row = series.newest(db, name, step)
            return None if row is None else (row[0], blobs.decode([row[1]], dtype, shape)[0])

    # -- commands

    def send(self, name: str, value: float | int | None = None) -> int:
        """Ask the trainer for something (see ``control.COMMANDS``); the command's id, to find its answer by.

        InputError where the command is unknown, its value is not allowed, or nobody is there to carry it out.
        """
        meta = self.meta
        value = validate(name, value, meta)
        if meta.get("kind") == "watch":
            raise InputError(f"run {self.name} is a watched model: its own program decides, and takes no commands")
        self._check_live()
        db = None
        try:
            db = schema.connect(self.folder / schema.DATABASE, "rw", TIMEOUT)
            db.execute("PRAGMA wal_autocheckpoint = 0").fetchall()  # that work is the writer's
            db.execute("BEGIN IMMEDIATE")
            self._check_live()  # now the writer cannot end the run before it sees this command
            sql = "INSERT INTO commands (name, value, sent) VALUES (?, ?, ?)"
            id_ = db.execute(sql, (name, value, time.time())).lastrowid
            db.execute("COMMIT")
            return id_
        except schema.FAULTS as error:
            raise InputError(f"run {self.name} cannot take a command: {error}") from error
        finally:
            if db is not None:
                db.close()

    def answers(self) -> list[Answer]:
        """All commands sent so far, oldest first, with what became of them."""
        with self._reading() as db:
            sql = "SELECT id, name, value, sent, step, error FROM commands ORDER BY id"
            rows = db.execute(sql).fetchall()
            told = [(-1 if row[4] is None else row[4], *row[1:4], row[5]) for row in rows]
            number, none = checks.NUMBER, checks.NONE
            checks.check_rows(told, {str}, number | none, number, {str} | none, low=-1)
            return [Answer(*row) for row in rows]

    # -- the rest

    def export(self, folder: str | Path) -> Path:
        """Write the run as parquet and JSON into a new folder, and return that."""
        from workbench.live.export import export  # pyarrow is only wanted here

        return export(self, Path(folder))

    def check(self) -> None:
        """Look through the whole file; InputError says what is damaged."""
        with self._reading() as db:
            found = [text for (text,) in db.execute("PRAGMA quick_check(3)").fetchall()]
        if found != ["ok"]:
            raise InputError(f"run {self.name} is damaged: {'; '.join(found)}")

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        with self._guard:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # -- inside

    def _state(self) -> tuple[str, str, int]:
        with self._reading() as db:
            return checks.check_state(db.execute("SELECT state, message, last_step FROM state").fetchone())

    def _check_size(self) -> None:
        """SQLite takes a file that ends within a page for whole, and reads zeros there."""
        path = self.folder / schema.DATABASE
        there = _size(path)
        with self._reading() as db:
            pages, size = (db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
        # with a writer, or a log, the rest is only still on its way into the file
        if there < pages * size and not lock.held(self.folder) and not _size(path.with_name(f"{path.name}-wal")):
            raise InputError(f"run {self.name} is damaged: {path} has lost its end")

    def _check_live(self) -> None:
        status = self.status
        if not status.live:
            raise InputError(f"run {self.name} takes no commands: it {_PAST[status.state]}")

    def _check_tables(self) -> None:
        """The tables are tables: a view or a trigger in their place would run what somebody else has written."""
        with self._reading() as db:
            rows = db.execute("SELECT type, name, rootpage FROM sqlite_master").fetchall()
            tables = {name for kind, name, page in rows if kind == "table" and page}
            if missing := [name for name in schema.NAMES if name not in tables]:
                raise sqlite3.OperationalError(f"no such table: {missing[0]}")
            if more := [name for kind, name, _ in rows if kind in ("view", "trigger")]:
                raise ValueError(f"it has a view or a trigger, {more[0]!r}")

    def _check_format(self) -> None:
        """Before the rest of the meta, of which a newer format may say other things."""
        with self._reading() as db:
            found = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        if not (found and re.fullmatch(r"\d{1,9}", str(found[0]))):
            raise InputError(f"{self.folder} is not a run folder: its {schema.DATABASE} has no format")
        if int(found[0]) > schema.FORMAT:
            raise InputError(
                f"run {self.name} has format {found[0]}, this workbench reads up to {schema.FORMAT}: "
                "upgrade the workbench"
            )

    def _series(self, db: sqlite3.Connection, name: str) -> tuple[str | None, tuple[int, ...] | None] | None:
        """(dtype, shape) of a series; None where there is none of this name."""
        row = db.execute("SELECT name, dtype, shape FROM names WHERE name = ?", (name,)).fetchone()
        return row and self._check_series(*row)

    def _check_series(self, *row: object) -> tuple[str | None, tuple[int, ...] | None]:
        if row not in self._checked:
            self._checked[row] = checks.read_series(*row)
        return self._checked[row]

    def _type(self, db: sqlite3.Connection, name: str) -> tuple[str, tuple[int, ...]]:
        found = self._series(db, name)
        if found is None:
            return "<f8", ()
        if found[0] is None:
            raise InputError(f"{name!r} is a series of scalars: read it with scalars()")
        return found

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            passing = None
            try:
                if self._db is None:
                    db, lasting = self._connect()
                    if lasting:
                        self._db = db
                    else:
                        passing = db
                yield passing or self._db
            except (sqlite3.Error, ValueError) as error:  # ValueError: a blob or JSON that is not one
                if isinstance(error, InputError) or (isinstance(error, sqlite3.Error) and not schema.is_fault(error)):
                    raise
                raise schema.read_error(self.folder, error) from error
            finally:
                if passing is not None:
                    passing.close()

    def _connect(self) -> tuple[sqlite3.Connection, bool]:
        """A connection for reading, and whether it may be kept."""
        path = self.folder / schema.DATABASE
        db = schema.connect(path, "ro", TIMEOUT)
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchall()
            return db, True
        except sqlite3.OperationalError:
            db.close()
            if os.access(self.folder, os.W_OK) or lock.held(self.folder):
                raise
            if _size(path.with_name(f"{path.name}-wal")):
                raise InputError(
                    f"run {self.name} has unfinished writes and lies in a read-only folder: copy it to a folder "
                    "that can be written, and open it there"
                ) from None
            # a closed run on a medium where SQLite cannot keep its index of the log, and needs none; not kept, because
            # somebody who may write there could resume the run
            return schema.connect(path, "ro&immutable=1", TIMEOUT), False


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


_PAST = {"died": "died", "finished": "has finished", "stopped": "was stopped", "failed": "has failed"}
