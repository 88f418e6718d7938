"""Files that are no notebook, or one that says odd things: 60. All are read, or refused in words."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tests.fuzz.harness import Case
from tests.fuzz.stores import ODD, replaced
from workbench import notebook

NOTEBOOKS = 60
GOOD: dict[str, Any] = {
    "nbformat": 4,
    "nbformat_minor": 5,
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# A notebook\n"]},
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {"tags": ["parameters"]},
            "source": ['preset: str = "small"  # one of: smoke, small\n', "seed: int = 0  # 0..9: of everything\n"],
            "outputs": [],
            "execution_count": None,
        },
    ],
}
SOURCES = (
    *("(" * 3000, "x = " + "-" * 3000 + "1", "x = " + "[" * 90 + "]" * 90, "a\x00b", "x: int = " + "9" * 5000),
    *("x = f()", "x: int = 'a'", "x: 3 = 3", "x = 1j", "x = {[]: 1}", "x: int = 1 # 9..0", "x = 'é' # é..", "\ud800"),
    *("x: int | None | None = None", "x: str = 'a' # one of: ", "x: float = 1e999", "x = 1 # 1e999..", "x = 1; " * 999),
    *("seed: int = 1 # " + "1" * 400 + "..", "x = b'a'", "x = ...", "x: 'int' = 1", "x = y = 1", "x: int = {**{}}"),
)
FILES = (b"", b"\xff\xfe", b"{", b"[" * 100_000, b"null", b"[]", b"1", b'"text"', b'{"cells": []}', b"\x00" * 100)


def cases(folder: Path, seed: int = 0) -> Iterator[Case]:
    path = folder / "odd.ipynb"
    for name, content in islice(variants(random.Random(seed)), NOTEBOOKS):
        path.write_bytes(content)
        yield Case("notebooks", name, partial(read, path))


def read(path: Path) -> None:
    """All that is asked of a notebook before a kernel starts."""
    found = notebook.parameters(notebook.find(path))
    values = notebook.check(path, {name: parameter.default for name, parameter in found.items()})
    notebook.default_output(path, values)
    json.dumps([parameter.as_dict() for parameter in found.values()])
    notebook.kernel_of(path)


def variants(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """What is odd about a file, and what is in it."""
    sorts: tuple[Callable[[random.Random], tuple[str, bytes]], ...] = (_file, _source, _value, _value)
    while True:
        yield rng.choice(sorts)(rng)


def _file(rng: random.Random) -> tuple[str, bytes]:
    content = rng.choice(FILES)
    return f"the file is {content[:20]!r}", content


def _source(rng: random.Random) -> tuple[str, bytes]:
    source, changed = rng.choice(SOURCES), copy.deepcopy(GOOD)
    changed["cells"][1]["source"] = source
    return f"parameters are {source[:40]!r}", json.dumps(changed).encode()


def _value(rng: random.Random) -> tuple[str, bytes]:
    odd, depth = rng.choice(ODD), rng.randrange(6)
    return f"{odd!r:.40} at depth {depth}", json.dumps(replaced(GOOD, odd, depth, rng)).encode()
