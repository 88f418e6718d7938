"""What low-rank merges are made of: thin and joint SVD, orthogonal Procrustes, and the pools of the parts of LoRAs.

A LoRA of a layer is a triple (A (r, I), B (O, r), scale) with the update scale B A, as everywhere here. All functions
compute in the type they are given, in float32 where it is narrower.

Tensor letters: n tasks, r rank, q components kept, I input width, O output width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.errors import InputError

Factors = tuple[Tensor, Tensor, float]
SVD = tuple[Float[Tensor, "rows q"], Float[Tensor, " q"], Float[Tensor, "q columns"]]


def thin_svd(matrix: Float[Tensor, "rows columns"], rank: int | None = None) -> SVD:
    """U, S, V^T of the `rank` largest singular values (default all), V^T by rows.

    Singular vectors have no sign of their own: here the largest entry of each column of U is positive, so that the same
    matrix has the same factors on every machine and alike matrices have alike ones.

    Raises:
        InputError: `rank` is not from 1 to the smaller width, or the matrix is not finite.
    """
    least = min(matrix.shape)
    if rank is not None and not 1 <= rank <= least:
        raise InputError(f"rank is {rank} but must be between 1 and the smaller width, {least}")
    u, s, v = torch.linalg.svd(_finite(matrix), full_matrices=False)
    sign = _signs(u)
    return (u * sign)[:, :rank], s[:rank], (sign[:, None] * v)[:rank]


def factored_svd(lora: Factors, rank: int | None = None) -> SVD:
    """`thin_svd` of scale B A without the O x I matrix: nothing larger than r x r is decomposed.

    At most r components, or the smaller width where that is less.
    """
    a, b, scale = lora
    (qb, rb), (qa, ra) = torch.linalg.qr(_wide(b) * scale), torch.linalg.qr(_wide(a).T)
    u, s, v = thin_svd(rb @ ra.T, rank)
    u, v = qb @ u, v @ qa.T
    sign = _signs(u)
    return u * sign, s, sign[:, None] * v


def joint_svd(
    matrices: Sequence[Tensor], rank: int | None = None, side: Literal["left", "right"] = "left"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One basis for a set of matrices, from the SVD of all of them side by side, or one above the other.

    Args:
        rank: q; default as many as there are singular values above the rounding error of the largest.
        side: "left": M_i = U diag(S) V_i, with U (rows, q) and the V_i (q, columns) of each matrix;
            "right": M_i = U_i diag(S) V, with V (q, columns) and the U_i (rows, q).

    Returns:
        The shared basis, S (q,), and the blocks in the order of the matrices. Exact where q is the joint rank. The
        blocks together are orthonormal, one alone is not.

    Raises:
        InputError: no matrices, or widths that do not go together, or a rank that is not there.
    """
    joined = 0 if side == "left" else 1
    if not matrices or len({m.shape[joined] for m in matrices}) > 1:
        shapes = ", ".join(str(tuple(m.shape)) for m in matrices) or "none"
        raise InputError(f"matrices have shapes {shapes} but must share their {('rows', 'columns')[joined]}")
    together = torch.cat([*matrices], dim=1 - joined)
    u, s, v = thin_svd(together, rank)
    if rank is None:
        q = max(1, int((s > s[0] * max(together.shape) * torch.finfo(s.dtype).eps).sum()))
        u, s, v = u[:, :q], s[:q], v[:q]
    sizes = [m.shape[1 - joined] for m in matrices]
    return (u, s, list(v.split(sizes, 1))) if side == "left" else (v, s, list(u.split(sizes)))


def polar(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest matrix with orthonormal columns, or rows where there are fewer of them: U V^T of its SVD."""
    u, _, v = torch.linalg.svd(_finite(matrix), full_matrices=False)
    return u @ v


def procrustes(moving: Tensor, fixed: Tensor) -> Float[Tensor, "r r"]:
    """The orthogonal R that makes moving R as near to fixed, both (rows, r), as can be (Schoenemann 1966).

    Raises:
        InputError: the shapes differ.
    """
    if moving.shape != fixed.shape:
        raise InputError(f"moving has shape {tuple(moving.shape)} but must have that of fixed, {tuple(fixed.shape)}")
    return polar(_wide(moving).T @ _wide(fixed))


def positions(loras: Sequence[Factors]) -> Float[Tensor, "positions r n"]:
    """The pool of rows and columns: for each row of B (O of them), then each column of A (I), its r numbers by task.

    The scale is in B.

    Raises:
        InputError: the adapters differ in rank or in their layer's widths.
    """
    check_together(loras)
    if len({len(a) for a, _, _ in loras}) > 1:
        ranks = ", ".join(str(len(a)) for a, _, _ in loras)
        raise InputError(f"loras have ranks {ranks} but must have one rank: a position is a vector of r numbers")
    return torch.stack([torch.cat([_wide(b) * scale, _wide(a).T]) for a, b, scale in loras], dim=2)


def of_positions(pool: Float[Tensor, "positions r"], d_out: int) -> Factors:
    """The adapter whose rows and columns these are, of scale 1."""
    return pool[d_out:].T.contiguous(), pool[:d_out].contiguous(), 1.0


def units(loras: Sequence[Factors]) -> tuple[Float[Tensor, "units width"], Int64[Tensor, " units"]]:
    """The pool of rank-one pieces: row j of A beside column j of B, (I + O) numbers, of each adapter in turn.

    The root of the scale is in either half, its sign in B's. Ranks may differ.

    Returns:
        The units (N, I + O), and which adapter each is of (N,).

    Raises:
        InputError: the adapters differ in their layer's widths.
    """
    check_together(loras)
    pool = [
        torch.cat([_wide(a) * abs(scale) ** 0.5, _wide(b).T * (abs(scale) ** 0.5 * (1 if scale >= 0 else -1))], dim=1)
        for a, b, scale in loras
    ]
    return torch.cat(pool), torch.arange(len(pool)).repeat_interleave(torch.tensor([len(p) for p in pool]))


def of_units(pool: Float[Tensor, "units width"], d_in: int) -> Factors:
    """The adapter whose pieces these are, of scale 1."""
    return pool[:, :d_in].contiguous(), pool[:, d_in:].T.contiguous(), 1.0


def check_together(loras: Sequence[Factors]) -> None:
    """Raise an `InputError` unless there are adapters, A (r, I) and B (O, r), finite, all of one layer's widths."""
    shapes = ", ".join(f"A {tuple(a.shape)} B {tuple(b.shape)}" for a, b, _ in loras) or "none"
    fit = all(a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0 for a, b, _ in loras)
    if not loras or not fit or len({(a.shape[1], len(b)) for a, b, _ in loras}) > 1:
        raise InputError(f"loras have shapes {shapes} but must be A (r, I) and B (O, r) with the same I and O")
    for i, (a, b, scale) in enumerate(loras):
        if not (a.isfinite().all() and b.isfinite().all() and abs(scale) < float("inf")):
            raise InputError(f"loras[{i}] holds numbers that are not finite")


def _signs(u: Tensor) -> Tensor:
    """+1 or -1 for each column: the sign of its largest entry."""
    return torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).to(u.dtype)


def _finite(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        raise InputError(f"matrix {tuple(matrix.shape)} has values that are not finite, of which there is no SVD")
    return _wide(matrix)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
