"""Sigma-MoE-Tiny: balance when one of very many experts is active (technical report, arXiv:2512.16248).

L layers, E experts each (96 in the report), K_l active in layer l, N tokens.

1. Router: p = softmax(x W) over ALL experts in float32, the top K_l take the token, y = sum_k p_k E_k(x). Nothing is
   renormalised: with K = 1 the weight would be the constant 1 and the router would get no gradient; with K > 1 the kept
   weights stay what they are when K falls, so the output moves by exactly the terms that are dropped.
2. Balance loss: E * sum_i f_i P_i with f counted over the global batch, that is over all micro-batches of an optimizer
   step (`LoadWindow`, `global_batch_lbl`). It is 1 whenever P is uniform, whatever f: in the lower layers training
   takes this shortcut and flattens the probabilities instead of the load.
3. Progressive sparsification, the remedy (`SparsityPlan`): the lower layers start with several active experts, all
   others with one; late in training one switch sets K = 1 everywhere. It is a step, not an annealing, and it concerns
   the lower layers only. No parameter changes at the switch and the optimizer keeps its state.
4. The alternatives it is compared with: the top-1 loss (`workbench.lib.core.balance.top1_lbl`), which has no such
   shortcut, and loss-free balancing (`LossFreeBias`), whose biases drown the scores.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.balance import switch_lbl
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Routing
from workbench.lib.core.train import Hook, State

METHOD = Method(
    slug="sigma-moe-tiny",
    title="Sigma-MoE-Tiny: one active expert of 96, balanced by progressive sparsification",
    family="routing",
    year=2025,
    paper="arXiv:2512.16248",
    claim="With one active expert of very many, the usual balance loss leaves the lower layers unbalanced; starting "
    "them with several active experts, and switching to one late in training, balances them at almost equal quality.",
    objects=(
        "SparsityPlan",
        "Sparsify",
        "GlobalBatchRouter",
        "LoadWindow",
        "global_batch_lbl",
        "geometric_low",
        "active_parameters",
    ),
)


class LoadWindow(nn.Module):
    """Pairs per expert (E,) since the last optimizer step: f of the global batch when its gradient is accumulated.

    The training loop calls `after_step`; the counts of a window that is still open are not part of a checkpoint.
    """

    def __init__(self, n_experts: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(n_experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def count(self, routing: Routing, mask: Bool[Tensor, " tokens"] | None = None) -> None:
        """Add one micro-batch, its tokens where `mask` holds; for training batches. What is recomputed counts once."""
        if not recomputing():
            self.counts += routing.only(mask).counts

    def after_step(self) -> None:
        """Close the window."""
        self.counts.zero_()


def global_batch_lbl(window: LoadWindow, probs: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Switch balance loss with f over the window so far and P over this micro-batch (report, "global batch" loss).

    A window of one micro-batch gives `switch_lbl`. The distinction matters: f of a small micro-batch is forced towards
    uniform within every sequence, f of the global batch lets experts specialise (Qiu et al. 2025, 2501.11873).
    """
    return switch_lbl(probs, window.counts)


