"""Rows of wrong kinds in the store of a run: 300, in its scalars, tensors, events and commands.

What must hold is what must hold of `stores`.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from tests.fuzz.harness import Case
from tests.fuzz.stores import CELLS, Site, spoiled

ROWS = 300
COLUMNS = {
    "scalars": ("name", "step", "value"),
    "tensors": ("name", "step", "data"),
    "events": ("id", "step", "kind", "text", "time"),
    "commands": ("id", "name", "value", "sent", "step", "error"),
}


def cases(folder: Path, seed: int = 0) -> Iterator[Case]:
    site = Site(folder)
    for name, spoil in islice(variants(random.Random(seed)), ROWS):
        yield site.case("rows", name, spoil)


def variants(rng: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """What is done to a run, in words, and how."""
    while True:
        table = rng.choice(tuple(COLUMNS))
        column, which, cell = rng.choice(COLUMNS[table]), rng.choice(("one", "all", "more")), rng.choice(CELLS)
        if column == "data" and rng.random() < 0.5:
            cell = rng.randbytes(rng.choice((1, 8, 16, 32, 64, 256, 300)))
        at, sql = rng.randrange(400), f"UPDATE OR IGNORE {table} SET {column} = ?"
        if which == "one":
            keys = ("name", "step") if "name" in COLUMNS[table] and table != "commands" else ("id",)
            key = " AND ".join(f"{key} = (SELECT {key} FROM {table} LIMIT 1 OFFSET {at} % 150)" for key in keys)
            sql += f" WHERE {key}"
        elif which == "more":
            columns = COLUMNS[table]
            values = ", ".join("?" if name == column else f"{name}" for name in columns)
            sql = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table} LIMIT {at}"
        yield (
            f"{which} of {table}: {column} is {cell!r:.40}",
            lambda folder, sql=sql, cell=cell: spoiled(folder, sql, cell),
        )
