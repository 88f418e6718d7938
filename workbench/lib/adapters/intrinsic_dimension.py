"""Intrinsic dimension: how many numbers does a task need? A network is trained along d fixed random directions alone.

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes" (arXiv:1804.08838, ICLR); public code:
uber-research/intrinsic-dimension.

    theta = theta0 + P v        theta (D,) all parameters, theta0 as initialised, v (d,) trained, 0 at first

P (D, d) is fixed, and its columns have unit length over the whole network, so that a step of v is a step of theta as
long, whatever d is. The smallest d at which the task is solved, by nine tenths of what the network reaches when all of
it is trained, is the intrinsic dimension d_int90 of the task and the architecture. Three kinds of P:

    dense     P_ij from N(0, 1), columns divided by their length      D d numbers
    sparse    P_ij not 0 with probability D^-1/2, +1 or -1, likewise  d D^1/2 numbers
    fastfood  P v = S H G Pi H B v, never written out                 3 L numbers, L = 2^ceil(log2 D)

of which B (signs, v padded to L), Pi (a permutation) and G (normal) are diagonal or an order, H is the Walsh-Hadamard
transform and S takes the first D entries. The length of its columns is exactly 1 where D = L and that up to chance
else. All of P is known by its seed: (seed, v) is the whole network to whoever has theta0, which bounds the length of
its description.

Tensor letters: D parameters, d dimensions of the subspace, L the next power of two.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels import walsh_hadamard
from workbench.kernels.random_basis import uniform

METHOD = Method(
    slug="intrinsic-dimension",
    title="Measuring the Intrinsic Dimension of Objective Landscapes",
    family="adapters",
    year=2018,
    paper="arXiv:1804.08838",
    claim="A task is solved in a random subspace whose dimension hardly depends on the width of the model and ranks "
    "the difficulty of tasks.",
    objects=(
        "SubspaceModel",
        "measure_intrinsic_dimension",
        "DenseProjection",
        "SparseProjection",
        "FastfoodProjection",
    ),
)


def example() -> nn.Module:
    """A network of 2,112 parameters that trains along 48 directions."""
    return SubspaceModel(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), dims=48)


class SubspaceProjection(nn.Module):
    """P (D, d) with columns of unit length, fixed by a seed. What is saved of it is the seed.

    Args:
        size: D.
        dims: d, from 1 to D.
        seed: of everything in P; the numbers are those of `kernels.random_basis`, the same on every device.
    """

    def __init__(self, size: int, dims: int, seed: int = 0):
        super().__init__()
        if not 1 <= dims <= size:
            raise InputError(f"dims is {dims} but must be between 1 and the number of parameters, {size}")
        if not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed} but must be between 0 and 2**63 - 1")
        self.size, self.dims = size, dims
        self.register_buffer("seed", torch.tensor(seed))
        self._set()

    def forward(self, v: Float[Tensor, "*batch dims"]) -> Float[Tensor, "*batch size"]:
        """P v, differentiable in v any number of times.

        Raises:
            InputError: v has another width.
        """
        if v.shape[-1] != self.dims:
            raise InputError(f"v is of shape {tuple(v.shape)} but must be (..., {self.dims})")
        return _Product.apply(v, self)

    def product(self, v: Tensor) -> Tensor:
        """P v, of which nothing is remembered."""
        raise NotImplementedError

    def adjoint(self, g: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch dims"]:
        """P^T g: the gradient for v where g is that for theta."""
        raise NotImplementedError

    def drawn(self, seed: Tensor) -> dict[str, Tensor]:
        """What P is made of, by name, on the CPU."""
        raise NotImplementedError

    def matrix(self) -> Float[Tensor, "size dims"]:
        """P, written out."""
        some = next(buffer for buffer in self.buffers() if buffer.is_floating_point())
        return self.product(torch.eye(self.dims, dtype=some.dtype, device=some.device)).T

    def column_norms(self) -> Float[Tensor, " dims"]:
        return self.matrix().norm(dim=0)

    def extra_repr(self) -> str:
        return f"size={self.size}, dims={self.dims}, seed={int(self.seed)}"

    def _set(self) -> None:
        """Draw P; where it was drawn before, in the type and on the device that it has."""
        for name, value in self.drawn(self.seed.cpu()).items():
            old = self._buffers.get(name)
            self.register_buffer(name, value if old is None else value.to(old), persistent=False)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._set()


class DenseProjection(SubspaceProjection):
    """Every entry is normal. D d numbers are kept, and read twice a step."""

    def drawn(self, seed: Tensor) -> dict[str, Tensor]:
        columns = [normal(seed, j * self.size, self.size) for j in range(self.dims)]
        return {"columns": torch.stack([column / column.norm() for column in columns])}  # (d, D)

    def product(self, v: Tensor) -> Tensor:
        return v @ self.columns

    def adjoint(self, g: Tensor) -> Tensor:
        return g @ self.columns.T


class SparseProjection(SubspaceProjection):
    """About D^1/2 entries of a column are not 0, and those are one number or its negative (Li, Hastie and Church 2006).

    In the public code the density is that of each layer's own size; here it is one for the network.
    """

    def drawn(self, seed: Tensor) -> dict[str, Tensor]:
        column, row = self._places(seed)
        sign = torch.where(uniform(seed, 0, len(row)) < 0, -1.0, 1.0)
        return {"row": row, "column": column, "value": sign * column.bincount(minlength=self.dims)[column] ** -0.5}

    def _places(self, seed: Tensor) -> tuple[Tensor, Tensor]:
        """Column and row of each entry that is not 0: each of d D places is with probability D^-1/2, on its own.

        The gaps between such places are geometric, and these are drawn. A column that got nothing gets one entry, as it
        could not have unit length.
        """
        places, never = self.dims * self.size, math.log1p(-(self.size**-0.5)) if self.size > 1 else -math.inf
        count = int(1.1 * places * self.size**-0.5) + 64  # more are drawn below, if these do not reach the end
        at = torch.zeros(0, dtype=torch.int64)
        while not len(at) or at[-1] < places:
            drawn = uniform(seed, 2**40 + len(at), count, torch.float64)
            gaps = ((drawn * 0.5 + 0.5 + 2.0**-25).log() / never).floor().long() + 1
            at = torch.cat([at, gaps.cumsum(0) + (at[-1] if len(at) else -1)])
        at = at[at < places]
        column, row = at // self.size, at % self.size
        empty = (column.bincount(minlength=self.dims) == 0).nonzero().flatten()
        filled = ((uniform(seed, 2**41, self.dims, torch.float64) * 0.5 + 0.5) * self.size).long()[empty]
        return torch.cat([column, empty]), torch.cat([row, filled])

    def product(self, v: Tensor) -> Tensor:
        return v.new_zeros(*v.shape[:-1], self.size).index_add_(-1, self.row, v[..., self.column] * self.value)

    def adjoint(self, g: Tensor) -> Tensor:
        return g.new_zeros(*g.shape[:-1], self.dims).index_add_(-1, self.column, g[..., self.row] * self.value)


class FastfoodProjection(SubspaceProjection):
    """Le, Sarlos and Smola 2013: a normal matrix in all but name, for D log D operations and 3 L numbers."""

    def drawn(self, seed: Tensor) -> dict[str, Tensor]:
        length = 1 << (self.size - 1).bit_length()
        gauss = normal(seed, length, length)
        return {
            "sign": torch.where(uniform(seed, 0, self.dims) < 0, -1.0, 1.0),  # of the padding it is of no matter
            # A column is as long as G times L^1/2 before its first D entries are taken, and D / L of its square after.
            "gauss": gauss / (gauss.norm() * self.size**0.5),
            "order": uniform(seed, 2 * length, length).argsort(stable=True),
        }

    def product(self, v: Tensor) -> Tensor:
        x = walsh_hadamard(nn.functional.pad(v * self.sign, (0, len(self.gauss) - self.dims)))
        return walsh_hadamard(x[..., self.order] * self.gauss)[..., : self.size]

    def adjoint(self, g: Tensor) -> Tensor:
        x = walsh_hadamard(nn.functional.pad(g, (0, len(self.gauss) - self.size))) * self.gauss
        return walsh_hadamard(torch.empty_like(x).index_copy_(-1, self.order, x))[..., : self.dims] * self.sign


PROJECTIONS = {"dense": DenseProjection, "sparse": SparseProjection, "fastfood": FastfoodProjection}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, projection):
        ctx.projection = projection
        return projection.product(v)

    @staticmethod
    def backward(ctx, gradient):
        return _Adjoint.apply(gradient, ctx.projection), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, projection):
        ctx.projection = projection
        return projection.adjoint(g)

    @staticmethod
    def backward(ctx, gradient):
        return _Product.apply(gradient, ctx.projection), None


def normal(seed: Tensor, start: int, count: int) -> Float[Tensor, " count"]:
    """Numbers `start`, `start + 1`, ... of a seed, from N(0, 1)."""
    return ((uniform(seed, start, count, torch.float64) + 2.0**-24).erfinv() * 2**0.5).float()


class SubspaceModel(nn.Module):
    """A network of which `vtheta` (d,) alone trains: theta0 + P vtheta stands for all of its parameters in each call.

    All are those of norms and biases too; one that two layers share is one. Buffers stay the network's own.

    Args:
        model: any network, as it was initialised; its parameters are frozen and stay theta0.
        dims: d.
        projection: one of `PROJECTIONS`.
        seed: of P; None: from torch's global generator.
    """

    def __init__(self, model: nn.Module, dims: int, projection: str = "fastfood", seed: int | None = None):
        super().__init__()
        if projection not in PROJECTIONS:
            raise unknown("projection", projection, PROJECTIONS)
        parameters = dict(model.named_parameters())
        if not parameters or not all(p.is_floating_point() for p in parameters.values()):
            raise InputError("model must have parameters, all of them real and floating point")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        self.model = model.requires_grad_(False)
        kind = next(iter(parameters.values())).to(_widest(parameters.values()))
        size = sum(p.numel() for p in parameters.values())
        self.projection = PROJECTIONS[projection](size, dims, seed).to(kind.device, kind.dtype)
        self.vtheta = nn.Parameter(kind.new_zeros(dims))

    def forward(self, *args, **kwargs):
        change = self.change(self.vtheta)
        there = {name: p + change[name].to(p.dtype) for name, p in self.model.named_parameters()}
        return functional_call(self.model, there, args, kwargs)

    def change(self, v: Float[Tensor, " dims"]) -> dict[str, Tensor]:
        """P v, as what it adds to each parameter."""
        named = dict(self.model.named_parameters())
        parts = self.projection(v).split([p.numel() for p in named.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}

    @property
    def description_bits(self) -> int:
        """Of what was learned: d numbers of 32 bits, and the seed."""
        return 32 * self.projection.dims + 64

    def made_matrices(self) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
        """What is there to watch, as what trains is a vector: what it adds to each matrix of the network."""
        for name, p in self.model.named_parameters():
            if p.ndim > 1:
                yield name, self.vtheta, lambda v, name=name: self.change(v)[name].flatten(1)


def _widest(parameters: Iterable[Tensor]) -> torch.dtype:
    """The type of the widest, at least float32."""
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


@dataclass(frozen=True)
class IntrinsicDimension:
    """What each subspace reached.

    Attributes:
        dims: d of each, ascending.
        scores: of each; higher is better.
        threshold: the score at which the task counts as solved.
    """

    dims: tuple[int, ...]
    scores: tuple[float, ...]
    threshold: float

    @property
    def value(self) -> int | None:
        """The smallest d that reaches the threshold; None where none does."""
        return None if (first := self._first) is None else self.dims[first]

    @property
    def crossing(self) -> float | None:
        """Where the score, a straight line in log d between its last d below and `value`, reaches the threshold."""
        first = self._first
        if not first:
            return self.value
        (low, high), (below, above) = (values[first - 1 : first + 1] for values in (self.dims, self.scores))
        return low * (high / low) ** ((self.threshold - below) / (above - below))

    @property
    def _first(self) -> int | None:
        return next((i for i, score in enumerate(self.scores) if score >= self.threshold), None)


def measure_intrinsic_dimension(
    score: Callable[[int], float], dims: Sequence[int], baseline: float, criterion: float = 0.9
) -> IntrinsicDimension:
    """Train in a subspace of every dimension, and see which reach a share of the baseline.

    Args:
        score: d -> what a network trained in d dimensions reaches, above 0 and higher for better (the paper takes
            exp(-loss) of a loss): a fresh one each time, at its own best learning rate.
        dims: ascending.
        baseline: the score of the same network, all of whose parameters were trained, as well as can be.
        criterion: 0.9 for d_int90. The whole of the baseline, 1, is for tasks that can be solved exactly: elsewhere the
            last hundredths are noise.

    Raises:
        InputError: the dimensions do not ascend from 1, or a number is not above 0, or the criterion above 1.
    """
    dims = tuple(dims)
    if not dims or list(dims) != sorted(set(dims)) or dims[0] < 1:
        raise InputError(f"dims are {dims} but must ascend, from 1 or more")
    if not 0 < baseline < math.inf or not 0 < criterion <= 1:
        raise InputError(f"baseline, criterion are {baseline}, {criterion} but must be above 0, and the latter up to 1")
    return IntrinsicDimension(dims, tuple(float(score(d)) for d in dims), criterion * baseline)
