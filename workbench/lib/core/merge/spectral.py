"""Merges in the singular directions of matrices: KnOTS, and TSV-M. What is no matrix is averaged."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.trim_elect_merge import magnitude_threshold
from workbench.lib.core.merge.linear import weights_of
from workbench.lib.core.merge.low_rank import polar
from workbench.lib.core.merge.merger import Matrices
from workbench.lib.core.merge.trimmed import Ties, kept_count
from workbench.lib.core.merge.vectors import TaskVectors


def aligned(tau: Float[Tensor, "n O I"], tolerance: float) -> tuple[Float[Tensor, "O q"], Float[Tensor, "n q I"]]:
    """U and the blocks S V_i^T of the SVD of [tau_1 ... tau_n] (O, nI), so that tau_i = U (S V_i^T).

    Singular values of at most `tolerance` times the largest are left out.
    """
    n, _, width = tau.shape
    u, s, vh = torch.linalg.svd(tau.transpose(0, 1).flatten(1).double(), full_matrices=False)
    kept = s > tolerance * s[0]
    blocks = (s[kept, None] * vh[kept]).unflatten(1, (n, width)).transpose(0, 1)
    return u[:, kept].to(tau.dtype), blocks.to(tau.dtype).contiguous()


class Knots(Matrices):
    """TIES on the blocks S V_i^T of one SVD of all tasks, [tau_1 ... tau_n] = U S [V_1 ... V_n]^T, and U times that.

    Stoica et al. 2024 (arXiv:2410.19735). A sum in the place of TIES (`elect=None`, `density=1`, `divide=None`) is task
    arithmetic exactly.

    Args:
        density, weights, scale, elect, divide, least: as of `Ties`, of the blocks.
        scope: whether the share is of the blocks of all matrices, which are in memory then, or of each matrix.
        tolerance: singular values of at most this times the largest are left out, with their rows of the blocks.
    """

    def __init__(
        self,
        density: float = 0.2,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        scope: Literal["global", "tensor"] = "global",
        elect: Literal["values", "weighted", "signs"] | None = "values",
        divide: Literal["count", "weights"] | None = "count",
        least: Literal[0, 1] = 0,
        tolerance: float = 1e-6,
    ):
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance is {tolerance} but must be at least 0 and below 1")
        self.ties = Ties(density, weights, scale, scope, elect, "plus", divide, least)
        self.tolerance = tolerance

    def facts(self, vectors: TaskVectors) -> tuple[list[float], dict[str, tuple[Tensor, Tensor]], list[float] | None]:
        """Weights, and where the share is of all matrices, each one's U and blocks, and the thresholds (n,)."""
        weights, ties = weights_of(self.ties.weights, vectors), self.ties
        if ties.scope == "tensor" or ties.density == 1:
            return weights, {}, None
        names = [name for name in vectors.names if self.merges(name, vectors, None)]
        found = {name: aligned(vectors.deltas(name), self.tolerance) for name in names}
        return weights, found, self._thresholds([blocks.to(vectors.dtype) for _, blocks in found.values()], vectors.n)

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: Any) -> Float[Tensor, "O I"]:
        weights, found, thresholds = facts
        u, blocks = found.pop(name) if name in found else aligned(tau, self.tolerance)
        thresholds = self._thresholds([blocks], len(tau)) if thresholds is None else thresholds
        return u @ self.ties.merged(blocks, weights, thresholds)

    def other(self, tau: Float[Tensor, "n p"], place: Any, facts: Any) -> Float[Tensor, " p"]:
        return self.ties.scale * tau.mean(0)

    def _thresholds(self, blocks: list[Tensor], n: int) -> list[float]:
        if self.ties.density == 1 or not blocks:
            return [0.0] * n
        k = kept_count(self.ties.density, sum(block[0].numel() for block in blocks), self.ties.least)
        return [magnitude_threshold([block[i] for block in blocks], k) for i in range(n)]


class TsvM(Matrices):
    """Each task's first singular vectors side by side, made orthogonal, and its singular values between them.

    Gargiulo et al. 2024 (arXiv:2412.00081): of min(O, I) directions each of n tasks has an equal part, one at least;
    U and V are replaced by the nearest matrices with orthonormal columns.

    Args:
        scale: of the merged update, of matrices and of what is averaged.
    """

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: Any) -> Float[Tensor, "O I"]:
        n, *shape = tau.shape
        k = max(1, min(shape) // n)
        u, s, vh = torch.linalg.svd(tau.double(), full_matrices=False)
        left = u[:, :, :k].transpose(0, 1).flatten(1)  # (O, nk)
        right = vh[:, :k].flatten(0, 1)  # (nk, I)
        merged = (polar(left) * s[:, :k].flatten()) @ polar(right)
        return (self.scale * merged).to(tau.dtype)

    def other(self, tau: Float[Tensor, "n p"], place: Any, facts: Any) -> Float[Tensor, " p"]:
        return self.scale * tau.mean(0)
