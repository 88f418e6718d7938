"""CLIMB: clusters as domains, and their weights searched in shrinking rounds of proxy runs (2504.13161).

A round asks for mixtures, small models trained on them score them, and a regressor from weights to scores, fitted on
all scores so far, proposes the next ones. With a single round the search is RegMix (2407.01492). Scores are losses: the
smaller the better. The clusters are made in `clusters.py`.
Tensor letters: K domains, M mixtures.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.mixtures import Numbers, as_numbers, check_weights, dirichlet_mixtures
from workbench.lib.data_mixtures.clusters import ClusterDomains
from workbench.lib.measures.statistics import checked

METHOD = Method(
    slug="climb",
    title="CLIMB: CLustering-based Iterative Data Mixture Bootstrapping for Language Model Pre-training",
    family="data_mixtures",
    year=2025,
    paper="arXiv:2504.13161",
    claim="Searching the weights of discovered clusters in shrinking rounds of proxy runs finds better mixtures than "
    "one round of random ones.",
    objects=("IterativeMixtureSearch", "MixtureSpace", "MixturePredictor", "ClusterDomains"),
    kind="data mixture",
)

__all__ = ["METHOD", "ClusterDomains", "IterativeMixtureSearch", "MixturePredictor", "MixtureSpace", "SearchResult"]

KINDS = ("trees", "quadratic", "gp")
STRENGTHS = 15  # of the grid between the two ends
SPARE = 100  # draws for each mixture of the first round
TRIES = 50  # times that a space draws before it says that there is nothing more


class MixtureSpace:
    """The mixtures that may be tried: Dirichlet draws around a prior, within limits of repetition, on a fine grid.

    Args:
        share: of the data that each domain has, above 0 and of sum 1.
        temperature: the prior is share ** temperature, normalised.
        strengths: ends of a logarithmic grid of 15 concentrations, of which every draw has one: below 1 most weight is
            on few domains.
        max_repeat: weight that a domain may have, in units of its share: how often its data are repeated in a training
            as long as all data together.
        minimum: weights are multiples of it, and 1 is; what is below it is none.
    """

    def __init__(
        self,
        share: Numbers,
        temperature: float = 0.5,
        strengths: tuple[float, float] = (0.1, 5.0),
        max_repeat: float = 15.0,
        minimum: float = 2e-4,
    ):
        share = torch.from_numpy(as_numbers("share", share))
        if share.ndim != 1 or len(share) < 2:
            raise InputError(f"share has shape {tuple(share.shape)} but must be of at least two domains")
        self.share = check_weights(share, [str(index) for index in range(len(share))])
        if not (self.share > 0).all():
            raise InputError(f"share is 0 of domain {int(self.share.argmin())} but must be above 0: it has no data")
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature} but must be at least 0 and finite")
        if not 0 < strengths[0] <= strengths[1] < math.inf:
            raise InputError(f"strengths are {strengths} but must be above 0, the smaller first")
        if not max_repeat >= 1:
            raise InputError(f"max_repeat is {max_repeat} but must be at least 1")
        self.units = round(1 / minimum) if 0 < minimum <= 1 else 0
        if not self.units or abs(self.units * minimum - 1) > 1e-9:
            raise InputError(f"minimum is {minimum} but must be 1 over a whole number")
        self.prior = self.share**temperature / (self.share**temperature).sum()
        if not (self.prior > 0).all():
            raise InputError(f"temperature is {temperature} but must be lower: it leaves a domain without any weight")
        self.limit = (max_repeat * self.share).clamp(max=1.0)
        self.strengths = np.geomspace(*strengths, STRENGTHS)

    def __len__(self) -> int:
        return len(self.share)

    def sample(self, count: int, generator: np.random.Generator, without: Tensor | None = None) -> Tensor:
        """`count` mixtures (M, K) around the prior, no two alike and none of `without`: a first round.

        They are chosen from a hundred times as many distinct ones, so that corners, which strong draws often come to,
        are tried no more than once.

        Raises:
            InputError: there are not so many.
        """
        if count < 1:
            raise InputError(f"count is {count} but must be at least 1")
        found = self._distinct(lambda: self._around_prior(SPARE * count, generator), count, without)
        return found[torch.from_numpy(generator.permutation(len(found))[:count])]

    def proposals(self, count: int, generator: np.random.Generator, without: Tensor | None = None) -> Tensor:
        """Distinct mixtures (M, K), at most `count`, with the shares as mean and concentration 1, so mostly sparse."""
        return self._distinct(lambda: dirichlet_mixtures(len(self), count, self.share.numpy(), generator), 1, without)

    def _around_prior(self, count: int, generator: np.random.Generator) -> Tensor:
        picked = np.bincount(generator.integers(STRENGTHS, size=count), minlength=STRENGTHS)
        return torch.cat(
            [
                dirichlet_mixtures(len(self), int(many), strength * self.prior.numpy(), generator)
                for many, strength in zip(picked, self.strengths, strict=True)
                if many
            ]
        )

    def _distinct(self, draw: Callable[[], Tensor], least: int, without: Tensor | None) -> Tensor:
        """At least so many distinct mixtures of the grid from what is drawn."""
        out = {row.tobytes() for row in self._in_units(without)} if without is not None else set()
        found: dict[bytes, np.ndarray] = {}
        for _ in range(TRIES):
            for row in self._on_grid(draw()):
                if (key := row.tobytes()) not in out:
                    found.setdefault(key, row)
            if len(found) >= least:
                return torch.from_numpy(np.stack([*found.values()]) / self.units)
        raise InputError(f"the space has only {len(found)} mixtures that are new, and {least} are asked for")

    def _on_grid(self, drawn: Tensor) -> np.ndarray:
        """Draws that keep to the limits, in whole units."""
        drawn = drawn[(drawn <= self.limit).all(1)]
        drawn = torch.where(drawn * self.units < 1, 0.0, drawn)
        drawn = drawn[(drawn > 0).any(1)]  # where the grid is coarse, all weights may be below its step
        drawn = drawn / drawn.sum(1, keepdim=True)
        units = (drawn * self.units).numpy()
        whole = np.floor(units).astype(np.int64)
        # The largest remainders get what is left to a sum of 1; a weight of 0 has none.
        rank = np.argsort(np.argsort(whole - units, axis=1, kind="stable"), axis=1, kind="stable")
        whole += rank < (self.units - whole.sum(1, keepdims=True))
        return whole[(whole <= np.maximum(self.limit.numpy() * self.units, 1) + 1e-9).all(1)]

    def _in_units(self, weights: Tensor) -> np.ndarray:
        return (weights * self.units).round().long().numpy()


class MixturePredictor:
    """A regressor from mixtures to scores.

    Args:
        kind: "trees", the paper's boosted trees of depth 4 with 5 mixtures a leaf and early stopping, which 16 mixtures
            hardly split (here scikit-learn's histogram trees for LightGBM's); "quadratic", ridge regression on the
            weights and their products (the canonical polynomial of mixtures: the squares and the constant are in its
            span, for the sum is 1), its strength by leaving one out; "gp", a Gaussian process on the square roots of
            the weights, whose distance is Hellinger's.
        seed: of the trees' split.
    """

    def __init__(self, kind: str = "trees", seed: int = 0):
        if kind not in KINDS:
            raise unknown("predictor", kind, KINDS)
        self.kind, self.seed, self._domains = kind, seed, None

    def fit(self, weights: Float64[Tensor, "mixtures domains"], scores: Numbers) -> "MixturePredictor":
        y, x = checked("scores", as_numbers("scores", scores)), self._checked(weights)
        if len(weights) != len(y):
            raise InputError(f"scores has {len(y)} values but must have one for each of {len(weights)} mixtures")
        if len(y) < 2:
            raise InputError(f"weights has {len(y)} mixtures but a predictor needs at least 2")
        from sklearn.exceptions import ConvergenceWarning

        self._model = self._make(len(y))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a scale at its bound: scores without any pattern
            self._model.fit(self._features(x), y)
        self._domains = x.shape[1]
        return self

    def predict(self, weights: Float64[Tensor, "mixtures domains"]) -> Float64[Tensor, " mixtures"]:
        if self._domains is None:
            raise InputError("the predictor must be fitted before it predicts")
        x = self._checked(weights)
        if x.shape[1] != self._domains:
            raise InputError(f"weights are of {x.shape[1]} domains but must be of the {self._domains} it was fitted on")
        return torch.from_numpy(np.asarray(self._model.predict(self._features(x)), dtype=np.float64))

    @staticmethod
    def _checked(weights: Tensor) -> np.ndarray:
        x = as_numbers("weights", weights)
        if x.ndim != 2 or not ((x >= 0) & (x < np.inf)).all():
            raise InputError(f"weights has shape {x.shape} but must be (mixtures, domains), at least 0 and finite")
        return x

    def _features(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "gp":
            return np.sqrt(x)
        if self.kind == "quadratic":
            i, j = np.triu_indices(x.shape[1], 1)
            return np.concatenate([x, x[:, i] * x[:, j]], axis=1)
        return x

    def _make(self, count: int) -> Any:
        if self.kind == "quadratic":
            from sklearn.linear_model import RidgeCV

            return RidgeCV(np.logspace(-6, 2, 17))
        if self.kind == "gp":
            from sklearn.gaussian_process import GaussianProcessRegressor
            from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

            kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(0.5, (5e-2, 1e1)) + WhiteKernel(1e-2, (1e-6, 1.0))
            return GaussianProcessRegressor(kernel, normalize_y=True)
        from sklearn.ensemble import HistGradientBoostingRegressor

        held = math.ceil(0.1 * count)
        stop = {"early_stopping": count >= 10, "validation_fraction": 0.1, "n_iter_no_change": min(20, max(2, held))}
        return HistGradientBoostingRegressor(
            learning_rate=0.01,
            max_iter=1000,
            max_depth=4,
            min_samples_leaf=5,
            l2_regularization=1.0,
            random_state=self.seed,
            **stop,
        )


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search has found.

    Attributes:
        weights, scores: all mixtures that were scored, in the order they were asked for.
        rounds: of each of them, from 0.
        foreseen: what the predictor of its round expected; NaN in the first, which has none.
        best_measured: the mixture of the best score, and that score.
        best_predicted: the mixture that the last predictor likes best among new draws, and what it expects: the
            smallest of many guesses, so mostly too small, and no measurement; None of a search without a predictor.
    """

    weights: Float64[Tensor, "mixtures domains"]
    scores: Float64[Tensor, " mixtures"]
    rounds: Int64[Tensor, " mixtures"]
    foreseen: Float64[Tensor, " mixtures"]
    best_measured: tuple[Tensor, float]
    best_predicted: tuple[Tensor, float] | None


