"""How much the experts of one layer say the same: from the outputs of all of them on the same tokens.

Cosine asks whether two experts push a token in the same direction. CKA asks whether they see the same differences
between tokens, in whatever direction they write them down: it does not change if an expert's outputs are rotated,
scaled or moved (Kornblith et al. 2019, 1905.00414).

Tensor letters: E experts, N tokens, D width of the outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

SAME = 1e-12  # of their own length: outputs that differ by less are the same up to rounding


def output_cosine(outputs: Float[Tensor, "*batch experts tokens dim"]) -> Float64[Tensor, "*batch experts experts"]:
    """Mean over tokens of the cosine between the outputs of two experts; -1 .. 1, 0 for unrelated directions.

    A token counts for a pair where both outputs are other than 0; NaN where there is none.
    """
    units = F.normalize(outputs.double(), dim=-1, eps=torch.finfo(torch.float64).tiny)
    there = units.square().sum(-1) > 0.5
    total, seen = units.flatten(-2) @ units.flatten(-2).mT, there.double() @ there.double().mT
    return (total / seen).clamp(-1, 1)  # 0 / 0: NaN


@dataclass(frozen=True)
class Alignment:
    """CKA between experts, and what chance alone would give.

    Attributes:
        value: (..., E, E) 0 .. 1; 1 on the diagonal; NaN for an expert that says the same of all tokens.
        null: its mean over all ways to shuffle the tokens of one of the two: exact, and far from 0 for few tokens.
    """

    value: Float64[Tensor, "*batch experts experts"]
    null: Float64[Tensor, "*batch experts experts"]


def output_cka(outputs: Float[Tensor, "*batch experts tokens dim"]) -> Alignment:
    """Linear CKA: |X_i^T X_j|^2 / (|X_i^T X_i| |X_j^T X_j|), X the outputs less their mean over the tokens.

    The null is tr K_i tr K_j / ((N - 1) |K_i| |K_j|) with K = X X^T.
    """
    x = outputs.double()
    x = x - x.mean(-2, keepdim=True)
    both = torch.einsum("...ind,...jne->...ijde", x, x).square().sum((-2, -1))
    own = both.diagonal(dim1=-2, dim2=-1).sqrt()
    trace = x.square().sum((-2, -1))
    trace = trace.where(trace > SAME**2 * outputs.double().square().sum((-2, -1)), torch.nan)
    own = own.where(trace.isfinite(), torch.nan)
    lengths = own[..., :, None] * own[..., None, :]
    null = trace[..., :, None] * trace[..., None, :] / ((x.shape[-2] - 1) * lengths)
    return Alignment(both / lengths, null)


def mean_pair(matrix: Float[Tensor, "*batch experts experts"]) -> Float64[Tensor, "*batch"]:
    """The redundancy of a layer: mean over pairs of different experts, those that are undefined left out."""
    off = ~torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix.double()[..., off].nanmean(-1)
