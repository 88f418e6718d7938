"""What watching costs: two trainings in one process, step by step in turn, one with probes and one without.

Who goes first changes from pair to pair, so that neither has the better place.

python -m workbench.live.cost --steps 400
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.lib.core.train import Hook, State, train
from workbench.live.hooks import Recorder
from workbench.live.recipe import Recipe
from workbench.live.store import Run, RunWriter
from workbench.live.trainer import threads
from workbench.live.watch import Cadence, Watch


class _Begin(Hook):
    """First hook: waits for its turn, then starts the clock."""

    def __init__(self, turn: threading.Semaphore):
        self.turn, self.began = turn, 0.0

    def before_step(self, state: State) -> None:
        self.turn.acquire()
        self.began = time.perf_counter()


class _End(Hook):
    """Last hook: stops the clock and gives the turn away, in the order 0 1, 1 0, 0 1, ... for training `me` of two."""

    def __init__(self, begin: _Begin, me: int, turns: Sequence[threading.Semaphore]):
        self.begin, self.me, self.turns, self.seconds = begin, me, turns, []

    def after_step(self, state: State) -> None:
        self.seconds.append(time.perf_counter() - self.begin.began)
        first = self.me == state.step % 2
        self.turns[1 - self.me if first else self.me].release()


def measure(steps: int, recipe: Recipe | None = None) -> dict[str, float]:
    """Step times with probes at the default cadence over those without, pair by pair, and the share of the store.

    The first step, which warms up, and the last, which evaluates, are left out.
    """
    if steps < 3:
        raise InputError(f"steps is {steps} but must be at least 3")
    recipe = Recipe.from_dict((recipe or Recipe()).to_dict() | {"steps": steps, "eval_every": 0})
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    ends, trainings = [], []
    with tempfile.TemporaryDirectory() as folder:
        with RunWriter.create(Path(folder) / "run", {"kind": "train"}) as writer:
            for i in range(2):
                model, task, config = recipe.build()
                begin = _Begin(turns[i])
                ends.append(_End(begin, i, turns))
                hooks: list[Hook] = [begin, ends[i]]
                if i == 0:
                    probes = Watch(model, task, Cadence(), recipe.seed)
                    probes.attach(writer, own=False, next_step=0)
                    hooks.insert(1, Recorder(probes))
                trainings.append(threading.Thread(target=train, args=(model, task, config, hooks)))
            with threads(recipe.threads):
                for training in trainings:
                    training.start()
                for training in trainings:
                    training.join()
        with Run(Path(folder) / "run") as run:
            store = run.scalars("cost/store_seconds")[1][1:-1]
    watched, plain = (np.array(end.seconds)[1:-1] for end in ends)
    return {
        "pairs": len(plain),
        "step_seconds": float(np.median(plain)),
        "median_ratio": float(np.median(watched / plain)),
        "mean_ratio": float(watched.sum() / plain.sum()),
        "store_median_share": float(np.median(store / plain)),
        "store_mean_share": float(store.sum() / plain.sum()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workbench.live.cost", description="Measure what watching costs.")
    parser.add_argument("--steps", type=int, default=400, help="steps of each of the two trainings (default: 400)")
    print(json.dumps(measure(parser.parse_args(argv).steps), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
