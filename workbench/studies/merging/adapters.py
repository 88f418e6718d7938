"""What the studies of merged adapters share: the LoRAs of a seed, rules on their factors and on their updates.

    bed = load(settings, seed, "shared")
    update, chosen = bed.scaled(bed.update(merged))             # merged: layer -> factors, or an update (O, I)
    row = merged_row("svd", seed, bed.suite, update, chosen=chosen)

Every arm has an overall scale that is tuned, or a scale and a density, on `POINTS` points. Adapters that serve their
own task alone, the task being known (`reverted`), are tuned and judged likewise, one common scale for all of them.

Tensor letters: n tasks, P numbers of what a rule merges, O x I a layer's update.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.beds import digit_experts, digit_loras
from workbench.beds.digit_loras import Loras
from workbench.kernels.trim_elect_merge import magnitude_threshold, trim_elect_merge
from workbench.lib.core.merge.low_rank import Factors, joint_svd
from workbench.lib.merging.rmm import merge_factors_separately
from workbench.studies.core import Settings
from workbench.studies.merging import tuning
from workbench.studies.merging.tuning import POINTS, Suite, Update, grid, tuned
from workbench.studies.rows import Row

SCALES = tuple(2 ** (j / 3) for j in range(-9, 15))  # 1 among them
DENSITIES = (0.1, 0.2, 0.4, 0.8)
DENSE_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of rules with a density
assert len(SCALES) == len(DENSITIES) * len(DENSE_SCALES) == POINTS

Rule = Callable[[Float[Tensor, "n P"]], Float[Tensor, " P"]]


@dataclass(frozen=True)
class Bed:
    """The adapters of a seed.

    Attributes:
        suite: as of full experts; `own` is what the adapters reach, `deltas` their updates, 0 where there is none.
        loras: of each task.
        stride: of the points of a grid: every so many-th is tried.
    """

    suite: Suite
    loras: tuple[Loras, ...]
    stride: int

    @property
    def layers(self) -> list[str]:
        return list(self.loras[0])

    def of(self, layer: str) -> list[Factors]:
        """The adapters of one layer."""
        return [each[layer] for each in self.loras]

    def update(self, merged: Mapping[str, Factors | Tensor]) -> Update:
        """A vector over the trunk, of factors or of full updates by layer."""
        return _update(self.suite, merged)

    def scaled(self, update: Update) -> tuple[Update, dict[str, Any]]:
        """The update times the scale that is best on validation, and what was chosen."""
        return tuned(self.suite, lambda deltas, scale: scale * update, grid(scale=SCALES)[:: self.stride])

    def trimmed(self, merge: Callable[[float], Update]) -> tuple[Update, dict[str, Any]]:
        """The best of `merge(density)` times a scale."""
        made = lru_cache(merge)
        points = grid(density=DENSITIES, scale=DENSE_SCALES)[:: self.stride]
        return tuned(self.suite, lambda deltas, density, scale: scale * made(density), points)

    def stacked(self, layer: str) -> Float[Tensor, "n O I"]:
        """The updates of one layer."""
        return torch.stack([scale * b @ a for a, b, scale in self.of(layer)])


def load(settings: Settings, seed: int, source: str) -> Bed:
    """The adapters of a seed; those of the last few are held, so nothing of them may be written to."""
    return _load(tuple((key, settings[key]) for key in digit_experts.SMALL), seed, source, int(settings["stride"]))


@lru_cache(maxsize=3)
def _load(recipe: tuple[tuple[str, Any], ...], seed: int, source: str, stride: int) -> Bed:
    settings = dict(recipe)
    full = tuning.load(settings, seed)
    loras = tuple(digit_loras.adapter(name, source, settings, seed) for name in digit_experts.TASKS)
    deltas = torch.stack([_update(full, each) for each in loras])
    suite = replace(full, deltas=deltas)
    own = [[suite_accuracy(suite, i, deltas[i], split) for i in range(len(loras))] for split in ("test", "validation")]
    return Bed(replace(suite, own=tuple(own[0]), own_validation=tuple(own[1])), loras, stride)


def _update(suite: Suite, merged: Mapping[str, Factors | Tensor]) -> Update:
    vector = torch.zeros_like(suite.start)
    parts = suite.split(vector)  # views
    for layer, made in merged.items():
        parts[f"{layer}.weight"].copy_(made if torch.is_tensor(made) else made[2] * made[1] @ made[0])
    return vector


def suite_accuracy(suite: Suite, task: int, update: Update, split: str) -> float:
    """Accuracy of the base with an update on one task."""
    return tuning.accuracies(suite.model_of(update), [suite.tasks[task]], split)[0]


# -- single merges


def mean(stack: Float[Tensor, "n P"]) -> Float[Tensor, " P"]:
    return stack.mean(0)


def ties(density: float) -> Rule:
    """Each row trimmed to its largest, signs elected by the sum, the mean of what agrees."""

    def rule(stack: Float[Tensor, "n P"]) -> Float[Tensor, " P"]:
        stack = stack.contiguous()
        thresholds = [magnitude_threshold(row, max(1, int(density * len(row)))) for row in stack]
        return trim_elect_merge(stack, thresholds=thresholds)

    return rule


def dare(density: float, seed: int) -> Rule:
    """The mean of rows of which each number stays with this chance, divided by it."""

    def rule(stack: Float[Tensor, "n P"]) -> Float[Tensor, " P"]:
        kept = torch.rand(stack.shape, generator=torch.Generator().manual_seed(seed)) < density
        return (stack * kept / density).mean(0)

    return rule


def factorwise(bed: Bed, rule: Rule) -> Update:
    """A rule on all A of a layer, and by itself on all B."""
    return bed.update({name: merge_factors_separately(bed.of(name), rule) for name in bed.layers})


def knots(bed: Bed) -> Callable[[float], Update]:
    """TIES on what is left of each task in one basis a layer: density -> update (Stoica et al. 2024, 2410.19735)."""
    found = {layer: joint_svd(list(bed.stacked(layer))) for layer in bed.layers}
    blocks = {layer: torch.stack([s[:, None] * v for v in parts]) for layer, (_, s, parts) in found.items()}

    def merge(density: float) -> Update:
        merged = ties(density)(torch.cat([block.flatten(1) for block in blocks.values()], dim=1))
        parts = merged.split([block[0].numel() for block in blocks.values()])
        return bed.update(
            {name: found[name][0] @ part.view_as(blocks[name][0]) for name, part in zip(blocks, parts, strict=True)}
        )

    return merge


# -- one adapter a task


def reverted_kept(suite: Suite, updates: Sequence[Update], split: str, scale: float = 1.0) -> list[float]:
    """Normalised accuracy of each task's own update on its task."""
    own = suite.own if split == "test" else suite.own_validation
    return [suite_accuracy(suite, i, scale * update, split) / own[i] for i, update in enumerate(updates)]


