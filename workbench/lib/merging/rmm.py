"""RMM: low-rank models are not made one; a few directions between them are kept, from which each comes back.

"Towards Reversible Model Merging For Low-rank Weights", 2025 (arXiv:2510.14163); no public code was found. Of n tasks
with an update B_i A_i of rank r for a layer (or its full update cut to rank r by an SVD, "PT-SVD"), take each position
by itself: a row of B or a column of A, which is a vector x_i of r numbers in each task.

    mu = mean_i x_i,     U S V^T = [x_1 - mu .. x_n - mu],     C = U_p^T [x_1 - mu .. x_n - mu]
    x_i' = mu + U_p C[:, i]                                    0 <= p <= min(r, n - 1)

No affine space of p dimensions is nearer to the x_i (Eckart-Young): what is lost is the sum of S_j^2 over j > p. Kept
are r + r p + p n numbers a position instead of r n, so that p = 1 costs hardly more than two adapters. What serves is
one task's model at a time, and the task has to be known.

The paper's closed form is derived here from its abstract; the mean is kept, as its count of numbers says. B A is also
(B R)(R^-1 A): the factors of a task are known up to its own R, the gauge, and what RMM loses depends on it. Adapters
that were trained from the same A have nearly the same gauge. For others there are two gauges of our own: `balanced`
and `aligned`. The root of S on either side is our choice for PT-SVD, too.

Tensor letters: n tasks, r rank, p directions kept, O outputs, I inputs, M = O + I positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.merge import Matrices, TaskVectors, merged_state
from workbench.lib.core.merge.low_rank import Factors, factored_svd, of_positions, positions, procrustes, thin_svd

METHOD = Method(
    slug="rmm",
    title="RMM: Towards Reversible Model Merging For Low-rank Weights",
    family="merging",
    year=2025,
    paper="arXiv:2510.14163",
    claim="A small basis of models with a few coefficients per task rebuilds low-rank task models far better than one "
    "merged model serves them.",
    objects=("ReversibleMerge", "Basis", "pt_svd"),
    kind="merge",
)


def example() -> Callable[..., dict[str, Tensor]]:
    """The first of the experts, as it comes back from a mean and one direction."""
    return lambda base, experts: merged_state(TaskVectors(base, experts), Reverted(task=0, rank=4, p=1))


@dataclass(frozen=True)
class Basis:
    """What is kept of one layer.

    Attributes:
        mean: (M, r) mu of each position, first the O rows of B, then the I columns of A.
        directions: (M, r, p) U_p.
        coefficients: (M, p, n) C.
        lost: (M,) squared distance of the n tasks from what they come back as; for reading, not kept with the rest.
        d_out: O.
    """

    mean: Float[Tensor, "M r"]
    directions: Float[Tensor, "M r p"]
    coefficients: Float[Tensor, "M p n"]
    lost: Float[Tensor, " M"]
    d_out: int

    @classmethod
    def fit(cls, loras: Sequence[Factors], p: int) -> "Basis":
        """The basis of n adapters of one layer, all of rank r.

        Raises:
            InputError: ranks or widths differ, or p is not from 0 to min(r, n - 1).
        """
        pool = positions(loras)
        most = min(pool.shape[1], pool.shape[2] - 1)
        if not 0 <= p <= most:
            raise InputError(f"p is {p} but must be from 0 to the smaller of rank and tasks - 1, {most}")
        mean = pool.mean(2)
        centered = pool - mean[:, :, None]
        u, s, _ = torch.linalg.svd(centered, full_matrices=False)
        directions = u[:, :, :p].contiguous()
        return cls(mean, directions, directions.mT @ centered, s[:, p:].square().sum(1), len(loras[0][1]))

    def revert(self, task: int) -> Factors:
        """The adapter of one task, scale 1."""
        n = self.coefficients.shape[2]
        if not 0 <= task < n:
            raise InputError(f"task is {task} but must be from 0 to {n - 1}")
        back = self.mean + (self.directions @ self.coefficients[:, :, task, None])[:, :, 0]
        return of_positions(back, self.d_out)

    @property
    def numbers(self) -> int:
        """How many are kept."""
        return self.mean.numel() + self.directions.numel() + self.coefficients.numel()


class ReversibleMerge:
    """The adapters of n tasks as one basis a layer.

    Args:
        adapters: of each task, layer -> (A (r, I), B (O, r), scale); the scale goes into B first.
        p: directions kept.
        gauge: "given" takes the factors as they are, as the paper does; "balanced" and "aligned" as the functions of
            these names make them.

    Attributes:
        layers: name -> `Basis`.

    Raises:
        InputError: no adapters, or they have other layers than the first, or what `Basis.fit` refuses.
    """

    def __init__(
        self,
        adapters: Sequence[Mapping[str, Factors]],
        p: int,
        gauge: Literal["given", "balanced", "aligned"] = "given",
    ):
        if not adapters or any(set(each) != set(adapters[0]) for each in adapters):
            names = "; ".join(", ".join(each) for each in adapters) or "none"
            raise InputError(f"adapters have the layers {names} but must all have the same")
        if gauge not in GAUGES:
            raise unknown("gauge", gauge, GAUGES)
        self.layers = {name: Basis.fit(GAUGES[gauge]([each[name] for each in adapters]), p) for name in adapters[0]}

    def revert(self, task: int) -> dict[str, Factors]:
        """The adapter of one task."""
        return {name: basis.revert(task) for name, basis in self.layers.items()}

    @property
    def numbers(self) -> int:
        """How many are kept in all: means, directions and coefficients."""
        return sum(basis.numbers for basis in self.layers.values())


def share(p: int, rank: int, tasks: int) -> float:
    """Numbers kept as a share of all adapters': (r + r p + p n) / (r n)."""
    return (rank + p * (rank + tasks)) / (rank * tasks)


