"""A notebook at every point of a grid of parameters, each executed one kept and none paid for twice.

    rows = run_grid("01_routing", {"seed": [0, 1, 2], "preset": ["smoke"]}, Path("out/seeds"), Workers(2))

A point is known by the notebook's bytes and the values. Its executed notebook is put in place when it is whole, so what
is there is done; one that failed is kept beside it under a name that says so, and is run again the next time.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from workbench import notebook
from workbench.engines import HERE, ONE_THREAD, Crew, Workers
from workbench.errors import InputError
from workbench.notebook import Value
from workbench.sealed import sealed_file

Progress = Callable[[int, int, str], None]
MOST = 10_000
"""Points of a grid. More are a mistake in typing."""


@dataclass(frozen=True)
class Point:
    """What became of one point.

    Attributes:
        parameters: by name.
        state: "done" now, "kept" from before, or "failed".
        seconds: that it took now; 0 for one that was kept.
        output: the executed notebook; of one that failed, as far as it came.
        error: why it failed.
    """

    parameters: dict[str, Value]
    state: str
    seconds: float
    output: str
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def points(path: Path, grid: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """All combinations, the last name varying fastest, in the types that the notebook declares.

    Raises:
        InputError: a name or a value that the notebook does not have, a value twice, none at all, or more than `MOST`.
    """
    for name, values in grid.items():
        if not values:
            raise InputError(f"grid has no value of {name}")
    if (total := math.prod(map(len, grid.values()))) > MOST:
        raise InputError(f"grid has {total} points but may have {MOST} at most")
    checked = {name: [notebook.check(path, {name: value})[name] for value in values] for name, values in grid.items()}
    for name, values in checked.items():
        twice = [value for at, value in enumerate(values) if value in values[:at]]
        if twice:
            raise InputError(f"grid has {name}={twice[0]} twice")
    return [dict(zip(checked, values, strict=True)) for values in product(*checked.values())]


def run_grid(
    name: str | Path,
    grid: Mapping[str, Sequence[Value]],
    folder: Path,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> list[Point]:
    """Execute a notebook at every point that is not done yet, and say what became of each, in the grid's order.

    Args:
        name: a path, or the name of one of the workbench's own (`01_routing`).
        grid: the values of each parameter; text is converted to the declared type.
        folder: where the executed notebooks are kept.
        workers: who executes, each point with one thread. What they make is kept here.
        progress: called as progress(points done, points in all, what was just done).

    Raises:
        InputError: before anything runs: the notebook, a parameter or the folder cannot be used.
        WorkerLostError: the worker died at one point, each time; what the others made is kept.
    """
    path = notebook.find(name)
    kernel, source = notebook.kernel_of(path), path.read_bytes()
    plan = {_output(folder, path, source, values): values for values in points(path, grid)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"folder {folder} cannot be written: {error.strerror}") from None
    found = {output: Point(values, "kept", 0.0, str(output)) for output, values in plan.items() if output.exists()}
    missing = [(output, values) for output, values in plan.items() if output not in found]
    if found and progress is not None:
        progress(len(found), len(plan), f"{len(found)} are there")
    with workers.open(len(missing)) as crew:
        for (output, values), point in crew.each(partial(_run_point, crew, path.stem, source, kernel), missing):
            found[output] = point
            if progress is not None:
                progress(len(found), len(plan), f"{shown(values)}: {point.state} in {point.seconds:.0f} s")
    return [found[output] for output in plan]


def shown(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _output(folder: Path, path: Path, source: bytes, values: Mapping[str, Value]) -> Path:
    digest = hashlib.sha256(source + json.dumps(values, sort_keys=True).encode()).hexdigest()
    return folder / f"{path.stem}-{digest[:12]}.ipynb"


def _run_point(crew: Crew, stem: str, source: bytes, kernel: str, output: Path, values: dict[str, Value]) -> Point:
    began = time.perf_counter()
    executed, error = crew.call(_execute, stem, source, values, kernel)
    failed = output.with_name(f"{output.stem}-failed.ipynb")
    place = output if error is None else failed
    with sealed_file(place) as unfinished:
        unfinished.write_bytes(executed)
    if error is None:
        failed.unlink(missing_ok=True)
    state = "done" if error is None else "failed"
    return Point(values, state, time.perf_counter() - began, str(place), error)


def _execute(stem: str, source: bytes, values: dict[str, Value], kernel: str) -> tuple[bytes, str | None]:
    """The executed notebook, as far as it came, and the error that ended it."""
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        path, output = Path(folder, f"{stem}.ipynb"), Path(folder, "executed", f"{stem}.ipynb")
        path.write_bytes(source)
        try:
            notebook.run(path, values, output)
        except notebook.NotebookError as failed:
            return output.read_bytes(), str(failed)
        return output.read_bytes(), None


@contextmanager
def _one_thread() -> Iterator[None]:
    """A kernel has the environment of the process that starts it."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
