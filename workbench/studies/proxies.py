"""The proxy runs of a search of mixtures: each kept as it ends, none paid for twice, spread by joblib.

A run is known by its mixture, seed, recipe and code, and kept in `$WORKBENCH_HOME/mixtures/<code>/`. Workers are those
of joblib, so that `with joblib.parallel_config("dask"): ...` sends the runs to other machines; what they come to is
kept on this one. One thread each: the same numbers wherever they run.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench.beds.text_mixtures import Trainer
from workbench.errors import InputError
from workbench.lib.core.threads import torch_threads
from workbench.paths import home
from workbench.studies import sheets
from workbench.studies.kept import code_of

Told = Callable[[float], None]
"""Called with each score as it comes."""


@dataclass
class Proxies:
    """Scores of mixtures by trainings of one recipe.

    Attributes:
        trainer: of the proxy.
        seed: of the data's order, the same for all mixtures.
        jobs: processes; None for what `joblib.parallel_config` says.
        kept, run: how many scores were there already, and how many were made.
    """

    trainer: Trainer
    seed: int = 0
    jobs: int | None = 1
    kept: int = field(default=0, init=False)
    run: int = field(default=0, init=False)

    def __post_init__(self):
        self._root = home() / "mixtures" / code_of(_score)

    def scores(self, mixtures: Sequence[Tensor] | Tensor, told: Told = lambda score: None) -> list[float]:
        """Bits per byte of the proxy of each mixture, in their order.

        Raises:
            InputError: a training diverged; the others are kept.
        """
        recipes = [self._recipe(weights) for weights in mixtures]
        found = [self._read(recipe) for recipe in recipes]
        self.kept += sum(score is not None for score in found)
        for score in found:
            if score is not None:
                told(score)
        missing = [index for index, score in enumerate(found) if score is None]
        if missing:
            self.trainer.warm()  # here, and not by all workers at once
        made = self.each(_score, [(mixtures[index], self.seed) for index in missing])
        for index, score in zip(missing, made, strict=True):
            if score is None:
                raise InputError(f"mixture {_shown(mixtures[index])} makes the proxy diverge: lower its learning rate")
            found[index] = score
            self.run += 1
            with suppress(OSError):  # a full disk costs time, not the result
                sheets.write(self._path(recipes[index]), {"recipe": recipes[index], "score": score})
            told(score)
        return found

    def each(self, work: Callable, tasks: Sequence[tuple]) -> Any:
        """`work(trainer, *task)` of every task, in their order, each as it is there."""
        if self.jobs == 1 or len(tasks) < 2:
            return (work(self.trainer, *task) for task in tasks)
        from joblib import Parallel, delayed

        parallel = Parallel(self.jobs, return_as="generator", batch_size=1)
        return parallel(delayed(work)(self.trainer, *task) for task in tasks)

    def _recipe(self, weights: Tensor) -> dict[str, Any]:
        return sheets.plain({"weights": weights.tolist(), "seed": self.seed, "recipe": self.trainer.recipe()})

    def _path(self, recipe: dict[str, Any]) -> Path:
        return self._root / f"{sheets.digest(recipe)[:24]}.json"

    def _read(self, recipe: dict[str, Any]) -> float | None:
        """The score that is kept; a file that is damaged, or of another run, is made again."""
        with suppress(FileNotFoundError, sheets.Damaged):
            content = sheets.read(self._path(recipe))
            if content.get("recipe") == recipe and isinstance(content.get("score"), float):
                return content["score"]
        return None


def _score(trainer: Trainer, weights: Tensor, seed: int) -> float | None:
    with torch_threads(1), suppress(FloatingPointError):
        score = trainer.score(weights, seed)
        return score if math.isfinite(score) else None
    return None


def expert(trainer: Trainer, domain: int, seed: int) -> dict[str, Tensor]:
    """The weights of the model of one domain.

    Raises:
        InputError: its training diverged.
    """
    with torch_threads(1):
        try:
            return trainer.expert(domain, seed).state_dict()
        except FloatingPointError:
            name = list(trainer.source.texts)[domain]
            raise InputError(f"the expert of {name!r} diverges: lower its learning rate") from None


def _shown(weights: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in weights.tolist()) + ")"