def reverted_row(arm: str, seed: int, bed: Bed, updates: Sequence[Update], **extra: Any) -> Row:
    """The row of adapters that serve their own task each, at the common scale that is best on validation."""
    scales = SCALES[:: bed.stride]
    found = [fmean(reverted_kept(bed.suite, updates, "validation", scale)) for scale in scales]
    best = max(range(len(scales)), key=lambda i: (found[i], -i))
    by_task = reverted_kept(bed.suite, updates, "test", scales[best])
    unscaled = fmean(reverted_kept(bed.suite, updates, "test"))
    chosen = {"scale": scales[best], "validation": found[best]}
    return tuning.kept_row(arm, seed, bed.suite, bed.suite.model, by_task, unscaled=unscaled, chosen=chosen, **extra)


def scaled_row(arm: str, seed: int, bed: Bed, update: Update, **extra: Any) -> Row:
    """The row of a merge without options at its best scale; beside it what it keeps as it is, "unscaled"."""
    best, chosen = bed.scaled(update)
    unscaled = fmean(bed.suite.kept(bed.suite.model_of(update), "test"))
    return tuning.merged_row(arm, seed, bed.suite, best, unscaled=unscaled, chosen=chosen, **extra)


def trimmed_row(arm: str, seed: int, bed: Bed, merge: Callable[[float], Update]) -> Row:
    """The row of a merge with a density."""
    best, chosen = bed.trimmed(merge)
    return tuning.merged_row(arm, seed, bed.suite, best, chosen=chosen)
