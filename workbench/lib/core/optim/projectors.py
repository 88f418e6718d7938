"""How a gradient is projected to a low rank: one protocol, four ways to choose the subspace.

Tensor letters: matrices lie tall, (*stack, n, m) with n >= m, so that the smaller side is projected; r rank.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.kernels.column_adam.reference import kept
from workbench.kernels.column_topk import column_topk, gather_columns, in_range
from workbench.kernels.dct import dct2_rows, dct3_rows, dct_basis
from workbench.kernels.walsh_hadamard import walsh_hadamard

State = dict[str, Tensor]
BASES = ("dct", "dct-3", "hadamard", "random")

FFT_FROM = 256
"""Width and rank from which on a processor makes the product with r cosines faster by a whole FFT of every row."""


@runtime_checkable
class Projector(Protocol):
    """G (n, m) -> g (n, r) and back, by an orthonormal Q (m, r) that `refresh` chooses anew. The state says which Q."""

    rank: int

    def fresh(self, stack: tuple[int, ...], m: int, **where: Any) -> State:
        """The state before the first `refresh`, for matrices of width m; `where`: dtype and device."""

    def refresh(self, grad: Tensor, state: State) -> tuple[State, Tensor]:
        """A new state, chosen for `grad` (*stack, n, m), and `grad` projected by it. The old one stays as it is."""

    def project(self, grad: Tensor, state: State) -> Tensor:
        """G Q (*stack, n, r)."""

    def lift(self, low: Tensor, state: State, m: int) -> Tensor:
        """g Q^T (*stack, n, m)."""

    def remap(self, lows: Sequence[Tensor], old: State, new: State) -> list[Tensor]:
        """What lies in the old subspace in the coordinates of the new one: g Q_old^T Q_new of each."""


class _Kept:
    """A projector whose state is Q itself, "basis" (*stack, m, r)."""

    def __init__(self, rank: int):
        self.rank = rank

    def fresh(self, stack: tuple[int, ...], m: int, **where: Any) -> State:
        return {"basis": torch.zeros(*stack, m, self.rank, **where)}

    def refresh(self, grad: Tensor, state: State) -> tuple[State, Tensor]:
        new = self.chosen(grad, state)
        return new, self.project(grad, new)

    def chosen(self, grad: Tensor, state: State) -> State:
        raise NotImplementedError

    def project(self, grad: Tensor, state: State) -> Tensor:
        return grad @ state["basis"]

    def lift(self, low: Tensor, state: State, m: int) -> Tensor:
        return low @ state["basis"].mT

    def remap(self, lows: Sequence[Tensor], old: State, new: State) -> list[Tensor]:
        turn = old["basis"].mT @ new["basis"]
        return [low @ turn for low in lows]


class Svd(_Kept):
    """The r leading right singular vectors of the gradient, as GaLore takes them.

    A pair of singular vectors may as well have the other sign, and moments that are not turned depend on it. LAPACK's
    choice changes with how a matrix lies in memory; here the entries of both vectors have a sum of at least zero.
    """

    def chosen(self, grad: Tensor, state: State) -> State:
        u, _, vt = torch.linalg.svd(grad, full_matrices=False)
        vectors = vt[..., : self.rank, :].mT
        total = u[..., : self.rank].sum(-2, keepdim=True) + vectors.sum(-2, keepdim=True)
        return {"basis": torch.where(total < 0, -vectors, vectors).contiguous()}


class Random(_Kept):
    """A random orthonormal basis, the same for all matrices of a width: draw number `draws` from `seed`."""

    def __init__(self, rank: int, seed: int = 0):
        super().__init__(rank)
        self.seed = seed

    def fresh(self, stack: tuple[int, ...], m: int, **where: Any) -> State:
        return super().fresh(stack, m, **where) | {"draws": torch.zeros((), dtype=torch.int64)}

    def chosen(self, grad: Tensor, state: State) -> State:
        generator = torch.Generator().manual_seed(self.seed + int(state["draws"]))
        drawn = torch.randn(grad.shape[-1], self.rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.to(grad).expand(*grad.shape[:-2], -1, -1)
        return {"basis": basis.clone(), "draws": state["draws"] + 1}


class Power(_Kept):
    """One step of power iteration on G^T G from the basis before, as Dion does it; the first from cosines."""

    def chosen(self, grad: Tensor, state: State) -> State:
        start = state["basis"]
        if not start.any():
            start = dct_basis(grad.shape[-1], grad.dtype, grad.device)[:, : self.rank]
        grad = in_range(grad)  # or what is huge or tiny has a square that is infinite or 0
        return {"basis": torch.linalg.qr(grad.mT @ (grad @ start)).Q}


class ColumnSelector:
    """The r columns of one fixed orthonormal matrix C (m, m) in which G has the largest part: the state is r integers.

    S = G C, score_k = ||S_k||_norm, Q = C[:, I] for the r best I, in ascending order; g = S[:, I].

    Args:
        norm: 2 makes ||G - G Q Q^T|| the smallest that r of the columns can make it; 1 is what the authors' code has.
        basis: "dct"; "dct-3", its transpose, which the authors' code multiplies by where it makes no FFT; "hadamard",
            for widths of 2^k; or "random".
    """

    def __init__(self, rank: int, norm: int = 2, basis: str = "dct"):
        if norm not in (1, 2):
            raise InputError(f"norm is {norm} but must be 1 or 2")
        if basis not in BASES:
            raise unknown("basis", basis, BASES)
        self.rank, self.norm, self.basis = rank, norm, basis

    def fresh(self, stack: tuple[int, ...], m: int, **where: Any) -> State:
        if self.basis == "hadamard" and m & (m - 1):
            raise InputError(f"basis is 'hadamard' but the width {m} is no power of two, so it must be another")
        return {"index": torch.zeros(*stack, self.rank, dtype=torch.int32, device=where.get("device"))}

    def refresh(self, grad: Tensor, state: State) -> tuple[State, Tensor]:
        index, low = self.select(grad)
        return {"index": index}, low

    def select(self, grad: Float[Tensor, "*stack n m"]) -> tuple[Int[Tensor, "*stack r"], Float[Tensor, "*stack n r"]]:
        """The columns and the gradient in them."""
        return column_topk(self._spread(grad), self.rank, norm=self.norm)

    def project(self, grad: Tensor, state: State) -> Tensor:
        if self._by_fft(grad, grad.shape[-1]):
            return gather_columns(dct2_rows(grad), state["index"])
        return grad @ self.vectors(grad.shape[-1], state["index"], grad)

    def lift(self, low: Tensor, state: State, m: int) -> Tensor:
        if self._by_fft(low, m):
            index = state["index"].long()[..., None, :].expand(low.shape)
            return dct3_rows(low.new_zeros(*low.shape[:-1], m).scatter_(-1, index, low))
        return low @ self.vectors(m, state["index"], low).mT

    def remap(self, lows: Sequence[Tensor], old: State, new: State) -> list[Tensor]:
        """Columns that stay keep what they have, new ones begin with zeros: no product is needed."""
        return kept(lows, old["index"], new["index"])

    def vectors(self, m: int, index: Int[Tensor, "*stack r"], like: Tensor) -> Float[Tensor, "*stack m r"]:
        """Q, of the type of `like` and where it is."""
        rows = _fixed(self.basis, m, like.dtype, like.device)
        return (rows.index_select(0, index) if index.ndim == 1 else rows[index.long()]).mT

    def _spread(self, grad: Tensor) -> Tensor:
        m = grad.shape[-1]
        match self.basis:
            case "dct":
                return dct2_rows(grad)
            case "dct-3":
                return dct3_rows(grad)
            case "hadamard":
                return walsh_hadamard(grad) * m**-0.5
        return grad @ _fixed(self.basis, m, grad.dtype, grad.device).T

    def _by_fft(self, like: Tensor, m: int) -> bool:
        return self.basis == "dct" and like.device.type == "cpu" and m >= FFT_FROM and self.rank >= FFT_FROM


@lru_cache(maxsize=16)
def _fixed(basis: str, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C^T (m, m) of a name, its rows the columns of C; one for each width, not to be changed."""
    with torch.inference_mode(False):
        if basis == "hadamard":
            return walsh_hadamard(torch.eye(m, dtype=dtype, device=device)) * m**-0.5  # it is symmetric
        if basis == "random":
            drawn = torch.randn(m, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
            return torch.linalg.qr(drawn).Q.T.contiguous().to(device, dtype)
        cosines = dct_basis(m, dtype, device)
        return cosines if basis == "dct-3" else cosines.T.contiguous()


PROJECTORS = {"svd": Svd, "random": Random, "power": Power, "dct": ColumnSelector}
"""Name -> projector, as an option of a parameter group says it."""


def make_projector(name: str, rank: int, norm: int = 2, basis: str = "dct") -> Projector:
    """The projector of a name; `norm` and `basis` are those of "dct" alone.

    Raises:
        InputError: it is none of `PROJECTORS`, or its options are wrong.
    """
    if name not in PROJECTORS:
        raise unknown("projector", name, PROJECTORS)
    return ColumnSelector(rank, norm, basis) if name == "dct" else PROJECTORS[name](rank)


def check_width(projector: Projector, shape: torch.Size) -> None:
    """Raise `InputError` where a projector is not for the width of a matrix (*stack, O, I)."""
    projector.fresh((), min(shape[-2:]), device="meta")


def tall(matrix: Tensor) -> Tensor:
    """(*stack, n, m) with n >= m of (*stack, O, I): as it is, or transposed. It is its own inverse where O != I."""
    return matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