@dataclass
class Asked:
    """The mixtures of a search so far: `ask` for some, `tell` their scores, and so on until it is `done`."""

    weights: list[Tensor] = field(default_factory=list)
    foreseen: list[Tensor] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Mixtures that were asked for and have no score yet."""
        return sum(map(len, self.weights)) - len(self.scores)

    def add(self, weights: Tensor, foreseen: Tensor | None = None) -> Tensor:
        self.weights.append(weights)
        self.foreseen.append(weights.new_full((len(weights),), math.nan) if foreseen is None else foreseen)
        return weights

    def tell(self, scores: Sequence[float]) -> None:
        values = checked("scores", np.asarray(scores))
        if len(values) != self.waiting:
            raise InputError(f"scores has {len(values)} values but {self.waiting} mixtures wait for one")
        self.scores += values.tolist()

    def so_far(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.weights), torch.tensor(self.scores, dtype=torch.float64)

    def result(self, best_predicted: tuple[Tensor, float] | None = None) -> SearchResult:
        weights, scores = self.so_far()
        rounds = torch.arange(len(self.weights)).repeat_interleave(torch.tensor([len(part) for part in self.weights]))
        best = int(scores.argmin())
        measured = (weights[best], float(scores[best]))
        return SearchResult(weights, scores, rounds, torch.cat(self.foreseen), measured, best_predicted)


class IterativeMixtureSearch:
    """Rounds of mixtures: random ones first, then what a predictor fitted on all before likes, with some luck.

    >>> search = IterativeMixtureSearch(MixtureSpace(share), schedule=(16, 8, 4))
    >>> while not search.done:
    ...     search.tell([proxy(weights) for weights in search.ask()])
    >>> search.result().best_predicted

    Args:
        schedule: mixtures of each round. (112,) is RegMix.
        predictor: see `MixturePredictor`.
        pool: draws that the predictor chooses from, in every round and in the end.
        explore: n -> how many of the best in the pool the n of a round are drawn from, at random; max(n * n, 128) by
            default.
        seed: of everything random.
    """

    def __init__(
        self,
        space: MixtureSpace,
        schedule: Sequence[int] = (64, 32, 16),
        predictor: str = "trees",
        pool: int = 100_000,
        explore: Callable[[int], int] = lambda n: max(n * n, 128),
        seed: int = 0,
    ):
        if not schedule or min(schedule) < 1 or schedule[0] < 2:
            raise InputError(f"schedule is {tuple(schedule)} but must have rounds of 1 or more, the first of 2 or more")
        if pool < 1:
            raise InputError(f"pool is {pool} but must be at least 1")
        self.space, self.schedule, self.pool, self.explore = space, tuple(schedule), pool, explore
        self._predictor = MixturePredictor(predictor, seed)
        self._generator = np.random.default_rng(seed)
        self._asked = Asked()
        self._best: tuple[Tensor, float] | None = None

    @property
    def done(self) -> bool:
        return len(self._asked.weights) == len(self.schedule) and not self._asked.waiting

    def ask(self) -> Float64[Tensor, "mixtures domains"]:
        """The mixtures of the next round; none of them was asked for before."""
        asked = self._asked
        if self.done or asked.waiting:
            raise InputError("the search is done" if self.done else f"{asked.waiting} mixtures wait for a score")
        count = self.schedule[len(asked.weights)]
        if not asked.weights:
            return asked.add(self.space.sample(count, self._generator))
        weights, foreseen = self._liked(without=asked.so_far()[0])
        if len(weights) < count:
            raise InputError(f"the space has only {len(weights)} mixtures that are new, and {count} are asked for")
        few = max(count, self.explore(count))
        chosen = torch.from_numpy(self._generator.permutation(min(few, len(weights)))[:count])
        return asked.add(weights[chosen], foreseen[chosen])

    def tell(self, scores: Sequence[float]) -> None:
        """The scores of what was asked for, in that order: losses."""
        self._asked.tell(scores)

    def result(self) -> SearchResult:
        """What was found; the same each time."""
        if not self.done:
            raise InputError("the search is not done")
        if self._best is None:
            weights, foreseen = self._liked()
            self._best = weights[0], float(foreseen[0])
        return self._asked.result(self._best)

    def _liked(self, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """New draws and what is expected of them, the best first."""
        self._predictor.fit(*self._asked.so_far())
        drawn = self.space.proposals(self.pool, self._generator, without)
        foreseen, order = self._predictor.predict(drawn).sort(stable=True)
        return drawn[order], foreseen


def example() -> Callable[[Callable[[Tensor], float], int, int], Tensor]:
    def mix(score: Callable[[Tensor], float], domains: int, seed: int) -> Tensor:
        space = MixtureSpace([1 / domains] * domains)
        search = IterativeMixtureSearch(space, schedule=(16, 8, 4), predictor="quadratic", pool=2000, seed=seed)
        while not search.done:
            search.tell([score(weights) for weights in search.ask()])
        return search.result().best_predicted[0]

    return mix
