"""Processes that test_store_faults starts: ``python crash.py ACTION FOLDER [ARGUMENT]``. They print JSON lines."""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.live import lock
from workbench.live.store import Run, RunStopped, RunWriter

NOBODY = 65534


def value(step: int) -> np.ndarray:
    """What every life of a writer records for a step: noise, so that it needs pages."""
    return np.random.default_rng(step).standard_normal(300)


def write(writer: RunWriter, steps) -> None:
    for step in steps:
        writer.scalars(step, {"a": step, "b": -step})
        writer.tensors(step, {"t": value(step)})
        writer.commit(step)


def check(run: Run) -> int:
    """The last committed step; AssertionError unless the run holds exactly the steps up to it."""
    last = run.last_step
    expected = list(range(last + 1))
    for name, sign in (("a", 1), ("b", -1)):
        steps, values = run.scalars(name)
        assert steps.tolist() == expected, (name, last, len(steps))
        assert values.tolist() == [sign * step for step in expected], name
    steps, arrays = run.tensors("t")
    assert steps.tolist() == expected, ("t", last, len(steps))
    assert all((array == value(step)).all() for step, array in zip(steps, arrays, strict=True))
    return last


def live(folder: Path, ready: int) -> None:
    """One life: go on from a step before the last one, until killed; a byte into ``ready`` before each step."""
    writer = RunWriter.open(folder)
    writer.truncate(max(writer.last_step - 3, -1))
    writer._db.execute("PRAGMA wal_autocheckpoint = 60").fetchall()  # so that kills fall into checkpoints too
    for step in range(writer.last_step + 1, 10**9):
        os.write(ready, b".")
        write(writer, [step])


def killed(folder: Path, times: str) -> None:
    """Lives of a writer, each killed at a random moment; what a reader then sees."""
    RunWriter.create(folder, {}).close()
    moments = random.Random(0)
    for _ in range(int(times)):
        heard, ready = os.pipe()
        child = os.fork()
        if child == 0:
            live(folder, ready)
        if moments.random() < 0.8:  # the others die while they open and truncate
            for _ in range(moments.randint(1, 20)):  # counted in steps, which a busy machine makes, too, if later
                os.read(heard, 1)
        time.sleep(moments.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard), os.close(ready)
        with Run(folder) as run:
            run.check()
            print(json.dumps({"state": run.status.state, "last": check(run)}))
    with RunWriter.open(folder) as writer:
        write(writer, [writer.last_step + 1])
    with Run(folder) as run:
        print(json.dumps({"state": run.status.state, "last": check(run)}))


def orphan(folder: Path) -> None:
    """A writer with a forked helper (as data loaders have), until killed; the helper lives on and says its number."""
    writer = RunWriter.create(folder, {})
    write(writer, range(3))
    child = os.fork()
    if child == 0:
        try:
            with writer:
                writer.event(3, "note", "from the helper")
        except RuntimeError as error:
            print(json.dumps({"child": os.getpid(), "error": str(error)}), flush=True)
        time.sleep(3600)
        os._exit(0)
    time.sleep(3600)


def full(folder: Path) -> None:
    """A writer that may not make a file larger than 300 kB."""
    writer = RunWriter.create(folder, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        write(writer, range(10_000))
    except RunStopped as error:
        last = writer.last_step
        writer.close()
        with Run(folder) as run:
            print(json.dumps({"error": str(error), "writer": last, "reader": check(run)}))


def nobody(folder: Path) -> None:
    """What somebody without the right to write can do with each of the runs in ``folder``."""
    value(0)  # numpy loads its generators when they are first wanted, and nobody may not read them
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    unprivileged(folder)


def unprivileged(folder: Path) -> None:
    lock.PATIENCE = 0.05
    for path in sorted(folder.iterdir()):
        found = {"name": path.name}
        try:
            run = Run(path)
            found |= {"state": run.status.state, "last": check(run)}
        except InputError as error:
            found["read"] = str(error)
        for what, use in {
            "send": lambda path=path: Run(path).send("pause"),
            "open": lambda path=path: RunWriter.open(path),
            "create": lambda path=path: RunWriter.create(path / "new", {}),
        }.items():
            try:
                use()
            except InputError as error:
                found[what] = str(error)
        print(json.dumps(found))


def send(folder: Path, first: str) -> None:
    """One of several apps: 40 commands with values of its own."""
    run = Run(folder)
    for i in range(40):
        run.send("learning_rate", (int(first) + i) * 1e-6)


if __name__ == "__main__":
    action, folder, *rest = sys.argv[1:]
    {"killed": killed, "orphan": orphan, "full": full, "nobody": nobody, "unprivileged": unprivileged, "send": send}[
        action
    ](Path(folder), *rest)
