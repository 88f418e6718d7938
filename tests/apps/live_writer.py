"""A stand-in for the trainer: writes a synthetic run step by step, obeying commands. Arguments: folder, seconds."""

import sys
import time

from tests.live.synthetic import synthetic_meta, synthetic_steps
from workbench.live.control import Controller
from workbench.live.store import RunWriter

SHAPE = {
    "n_steps": 100_000,
    "n_layers": 3,
    "n_experts": 8,
    "top_k": 2,
    "seed": 7,
    "domains": ("python", "docs", "names"),
}

if __name__ == "__main__":
    folder, seconds = sys.argv[1], float(sys.argv[2])
    with RunWriter.create(folder, synthetic_meta(**SHAPE)) as writer:
        controller = Controller(writer)
        for step in synthetic_steps(writer, **SHAPE):
            if controller.before_step(step + 1).stop:
                writer.status("stopped")
                break
            time.sleep(seconds)