class GlobalBatchRouter(LinearRouter):
    """The linear top-K router of the report: full softmax weights for every K, balance loss over the global batch.

    Args:
        d_model, n_experts, top_k: D, E, and K at the start; a `SparsityPlan` changes K.
        coefficients, bias_rate: as in `TopKRouter`; "lbl" is counted over the window in training mode.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int = 1, **options):
        super().__init__(d_model, n_experts, top_k, renormalize=False, **options)
        self.window = LoadWindow(n_experts)

    def route(self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        routing = super().route(logits, mask)
        if self.training and "lbl" in self.coefficients:
            self.window.count(routing, mask)
            routing.losses["lbl"] = global_batch_lbl(self.window, routing.only(mask).probs)
        return routing


@dataclass(frozen=True)
class SparsityPlan:
    """How many experts each layer activates at each step.

    Args:
        stages: (first step, K of each layer), the first from step 0, in rising order.

    Raises:
        InputError: no stage, stages out of order, layers of different number, or a K below 1.
    """

    stages: Sequence[tuple[int, Sequence[int]]]

    def __post_init__(self):
        stages = tuple((int(start), tuple(map(int, top_k))) for start, top_k in self.stages)
        object.__setattr__(self, "stages", stages)
        starts = [start for start, _ in stages]
        if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise InputError(f"stages start at the steps {starts} but must start at 0 and rise")
        if len({len(top_k) for _, top_k in stages}) != 1 or not stages[0][1]:
            raise InputError(f"stages have {[len(k) for _, k in stages]} layers but must all have the same, at least 1")
        if min(k for _, top_k in stages for k in top_k) < 1:
            raise InputError(f"stages are {stages} but every K must be at least 1")

    @classmethod
    def constant(cls, n_layers: int, top_k: int = 1) -> "SparsityPlan":
        """The same K in every layer at every step: the baseline."""
        return cls([(0, [top_k] * n_layers)])

    @classmethod
    def progressive(cls, n_layers: int, total_steps: int, low: Sequence[int], switch_at: float = 0.9) -> "SparsityPlan":
        """K = `low` in the lower layers and 1 above, until `switch_at` of training; then 1 everywhere.

        Args:
            low: K of the first len(low) layers, e.g. from `geometric_low`.
            switch_at: share of `total_steps` made before the switch; at least one step on either side.
        """
        if not 1 <= len(low) <= n_layers:
            raise InputError(f"low has {len(low)} entries but must have between 1 and n_layers = {n_layers}")
        switch = round(switch_at * total_steps)
        if not 1 <= switch < total_steps:
            raise InputError(
                f"switch_at is {switch_at} (step {switch}) but must leave a step of the {total_steps} on either side"
            )
        return cls([(0, [*low, *[1] * (n_layers - len(low))]), (switch, [1] * n_layers)])

    @property
    def n_layers(self) -> int:
        return len(self.stages[0][1])

    @property
    def switches(self) -> tuple[int, ...]:
        """The steps at which K changes."""
        return tuple(start for start, _ in self.stages[1:])

    def at(self, step: int) -> tuple[int, ...]:
        """K of every layer at a step."""
        return next(top_k for start, top_k in reversed(self.stages) if start <= max(step, 0))

    def top_k(self, layer: int, step: int) -> int:
        """K of one layer (0-based, counted over the MoE layers) at a step."""
        return self.at(step)[layer]

    def apply(self, model: nn.Module, step: int) -> None:
        """Set K in every MoE layer of `model`; touches no parameter, so an optimizer goes on as it was."""
        for layer, top_k in zip(_layers(model, self), self.at(step), strict=True):
            layer.router.set_top_k(top_k)


def geometric_low(n_layers: int, k_max: int, n_low: int | None = None) -> list[int]:
    """A list for the lower layers of a small model: geometric descent from `k_max` to 2 over `n_low` layers.

    Default for `n_low`: ceil(L / 7), the proportion of the report (8 of 56 layers).
    """
    n_low = math.ceil(n_layers / 7) if n_low is None else n_low
    if not 1 <= n_low <= n_layers:
        raise InputError(f"n_low is {n_low} but must be between 1 and n_layers = {n_layers}")
    if k_max < 2:
        raise InputError(f"k_max is {k_max} but must be at least 2")
    return [round(k_max * (2 / k_max) ** (i / max(1, n_low - 1))) for i in range(n_low)]


class Sparsify(Hook):
    """Applies a plan in the training loop. It reads the step only, so a resumed run is at the right stage."""

    def __init__(self, plan: SparsityPlan):
        self.plan = plan

    def before_step(self, state: State) -> None:
        self.plan.apply(state.model, state.step)


def active_parameters(model: nn.Module, plan: SparsityPlan, step: int) -> int:
    """Parameters a token uses at a step of the plan: all of them but the experts it is not routed to."""
    idle = 0
    for layer, top_k in zip(_layers(model, plan), plan.at(step), strict=True):
        idle += count_params(layer.experts) * (layer.n_experts - top_k) // layer.n_experts
    return count_params(model) - idle


def _layers(model: nn.Module, plan: SparsityPlan) -> Iterable[MoELayer]:
    layers = moe_layers(model)
    if len(layers) != plan.n_layers:
        raise InputError(f"the plan has {plan.n_layers} layers but the model has {len(layers)} MoE layers")
    return layers.values()


def example() -> nn.Module:
    layer = MoELayer(GlobalBatchRouter(32, n_experts=8, coefficients={"lbl": 0.01}), GLUExperts(8, 32, 32))
    SparsityPlan.progressive(n_layers=1, total_steps=100, low=[4], switch_at=0.9).apply(layer, step=0)
    return layer
