"""The layers of Maestro: two factors whose components stand in an order, cut to the first of them.

Of a linear layer, and of a convolution seen as the matrix (O, C kh kw) of its windows. See `maestro`.

Tensor letters: I input width (of a convolution with its window), O output width, R full rank, r rank.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.factored import FactoredLinear, LowRankLinear, truncated


class Ordered:
    """What the two kinds of layers have in common.

    Attributes:
        a: (R, I), or (R, C, kh, kw).
        b: (O, R).
        sampled: the width that forward passes are cut to just now; None for all that is kept.
    """

    a: nn.Parameter
    b: nn.Parameter
    sampled: int | None = None

    def _set_factors(self, b: Tensor, a: Tensor) -> None:
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("kept", torch.tensor(len(a), device=a.device))
        self._rank = len(a)  # the same, where no forward pass has to wait for a GPU to know it

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self._rank, kept = self.full_rank, int(self.kept)
        self._rank = self._width(kept)  # of a file, which may say anything

    @property
    def full_rank(self) -> int:
        return len(self.a)

    @property
    def rank(self) -> int:
        """r, the number of components that are left."""
        return self._rank

    def cut(self, rank: int) -> None:
        """Keep the first `rank` components; those that are gone do not come back."""
        self._rank = self._width(rank)
        self.kept.fill_(rank)

    def _width(self, width: int | None) -> int:
        """The number of components to use, or an `InputError` where there are not so many."""
        width = self.sampled if width is None else width
        if width is None:
            return self.rank
        if not 1 <= width <= self.rank:
            raise InputError(f"width is {width} but must be between 1 and the {self.rank} components that are left")
        return width

    def prefix(self, width: int | None = None) -> tuple[Float[Tensor, "d_out width"], Float[Tensor, "width d_in"]]:
        """The first components as matrices B and A, whose product is the weight."""
        width = self._width(width)
        return self.b[:, :width], self.a[:width].flatten(1)

    def watched_factors(self) -> tuple[Float[Tensor, "full_rank d_in"], Float[Tensor, "d_out full_rank"]]:
        """A and B at their full shape, with 0 for what was cut: what the live views watch."""
        kept = torch.arange(self.full_rank, device=self.a.device) < self.rank
        return self.a.detach().flatten(1) * kept[:, None], self.b.detach() * kept

    def _squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the rows of A and the columns of B that are left, in float32 at least."""
        b, a = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.prefix(self.rank))
        return a.square().sum(1), b.square().sum(0)

    @torch.no_grad()
    def strength(self) -> Float[Tensor, " full_rank"]:
        """||a_b|| ||b_b|| of each component alone; 0 for what was cut."""
        a, b = self._squares()
        return F.pad((a * b).sqrt(), (0, self.full_rank - self.rank))

    @torch.no_grad()
    def importance(self) -> Float[Tensor, " full_rank"]:
        """||A[b:]|| ||B[:, b:]|| of each component with all that follow, so never increasing; 0 for what was cut."""
        a, b = (_suffix_sums(squares) for squares in self._squares())
        return F.pad(a.sqrt() * b.sqrt(), (0, self.full_rank - self.rank))

    def rank_at(self, eps: float) -> int:
        """How many components are of importance `eps` or more: a prefix, as importances never increase.

        Raises:
            InputError: `eps` is negative, an importance is not finite, or none would be left.
        """
        if not eps >= 0:
            raise InputError(f"eps is {eps} but must be at least 0")
        importance = self.importance()[: self.rank]
        if not importance.isfinite().all():
            raise InputError("its importances are not finite: training has diverged, and no rank follows from them")
        rank = int((importance >= eps).sum())
        if rank == 0:
            raise InputError(
                f"eps is {eps} but must be at most its largest importance, {float(importance[0]):.3g}: without a "
                "component a layer gives its bias alone, and nothing before it trains any more"
            )
        return rank

    def shrink(self, eps: float) -> int:
        """Cut the components of importance below `eps`, and say how many are left; errors as in `rank_at`."""
        self.cut(self.rank_at(eps))
        return self.rank

    def group_lasso(self, eps: float) -> Tensor:
        """Its part of `hierarchical_group_lasso`."""
        a, b = (_suffix_sums(squares) for squares in self._squares())
        return (a + eps).sqrt().sum() + (b + eps).sqrt().sum()

    def params_at(self, rank: int) -> int:
        """Parameters of the layer that `to_factored` makes."""
        d_in, d_out = self.a[0].numel(), len(self.b)
        bias = 0 if self.bias is None else self.bias.numel()
        return min(rank * (d_in + d_out), d_in * d_out) + bias

    def form_now(self) -> dict[str, float | Tensor]:
        return {"rank": self.rank, "importance": self.importance()}

    def merged(self) -> Float[Tensor, "d_out d_in"]:
        """The weight of the dense layer that is the same function, just now."""
        b, a = self.prefix()
        return b @ a

    def to_factored(self, rank: int) -> nn.Module:
        """A layer of the first `rank` components as it is deployed: two factors, or dense where r (I + O) > I O."""
        raise NotImplementedError

    def _is_dense_at(self, rank: int) -> bool:
        d_in, d_out = self.a[0].numel(), len(self.b)
        return rank * (d_in + d_out) > d_in * d_out


