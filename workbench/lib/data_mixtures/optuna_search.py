"""Optuna's default sampler (the tree-structured Parzen estimator) as a search of mixtures: the peer of `climb`.

Asked and told like `IterativeMixtureSearch`, one mixture at a time. Weights are -log(u) of numbers u between 0 and 1
that Optuna suggests, divided by their sum: where it suggests evenly, as in its first ten trials, all mixtures are
equally likely.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.core.mixtures import check_domains
from workbench.lib.data_mixtures.climb import Asked, SearchResult

SMALLEST = 1e-9  # of u, for its logarithm to be a number; and 1 less this, for no mixture to be nothing


class OptunaSearch:
    """`runs` mixtures of `n_domains`, by optuna's TPESampler as it comes.

    Raises:
        InputError: optuna is not installed; the message has the line that does.
    """

    def __init__(self, n_domains: int, runs: int, seed: int = 0):
        check_domains(n_domains)
        if runs < 1:
            raise InputError(f"runs is {runs} but must be at least 1")
        try:
            import optuna
        except ImportError as error:
            raise InputError(f"this search needs optuna (pip install 'optuna>=4.0'): {error}") from None
        self._space = {
            f"u{i}": optuna.distributions.FloatDistribution(SMALLEST, 1 - SMALLEST) for i in range(n_domains)
        }
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells stderr that a study was made
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        optuna.logging.set_verbosity(level)
        self.runs, self._asked, self._trial = runs, Asked(), None

    @property
    def done(self) -> bool:
        return len(self._asked.scores) == self.runs

    def ask(self) -> Float64[Tensor, "one domains"]:
        """The next mixture."""
        if self.done or self._asked.waiting:
            raise InputError("the search is done" if self.done else "1 mixture waits for a score")
        self._trial = self._study.ask(self._space)
        weights = -np.log([self._trial.params[name] for name in self._space])
        return self._asked.add(torch.from_numpy(weights / weights.sum())[None])

    def tell(self, scores: Sequence[float]) -> None:
        """Its score: a loss."""
        self._asked.tell(scores)
        self._study.tell(self._trial, self._asked.scores[-1])

    def result(self) -> SearchResult:
        if not self.done:
            raise InputError("the search is not done")
        return self._asked.result()
