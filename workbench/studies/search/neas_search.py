"""The search of NEAS for a time, on the bed of its study: what `workbench search neas` goes through."""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.search.genomes import EnsembleGenome
from workbench.lib.core.search.kept import Report
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.search.neas import KPathSupernet
from workbench.lib.search.neas_shrink import Shrinking, candidates, cheapest, rate
from workbench.studies.search.neas import PRESETS, SHRUNK_AT, judged_on, space_of, task_of

STEPS = 600
K = 2


class NeasSearch:
    """Pairs of paths for MNIST-1D, rated on its validation split with the weights of one supernet.

    Args:
        seed: of everything.
        max_macs: most multiplications for one signal; None for those of the study.
        steps: of the supernet.
    """

    rating, cost = "accuracy", "multiplications"

    def __init__(self, seed: int = 0, max_macs: int | None = None, steps: int = STEPS):
        self._small = PRESETS["small"]
        self.space, self._task = space_of(self._small), task_of(seed)
        self.settings: Mapping[str, Any] = {
            "system": "neas",
            "seed": seed,
            "max_macs": self._small["max_macs"] if max_macs is None else max_macs,
            "steps": steps,
            "batch_size": self._small["batch_size"],
            "lr": self._small["lr"],
        }
        least = cheapest(self.space.everything, K, self.space).macs(self.space)
        if self.settings["max_macs"] < least:  # before anything is trained
            raise InputError(
                f"max_macs is {self.settings['max_macs']} but no ensemble of {K} paths meets it: the cheapest has "
                f"{least} multiplications"
            )
        self._batch = judged_on(self._task, self._small)
        torch.manual_seed(seed)
        self.supernet = KPathSupernet(self.space, K)

    def prepare(self, report: Report) -> dict[str, Tensor]:
        steps = self.settings["steps"]
        at = [max(1, round(share * steps)) for share in SHRUNK_AT]
        shrinking = Shrinking("diversity", at, *self._batch, n=self._small["scored"])
        sizes = (steps, self.settings["batch_size"], self.settings["lr"])
        config = TrainConfig(*sizes, seed=self.settings["seed"], eval_every=None)
        train(self.supernet, self._task, config, [shrinking, _Told(report)])
        return self.supernet.state_dict()

    def restore(self, prepared: Mapping[str, Tensor]) -> None:
        self.supernet.load_state_dict(dict(prepared))

    def asked(self) -> Generator[EnsembleGenome, float, dict[EnsembleGenome, float]]:
        limit, seed = self.settings["max_macs"], self.settings["seed"]
        return candidates(self.supernet.kept, K, self.space, limit, seed=seed, generations=None)

    def rate(self, candidate: EnsembleGenome) -> float:
        return rate(self.supernet, candidate, *self._batch)

    def cost_of(self, candidate: EnsembleGenome) -> int:
        return candidate.macs(self.space)

    def encode(self, candidate: EnsembleGenome) -> list[int]:
        return candidate.encode()


class _Told(Hook):
    def __init__(self, report: Report):
        self.report = report

    def after_step(self, state: State) -> None:
        self.report(state.step + 1, state.config.steps, "supernet")


def search(seed: int, max_macs: int | None) -> NeasSearch:
    """What `workbench search neas` goes through."""
    return NeasSearch(seed, max_macs)
