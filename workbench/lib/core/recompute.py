"""Forwards that activation checkpointing repeats in the backward pass: counted once, with gradients as if kept.

A layer that reports a loss beside its output does so where a checkpoint does not look. Three things go wrong then, and
each has its remedy here:

    what is reported twice   `recomputing` says that a forward repeats an earlier one, which reports and counts nothing
    what was told            facts, masks and states are those of the earlier call, see `Call` and `find`
    a loss without a graph   a reentrant checkpoint runs the first forward without gradients. `Call.part` then stands in
                             the loss for what the call reported, and keeps the gradient that arrives there; the
                             repeated call hands it to what it reports itself, by way of its output (`Repeat.carry`)

The last works because autograd runs what was made last first: a part enters the loss after the layer has run, so its
gradient is there before the layer is repeated.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from workbench.errors import InputError
from workbench.lib.core.routing import Context

SAMPLED = 64
SHARED = ("aux", "calls", "passed", "notes")
"""What a context has for all of its pass: no part of what one call is told."""
NEAR = 0.05  # relative; what is not computed alike twice differs by rounding only


def recomputing() -> bool:
    """Whether autograd is running now: a forward then repeats an earlier one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: whose.
        context: what it was told of its rows.
        sample: some numbers of its input, by which the call is known again.
        parts: what it reports, by name; without a graph where gradients were off.
        losses: the names of the parts that are losses.
        own: what else the layer must know again when the call is repeated, by name.
        graph: whether gradients were on.
        seeds: the gradients of parts without a graph, from when they are known until the call is repeated.
        carried: the names of those that are on their way then, by the output.
    """

    layer: nn.Module
    context: Context
    sample: Float[Tensor, " sampled"]
    parts: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)
    graph: bool = field(default_factory=torch.is_grad_enabled)
    seeds: dict[str, Tensor] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)
    repeated = False

    def part(self, name: str) -> Tensor:
        """What was reported, to be made a loss of; see the module."""
        value = self.parts[name]
        if self.graph or not torch.is_grad_enabled():
            return value
        return _Handed.apply(torch.zeros((), device=value.device, requires_grad=True), value, self, name)

    def carry(self, y: Tensor) -> Tensor:
        """The layer's output."""
        return y

    def settle(self) -> None:
        """Called when a backward pass ends in which some part had a gradient."""
        if self.seeds:
            names, self.seeds = ", ".join(self.seeds), {}
            raise InputError(
                f"the loss ({names}) of a {type(self.layer).__name__} has no graph: the layer ran without gradients, "
                "and no checkpoint ran it again in this backward pass. Differentiate the losses together with the "
                "output of the forward they are of, which must not be under torch.no_grad()"
            )
        if self.carried:
            names, self.carried = ", ".join(sorted(self.carried)), set()
            raise InputError(
                f"the loss ({names}) of a {type(self.layer).__name__} has no gradient: a reentrant checkpoint hands it "
                "on by way of the layer's output, on which no other loss depends. Use use_reentrant=False"
            )


@dataclass(eq=False)
class Repeat:
    """A call that repeats an earlier one: told the same, and heard by nobody.

    Attributes:
        first: the earlier one.
        parts: what is reported now, to be given the gradient of what was reported then.
    """

    first: Call
    parts: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[str, ...] = ()
    repeated = True

    @property
    def context(self) -> Context:
        return self.first.context

    @property
    def own(self) -> dict[str, Any]:
        return self.first.own

    def part(self, name: str) -> Tensor:
        return self.parts[name]

    def carry(self, y: Tensor) -> Tensor:
        """The layer's output, by way of which the gradients of the parts come in."""
        if torch.is_grad_enabled():  # off where checkpoints are in each other
            seeds, self.first.seeds = self.first.seeds, {}
            self.first.carried.update(seeds)
            for name, seed in seeds.items():
                y = _Carried.apply(y, self.parts[name], seed, self.first, name)
        return y


def sample(x: Tensor) -> Float[Tensor, " sampled"]:
    """A few numbers of x, spread evenly."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED) | 1][:SAMPLED].clone()


def find(calls: Iterable[Call], x: Tensor) -> Call | None:
    """The call that was given x, up to rounding; None if none was.

    Raises:
        InputError: several were, and were told different things.
    """
    here = sample(x)
    near = [(call, _distance(call.sample, here)) for call in calls if call.sample.shape == here.shape]
    least = min((far for _, far in near), default=torch.inf)
    if not least <= NEAR:
        return None
    best = [call for call, far in near if far == least]
    if any(not _same(_told(call), _told(best[0])) for call in best[1:]):
        raise InputError(
            "two forwards of the same input were told different things, and a checkpoint now repeats one of them: "
            "differentiate each before the next forward"
        )
    return next((call for call in best if call.seeds), best[0])


def _distance(a: Tensor, b: Tensor) -> float:
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    return float((a - b).norm() / a.norm().clamp(min=torch.finfo(wide).tiny))


def _told(call: Call) -> list[Any]:
    context = [getattr(call.context, f.name) for f in fields(Context) if f.name not in SHARED]
    own = {name: value for name, value in call.own.items() if name != "counted"}  # which follows from the input
    return tree_leaves((context, own), is_leaf=lambda value: value is None)


def _same(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    both = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b for a, b in both)


class _Handed(torch.autograd.Function):
    """What a call reported without a graph; its gradient becomes the call's seed."""

    @staticmethod
    def forward(ctx, anchor, value, call, name):
        ctx.call, ctx.name = call, name
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        seeds = ctx.call.seeds
        Variable._execution_engine.queue_callback(ctx.call.settle)
        seeds[ctx.name] = seeds[ctx.name] + grad if ctx.name in seeds else grad
        return None, None, None, None


class _Carried(torch.autograd.Function):
    """y; whatever gradient y has, `part` has the gradient `seed`."""

    @staticmethod
    def forward(ctx, y, part, seed, call, name):
        ctx.seed, ctx.call, ctx.name = seed, call, name
        return y.clone()  # no view: the next module may work in place

    @staticmethod
    def backward(ctx, grad):
        ctx.call.carried.discard(ctx.name)
        return grad, ctx.seed, None, None, None
