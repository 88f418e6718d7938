"""Linear-DMO: mixtures of data ranked by merged experts, one training a domain and none a mixture (2602.04937).

    proxy = MergeProxy(base, [of_code, of_prose, of_names], ["code", "prose", "names"])
    tried = candidates(3)                                  # (M, K)
    scores = evaluate_mixtures(proxy, tried, evaluate)     # (M, n), evaluate: a state dict -> n losses
    chosen = tried[scores.mean(1).argmin()]                # and on that one trains

The model that a mixture w would give is replaced by theta_w = theta_0 + sum of w_i (theta_i - theta_0), of experts
theta_i that were trained on one domain each, alike and for as many examples. Its losses are used to rank mixtures only.

Why it may work: near a common point with L_i(theta) = L_i(theta_i) + (theta - theta_i)^T H_i (theta - theta_i) / 2 the
minimum of sum_i w_i L_i is (sum_i w_i H_i)^-1 sum_i w_i H_i theta_i, which is theta_w where all H_i are alike. With
estimates of H_i it is the merge of `by_fisher` (diagonals) and `by_grams` (the inputs of linear layers); both are ours.

Shape letters: K domains, M mixtures, n losses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.merge.files import open_models
from workbench.lib.core.merge.fisher import Fisher
from workbench.lib.core.merge.merger import Merger, merged_state
from workbench.lib.core.merge.regmean import RegMean
from workbench.lib.core.merge.vectors import Place, narrowed
from workbench.lib.core.mixtures import (
    Weights,
    as_numbers,
    check_domains,
    check_weights,
    dirichlet_mixtures,
    simplex_grid,
)
from workbench.lib.measures.statistics import checked

METHOD = Method(
    slug="linear-dmo",
    title="Linear Model Merging Unlocks Simple and Scalable Multimodal Data Mixture Optimization",
    family="data_mixtures",
    year=2026,
    paper="arXiv:2602.04937",
    claim="Scores of linearly merged domain experts rank data mixtures as training on each mixture would, with one run "
    "per domain.",
    objects=("MergeProxy", "evaluate_mixtures", "candidates", "mix", "by_fisher", "by_grams"),
    kind="data mixture",
)

STEP = 1 / 8  # of the grids of two and three domains
DRAWS = 64
"""Candidates of more domains. The paper has 20 for four; but a merge costs no training, so there may be more."""

Rule = Callable[[list[float]], Merger]
"""Weights of the domains -> how their experts are merged."""


class MergeProxy:
    """The merged model of any mixture, of a base and an expert of each domain.

    Args:
        base, experts: state dicts, modules, or paths of safetensors files; an expert may be a folder of a LoRA, which
            counts by its product, not by its factors.
        domains: their names; "0", "1" and so on by default.
        include, exclude: glob patterns of what is merged; the rest is the base's.
        rule: another merge than the linear one, see `by_fisher` and `by_grams`.

    Raises:
        InputError: experts that do not fit the base or are not finite, or not as many as domains.
    """

    def __init__(
        self,
        base: Any,
        experts: Sequence[Any],
        domains: Sequence[str] | None = None,
        *,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        rule: Rule | None = None,
    ):
        self.vectors = open_models(base, experts, include, exclude)
        self.domains = tuple(map(str, range(self.vectors.n)) if domains is None else domains)
        if len(self.domains) != self.vectors.n:
            raise InputError(
                f"domains has {len(self.domains)} names but must have one for each of {self.vectors.n} experts"
            )
        for _ in self.vectors.pieces():  # refuses now what is not finite
            pass
        self.rule = rule

    @torch.no_grad()
    def state_dict(self, weights: Weights) -> dict[str, Tensor]:
        """The merged model: the base's names, order, dtypes and integers. Of a single domain it is its expert, exactly.

        Raises:
            InputError: weights that are no mixture of the domains.
        """
        given = check_weights(weights, self.domains)
        if self.rule is not None:
            return merged_state(self.vectors, self.rule(given.tolist()))
        merged, own = self.vectors.apply({}), (given / given.sum()).to(self.vectors.device)
        used = given.nonzero().flatten().tolist()
        for place in self.vectors.places():
            # sum_i w_i theta_i, for the base's own share is 1 - sum_i w_i = 0; in float64, so that order hardly counts
            if len(used) == 1:  # as it is: the product would make +0 of -0
                mixed = self._read(used[0], place)
            else:
                mixed = own @ torch.stack([self._read(i, place) for i in range(self.vectors.n)])
            values = narrowed(mixed, self.vectors.dtypes[place.name], place.name)
            merged[place.name].view(-1)[place.start : place.stop] = values
        return merged

    def _read(self, expert: int, place: Place) -> Float64[Tensor, " p"]:
        source = self.vectors.experts[expert]
        own = source.read(self.vectors.name_in(source, place.name), place.start, place.stop)
        return own.to(self.vectors.device, torch.float64)


def by_fisher(fishers: Sequence[Any]) -> Rule:
    """Experts count by w_i F_i, weight by weight; F_i the diagonals as `Fisher` takes them."""
    return lambda weights: Fisher(fishers, weights=weights)


def by_grams(grams: Sequence[Mapping[str, Tensor]], ridge: float = 1e-6) -> Rule:
    """Matrices of linear layers count by w_i X_i^T X_i, the rest by w_i; grams and ridge as `RegMean` takes them."""
    return lambda weights: _Weighted(weights, grams, ridge)


class _Weighted(RegMean):
    """RegMean of a mixture: each domain's inputs as often as the mixture has them."""

    def __init__(self, weights: list[float], grams: Sequence[Mapping[str, Tensor]], ridge: float):
        if len(grams) != len(weights):
            raise InputError(f"grams has {len(grams)} entries but must have one for each of {len(weights)} experts")
        scaled = [{name: share * own for name, own in each.items()} for share, each in zip(weights, grams, strict=True)]
        super().__init__(scaled, off_diagonal=1.0, ridge=ridge)
        self.weights = weights

    def other(self, tau: Float[Tensor, "n p"], place: Place, facts: Any) -> Float[Tensor, " p"]:
        return torch.tensor(self.weights, dtype=tau.dtype, device=tau.device) @ tau


