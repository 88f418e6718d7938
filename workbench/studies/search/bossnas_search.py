"""The search of BossNAS for a time, on the bed of its study: what `workbench search bossnas` goes through.

The blocks are trained and rated first; after that every architecture has a rating, and those that meet the limit are
gone through from the best on.
"""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.beds.architectures import SPACE
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.search.kept import Report
from workbench.lib.core.train import Hook, State
from workbench.lib.search.bossnas import Path, width_blocks
from workbench.lib.search.bossnas_search import BlockRatings, rate_all, search_blockwise
from workbench.lib.search.bossnas_views import TwoViews
from workbench.studies.search.bossnas import PRESETS, config_of

STEPS = 600


class BossnasSearch:
    """Architectures of the study's space of widths for MNIST-1D, rated without labels.

    Args:
        seed: of everything.
        max_macs: most multiplications for one signal; None for any.
        steps: of each block.
    """

    rating, cost = "minus the rating, summed over blocks", "multiplications"

    def __init__(self, seed: int = 0, max_macs: int | None = None, steps: int = STEPS):
        self._small = PRESETS["small"] | {"steps": steps}
        names = ("batch_size", "lr", "momentum", "rated")
        self.settings: Mapping[str, Any] = {"system": "bossnas", "seed": seed, "max_macs": max_macs, "steps": steps}
        self.settings = self.settings | {name: self._small[name] for name in names}
        least = SPACE.macs((0,) * SPACE.n_layers)
        if max_macs is not None and max_macs < least:  # before anything is trained
            raise InputError(
                f"max_macs is {max_macs} but no architecture meets it: the cheapest has {least} multiplications"
            )
        self.ratings = BlockRatings([])

    def prepare(self, report: Report) -> dict[str, Tensor]:
        """The scores of the paths of each block, in order."""
        seed = self.settings["seed"]
        task, config = TwoViews(data.load("mnist-1d")), config_of("bossnas", seed, self._small)
        torch.manual_seed(seed)
        blocks = width_blocks(SPACE)
        found = search_blockwise(blocks, task, config, [_Told(report, len(blocks))])
        named = enumerate(zip(found.scores, blocks, strict=True))
        return {
            str(place): torch.tensor([scores[path] for path in block.paths], dtype=torch.float64)
            for place, (scores, block) in named
        }

    def restore(self, prepared: Mapping[str, Tensor]) -> None:
        scores = (prepared[str(place)].tolist() for place in range(len(SPACE.blocks)))
        self.ratings = BlockRatings(
            [dict(zip(block.paths, its, strict=True)) for block, its in zip(width_blocks(SPACE), scores, strict=True)]
        )

    def asked(self) -> Generator[Path, float, dict[Path, float]]:
        limit = self.settings["max_macs"]
        meeting = [arch for arch in SPACE.every() if limit is None or SPACE.macs(arch) <= limit]
        rated = dict(zip(meeting, rate_all(SPACE, self.ratings, meeting), strict=True))
        told = {}
        for arch in sorted(meeting, key=rated.__getitem__):
            told[arch] = yield arch
        return told

    def rate(self, candidate: Path) -> float:
        return -rate_all(SPACE, self.ratings, [candidate])[0]

    def cost_of(self, candidate: Path) -> int:
        return SPACE.macs(candidate)

    def encode(self, candidate: Path) -> list[int]:
        return list(candidate)


class _Told(Hook):
    """Counts the steps of all blocks."""

    def __init__(self, report: Report, blocks: int):
        self.report, self.blocks, self.made = report, blocks, 0

    def after_step(self, state: State) -> None:
        self.made += 1
        self.report(self.made, self.blocks * state.config.steps, f"block {(self.made - 1) // state.config.steps + 1}")


def search(seed: int, max_macs: int | None) -> BossnasSearch:
    """What `workbench search bossnas` goes through."""
    return BossnasSearch(seed, max_macs)
