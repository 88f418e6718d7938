"""Co-activation against random routing that keeps both margins: how often each expert is used and each token's K.

Lift corrected by one number assumes equal loads. With uneven loads the fair comparison is the set of all assignments
with the same row and column sums, sampled by trades ("curveball", Strona et al. 2014; the variant where all rows trade
in disjoint pairs at once is the global curveball of Carstens et al. 2018).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from workbench.errors import InputError

BURN_IN = 20  # rounds before the first sample; every round lets each expert trade once
THINNING = 5  # rounds between samples


@dataclass(frozen=True)
class CoactivationScores:
    """z_ij = (N_ij - mean) / std over random assignments with the same margins.

    NaN on the diagonal and where the margins leave a cell no freedom (K = 1, K = E, an expert without tokens).

    Attributes:
        z: (E, E), symmetric; null mean 0 and standard deviation 1.
        mean: (E, E) mean count under the null.
        std: (E, E) standard deviation under the null.
    """

    z: Float64[Tensor, "experts experts"]
    mean: Float64[Tensor, "experts experts"]
    std: Float64[Tensor, "experts experts"]


def coactivation_scores(
    mask: Bool[Tensor, "tokens experts"], samples: int = 200, generator: torch.Generator | None = None
) -> CoactivationScores:
    """z-scores of the co-activation counts of `mask` against `samples` margin-preserving randomisations."""
    if samples < 2:
        raise InputError(f"samples is {samples} but must be at least 2")
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    rows = np.ascontiguousarray(mask.cpu().numpy().T)
    observed = _counts(rows)
    total, squares = np.zeros_like(observed), np.zeros_like(observed)
    for _ in range(BURN_IN):
        trade(rows, rng)
    for _ in range(samples):
        for _ in range(THINNING):
            trade(rows, rng)
        difference = _counts(rows) - observed  # small numbers: their squares lose nothing
        total += difference
        squares += difference**2
    mean = total / samples
    variance = (squares - samples * mean**2) / (samples - 1)
    std = np.sqrt(np.maximum(variance, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(std > 0, -mean / std, np.nan)
    np.fill_diagonal(z, np.nan)
    return CoactivationScores(torch.from_numpy(z), torch.from_numpy(observed + mean), torch.from_numpy(std))


def trade(rows: np.ndarray, rng: np.random.Generator) -> None:
    """One round, in place: experts (rows of a bool array (E, N)) meet in random pairs and deal out anew, at random,
    the tokens exactly one of them has, each keeping its number of tokens and each token its number of experts."""
    order = rng.permutation(len(rows))
    for i, j in zip(order[0::2], order[1::2], strict=False):
        tokens = np.flatnonzero(rows[i] ^ rows[j])
        if tokens.size == 0:
            continue
        of_i = int(rows[i, tokens].sum())
        dealt = rng.permutation(tokens)
        rows[i, tokens], rows[j, tokens] = False, True
        rows[i, dealt[:of_i]], rows[j, dealt[:of_i]] = True, False


def _counts(rows: np.ndarray) -> np.ndarray:
    dense = rows.astype(np.float32)
    return (dense @ dense.T).astype(np.float64)
