"""LOST: low-rank factors and a few whole columns in the place of a weight, both from one SVD of how it starts.

Li et al. 2025, "LOST: Low-rank and Sparse Pre-training for Large Language Models" (arXiv:2508.02668). The code that the
abstract names cannot be had; the steps are those of the abstract and of a fine-tuning module that was made after it.
Of the initial weight W = U S V^T (O, I) of a layer, which is then gone:

    A = S_r^1/2 V_r^T (r, I), B = U_r S_r^1/2 (O, r)           the first r singular triplets
    W_c = the next k triplets;  idx = the c columns of largest norm in W_c, for good
    Z = W[:, idx] (O, c)                                       whole columns of W itself, and not of W_c
    y = gamma B f(A x) + (1 - gamma) Z x[idx] + bias           f = SiLU, or nothing

All of A, B, Z and the bias train: r (I + O) + c O numbers. With SiLU the layer is no linear map, and nothing merges.

Of a weight that was drawn the columns of W_c are nearly as long as each other (their norms vary by 5 to 20 per cent),
so that what chooses them has little to go by: `importance` shows it, and selection="random" is the control.

Beside it what it is compared with: CoLA (SiLU between factors alone) and SLTrain (Han et al. 2024, 2406.02214: the sum
of a product of factors and of single numbers at places that were drawn).

Tensor letters: O output width, I input width, n = min(O, I), r rank, c columns, k triplets of the complement.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.factored import FactoredLinear, Replaced, find_linears, replace_linears, truncated
from workbench.lib.core.low_rank import check_rank

METHOD = Method(
    slug="lost",
    title="LOST: Low-rank and Sparse Pre-training for Large Language Models",
    family="low_rank",
    year=2025,
    paper="arXiv:2508.02668",
    claim="Low-rank factors plus a few dense columns, both from one SVD of the initial matrix, pre-train as well as "
    "full rank with less memory.",
    objects=("LOSTLinear", "apply_lost", "match_budget", "importance", "CoLALinear", "SLTrainLinear"),
)

ACTS = ("silu", None)
SELECTIONS = ("svd", "svd_tail", "magnitude", "random")


def example() -> nn.Module:
    """A layer of rank 8 and four columns."""
    return LOSTLinear.from_dense(nn.Linear(32, 32).weight, 8, 4)


class LOSTLinear(FactoredLinear):
    """y = gamma B f(A x) + (1 - gamma) Z x[idx] + bias.

    Attributes:
        a: (r, I).
        b: (O, r).
        z: (O, c).
        idx: (c,) ascending, which inputs have a column; a buffer.
        gamma: a number, or where it is trained a parameter.

    Args:
        columns: c; 0 for factors alone.
        gamma: above 0 and at most 1.
        act: "silu" between the factors, or None for a linear map.
        train_gamma: whether gamma trains with the rest.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        columns: int,
        gamma: float = 0.7,
        act: str | None = "silu",
        bias: bool | Tensor | None = True,
        train_gamma: bool = False,
    ):
        super().__init__(d_in, d_out, bias)
        self._make(rank, columns, gamma, act, train_gamma)
        self._start(nn.Linear(d_in, d_out, bias=False).weight)

    def _make(
        self, rank: int, columns: int, gamma: float = 0.7, act: str | None = "silu", train_gamma: bool = False
    ) -> None:
        """The parameters, without numbers."""
        d_in, d_out = self.in_features, self.out_features
        check_rank(rank, d_in, d_out)
        if not 0 <= columns <= d_in:
            raise InputError(f"columns is {columns} but must be between 0 and d_in = {d_in}")
        if not 0 < gamma <= 1:
            raise InputError(f"gamma is {gamma} but must be above 0 and at most 1")
        if act not in ACTS:
            raise unknown("act", act, ACTS)
        self.act = act
        self.gamma = nn.Parameter(torch.tensor(float(gamma))) if train_gamma else gamma
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.empty(d_out, rank))
        self.z = nn.Parameter(torch.empty(d_out, columns))
        self.register_buffer("idx", torch.arange(columns))

    @classmethod
    def from_dense(
        cls,
        weight: Float[Tensor, "d_out d_in"],
        rank: int,
        columns: int,
        bias: Tensor | None = None,
        selection: str = "svd",
        k: int | None = None,
        **options: Any,
    ) -> "LOSTLinear":
        """The layer that starts from this weight.

        Args:
            selection: which columns get one of their own: "svd", see `importance`; "svd_tail", the same of the last k
                triplets; "magnitude", the longest of W itself; "random".
            k: triplets of the complement; default as many as the rank, as far as there are.
            options: gamma, act, train_gamma.

        Raises:
            InputError: an unknown selection, a rank, columns or k that the weight has not room for.
        """
        layer = cls.__new__(cls)
        FactoredLinear.__init__(layer, weight.shape[1], weight.shape[0], bias)
        layer._make(rank, columns, **options)
        layer.to(weight.device, weight.dtype)._start(weight, selection, k)
        return layer

    @torch.no_grad()
    def _start(self, weight: Tensor, selection: str = "svd", k: int | None = None) -> None:
        if selection not in SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        u, v = truncated(weight, self.rank)
        self.b.copy_(u), self.a.copy_(v)
        if not self.z.shape[1]:
            return
        if selection == "random":
            score = torch.rand(weight.shape[1], device=weight.device)
        elif selection == "magnitude":
            score = weight.double().norm(dim=0)
        else:
            score = importance(weight, self.rank, k, tail=selection == "svd_tail")
        self.idx.copy_(score.topk(len(self.idx)).indices.sort().values)
        self.z.copy_(weight[:, self.idx])

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def watched_factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """A and gamma B, whose product the live views watch."""
        return self.a.detach(), (self.gamma * self.b).detach()

    def made_matrices(self) -> Iterator[tuple[str, nn.Parameter, Callable[[Tensor], Tensor]]]:
        """What they watch beside it: the columns."""
        if self.z.numel():
            yield "z", self.z, lambda z: z

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        code = F.linear(x, self.a)
        low = self.gamma * F.linear(F.silu(code) if self.act else code, self.b)
        if self.z.shape[1]:
            low = low + (1 - self.gamma) * F.linear(x[..., self.idx], self.z)
        return low if self.bias is None else low + self.bias

    def merged(self) -> Float[Tensor, "d_out d_in"]:
        if self.act:
            raise InputError(f"{self.act} is between its factors, so it is no linear map")
        low = self.gamma * self.b @ self.a
        return low.index_add(1, self.idx, ((1 - self.gamma) * self.z).to(low.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, columns={self.z.shape[1]}, act={self.act}"


class CoLALinear(LOSTLinear):
    """y = B silu(A x) + bias (Liu et al. 2025, 2502.10940), from Gaussians of variance (r (I + O))^-1/2."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool | Tensor | None = True):
        FactoredLinear.__init__(self, d_in, d_out, bias)
        self._make(rank, 0, gamma=1.0)
        for factor in (self.a, self.b):
            nn.init.normal_(factor, std=(rank * (d_in + d_out)) ** -0.25)


class SLTrainLinear(FactoredLinear):
    """y = (alpha / r B A + S) x + bias: S has single numbers at places that were drawn, for good.

    The product is made dense in each forward pass, as in the authors' code.

    Attributes:
        a, b: (r, I) as `nn.Linear` starts, (O, r) zero.
        values: (m,), from U(+-I^-1/2).
        places: (m,) ascending, in the flat (O, I); a buffer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        count: int,
        alpha: float | None = None,
        bias: bool | Tensor | None = True,
    ):
        super().__init__(d_in, d_out, bias)
        check_rank(rank, d_in, d_out)
        if not 0 <= count <= d_in * d_out:
            raise InputError(f"count is {count} but must be between 0 and {d_in * d_out}")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.a = nn.Parameter(torch.empty(rank, d_in))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.values = nn.Parameter(torch.empty(count).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.register_buffer("places", torch.randperm(d_in * d_out)[:count].sort().values)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def watched_factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """A and B, scaled, whose product the live views watch."""
        return self.a.detach(), (self.scale * self.b).detach()

    @property
    def flops(self) -> int:
        return 2 * self.in_features * self.out_features

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return F.linear(x, self.merged(), self.bias)

    def merged(self) -> Float[Tensor, "d_out d_in"]:
        low = self.scale * self.b @ self.a
        return low.flatten().index_add(0, self.places, self.values.to(low.dtype)).view_as(low)


@torch.no_grad()
def importance(
    weight: Float[Tensor, "d_out d_in"], rank: int, k: int | None = None, tail: bool = False
) -> Float64[Tensor, " d_in"]:
    """The norm of each column in the complement: the k singular triplets after the first `rank`.

    Args:
        k: default as many as the rank, as far as there are.
        tail: the last k triplets instead.

    Raises:
        InputError: there are not so many.
    """
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left = len(values) - rank
    k = min(rank, left) if k is None else k
    if not 1 <= k <= left:
        raise InputError(f"k is {k} but must be between 1 and the {left} triplets that a rank of {rank} leaves")
    part = slice(-k, None) if tail else slice(rank, rank + k)
    return (values[part, None] * right[part]).norm(dim=0)  # U has orthonormal columns, so the norms need it not


@dataclass(frozen=True)
class Matched:
    """A rank for every layer, and how many columns and how many single numbers each may have beside it."""

    rank: int
    columns: Mapping[str, int]
    counts: Mapping[str, int]


def match_budget(shapes: Mapping[str, tuple[int, int]], numbers: int, sparse: float) -> Matched:
    """What fits into so many numbers, biases aside.

    Args:
        shapes: (O, I) of each layer by name.
        numbers: of all layers together.
        sparse: the share of them that is not in factors; a little more, since ranks are whole.

    Returns:
        The largest rank that leaves that share; columns as the same share of every width, less than the
        smallest O below the budget (as long as a layer has inputs left); single numbers that fill it.

    Raises:
        InputError: no rank fits, `sparse` is not at least 0 and below 1, or no layer is given.
    """
    if not 0 <= sparse < 1:
        raise InputError(f"sparse is {sparse} but must be at least 0 and below 1")
    if not shapes:
        raise InputError("shapes is empty but must hold at least one layer")
    a_rank, dense = sum(o + i for o, i in shapes.values()), sum(o * i for o, i in shapes.values())
    rank = min(int((1 - sparse) * numbers / a_rank + 1e-9), *(min(shape) for shape in shapes.values()))
    if rank < 1:
        raise InputError(
            f"numbers is {numbers} but must be at least {math.ceil(a_rank / (1 - sparse))}: a rank of 1 everywhere "
            f"takes {a_rank}, and {sparse:g} are for what is sparse"
        )
    if not sparse:
        return Matched(rank, dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0))
    left = numbers - rank * a_rank
    share = min(1.0, left / dense)
    columns = {name: int(share * i + 1e-9) for name, (_, i) in shapes.items()}
    rest = left - sum(columns[name] * o for name, (o, _) in shapes.items())
    while fitting := [name for name, (o, i) in shapes.items() if o <= rest and columns[name] < i]:
        name = min(fitting, key=lambda name: columns[name] - share * shapes[name][1])  # that lost most by rounding
        columns[name], rest = columns[name] + 1, rest - shapes[name][0]
    counts = {name: int(share * o * i + 1e-9) for name, (o, i) in shapes.items()}
    for name in list(shapes)[: min(left, dense) - sum(counts.values())]:
        counts[name] += 1
    return Matched(rank, columns, counts)


def apply_lost(
    model: nn.Module,
    share: float = 0.4,
    sparse: float = 0.25,
    targets: str | Sequence[str] = "*",
    **options: Any,
) -> Replaced:
    """Put a LOST layer in the place of each linear layer whose name matches, before the model is trained.

    Args:
        model: changed in place; embeddings and the output layer are best not among the targets.
        share: of the numbers of these layers that theirs may have.
        sparse: the share of that which goes to columns.
        options: of `LOSTLinear.from_dense`.

    Raises:
        InputError: as `find_linears` and `match_budget`; `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share} but must be above 0 and at most 1")
    shapes = shapes_of(model, targets)
    budget = match_budget(shapes, int(share * sum(o * i for o, i in shapes.values())), sparse)

    def make(layer: nn.Linear, name: str) -> LOSTLinear:
        return LOSTLinear.from_dense(layer.weight, budget.rank, budget.columns[name], layer.bias, **options)

    return replace_linears(model, make, targets)


def shapes_of(model: nn.Module, targets: str | Sequence[str] = "*") -> dict[str, tuple[int, int]]:
    """(O, I) of the linear layers whose names match."""
    return {name: tuple(layer.weight.shape) for name, layer in find_linears(model, targets)[0].items()}
