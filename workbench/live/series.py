"""Rows of one series out of a run's file: a range of steps, thinned out in SQL, or the newest at a step.

Thinning works on keys. The rows wanted are found by look-ups in the index, as many as there are points however long the
run is, and only their values are read.
"""

import json
import sqlite3
from operator import index

from workbench.errors import InputError
from workbench.live.checks import NONE, NUMBER, check_rows

VALUE = {"scalars": "value", "tensors": "data"}  # the column of each table
KINDS = {"scalars": NUMBER | NONE, "tensors": {bytes}}
_LAST = 2**63 - 1
_NAMED = "name = (SELECT id FROM names WHERE name = ?)"
_SPAN = f"{_NAMED} AND step BETWEEN ? AND ?"


def rows(
    db: sqlite3.Connection, table: str, name: str, start: int | None, stop: int | None, points: int | None
) -> list[tuple[int, float | bytes | None]]:
    """(step, value) of the steps from start to stop, both included; with ``points``, at most that many of them."""
    if points is not None and points < 2:
        raise InputError(f"points is {points} but must be at least 2: the first and the last row")
    key, value = _key(name, start, stop), VALUE[table]
    if points is not None:
        some = f"SELECT 1 FROM {table} WHERE {_SPAN} LIMIT ?"
        if db.execute(f"SELECT count(*) FROM ({some})", (*key, points + 1)).fetchone()[0] > points:
            first, last = db.execute(f"SELECT min(step), max(step) FROM {table} WHERE {_SPAN}", key).fetchone()
            check_rows([(first,), (last,)])
            wanted = [first + (last - first) * i // (points - 1) for i in range(points)]
            at = f"SELECT (SELECT max(step) FROM {table} WHERE {_NAMED} AND step <= wanted.value)"
            chosen = f"step IN ({at} FROM json_each(?) AS wanted)"
            sql = f"SELECT step, {value} FROM {table} WHERE {_NAMED} AND {chosen} ORDER BY step"
            return _checked(db.execute(sql, (name, name, json.dumps(wanted))).fetchall(), table)
    sql = f"SELECT step, {value} FROM {table} WHERE {_SPAN} ORDER BY step"
    return _checked(db.execute(sql, key).fetchall(), table)


def steps(db: sqlite3.Connection, table: str, name: str, start: int | None, stop: int | None) -> list[int]:
    """The steps from start to stop that have a row; values are not read."""
    sql = f"SELECT step FROM {table} WHERE {_SPAN} ORDER BY step"
    return [step for (step,) in _checked(db.execute(sql, _key(name, start, stop)).fetchall())]


def newest(db: sqlite3.Connection, name: str, step: int | None) -> tuple[int, bytes] | None:
    """(step, blob) of the last tensor at or before ``step``."""
    sql = f"SELECT step, data FROM tensors WHERE {_NAMED} AND step <= ? ORDER BY step DESC LIMIT 1"
    rows = db.execute(sql, (name, _LAST if step is None else index(step))).fetchall()
    return next(iter(_checked(rows, "tensors")), None)


def _checked(rows: list[tuple], table: str | None = None) -> list[tuple]:
    check_rows(rows, *([KINDS[table]] if table else ()))
    return rows


def _key(name: str, start: int | None, stop: int | None) -> tuple[str, int, int]:
    """The parameters of ``_SPAN``."""
    return name, 0 if start is None else index(start), _LAST if stop is None else index(stop)