def pt_svd(delta: Float[Tensor, "O I"], rank: int) -> Factors:
    """The best adapter of a rank for a full update, the root of the singular values in either factor."""
    u, s, v = thin_svd(delta, rank)
    return s.sqrt()[:, None] * v, u * s.sqrt(), 1.0


def balanced(loras: Sequence[Factors]) -> list[Factors]:
    """The same updates with the factors of their SVD, as `pt_svd` has them: a gauge that hangs on the update alone."""
    found = [factored_svd(lora) for lora in loras]
    return [(s.sqrt()[:, None] * v, u * s.sqrt(), 1.0) for u, s, v in found]


def aligned(loras: Sequence[Factors], rounds: int = 20) -> list[Factors]:
    """The balanced factors, turned by an orthogonal matrix each until they are near their mean.

    Generalised Procrustes: turn each to the mean, take the mean anew. It begins at the largest adapter, and finds a
    minimum of what p = 0 loses, which need not be the least.
    """
    pool = positions(balanced(loras))
    mean = pool[:, :, pool.flatten(0, 1).norm(dim=0).argmax()]
    for _ in range(rounds):
        pool = torch.stack([x @ procrustes(x, mean) for x in pool.unbind(2)], dim=2)
        mean = pool.mean(2)
    return [of_positions(x, len(loras[0][1])) for x in pool.unbind(2)]


#: Gauge -> what it makes of the adapters of a layer.
GAUGES: dict[str, Callable[[Sequence[Factors]], Sequence[Factors]]] = {
    "given": lambda loras: loras,
    "balanced": balanced,
    "aligned": aligned,
}


def merge_factors_separately(loras: Sequence[Factors], rule: Callable[[Tensor], Tensor]) -> Factors:
    """What RMM is set against: a rule for task vectors, (n, P) -> (P,), on all A, and by itself on all B with scale."""
    pool, d_out = positions(loras), len(loras[0][1])
    merged = [rule(part.flatten(0, 1).T).view(part.shape[:2]) for part in (pool[:d_out], pool[d_out:])]
    return of_positions(torch.cat(merged), d_out)


class Reverted(Matrices):
    """One expert as it comes back: each matrix's update cut to a rank, then reverted; all else is averaged.

    Args:
        task: which of the experts.
        rank: r of the cut; a narrower matrix has its width.
        p: directions kept; at most experts - 1, and at most r.
    """

    def __init__(self, task: int, rank: int = 8, p: int = 1):
        if rank < 1:
            raise InputError(f"rank is {rank} but must be at least 1")
        self.task, self.rank, self.p = task, rank, p

    def facts(self, vectors: TaskVectors) -> None:
        if not 0 <= self.task < vectors.n:
            raise InputError(f"task is {self.task} but must be from 0 to {vectors.n - 1}")
        if not 0 <= self.p < vectors.n:
            raise InputError(f"p is {self.p} but must be from 0 to experts - 1, {vectors.n - 1}")

    def matrix(self, tau: Float[Tensor, "n O I"], name: str, facts: None) -> Float[Tensor, "O I"]:
        rank = min(self.rank, *tau.shape[1:])
        kept = self.p if rank == self.rank else min(self.p, rank)
        a, b, scale = Basis.fit([pt_svd(each, rank) for each in tau], kept).revert(self.task)
        return scale * b @ a


MERGER = Reverted