def candidates(n_domains: int, seed: int = 0, draws: int = DRAWS) -> Float64[Tensor, "mixtures domains"]:
    """The mixtures that are ranked: of two domains 7, of three 21 on a grid of 1/8, of more `draws` at random, all of
    them equally likely; and the even one."""
    check_domains(n_domains)
    if n_domains == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = simplex_grid(n_domains, STEP) if n_domains <= 3 else dirichlet_mixtures(n_domains, draws, seed=seed)
    even = torch.full((1, n_domains), 1 / n_domains, dtype=torch.float64)
    return found if (found == even).all(1).any() else torch.cat([found, even])


def evaluate_mixtures(
    proxy: MergeProxy,
    mixtures: Float64[Tensor, "mixtures domains"],
    evaluate: Callable[[dict[str, Tensor]], float | Sequence[float]],
) -> Float64[Tensor, "mixtures losses"]:
    """What the merged model of each mixture comes to, (M, n).

    Args:
        evaluate: a state dict -> its loss, or its n losses.

    Raises:
        InputError: there is no mixture, or losses are not numbers, and as many for every mixture.
    """
    if not len(mixtures):
        raise InputError("mixtures is empty but must hold at least one")
    rows = []
    for row in mixtures:
        found = as_numbers("what evaluate gives", evaluate(proxy.state_dict(row))).reshape(-1)
        if not len(found) or np.isnan(found).any() or (rows and len(found) != len(rows[0])):
            raise InputError(
                f"evaluate gives {found.tolist()} for {row.tolist()} but must give numbers, as many for each mixture"
            )
        rows.append(torch.from_numpy(found))
    return torch.stack(rows)


def mix(
    score: Callable[[Tensor], float], domains: int, seed: int = 0, draws: int = DRAWS
) -> Float64[Tensor, " domains"]:
    """The best of `candidates` by a score of weights, the smaller the better: that of the merged model, mostly.

    mix(lambda weights: loss(proxy.state_dict(weights)), len(proxy.domains))
    """
    tried = candidates(domains, seed, draws)
    return tried[int(checked("scores", [float(score(row.clone())) for row in tried]).argmin())]


def example() -> Callable[[Callable[[Tensor], float], int, int], Tensor]:
    return mix
