"""Stores of runs that are not what `RunWriter` writes: 300, of their meta, state, names, tables, files and folders.

What must hold: the list, the command and the page show the other runs and say of this one what is wrong with it; it is
read or refused in words; an export is there whole or not at all, and nothing is written beside it; what it says is
text wherever it is shown.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tests.fuzz.harness import Case
from tests.live.synthetic import write_synthetic_run
from tests.live.views.texts import texts
from workbench.cli import main
from workbench.errors import InputError
from workbench.live.arm import read_recipe
from workbench.live.store import DATABASE, Run, RunStopped, RunWriter, runs
from workbench.live.views import Workbench

STORES = 300
MARK = "<b>a mark</b>"
LONG = 10**400

#: In the place of any value of the meta.
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, LONG, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../outside", "/nowhere/at/all", "a\x00b", "\ud800", "x" * 5000, MARK, "%{x}", "\x1b[31m", "running"),
    *([], {}, [[]], [1, 2], [MARK], {"": None}, {MARK: 1}, {"a": {"b": []}}, ["x"] * 1000),
)
#: In the place of a value of a row.
CELLS: tuple[Any, ...] = (
    *(None, 0, -1, 1, 2**31, 2**63 - 1, -(2**63), 0.5, 1e308, float("inf")),
    *("", "x", MARK, "../outside", "a/../../outside", "/nowhere", "x" * 300, "a\x00b", "\x1b[31m", "<f4", "[4]"),
    *(b"", b"\xff\xfe", b"x" * 5000, "[1000000000, 1000000000]", "[-1]", "[" * 5000, "|O", "<f8", "died"),
)


def cases(folder: Path, seed: int = 0) -> Iterator[Case]:
    site = Site(folder)
    for name, spoil in islice(variants(random.Random(seed)), STORES):
        yield site.case("stores", name, spoil)


class Site:
    """A home with a good run, and one that is spoiled anew for each case."""

    def __init__(self, folder: Path):
        self.home, self.out = folder / "home", folder / "out"
        self.folder, self.root = folder, self.home / "runs"
        self.whole = write_synthetic_run(folder / "whole", 12, n_layers=2, n_experts=4, n_tokens=64)
        with RunWriter.open(self.whole) as writer:
            writer.event(3, "control", "pause")
            writer._db.execute("INSERT INTO commands VALUES (1, 'pause', NULL, 0.0, 3, NULL)")
        shutil.copytree(self.whole, self.root / "good")
        self.before = sorted(self.folder.iterdir())

    def case(self, sort: str, name: str, spoil: Callable[[Path], Path | None]) -> Case:
        for left in self.root.iterdir():
            if left.name != "good":
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        shutil.rmtree(self.out, ignore_errors=True)
        bad = self.root / "bad"
        shutil.copytree(self.whole, bad)
        bad = spoil(bad) or bad
        self.shown: list[str] = []
        return Case(sort, name, partial(self.look, bad), self.wrong, writes=True)

    def look(self, bad: Path) -> None:
        with warnings.catch_warnings(), _home(self.home):
            warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that are none
            refused = self._read(bad)
            self._list()
            self._page(bad)
            with contextlib.suppress(InputError, RunStopped):
                RunWriter.open(bad).close()
        if refused:
            raise refused

    def _read(self, bad: Path) -> InputError | None:
        """All that can be asked of it; why it was not even opened."""
        try:
            run = Run(bad)
        except InputError as error:
            return error
        questions: list[Callable[[], object]] = [
            *(lambda name=name: getattr(run, name) for name in ("meta", "status", "last_step")),
            *(run.names, run.events, run.answers, run.check),
            lambda: read_recipe(run.meta.get("recipe") or {}),
        ]
        with contextlib.suppress(InputError):
            for name in run.names():
                for ask in (run.dtype, run.steps, run.scalars, run.tensors, run.tensor):
                    questions.append(partial(ask, name))
                questions.append(partial(run.scalars, name, points=2))
        for question in questions:
            with contextlib.suppress(InputError):
                question()
        with contextlib.suppress(InputError):
            run.export(self.out)
        run.close()
        return None

    def _list(self) -> None:
        listed = {run.name: run.status for run in runs(self.root)}
        assert listed["good"].state == "finished", "the good run is not listed"
        for arguments in (["runs"], ["runs", "--json"]):
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as said:
                assert main(arguments) == 0, "the command failed"
            said.flush()
            text = said.buffer.getvalue().decode()
            assert "good" in text and "\x1b" not in text, "the command does not list the good run as text"

    def _page(self, bad: Path) -> None:
        page = Workbench(bad, root=self.root)
        for title in page._kinds:
            page.tabs.value = title
            page.poll()
        assert "good" in page.run.options, "the page does not list the good run"
        self.shown = list(texts(page))
        page.selection.close()

    def wrong(self, came_back: bool) -> str | None:
        names = [path for path in sorted(self.folder.iterdir()) if path != self.out]
        if names != self.before:
            return f"wrote {set(names) ^ set(self.before)}"
        if self.out.exists() and not (self.out / "meta.json").exists():
            return "half an export"
        if any(MARK in text for text in self.shown):
            return "a text is shown as HTML"
        return None


@contextlib.contextmanager
def _home(folder: Path) -> Iterator[None]:
    before = os.environ.get("WORKBENCH_HOME")
    os.environ["WORKBENCH_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("WORKBENCH_HOME") if before is None else os.environ.update(WORKBENCH_HOME=before)


def variants(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], Path | None]]]:
    """What is done to a run, in words, and how."""
    sorts = (_meta, _meta, _meta, _state, _name, _name, _table, _bytes, _lock, _folder)
    while True:
        yield rng.choice(sorts)(rng)


def spoiled(folder: Path, statement: str, *values: object) -> None:
    """Change the database as another program might."""
    with contextlib.closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as db, \
            contextlib.suppress(sqlite3.IntegrityError):  # fmt: skip
        db.execute("PRAGMA writable_schema = ON")
        db.execute(statement, values)


def _meta(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    keys = ("format", "created", "kind", "total_steps", "cadence", "recipe", "data", "model", "model", "model", "model")
    key, odd, depth = rng.choice(keys), rng.choice(ODD), rng.randrange(5)
    turn = rng.randrange(2**30)

    def spoil(folder: Path) -> None:
        with Run(folder) as run:
            value = run.meta[key]
        raw = {0: "[" * 100_000, 1: "{", 2: b"\xff", 3: 7}.get(turn % 40)
        if raw is None:
            raw = json.dumps(replaced(value, odd, depth, random.Random(turn)))
        if turn % 40 == 4:
            return spoiled(folder, "DELETE FROM meta WHERE key = ?", key)
        spoiled(folder, "UPDATE meta SET value = ? WHERE key = ?", raw, key)

    return f"meta {key!r} with {odd!r:.40} at depth {depth}", spoil


def replaced(value: Any, odd: Any, depth: int, rng: random.Random) -> Any:
    """`value` with something of it replaced, so many levels down, or a name of it."""
    if depth and isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        if isinstance(odd, str) and rng.random() < 0.3:
            return {odd if name == key else name: item for name, item in value.items()}
        return value | {key: replaced(value[key], odd, depth - 1, rng)}
    if depth and isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], replaced(value[at], odd, depth - 1, rng), *value[at + 1 :]]
    return odd


def _state(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    column, cell = rng.choice(("state", "message", "last_step")), rng.choice((*CELLS, "running", "failed"))
    if rng.random() < 0.1:
        return "no state", lambda folder: spoiled(folder, "DELETE FROM state")
    return f"{column} is {cell!r:.40}", lambda folder: spoiled(folder, f"UPDATE state SET {column} = ?", cell)


def _name(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    column, cell, at = rng.choice(("id", "name", "dtype", "shape")), rng.choice(CELLS), rng.randrange(1, 60)
    sql = f"UPDATE names SET {column} = ? WHERE id = (SELECT id FROM names ORDER BY id LIMIT 1 OFFSET {at % 40})"
    return f"{column} of series {at % 40} is {cell!r:.40}", lambda folder: spoiled(folder, sql, cell)


TABLES = ("meta", "state", "names", "scalars", "tensors", "events", "commands")
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT i, i AS step, i AS value FROM n"


def _table(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    table = rng.choice(TABLES)
    what = rng.choice(("gone", "another", "a view", "a view without end", "with a trigger", "of other columns", "text"))

    def spoil(folder: Path) -> None:
        if what == "with a trigger":
            return spoiled(folder, f"CREATE TRIGGER t AFTER UPDATE ON {table} BEGIN SELECT 1; END")
        if what == "text":  # the statement that made it
            return spoiled(folder, "UPDATE sqlite_master SET sql = ? WHERE name = ?", rng.choice(CELLS), table)
        if what == "of other columns":
            spoiled(folder, f"ALTER TABLE {table} RENAME TO old_{table}")
            return spoiled(folder, f"CREATE TABLE {table} (x)")
        spoiled(folder, f"ALTER TABLE {table} RENAME TO old_{table}")
        if what.startswith("a view"):
            spoiled(folder, f"CREATE VIEW {table} AS " + (FOREVER if "end" in what else f"SELECT * FROM old_{table}"))
        elif what == "another":
            spoiled(folder, f"ALTER TABLE old_{rng.choice(TABLES)} RENAME TO {table}")

    return f"table {table} is {what}", _again(spoil)


def _again(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """Where SQLite itself refuses, the file stays as far as it came."""

    def spoiling(folder: Path) -> None:
        with contextlib.suppress(sqlite3.Error):
            spoil(folder)

    return spoiling


def _bytes(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    turn = rng.randrange(2**30)
    name = rng.choice((DATABASE, DATABASE, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"))

    def spoil(folder: Path) -> None:
        path, own = folder / name, random.Random(turn)
        good = path.read_bytes() if path.exists() else own.randbytes(4096)
        at = own.randrange(len(good))
        path.write_bytes(
            own.choice((good[:at], b"", b"text", good[:at] + own.randbytes(64) + good[at + 64 :], own.randbytes(9000)))
        )

    return f"{name} with other bytes ({turn})", spoil


def _lock(rng: random.Random) -> tuple[str, Callable[[Path], None]]:
    words = (b"", b"4711 host", b"x" * 10**6, b"\xff\xfe\n\xff", MARK.encode(), b"1 \x1b[31m", b"1 h\n")
    first, second = rng.choice(words), rng.choice((b"failed why", MARK.encode(), b"died x", b"\xff", b"stopped"))
    kind = rng.choice(("file", "file", "file", "pipe", "folder"))

    def spoil(folder: Path) -> None:
        spoiled(folder, "UPDATE state SET state = 'running'")
        (folder / "lock").unlink()
        if kind == "pipe":
            os.mkfifo(folder / "lock")
        elif kind == "folder":
            (folder / "lock").mkdir()
        else:
            (folder / "lock").write_bytes(first + b"\n" + second)

    return f"lock is a {kind} with {first[:20]!r}, {second!r}", spoil


def _folder(rng: random.Random) -> tuple[str, Callable[[Path], Path | None]]:
    names = ("x" * 255, "a\nb", "\udcff\udcfe", MARK.replace("/", "-"), "'; --", "a b", "latest", "~", "é", "-", "%2e")
    name, kind = rng.choice(names), rng.choice(("named", "named", "a link to itself", "a folder as database", "empty"))

    def spoil(folder: Path) -> Path | None:
        if kind == "named":
            return folder.rename(folder.with_name(name))
        shutil.rmtree(folder)
        if kind == "a link to itself":
            folder.symlink_to(folder)
            return None
        (folder / DATABASE if "database" in kind else folder).mkdir(parents=True)
        return None

    return f"folder {name!r:.30} {kind}", spoil
