"""What takes the place of a layer, and what it knows of the forward pass it is in."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routing import Context, Routing

FACTS = ("task", "language", "label", "modality")
"""What an adapted model can be told beside its input."""


@dataclass(eq=False)
class Forward:
    """One forward pass of an adapted model: made when it begins, so that nothing in it is of another one.

    Attributes:
        context: what the model is called with; an empty one where it is called without.
        mask: the `attention_mask` (B, T) the model is called with by that keyword; None without one.
        losses: weighted auxiliary losses, by who reports one and its name.
        sums: what layers that report a loss together have added up, by who ties them.
    """

    context: Context = field(default_factory=Context)
    mask: Tensor | None = None
    losses: dict[tuple[Hashable, str], Tensor] = field(default_factory=dict)
    sums: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Side:
    """What the layers of an adapted model share beside their input.

    A model of the workbench hands its layers a `Context`: there `domain` is the task and `modality` the modality,
    unless `given` says otherwise.

    Attributes:
        given: what `Adapted.given` was told.
        forward: the pass now running, or the last one; None before the first, and of a layer in no adapted model.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    forward: Forward | None = None

    @property
    def context(self) -> Context:
        return Context() if self.forward is None else self.forward.context

    def rows(self, fact: str, x: Tensor) -> Tensor | None:
        """(N,) the fact for each of the N rows of x (..., I); None where nobody gave it.

        A fact has one value for all, one for each row of the batch, or one for each token. Where a layer sees a batch
        already flattened to tokens, each value serves as many consecutive rows as there are for it.

        Raises:
            InputError: the number of values does not fit the number of rows.
        """
        value = self.given.get(fact)
        if value is None:
            value = {"task": self.context.domain, "modality": self.context.modality}.get(fact)
        if value is None:
            return None
        n, value = x.shape[:-1].numel(), value.reshape(-1).to(x.device)
        if value.numel() == 0 or n % value.numel():
            raise InputError(
                f"{fact} has {value.numel()} values but a layer sees {n} rows: give one for all, one for each row of "
                "the batch or one for each token"
            )
        return value.repeat_interleave(n // value.numel())

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "forward": None}  # a copy has seen no forward


class AdaptedLayer(nn.Module):
    """Base of what takes the place of a linear layer or a feed-forward block: the frozen part, and something added.

    Attributes:
        base: what was there.
        slug: of the system; set when the layer is put in place.
        side: shared by all layers of a model from then on.
    """

    slug = ""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.side = Side()

    def fixed_update(self) -> Tensor | None:
        """The (O, I) matrix this layer adds to its base's weight, or None where it depends on the token."""
        return None


class RoutedLayer(AdaptedLayer, Announcing):
    """An adapted layer that sends its tokens to experts, and says where."""

    def tell(self, routing: Routing, coefficients: Mapping[str, float]) -> None:
        """Report the routing's losses, each by its coefficient, and announce it."""
        if self.side.forward is not None:
            losses = self.side.forward.losses
            for name, weight in coefficients.items():
                # a layer that is in several places of the model reports once in each
                losses[self, name] = losses.get((self, name), 0.0) + weight * routing.losses[name]
        if self.observed:
            self.announce(routing, self.context(routing.expert.new_empty(routing.n_tokens, 1)))

    def context(self, x: Tensor) -> Context:
        """What is known of the N rows of x (..., I): token ids, the task as `domain`, the modality."""
        ids = self.side.context.token_ids
        ids = ids if ids is not None and ids.numel() == x.shape[:-1].numel() else None
        return Context(token_ids=ids, domain=self.side.rows("task", x), modality=self.side.rows("modality", x))


class RoutedLinear(RoutedLayer):
    """y = W x + bank(x, router(x)): a linear layer with a mixture of low-rank experts beside it.

    Args:
        base: the frozen layer.
        router: see `lib.core.routing.Router`; sees the layer's input.
        experts: the bank, see `LowRankExperts`.
        dropout: of what the experts are given.
    """

    def __init__(self, base: nn.Linear, router: nn.Module, experts: nn.Module, dropout: float = 0.0):
        super().__init__(base)
        self.router, self.experts, self.dropout = router, experts, nn.Dropout(dropout)

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int | None:
        return self.router.top_k

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens, self.context(x))
        self.tell(routing, self.router.coefficients)
        return self.base(x) + self.experts(self.dropout(tokens), routing).view(*x.shape[:-1], -1)
