"""Counts collected over many batches: routing of all layers, and gradient conflict of parameter groups.

Meters hold sums only, so two meters of the same shape (of two batches, or of two machines) add up to the meter of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from workbench.errors import InputError, unknown
from workbench.lib.measures import routing
from workbench.lib.measures.coactivation import CoactivationMatrix, coactivation, pair_sums, selection_mask
from workbench.lib.measures.conflict import ConflictStats, conflict_stats, gramians
from workbench.lib.measures.gradients import Gradients, Groups, check_groups, gradients, of_member, size
from workbench.lib.measures.transition import transition_probability


@dataclass
class LayerCounts:
    """Sums over the tokens of one layer; counts are int64, so that adding is exact.

    Attributes:
        tokens: N.
        pairs: (E, E) co-activation counts; the diagonal holds the load n.
        transition: (E, E') tokens by expert here and in the next layer; None for the last layer.
        probabilities: number of tokens with probabilities.
        importance: (E,) sum of p.
        confidence: sum of max_i p.
        token_entropy: sum of H(p) / ln E.
        limited: (4,) under a capacity limit: pairs, pairs dropped, tokens, tokens without any pair left.
    """

    tokens: Int64[Tensor, ""]
    pairs: Int64[Tensor, "experts experts"]
    transition: Int64[Tensor, "experts next_experts"] | None
    probabilities: Int64[Tensor, ""]
    importance: Float64[Tensor, " experts"]
    confidence: Float64[Tensor, ""]
    token_entropy: Float64[Tensor, ""]
    limited: Int64[Tensor, "4"]


class RoutingMeter:
    """Routing of several MoE layers, summed over batches.

    Args:
        layers: names of the layers in the order tokens pass them.
        n_experts: E of every layer, or one number for each.
        top_k: K, or None where it varies.

    Updates of one forward pass must come in the order of `layers`: the transition to the next layer is counted when
    that layer is updated with the same number of tokens right after.
    """

    def __init__(self, layers: Sequence[str], n_experts: int | Sequence[int], top_k: int | None):
        sizes = [n_experts] * len(layers) if isinstance(n_experts, int) else list(n_experts)
        if len(set(layers)) != len(layers) or len(sizes) != len(layers) or not layers:
            raise InputError(
                f"layers is {list(layers)} with n_experts {sizes} but must be distinct names, one size each"
            )
        if top_k is not None and not 1 <= top_k <= min(sizes):
            raise InputError(f"top_k is {top_k} but must be between 1 and n_experts = {min(sizes)}")
        self.layers = tuple(layers)
        self.n_experts = dict(zip(layers, sizes, strict=True))
        self.top_k = top_k
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._counts = {layer: self._empty(layer) for layer in self.layers}
        self._previous: tuple[str, Tensor] | None = None

    def _empty(self, layer: str) -> LayerCounts:
        n, following = self.n_experts[layer], self._next(layer)
        integer, real = {"dtype": torch.int64}, {"dtype": torch.float64}
        return LayerCounts(
            tokens=torch.zeros((), **integer),
            pairs=torch.zeros(n, n, **integer),
            transition=None if following is None else torch.zeros(n, self.n_experts[following], **integer),
            probabilities=torch.zeros((), **integer),
            importance=torch.zeros(n, **real),
            confidence=torch.zeros((), **real),
            token_entropy=torch.zeros((), **real),
            limited=torch.zeros(4, **integer),
        )

    def update(
        self,
        layer: str,
        selection: Int[Tensor, "tokens k"] | Bool[Tensor, "tokens experts"],
        probs: Float[Tensor, "tokens experts"] | None = None,
        kept: Bool[Tensor, "tokens _"] | None = None,
        mask: Bool[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add one batch of one layer.

        Args:
            layer: its name.
            selection: chosen experts before any capacity limit: (N, K) indices, or an (N, E) mask.
            probs: router probabilities over all experts.
            kept: in the shape of `selection`, False for the pairs a capacity limit drops.
            mask: False for padding, which is left out of everything.
        """
        counts = self._of(layer)
        real = slice(None) if mask is None else mask
        selected = selection if selection.dtype == torch.bool else selection_mask(selection, self.n_experts[layer])
        selected = selected[real]
        counts.tokens += len(selected)
        counts.pairs += pair_sums(selected, selected).cpu()
        if kept is not None:
            left = kept & selection if selection.dtype == torch.bool else kept
            counts.limited += _limited(selected.sum(-1), left[real].sum(-1)).cpu()
        if probs is not None and len(selected):
            p = probs[real].detach()
            counts.probabilities += len(p)
            counts.importance += p.double().sum(0).cpu()
            counts.confidence += len(p) * routing.router_confidence(p).cpu()
            counts.token_entropy += len(p) * routing.token_entropy(p).cpu()
        self._count_transition(layer, selected)

    def _count_transition(self, layer: str, selected: Tensor) -> None:
        if self._previous is not None:
            before, mask = self._previous
            if self._next(before) == layer and len(mask) == len(selected):
                self._counts[before].transition += pair_sums(mask, selected).cpu()
        self._previous = (layer, selected)

    def _next(self, layer: str) -> str | None:
        following = self.layers.index(layer) + 1
        return self.layers[following] if following < len(self.layers) else None

    def _of(self, layer: str) -> LayerCounts:
        if layer not in self._counts:
            raise unknown("layer", layer, self.layers)
        return self._counts[layer]

    def counts(self, layer: str) -> LayerCounts:
        """The sums of one layer."""
        return self._of(layer)

    def summary(self) -> dict[str, routing.LoadStats]:
        """Load statistics of every layer over all batches so far (NaN where there were none)."""
        return {layer: self._load_stats(layer) for layer in self.layers}

    def _load_stats(self, layer: str) -> routing.LoadStats:
        counts = self._counts[layer]
        load = counts.pairs.diagonal()
        if self.top_k is not None:
            return routing.load_stats(load, self.top_k, counts.tokens)
        mean_k = float(load.sum() / counts.tokens) if load.any() else 1.0
        return routing.load_stats(load, mean_k, counts.tokens)

    def importance(self, layer: str) -> Float64[Tensor, " experts"]:
        """P, the mean probability of every expert; NaN if no probabilities were given."""
        return self._of(layer).importance / self._of(layer).probabilities

    def confidence(self, layer: str) -> Float64[Tensor, ""]:
        """Mean over tokens of the largest probability."""
        return self._of(layer).confidence / self._of(layer).probabilities

    def token_entropy(self, layer: str) -> Float64[Tensor, ""]:
        """Mean over tokens of H(p) / ln E."""
        return self._of(layer).token_entropy / self._of(layer).probabilities

    def drop_rates(self, layer: str) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
        """(pairs dropped, tokens with all pairs dropped) as shares; NaN without a capacity limit."""
        pairs, pairs_dropped, tokens, tokens_dropped = self._of(layer).limited.double()
        return pairs_dropped / pairs, tokens_dropped / tokens

    def coactivation(self, layer: str, kind: str = "lift_corrected") -> CoactivationMatrix:
        """One kind of co-activation matrix; see `measures.coactivation.coactivation`."""
        return coactivation(self._of(layer).pairs, kind, int(self._of(layer).tokens))

    def transition(self, layer: str) -> Float64[Tensor, "experts next_experts"]:
        """P(expert j in the next layer | expert i in this one)."""
        counts = self._of(layer).transition
        if counts is None:
            raise InputError(f"layer is {layer!r}, the last one, but must have a layer after it")
        following = self._of(self._next(layer))
        mean_k = float(following.pairs.diagonal().sum() / following.tokens)
        return transition_probability(counts, self.top_k or mean_k)

    def __add__(self, other: "RoutingMeter") -> "RoutingMeter":
        """The meter of the batches of both."""
        if (self.n_experts, self.top_k) != (other.n_experts, other.top_k) or self.layers != other.layers:
            raise InputError("the two meters must have the same layers, numbers of experts and top_k")
        total = RoutingMeter(self.layers, list(self.n_experts.values()), self.top_k)
        for layer in self.layers:
            a, b = vars(self._counts[layer]), vars(other._counts[layer])
            total._counts[layer] = LayerCounts(**{k: None if a[k] is None else a[k] + b[k] for k in a})
        return total


def _limited(chosen: Int64[Tensor, " tokens"], left: Int64[Tensor, " tokens"]) -> Int64[Tensor, "4"]:
    used = chosen > 0
    return torch.stack([chosen.sum(), (chosen - left).sum(), used.sum(), (used & (left == 0)).sum()])


class ConflictMeter:
    """Gradient conflict between tasks on groups of parameters; groups may overlap (a layer is part of the trunk).

    Args:
        groups: members of each group, by name; see `measures.gradients`.
    """

    def __init__(self, groups: Groups):
        check_groups(groups)
        self.groups = {name: list(group) for name, group in groups.items()}
        self.n_parameters = {name: size(group) for name, group in self.groups.items()}

    def gradients(self, losses: Mapping[str, Callable[[int], Tensor]]) -> list[list[Gradients]]:
        """Of each half the gradients of every task, in their order; one backward pass each, `.grad` stays untouched.

        Args:
            losses: by task, a function of the half (0 or 1) that returns the task's own mean loss on that half batch.
                The halves must be independent samples.
        """
        return [
            [gradients(lambda loss=loss, half=half: loss(half), self.groups) for loss in losses.values()]
            for half in range(2)
        ]

    def gramians(self, losses: Mapping[str, Callable[[int], Tensor]]) -> dict[str, Float64[Tensor, "3 tasks tasks"]]:
        """[G1, G2, X] of every group, from the `gradients` of these losses."""
        return self.gramians_of(self.gradients(losses))

    def gramians_of(self, halves: list[list[Gradients]]) -> dict[str, Float64[Tensor, "3 tasks tasks"]]:
        """[G1, G2, X] of every group, from what `gradients` found."""
        return {
            name: gramians(*([[of_member(member, task) for member in group] for task in tasks] for tasks in halves))
            for name, group in self.groups.items()
        }

    def measure(self, losses: Mapping[str, Callable[[int], Tensor]]) -> dict[str, ConflictStats]:
        """Conflict of every group; the tasks are in the order of `losses`."""
        return {name: conflict_stats(g, self.n_parameters[name]) for name, g in self.gramians(losses).items()}
