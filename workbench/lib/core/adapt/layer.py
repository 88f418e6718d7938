"""What takes the place of a layer, and what it knows of the forward pass it is in."""

import inspect
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.reading import of_base
from workbench.lib.core.observe import Announcing
from workbench.lib.core.recompute import Call, Repeat, find, recomputing, sample
from workbench.lib.core.routing import Context, Routing

FACTS = ("task", "language", "label", "modality")
"""What an adapted model can be told beside its input."""

Turn = tuple[str, int]
"""A call of a layer in a forward: the place of the layer, and which of its calls."""


@dataclass(eq=False)
class Forward:
    """One forward pass of an adapted model: made when it begins, so that nothing in it is of another one.

    Attributes:
        context: what the model is called with; an empty one where it is called without.
        rows: of the batch, along the axis it has in what the model is called with; empty where nobody knows.
        calls: of the routed layers, in their order.
        decided: for whole sequences, by layers that know of no cache, by their turn.
    """

    context: Context = field(default_factory=Context)
    rows: frozenset[int] = frozenset()
    calls: list[Call] = field(default_factory=list)
    decided: dict[Turn, tuple[Tensor, ...]] = field(default_factory=dict)

    def losses(self) -> dict[tuple[Hashable, str], Tensor]:
        """The weighted auxiliary losses, by who reports one and its name."""
        found: dict[tuple[Hashable, str], Tensor] = {}
        joint: dict[Any, list[Call]] = {}
        for call in self.calls:
            if (balance := call.layer.balance) is not None and "counted" in call.own:
                joint.setdefault(balance, []).append(call)
                continue
            for name in call.losses:  # a layer that is in several places of the model reports once in each
                found[call.layer, name] = found.get((call.layer, name), 0.0) + call.part(name)
        for balance, calls in joint.items():
            found |= balance.losses(calls)
        return found


@dataclass(eq=False)
class Frame:
    """A module around adapted layers, while it runs.

    Attributes:
        mask: (B, T) False where a token is padding; None without any.
        cache: what it goes on from, of an earlier forward of the same sequences; None without.
    """

    module: nn.Module
    mask: Bool[Tensor, "batch time"] | None = None
    cache: Any = None


@dataclass(eq=False)
class Side:
    """What the layers of an adapted model share beside their input.

    A model of the workbench hands its layers a `Context`: there `domain` is the task and `modality` the modality,
    unless `given` says otherwise.

    Attributes:
        given: what `Adapted.given` was told.
        axis: the rows of the batch, in what layers are given.
        forward: the pass now running, or the last one; None before the first.
        frames: the modules that are running, outermost first.
        decided: inside `Adapted.generating`, what layers have decided for the sequences, by their turn.
        alive: the calls of each layer that a checkpoint may repeat.
        chosen: which of the model's tokens a layer is given, and of how many, inside packed experts; else None.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    axis: int = 0
    forward: Forward | None = None
    frames: list[Frame] = field(default_factory=list)
    decided: dict[Turn, tuple[Tensor, ...]] | None = None
    alive: dict[nn.Module, WeakSet[Call]] = field(default_factory=lambda: defaultdict(WeakSet))
    chosen: tuple[Tensor, int] | None = None

    @contextmanager
    def only(self, token: Tensor, n: int) -> Iterator[None]:
        """Inside, layers are given these of the n tokens of the model."""
        self.chosen = token, n
        try:
            yield
        finally:
            self.chosen = None

    def enter(self, module: nn.Module) -> Forward:
        """A module is called that no other is around. With it begins a pass, unless the last one has still to see it.

        So what calls the parts of a model in turn makes one pass, and what calls a part again makes another.
        """
        inside = set(module.modules())
        if self.forward is None or any(call.layer in inside for call in self.forward.calls):
            self.forward = Forward()
        return self.forward

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """What layers decide for a sequence in the first forward inside stays for the others."""
        before, self.decided = self.decided, {}
        try:
            yield
        finally:
            self.decided = before

    def rows(self, fact: str, x: Tensor) -> Tensor | None:
        """(N,) the fact for each of the N rows of x (..., I); None where nobody gave it.

        A fact has one value for all, one for each row of the batch, or one for each token. Where a layer sees a batch
        already flattened to tokens, each value of a row serves its tokens.

        Raises:
            InputError: the number of values does not fit.
        """
        context = Context() if self.forward is None else self.forward.context
        value = self.given.get(fact)
        if value is None:
            value = {"task": context.domain, "modality": context.modality}.get(fact)
        if value is None:
            return None
        lead, value = x.shape[:-1] if self.chosen is None else torch.Size([self.chosen[1]]), value.to(x.device)
        rows = self._spread(fact, value, lead)
        return rows if self.chosen is None else rows[self.chosen[0]]

    def _spread(self, fact: str, value: Tensor, lead: torch.Size) -> Tensor:
        n, count, axis = lead.numel(), value.numel(), self.axis
        if count == n:  # a table whose axes are the other way round is read that way
            return (value.T if value.ndim == 2 and value.shape != lead == value.T.shape else value).reshape(-1)
        known = {lead[axis]} if len(lead) > 1 else self.forward.rows if self.forward is not None else frozenset()
        if self.decided is not None and count:  # sequences that are generated may be there several times, as beams
            known = {count for rows in known if rows % count == 0}
        if count == 1:
            return value.reshape(-1).expand(n)
        if count and n % count == 0 and (count in known or not (known or len(lead) > 1)):
            value = value.reshape(-1)
            if len(lead) == 1 or axis == 0:
                return value.repeat(n // count) if axis else value.repeat_interleave(n // count)
            value = value.repeat_interleave(lead[axis] // count)
            return value.view([-1 if i == axis else 1 for i in range(len(lead))]).expand(lead).reshape(-1)
        raise InputError(
            f"{fact} has {count} values but a layer sees {n} rows {tuple(lead)}: give one for all, one for each row of "
            f"the batch, which is taken to be axis {axis} (say which with `given(axis=...)`), or one for each token"
        )

    def mask(self, x: Tensor) -> Bool[Tensor, "batch time"] | None:
        """False for the rows of x (..., I) that are padding, with the axes of x where it has them; None if unknown.

        Inside packed experts the tokens of all sequences are one row.
        """
        if self.chosen is not None:
            mask = self._mask(torch.Size([self.chosen[1]]))
            return None if mask is None else mask.reshape(1, -1)[:, self.chosen[0].to(mask.device)].to(x.device)
        mask = self._mask(x.shape[:-1])
        return None if mask is None else mask.to(x.device)

    def _mask(self, lead: torch.Size) -> Tensor | None:
        if not self.frames or self.frames[-1].mask is None:
            return None
        mask = self.frames[-1].mask
        batch, time = mask.shape
        if self.frames[-1].cache is not None and batch * time > lead.numel() and lead.numel() % batch == 0:
            mask = mask[:, -(lead.numel() // batch) :]  # of the tokens that are new
        if mask.numel() != lead.numel():
            return None
        return mask.T if len(lead) == 2 and mask.shape != lead == mask.T.shape else mask

    def repeated(self, layer: nn.Module, x: Tensor) -> Call:
        """The call of this layer that a checkpoint repeats with x."""
        call = find(self.alive[layer], x)
        if call is None:
            raise InputError(
                "a layer runs in the backward pass on an input that no forward has given it, so what it was told then "
                "is not known: a checkpoint must repeat what it has run, with the same random numbers"
            )
        return call

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "axis": self.axis}  # a copy has seen no forward

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class AdaptedLayer(nn.Module):
    """Base of what takes the place of a linear layer or a feed-forward block: the frozen part, and something added.

    Attributes:
        base: what was there.
        slug: of the system; set when the layer is put in place.
        side: shared by all layers of a model from then on.
        place: its name in the model.
    """

    slug = place = ""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.side = Side()

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """As what was there is called: by its keyword too, with one axis, and with no tokens, who meet no router."""
        if not inputs:
            first = next(iter(inspect.signature(self.base.forward).parameters))
            inputs = (keywords.pop(first),)
        x, *rest = inputs
        if x.ndim == 1:
            return super().__call__(x[None], *rest, **keywords)[0]
        if not x.numel():
            return self.base(x, *rest, **keywords)
        return super().__call__(x, *rest, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return of_base(self, name, self.fixed_update)

    def fixed_update(self) -> Tensor | None:
        """The (O, I) matrix this layer adds to its base's weight, or None where it depends on the token."""
        return None


