"""BossNAS, the search: block after block is trained, its paths are rated, and the best one feeds the next.

    score(a) = mean over batches of l(predict(online(v_1; a)), c_2) + l(predict(online(v_2; a)), c_1)
    c_v      = mean over ALL paths of the target's projections of v, not normalised

with the statistics of the batch norms set anew for each path, on one batch. Lower is better: a path that agrees with
the centre of the population. The rating of an architecture is the sum over blocks of score + 4, which is not negative.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.cells.inverted_residual import recalibrate
from workbench.lib.core.modes import evaluating
from workbench.lib.core.task import Batch, Classification
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.search.bossnas import (
    BlockSupernet,
    EnsembleBootstrap,
    Path,
    PathTower,
    WidthSpace,
    alignment,
    momentum_at,
)

LEAST = -4.0
"""Of a loss, where everything points the same way."""
SHIFT, SPREAD, NOISE, CUT = 8, 0.2, 0.1, 6


def signal_views(x: Float[Tensor, "batch length"], generator: torch.Generator) -> Float[Tensor, "batch 2 length"]:
    """Two views of each: moved around by up to 8 places, scaled by 0.8 to 1.2, noise of 0.1, 6 places cut out."""
    found = []
    for _ in range(2):
        n, length = x.shape
        by = torch.randint(-SHIFT, SHIFT + 1, (n, 1), generator=generator)
        moved = x.gather(1, (torch.arange(length) - by) % length)
        scale = 1 + SPREAD * (2 * torch.rand(n, 1, generator=generator) - 1)
        noisy = moved * scale + NOISE * torch.randn(n, length, generator=generator)
        start = torch.randint(length - CUT + 1, (n, 1), generator=generator)
        places = torch.arange(length)
        found.append(noisy.masked_fill((places >= start) & (places < start + CUT), 0.0))
    return torch.stack(found, 1)


class TwoViews(Classification):
    """Signals without labels: inputs are two views of each, the loss is the mean of what a model says of paths."""

    metric, unit, higher_is_better = "alignment", "of the loss", False

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        found = super().batch(split, size, generator, domain)
        return Batch(signal_views(found.inputs, generator), torch.zeros_like(found.targets), found.domain)

    def batches(self, split: str, size: int):
        for number, found in enumerate(super().batches(split, size)):
            views = signal_views(found.inputs, torch.Generator().manual_seed(number))
            yield Batch(views, torch.zeros_like(found.targets), found.domain)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()


class Following(Hook):
    """The target follows after each step, the more slowly the later."""

    def __init__(self, first: float):
        self.first = first

    def after_step(self, state: State) -> None:
        state.model.follow(momentum_at(state.step, state.config.steps, self.first))


@dataclass(frozen=True)
class BlockwiseConfig:
    """How blocks are trained and rated.

    Attributes:
        train: of each block anew; labels are never seen.
        momentum: first one of the target.
        neck: widths of the adapter, inside, and of the projection.
        predictor: width inside it.
        rated: inputs that paths are rated on.
        ensemble: see `EnsembleBootstrap`; without it a path is rated by its own target as well.
        recalibrated: whether norms get the statistics of each path before it is rated.
    """

    train: TrainConfig
    momentum: float = 0.99
    neck: tuple[int, int, int] = (32, 64, 32)
    predictor: int = 64
    rated: int = 256
    ensemble: bool = True
    recalibrated: bool = True


@dataclass(frozen=True)
class BlockRatings:
    """What each path of each block was rated, lower being better, and the paths that were chosen.

    Attributes:
        scores: of each block, path -> score.
    """

    scores: list[dict[Path, float]]

    @property
    def best(self) -> list[Path]:
        """The path of each block that is rated best; of equal ones the first."""
        return [min(scores, key=scores.__getitem__) for scores in self.scores]

    @property
    def count(self) -> int:
        """How many ratings there are: the sum of the sizes of the blocks, not their product."""
        return sum(map(len, self.scores))


def rate_architecture(paths: Sequence[Path], ratings: BlockRatings) -> float:
    """The sum over blocks of score + 4, lower being better; `paths` are those through each block."""
    if len(paths) != len(ratings.scores):
        raise InputError(f"paths has {len(paths)} blocks but {len(ratings.scores)} are rated")
    for number, (path, scores) in enumerate(zip(paths, ratings.scores, strict=True)):
        if path not in scores:
            raise InputError(f"path of block {number} is {path} but must be one of the {len(scores)} that are rated")
    return sum(scores[path] - LEAST for path, scores in zip(paths, ratings.scores, strict=True))


class _Student(nn.Module):
    def __init__(self, model: EnsembleBootstrap, tower: PathTower):
        super().__init__()
        self.tower, self.predict = tower, model.predict

    def forward(self, x: Tensor, path: Path) -> Tensor:
        return self.predict(self.tower(x, path))


def rate_paths(
    model: EnsembleBootstrap,
    views: Float[Tensor, "batch 2 ..."],
    calibration: Float[Tensor, "batch 2 ..."],
    recalibrated: bool = True,
) -> dict[Path, float]:
    """The score of each path of the block, lower being better; nothing of the model is changed.

    Both nets go through the target's prefix. A copy is rated, so the order of paths makes no difference.
    """
    online, target = copy.deepcopy(model.online), copy.deepcopy(model.target)
    online.prefix = target.prefix
    student = _Student(copy.deepcopy(model), online)
    first, second = views.unbind(1)
    seen = calibration.flatten(0, 1)

    def said(net: nn.Module, path: Path) -> tuple[Tensor, Tensor]:
        if recalibrated:
            recalibrate(net, seen, path)
        return net(first, path), net(second, path)

    with torch.no_grad(), evaluating(target), evaluating(student):
        aims = {path: said(target, path) for path in model.online.block.paths}
        if model.ensemble:
            centre = tuple(torch.stack([aim[view] for aim in aims.values()]).mean(0) for view in range(2))
            aims = dict.fromkeys(aims, centre)
        scores = {}
        for path, aim in aims.items():
            one, other = said(student, path)
            scores[path] = float(alignment(one, aim[1]) + alignment(other, aim[0]))
    return scores


def search_blockwise(blocks: Sequence[BlockSupernet], task: TwoViews, config: BlockwiseConfig) -> BlockRatings:
    """Train and rate block after block; the blocks hold the trained weights afterwards.

    A neck is made anew for each block, from torch's global generator.
    """
    found, prefix, target_prefix = [], [], []
    dims = task.data.splits["train"][0].ndim - 1
    generator = torch.Generator().manual_seed(config.train.seed)
    drawn = [task.batch("train", config.rated, generator).inputs for _ in range(2)]
    for block in blocks:
        n_paths = block.layers[0].n_ops if block.free else min(4, len(block.paths))
        tower = PathTower(prefix, block, config.neck, dims)
        model = EnsembleBootstrap(tower, n_paths, config.predictor, target_prefix, config.ensemble)
        train(model, task, config.train, [Following(config.momentum)])
        found.append(rate_paths(model, *drawn, config.recalibrated))
        best = BlockRatings(found).best[-1]
        prefix.append((block, best))
        target_prefix.append(model.target.block)
    return BlockRatings(found)


def rate_all(space: WidthSpace, ratings: BlockRatings, archs: Sequence[Path]) -> list[float]:
    """The rating of each architecture of a space of widths, lower being better."""
    return [rate_architecture(space.split(arch), ratings) for arch in archs]
