"""How good architectures are when each is trained alone: the truth that rankings without training are held to.

A space of widths on MNIST-1D, signals of ten classes: five convolutions, each 4, 8, 12 or 16 channels wide. Of its
1,024 architectures 24 are drawn at random and 12 among those whose parameters are within 5 % of the median, where their
number says nothing. Each is trained with three seeds; what is kept is the accuracy on the test split.

    python -m workbench.beds.architectures [--jobs N]

makes the table anew, "architectures.json" beside this file, in about two minutes of a core.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import joblib
import torch

from workbench.lib import data
from workbench.lib.core.task import Classification
from workbench.lib.core.threads import torch_threads
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.search.bossnas import WidthNet, WidthSpace
from workbench.sealed import sealed_file

SPACE = WidthSpace(1, 40, 10, (4, 8, 12, 16), (2, 1, 2, 1, 1), (2, 2, 1))
RANDOM, ALIKE, NEAR = 24, 12, 0.05
SEEDS = 3
STEPS, BATCH, LR = 200, 64, 1e-2
TABLE = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True)
class Truth:
    """One architecture of the table.

    Attributes:
        arch: number of the width of each layer.
        accuracies: on the test split, one a seed.
        alike: whether it is one of those with about the median number of parameters.
    """

    arch: tuple[int, ...]
    params: int
    macs: int
    accuracies: tuple[float, ...]
    alike: bool

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.accuracies)


def chosen(space: WidthSpace = SPACE) -> list[tuple[tuple[int, ...], bool]]:
    """The architectures of the table, each with whether it was drawn for its number of parameters."""
    every, generator = space.every(), torch.Generator().manual_seed(2021)
    order = [every[place] for place in torch.randperm(len(every), generator=generator).tolist()]
    median = statistics.median(map(space.params, every))
    near = [arch for arch in order[RANDOM:] if abs(space.params(arch) / median - 1) <= NEAR]
    return [(arch, False) for arch in order[:RANDOM]] + [(arch, True) for arch in near[:ALIKE]]


def alone(arch: tuple[int, ...], seed: int, steps: int = STEPS) -> float:
    """Accuracy on the test split of one architecture trained from scratch."""
    task = Classification(data.load("mnist-1d"))
    torch.manual_seed(seed)
    net = WidthNet(arch, SPACE)
    with torch_threads(1):
        train(net, task, TrainConfig(steps, BATCH, LR, seed=seed, eval_every=None))
        return task.evaluate(net, "test")["accuracy"]


@cache
def table(path: Path = TABLE) -> tuple[Truth, ...]:
    """The kept table."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return tuple(Truth(tuple(arch), SPACE.params(tuple(arch)), SPACE.macs(tuple(arch)), tuple(found), alike)
                 for arch, found, alike in rows)  # fmt: skip


def make(jobs: int = 1, steps: int = STEPS) -> dict:
    """The table as it is kept: how it was made, and [architecture, accuracies, alike] of each."""
    data.load("mnist-1d")  # once, before processes ask for it together
    archs = chosen()
    plan = [(arch, seed) for arch, _ in archs for seed in range(SEEDS)]
    found = joblib.Parallel(jobs)(joblib.delayed(alone)(arch, seed, steps) for arch, seed in plan)
    rows = [
        [list(arch), [round(value, 4) for value in found[place * SEEDS : (place + 1) * SEEDS]], alike]
        for place, (arch, alike) in enumerate(archs)
    ]
    made = {"data": "mnist-1d", "widths": SPACE.widths, "strides": SPACE.strides, "kernel": SPACE.kernel}
    return {"made": made | {"steps": steps, "batch": BATCH, "lr": LR, "seeds": SEEDS}, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.beds.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    made = make(parser.parse_args(arguments).jobs)
    lines = ",\n".join(json.dumps(row) for row in made["rows"])
    with sealed_file(TABLE) as unfinished:
        unfinished.write_text(f'{{"made": {json.dumps(made["made"])}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
