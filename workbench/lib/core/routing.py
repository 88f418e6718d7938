"""What a router decides, and what it may know when it decides.

Tensor letters: N tokens, E experts, K active experts per token, P routed (token, expert) pairs.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from workbench.errors import InputError


@dataclass
class Routing:
    """The decision of one router for N tokens, as a token-major list of P (token, expert, weight) pairs.

    A list carries both a fixed and a variable number of experts per token; where the number is fixed, `indices` and
    `weights` give the familiar (N, K) view without a copy.

    Attributes:
        expert: (P,) expert of each pair; the pairs of token t are `expert[offsets[t]:offsets[t + 1]]`.
        weight: (P,) combine weight of each pair.
        offsets: (N + 1,) first pair of each token.
        n_experts: E.
        top_k: K where every token has exactly K experts, else None.
        probs: (N, E) full distribution over the experts, where the rule has one (rows sum to 1).
        logits: (N, E) scores before any normalisation, where the rule has them.
        losses: auxiliary losses by name, unweighted scalars.
        state: what the next layer's router receives (recurrent routers), else None.
        kept: (P,) False where a capacity limit drops the pair; None without a limit.
    """

    expert: Int64[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]
    offsets: Int64[Tensor, " tokens_plus_1"]
    n_experts: int
    top_k: int | None = None
    probs: Float[Tensor, "tokens experts"] | None = None
    logits: Float[Tensor, "tokens experts"] | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None
    kept: Bool[Tensor, " pairs"] | None = None

    @classmethod
    def fixed(
        cls, indices: Int64[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"], n_experts: int, **parts
    ) -> "Routing":
        """Exactly K experts per token, from the (N, K) views."""
        n_tokens, top_k = indices.shape
        offsets = torch.arange(0, n_tokens * top_k + 1, top_k, device=indices.device)
        return cls(indices.reshape(-1), weights.reshape(-1), offsets, n_experts, top_k, **parts)

    @classmethod
    def ragged(
        cls, mask: Bool[Tensor, "tokens experts"], weights: Float[Tensor, "tokens experts"], **parts
    ) -> "Routing":
        """A variable number of experts per token: the pairs where `mask` holds, with their dense `weights`."""
        token, expert = mask.nonzero(as_tuple=True)  # row-major, hence token-major
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(expert, weights[token, expert], offsets, mask.shape[1], None, **parts)

    @property
    def n_tokens(self) -> int:
        return self.offsets.numel() - 1

    @property
    def indices(self) -> Int64[Tensor, "tokens k"]:
        """(N, K) experts of each token; only where K is fixed."""
        return self.expert.view(self.n_tokens, self._fixed_k())

    @property
    def weights(self) -> Float[Tensor, "tokens k"]:
        """(N, K) combine weights; only where K is fixed."""
        return self.weight.view(self.n_tokens, self._fixed_k())

    @property
    def token(self) -> Int64[Tensor, " pairs"]:
        """(P,) token of each pair."""
        tokens = torch.arange(self.n_tokens, device=self.expert.device)
        if self.top_k is not None:
            return tokens.repeat_interleave(self.top_k)
        return tokens.repeat_interleave(self.active_counts, output_size=self.expert.numel())

    @property
    def first(self) -> Int64[Tensor, " tokens"]:
        """(N,) the expert of the largest weight of each token; only where K is fixed."""
        return self.indices.gather(1, self.weights.argmax(1, keepdim=True)).squeeze(1)

    @property
    def counts(self) -> Int64[Tensor, " experts"]:
        """(E,) pairs per expert, before any capacity limit."""
        return torch.bincount(self.expert, minlength=self.n_experts)

    @property
    def active_counts(self) -> Int64[Tensor, " tokens"]:
        """(N,) experts per token."""
        return self.offsets.diff()

    def mask(self) -> Bool[Tensor, "tokens experts"]:
        """(N, E) True where the token is assigned to the expert."""
        mask = torch.zeros(self.n_tokens, self.n_experts, dtype=torch.bool, device=self.expert.device)
        mask[self.token, self.expert] = True
        return mask

    def dense(self) -> Float[Tensor, "tokens experts"]:
        """(N, E) combine weights, zero where the token is not assigned; dropped pairs count as not assigned."""
        weight = self.weight if self.kept is None else self.weight * self.kept
        return self.weight.new_zeros(self.n_tokens, self.n_experts).index_put((self.token, self.expert), weight)

    def served(self) -> "Routing":
        """The pairs a capacity limit leaves (self where there is none): what an expert bank is given to compute."""
        if self.kept is None or bool(self.kept.all()):
            return self
        token = self.token[self.kept]
        offsets = torch.nn.functional.pad(torch.bincount(token, minlength=self.n_tokens).cumsum(0), (1, 0))
        return replace(
            self, expert=self.expert[self.kept], weight=self.weight[self.kept], offsets=offsets, top_k=None, kept=None
        )

    def only(self, mask: Bool[Tensor, " tokens"] | None) -> "Routing":
        """The decision for the tokens where `mask` holds, such as those that are no padding; None for all."""
        if mask is None:
            return self
        pairs = mask[self.token]
        offsets = torch.nn.functional.pad(self.active_counts[mask].cumsum(0), (1, 0))
        probs, logits = (None if part is None else part[mask] for part in (self.probs, self.logits))
        kept = None if self.kept is None else self.kept[pairs]
        own = {"expert": self.expert[pairs], "weight": self.weight[pairs], "offsets": offsets}
        return replace(self, **own, probs=probs, logits=logits, kept=kept)

    def _fixed_k(self) -> int:
        if self.top_k is None:
            raise InputError("this routing has a variable number of experts per token: use expert, weight and offsets")
        return self.top_k


@dataclass
class Context:
    """What travels with the hidden states through one forward pass: made anew for each, so nothing can be stale.

    Attributes:
        token_ids: (N,) vocabulary ids, for routers that look at the token itself (hash routing).
        domain: (N,) domain or task of each token.
        modality: (N,) modality of each token.
        mask: (N,) False for tokens that count in no balance loss and in no load and that no expert chooses, such as
            padding; None: all count.
        bias: (E,) on the selection, where it has moved since the call that is repeated; None: the router's own.
        prefix: (B,) tokens at the head of each row that see each other, before causal ones; see `prefix_mask`.
        state: the previous router's state (recurrent routers); None at the first MoE layer.
        aux: sum over layers of the weighted auxiliary losses; add it to the task loss before `backward`.
        calls: the calls of each layer in this pass, for checkpoints that repeat them; see `lib.core.recompute`.
        passed: how often each module has announced a decision in this pass, for those that are applied several times.
        notes: what modules write down for the rest of this pass, and for a checkpoint that repeats it, each its own.
    """

    token_ids: Int64[Tensor, " tokens"] | None = None
    domain: Int64[Tensor, " tokens"] | None = None
    modality: Int64[Tensor, " tokens"] | None = None
    mask: Bool[Tensor, " tokens"] | None = None
    bias: Float[Tensor, " experts"] | None = None
    prefix: Int64[Tensor, " batch"] | None = None
    state: Tensor | None = None
    aux: Tensor | float = 0.0
    calls: dict[Any, list] = field(default_factory=dict, repr=False)
    passed: dict[Any, int] = field(default_factory=dict, repr=False)
    notes: dict[Any, Any] = field(default_factory=dict, repr=False)


@runtime_checkable
class Router(Protocol):
    """Anything that maps hidden states to a `Routing`.

    Attributes:
        n_experts: E.
        top_k: K where it is fixed, else None.
        coefficients: weight of each auxiliary loss, by its name in `Routing.losses`.
    """

    n_experts: int
    top_k: int | None
    coefficients: dict[str, float]

    def __call__(self, x: Float[Tensor, "tokens dim"], context: Context) -> Routing: ...


@runtime_checkable
class Experts(Protocol):
    """A bank of experts: maps hidden states and a `Routing` over them to the weighted sum of expert outputs."""

    n_experts: int

    def __call__(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]: ...
