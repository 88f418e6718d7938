"""A process that test_resume starts: kills a run at random moments until it has finished, and compares it with one that
was never disturbed. Prints one JSON object. Every life of the run is a fork of this process, which has imported torch.

    python kill_and_resume.py FOLDER KILLS RECIPE
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.live.arm import Arm, read_recipe
from workbench.live.recipe import Recipe
from workbench.live.store import DATABASE, Run
from workbench.live.trainer import resume, train_run

TIMED = ("train/step_seconds", "cost/probe_seconds", "cost/store_seconds")


def life(folder: Path, recipe: Recipe | Arm) -> int:
    """Start the run or go on with it, in a child process."""
    child = os.fork()
    if child:
        return child
    try:
        if (folder / DATABASE).exists():
            resume(folder)
        else:
            train_run(recipe, folder)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def ended(child: int, wanted: Callable[[], bool]) -> bool:
    """Wait until the child has ended by itself (True) or `wanted` holds; a life that fails ends this process, too."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, f"a life of the run failed with status {status}"
            return True
        if wanted():
            return False
        time.sleep(0.001)
    raise AssertionError("a life of the run did not end")


def moment(folder: Path, reach: int) -> Callable[[], bool]:
    """A random moment: a little after a step up to `reach` ahead; in every fifth later life, soon after its start."""
    resumed = (folder / DATABASE).exists()
    if resumed and random.random() < 0.2:
        at = time.monotonic() + random.uniform(0, 0.3)
        return lambda: time.monotonic() > at
    target = last_step(folder) + random.randint(1, reach)
    began: list[float] = []

    def come() -> bool:
        if not began and last_step(folder) >= target:
            began.append(time.monotonic() + random.uniform(0, 0.02))
        return bool(began) and time.monotonic() > began[0]

    return come


def last_step(folder: Path) -> int:
    try:
        with Run(folder) as run:
            return run.last_step
    except InputError:  # not a run yet
        return -1


def record(folder: Path) -> dict[str, tuple[list[int], bytes]]:
    """All rows of a run but the clocks, bit for bit."""
    with Run(folder) as run:
        rows = {}
        for name in run.names():
            if name not in TIMED:
                steps, values = run.scalars(name) if run.dtype(name) is None else run.tensors(name)
                rows[name] = (steps.tolist(), np.ascontiguousarray(values).tobytes())
        rows["clocks"] = ([run.steps(name).tolist() for name in TIMED], b"")
        return rows


def main(folder: Path, kills: int, recipe: Recipe | Arm) -> None:
    import_module("torch._dynamo")  # the optimizers want it; imported here once, not in every life
    if isinstance(recipe, Recipe):
        recipe.build()
    random.seed(0)
    assert ended(life(folder / "whole", recipe), lambda: False)
    seen, killed = [], folder / "killed"
    with Run(folder / "whole") as run:
        reach = max(2, run.meta["total_steps"] // kills)
    for _ in range(kills):
        child = life(killed, recipe)
        if ended(child, moment(killed, reach)):
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (killed / DATABASE).exists():
            with Run(killed) as run:
                assert run.status.state == "died", run.status
                seen.append(run.last_step)
        else:
            seen.append(None)
    else:
        assert ended(life(killed, recipe), lambda: False)
    with Run(folder / "whole") as a, Run(killed) as b:
        digests = a.meta["weights_sha256"], b.meta["weights_sha256"]
        states = a.status.state, b.status.state
        resumed = sum(event.kind == "resume" for event in b.events())
    a, b = record(folder / "whole"), record(killed)
    different = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    print(json.dumps({"kills": seen, "digests": digests, "states": states, "resumed": resumed, "different": different}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), read_recipe(sys.argv[3]))