def _suffix_sums(values: Tensor) -> Tensor:
    """Sums from each entry to the end, added up from the end: none is below the next."""
    return values.flip(0).cumsum(0).flip(0)


class MaestroLinear(Ordered, FactoredLinear):
    """A linear layer of ordered factors; at first the same function as the dense one that it starts from.

    Args:
        bias: whether there is one.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        layer = nn.Linear(d_in, d_out, bias)
        super().__init__(d_in, d_out, layer.bias)
        self._set_factors(*truncated(layer.weight, min(d_in, d_out)))

    @classmethod
    def from_dense(cls, layer: nn.Module) -> "MaestroLinear":
        """Of a linear layer, whose bias it takes over; an `InputError` for any other module, or where it is not finite.

        A convolution is one for `MaestroConv2d`.
        """
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"layer is a {type(layer).__name__} but must be an nn.Linear: nothing else has factors here"
            )
        made = cls.__new__(cls)
        FactoredLinear.__init__(made, layer.in_features, layer.out_features, layer.bias)
        made._set_factors(*truncated(layer.weight, min(layer.weight.shape)))
        return made

    def forward(self, x: Float[Tensor, "... d_in"], width: int | None = None) -> Float[Tensor, "... d_out"]:
        """Cut to the first `width` components; default all that are left, or what a sampler has set."""
        b, a = self.prefix(width)
        return F.linear(F.linear(x, a), b, self.bias)

    def to_factored(self, rank: int) -> nn.Module:
        b, a = (factor.detach().clone() for factor in self.prefix(rank))
        layer = LowRankLinear.of(b, a, self.bias)
        layer.turned = self.turned
        for p in (layer.train(self.training).u, layer.v):
            p.requires_grad_(self.a.requires_grad)
        return layer.dense() if self._is_dense_at(rank) else layer

    @property
    def flops(self) -> int:
        """Floating-point operations of one token, forward, at the rank that is left."""
        return 2 * self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank} of {self.full_rank}"


class MaestroConv2d(Ordered, nn.Module):
    """A convolution of ordered factors: A is R filters of the same window, B a convolution of 1 x 1 after them.

    Made by `from_dense`; R = min(O, C kh kw).
    """

    @classmethod
    def from_dense(cls, layer: nn.Module) -> "MaestroConv2d":
        """Of a convolution, whose bias it takes over; an `InputError` for what it is not made for."""
        if reason := why_not(layer):
            raise InputError(f"layer cannot be decomposed: it is {reason}")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        flat = layer.weight.flatten(1)
        b, a = truncated(flat, min(flat.shape))
        made._set_factors(b, a.unflatten(1, layer.weight.shape[1:]))
        made.bias, made.options = layer.bias, {k: getattr(layer, k) for k in ("stride", "padding", "dilation")}
        return made

    def forward(
        self, x: Float[Tensor, "batch channels height width"], width: int | None = None
    ) -> Float[Tensor, "batch d_out height_out width_out"]:
        width = self._width(width)
        hidden = F.conv2d(x, self.a[:width], **self.options)
        return F.conv2d(hidden, self.b[:, :width, None, None], self.bias)

    def to_factored(self, rank: int) -> nn.Module:
        if self._is_dense_at(rank):
            return self._convolution(self._weight(rank), self.bias, **self.options)
        first = self._convolution(self.a[: self._width(rank)].detach().clone(), None, **self.options)
        second = self._convolution(self.b[:, :rank, None, None].detach().clone(), self.bias)
        return nn.Sequential(first, second).train(self.training)

    def dense(self) -> nn.Conv2d:
        """The convolution that is the same function."""
        return self._convolution(self._weight(self.rank), self.bias, **self.options)

    @property
    def flops(self) -> int:
        """Floating-point operations of one place of the output, forward, at the rank that is left."""
        return 2 * self.rank * (self.a[0].numel() + len(self.b))

    @torch.no_grad()
    def _weight(self, rank: int) -> Tensor:
        b, a = self.prefix(rank)
        return (b @ a).unflatten(1, self.a.shape[1:])

    def _convolution(self, weight: Tensor, bias: nn.Parameter | None, **options: Any) -> nn.Conv2d:
        with torch.device("meta"):  # no weight is drawn
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, **options)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=self.a.requires_grad), bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{tuple(self.a.shape[1:])} to {len(self.b)}, rank={self.rank} of {self.full_rank}, {self.options}"


def why_not(layer: nn.Module) -> str | None:
    """Why a module is no convolution that is decomposed here."""
    if type(layer) is not nn.Conv2d:
        return f"a {type(layer).__name__}"
    if layer.groups > 1:
        return f"a convolution in {layer.groups} groups"
    return None if layer.padding_mode == "zeros" else f"a convolution with padding {layer.padding_mode!r}"