class RoutedLayer(AdaptedLayer, Announcing):
    """An adapted layer that sends its tokens to experts, and says where.

    A forward of such a layer is `call = begin(x)`, a routing by what `call` was told, `tell`, and the output by way of
    `call.carry`. Under activation checkpointing `begin` gives the call that is repeated, which tells nobody.

    Attributes:
        balance: what the layers of a model report their balance loss to together; None: each its own.
    """

    balance = None

    @torch.compiler.disable
    def begin(self, x: Tensor) -> Call | Repeat:
        """This call of the layer, with what it is told of the rows of x (..., I)."""
        side = self.side
        if recomputing():
            return Repeat(side.repeated(self, x))
        if not side.frames:
            side.enter(self)
        call = Call(self, self.context(x), sample(x))
        side.forward.calls.append(call)
        side.alive[self].add(call)
        return call

    def tell(self, call: Call | Repeat, routing: Routing, coefficients: Mapping[str, float]) -> None:
        """Report the routing's losses, each by its coefficient, and announce it."""
        call.losses = tuple(coefficients)
        call.parts |= {name: weight * routing.losses[name] for name, weight in coefficients.items()}
        if self.observed and not call.repeated:
            self.announce(routing, call.context)

    def context(self, x: Tensor) -> Context:
        """What is known of the N rows of x (..., I): token ids, the task as `domain`, the modality, padding."""
        ids, chosen = None if self.side.forward is None else self.side.forward.context.token_ids, self.side.chosen
        ids = (
            ids if ids is not None and ids.numel() == (x.shape[:-1].numel() if chosen is None else chosen[1]) else None
        )
        ids = ids.reshape(-1)[chosen[0]] if ids is not None and chosen is not None else ids
        mask = self.side.mask(x)
        return Context(
            token_ids=ids,
            domain=self.side.rows("task", x),
            modality=self.side.rows("modality", x),
            mask=None if mask is None else mask.reshape(-1),
        )


def plain(x: Tensor) -> Tensor:
    """x in the type a plain linear layer would compute with: under autocast, that of autocast."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if autocast else x


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
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        routing = self.router(tokens, call.context)
        self.tell(call, routing, self.router.coefficients)
        return call.carry(self.base(x) + self.experts(self.dropout(tokens), routing).view(*x.shape[:-1], -1))
