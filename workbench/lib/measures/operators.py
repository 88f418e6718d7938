"""Norms and alignments that need the matrices themselves, and no full decomposition.

W is (o, i); dW an update of the same shape.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from workbench.errors import InputError


class PowerIteration(NamedTuple):
    """Estimate of s_1 and the vector to start from next time."""

    value: Float64[Tensor, ""]
    vector: Float[Tensor, " in"]


class OrthogonalityError(NamedTuple):
    """Largest and root-mean-square departure from orthonormal rows (or columns)."""

    largest: Float64[Tensor, "*batch"]
    rms: Float64[Tensor, "*batch"]


def power_iteration(
    weight: Float[Tensor, "out in"],
    vector: Float[Tensor, " in"] | None = None,
    steps: int = 20,
    generator: torch.Generator | None = None,
) -> PowerIteration:
    """s_1 of W by `steps` steps of v <- W^T W v / |.|: never above the true value, slow where the spectrum is flat.

    Keep the returned vector between calls: from there one or two steps suffice while W moves slowly. From cold on a
    random 512 x 128 matrix, 20 steps reach .985 of s_1. NaN for a matrix that is zero or not finite.
    """
    if steps < 1:
        raise InputError(f"steps is {steps} but must be at least 1")
    w = weight.detach()
    w = w if w.dtype == torch.float64 else w.float()
    v = torch.randn(w.shape[1], dtype=w.dtype, generator=generator).to(w.device) if vector is None else vector.to(w)
    for _ in range(steps):
        v = w.mT @ (w @ (v / v.norm()))
    v = v / v.norm()  # NaN for a zero matrix
    return PowerIteration((w @ v).norm().double(), v)


def gram_participation_ratio(weight: Float[Tensor, "*batch out in"]) -> Float64[Tensor, "*batch"]:
    """|W|_F^4 / |W W^T|_F^2 = (sum l)^2 / sum l^2 without any decomposition; 1 .. n."""
    w = weight.detach().double()
    gram = w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w
    return w.square().sum((-2, -1)).square() / gram.square().sum((-2, -1))


def orthogonality_error(values: Num[Tensor, "*batch n"]) -> OrthogonalityError:
    """(max_k |s_k - 1|, |X X^T - I|_F / sqrt(n)) from all singular values of X: the quality of an orthogonalisation."""
    values = values.double()
    return OrthogonalityError((values - 1).abs().amax(-1), (values.square() - 1).square().mean(-1).sqrt())


def top_subspace(weight: Float[Tensor, "out in"], rank: int, side: str = "right") -> Float[Tensor, "dim rank"]:
    """Orthonormal basis of the `rank` leading right (i, rank) or left (o, rank) singular vectors."""
    if side not in ("left", "right"):
        raise InputError(f"side is {side!r} but must be 'left' or 'right'")
    if not 1 <= rank <= min(weight.shape):
        raise InputError(f"rank is {rank} but must be between 1 and {min(weight.shape)}")
    w = weight.detach()
    left, _, right = torch.linalg.svd(w if w.dtype == torch.float64 else w.float(), full_matrices=False)
    return left[:, :rank] if side == "left" else right[:rank].mT


def subspace_overlap(
    first: Float[Tensor, "*batch dim rank"], second: Float[Tensor, "..."]
) -> Float64[Tensor, "*batch"]:
    """|Q^T Q'|_F^2 / r of two orthonormal bases; 0 (orthogonal) .. 1 (equal); r / dim for random subspaces."""
    if first.shape != second.shape:
        raise InputError(f"first has shape {tuple(first.shape)} but must have that of second, {tuple(second.shape)}")
    return (first.double().mT @ second.double()).square().sum((-2, -1)) / first.shape[-1]


def data_alignment(update: Float[Tensor, "out in"], hidden: Float[Tensor, "tokens in"]) -> Float64[Tensor, ""]:
    """RMS(dW h) / (|dW|_R RMS(h)), |dW|_R = s_1 sqrt(i / o), over a held batch h; 0 .. 1.

    1 if the data lie in the direction the update stretches most, sqrt(stable rank / i) for isotropic data.
    """
    update, hidden = update.detach().double(), hidden.detach().double()
    d_out, d_in = update.shape
    norm = torch.linalg.matrix_norm(update, 2) * (d_in / d_out) ** 0.5
    return (hidden @ update.mT).square().mean().sqrt() / (norm * hidden.square().mean().sqrt())
