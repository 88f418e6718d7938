"""What watching costs: two trainings in one process, step by step in turn, one with probes and one without.

Who goes first changes from pair to pair, so that neither has the better place.

python -m workbench.live.cost --steps 400
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.lib.core import train
from workbench.lib.core.threads import torch_threads
from workbench.live.hooks import Recorder
from workbench.live.recipe import Recipe
from workbench.live.records import STORE_SECONDS
from workbench.live.store import Run, RunWriter
from workbench.live.watch import Cadence, Watch


def measure(steps: int, recipe: Recipe | None = None) -> dict[str, float]:
    """Step times with probes at the default cadence over those without, pair by pair, and the share of the store.

    The first step, which warms up, and the last, which evaluates, are left out.
    """
    if steps < 3:
        raise InputError(f"steps is {steps} but must be at least 3")
    recipe = Recipe.from_dict((recipe or Recipe()).to_dict() | {"steps": steps, "eval_every": 0})
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder, torch_threads(recipe.threads):
        with RunWriter.create(Path(folder) / "run", {"kind": "train"}) as writer:
            model, task, config = recipe.build()
            probes = Watch(model, task, Cadence(), recipe.seed)
            probes.attach(writer, own=False, next_step=0)
            pair = (train.steps(model, task, config, [Recorder(probes)]), train.steps(*recipe.build()))
            for step in range(steps):
                for i in (0, 1) if step % 2 == 0 else (1, 0):
                    began = time.perf_counter()
                    next(pair[i])
                    seconds[i].append(time.perf_counter() - began)
        with Run(Path(folder) / "run") as run:
            store = run.scalars(STORE_SECONDS.name())[1][1:-1]
    watched, plain = (np.array(each)[1:-1] for each in seconds)
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
