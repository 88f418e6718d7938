"""BossNAS, the search: block after block is trained, its paths are rated, and the best one feeds the next.

    score(a) = mean over batches of l(predict(online(v_1; a)), c_2) + l(predict(online(v_2; a)), c_1)
    c_v      = mean over ALL paths of the target's projections of v, not normalised

with the statistics of the batch norms set anew for each path, on one batch. Lower is better: a path that agrees with
the centre of the population. The rating of an architecture is the sum over blocks of score + 4, which is not negative.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.cells.inverted_residual import recalibrate
from workbench.lib.core.modes import evaluating
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
from workbench.lib.search.bossnas_views import TwoViews

LEAST = -4.0
"""Of a loss, where everything points the same way."""


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


class Blockwise:
    """A search that goes from block to block: each is trained behind the best paths of those before it, and rated.

    A neck is made anew for each block, from torch's global generator. The blocks hold the trained weights afterwards.
    """

    def __init__(self, task: TwoViews, config: BlockwiseConfig):
        self.task, self.config, self.ratings = task, config, BlockRatings([])
        self._prefix, self._target_prefix = [], []
        generator = torch.Generator().manual_seed(config.train.seed)
        self._rated, self._calibration = (task.batch("train", config.rated, generator).inputs for _ in range(2))

    def add(self, block: BlockSupernet, hooks: Iterable[Hook] = ()) -> Path:
        """Train and rate the next block; returns its best path, which is frozen from here on."""
        config = self.config
        tower = PathTower(self._prefix, block, config.neck)
        model = EnsembleBootstrap(tower, block.n_paths, config.predictor, self._target_prefix, config.ensemble)
        train(model, self.task, config.train, [Following(config.momentum), *hooks])
        self.ratings.scores.append(rate_paths(model, self._rated, self._calibration, config.recalibrated))
        best = self.ratings.best[-1]
        self._prefix.append((block, best))
        self._target_prefix.append(model.target.block)
        return best


def search_blockwise(
    blocks: Sequence[BlockSupernet], task: TwoViews, config: BlockwiseConfig, hooks: Iterable[Hook] = ()
) -> BlockRatings:
    """Train and rate block after block."""
    search = Blockwise(task, config)
    for block in blocks:
        search.add(block, hooks)
    return search.ratings


def rate_all(space: WidthSpace, ratings: BlockRatings, archs: Sequence[Path]) -> list[float]:
    """The rating of each architecture of a space of widths, lower being better."""
    return [rate_architecture(space.split(arch), ratings) for arch in archs]
