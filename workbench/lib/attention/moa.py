"""MoA: for every attention head its own span, a function of the length, found without training.

Fu et al. 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (arXiv:2406.14909).
A head h sees the first `sink` tokens and the last span_h(N) = alpha_h + beta_h N ones. The rules are found from a
trained dense model in three steps:

1. `attention_influence`: how much the loss would rise, to first order, if an entry of the attention matrix were masked
   and its row normalised again. On long inputs, with the loss on the answers alone, and with answers the dense model
   gives itself (`own_answers`).
2. `solve_spans`: an integer programme picks a rule for every head under a density budget at several lengths at once.
3. `best_plan`: of the Pareto set, the plan with the least loss at a longer length that was not profiled.

`use_spans` puts a plan into a model; `MoA` runs it and `HeteroKVCache` keeps for each head only what that head sees.

Against one window for all heads (Xiao et al. 2023, arXiv:2309.17453), new are spans that differ between heads and that
grow with the input.

Tensor letters: B batch, H heads, T and N tokens, D model width, d head width, L layers, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.kernels.span_attention import span_attention, span_decode
from workbench.lib.attention.moa_plan import Plan, SpanRule, block_count, per_key_head, solve_spans, span_rules
from workbench.lib.core.attention import Attention, rope
from workbench.lib.core.routing import Context

__all__ = [
    "HeteroKVCache",
    "MoA",
    "Plan",
    "SpanRule",
    "answer_loss",
    "attention_influence",
    "best_plan",
    "masking_effects",
    "own_answers",
    "per_key_head",
    "solve_spans",
    "span_rules",
    "use_spans",
]

METHOD = Method(
    slug="moa",
    title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    family="attention",
    year=2024,
    paper="arXiv:2406.14909",
    claim="An attention span fitted per head, growing with the length, keeps far more of the context's use than one "
    "span for all at equal mean span.",
    objects=(
        "MoA",
        "SpanRule",
        "Plan",
        "HeteroKVCache",
        "attention_influence",
        "own_answers",
        "span_rules",
        "solve_spans",
        "per_key_head",
        "use_spans",
        "answer_loss",
        "best_plan",
    ),
)


def example() -> nn.Module:
    """Four heads: a short window, one that grows by half the length, and two that see everything."""
    spans = [SpanRule(8, 0, sink=2), SpanRule(0, 0.5, sink=2), SpanRule(0, 1, sink=2), SpanRule(0, 1, sink=2)]
    return MoA(32, 4, spans)


class MoA(Attention):
    """Causal self-attention with a span for each head, (B, T, D) -> (B, T, D); its parameters are those of `Attention`.

    In `forward` the length of the rules is T, the length of the input. It can be trained, though the method does not.

    Args:
        rules: one for each head, or one for all; all with the same sink.
        rope: see `Attention`; keys are rotated by their position in the text, not in the window.
    """

    def __init__(self, d_model: int, n_heads: int, rules: SpanRule | Sequence[SpanRule], rope: bool = False):
        super().__init__(d_model, n_heads, causal=True, rope=rope)
        self.set_rules(rules)

    @classmethod
    def from_dense(cls, attention: Attention, rules: SpanRule | Sequence[SpanRule]) -> "MoA":
        """The same attention with spans: it shares the projections of `attention`."""
        if not attention.causal:
            raise InputError("attention is not causal but must be: a span reaches back from a token")
        width = attention.qkv.in_features
        with torch.device("meta"):
            made = cls(width, attention.n_heads, rules, attention.rope)
        made.qkv, made.out = attention.qkv, attention.out
        return made.train(attention.training)

    def set_rules(self, rules: SpanRule | Sequence[SpanRule]) -> None:
        """Replace the rules."""
        rules = (rules,) * self.n_heads if isinstance(rules, SpanRule) else tuple(rules)
        if len(rules) != self.n_heads:
            raise InputError(f"rules has {len(rules)} entries but must have one for each head, {self.n_heads}")
        if len({rule.sink for rule in rules}) > 1:
            raise InputError(f"rules have the sinks {sorted({rule.sink for rule in rules})} but must share one")
        self.rules, self.sink = rules, rules[0].sink

    def spans(self, length: int) -> list[int]:
        """(H,) spans at a length."""
        return [rule.span(length) for rule in self.rules]

    def forward(
        self, x: Float[Tensor, "*batch time dim"], context: Context | None = None
    ) -> Float[Tensor, "*batch time dim"]:
        q, k, v = (part.unsqueeze(0) if x.ndim == 2 else part for part in self.heads(x))
        y = span_attention(q, k, v, self.spans(x.shape[-2]), self.sink).transpose(1, 2).flatten(2)
        return self.out(y.squeeze(0) if x.ndim == 2 else y)

    def cache(self, length: int) -> "HeteroKVCache":
        """An empty cache for a text of up to `length` tokens, with the spans of that length."""
        return HeteroKVCache(self.spans(length), self.sink, length)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch new dim"], cache: "HeteroKVCache") -> Float[Tensor, "batch new dim"]:
        """The attention of new tokens that continue the text in `cache`, which takes them up.

        The first call may bring a whole prompt; after it each call brings one token.
        """
        if x.ndim != 3 or x.shape[1] == 0 or (cache.length and x.shape[1] > 1):
            raise InputError(
                f"x has shape {tuple(x.shape)} but must be (batch, new, dim) with at least one new token, and with "
                f"exactly one once the cache holds text (it holds {cache.length} tokens)"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.rope:
            q, k = rope(q, offset=cache.length), rope(k, offset=cache.length)
        prompt = not cache.length
        cache.append(k, v)
        if prompt:
            y = span_attention(q, k, v, cache.spans, self.sink)
        else:
            y = span_decode(q.squeeze(2), cache.k, cache.v, cache.start, cache.lengths).unsqueeze(2)
        return self.out(y.transpose(1, 2).flatten(2))


class HeteroKVCache:
    """Keys and values of the tokens that each head still sees: the first `sink`, and a ring of its last span.

    A token keeps its slot until it leaves the window; keys carry their position (they are cached rotated), so the
    order of slots does not matter. All heads lie one after the other in one tensor.

    Args:
        spans: (H,) of the key heads, at least 1.
        sink: first tokens that are never dropped.
        max_length: tokens that will ever be appended; None for no limit.

    Attributes:
        length: tokens appended so far.
        k, v: (B, slots, d) the storage; of head h the slots start[h] .. start[h] + lengths[h] are in use.
    """

    def __init__(self, spans: Sequence[int], sink: int, max_length: int | None = None):
        self.spans = list(spans)
        if not self.spans or min(self.spans) < 1:
            raise InputError(f"spans is {self.spans} but must hold at least one entry, each at least 1")
        if sink < 0:
            raise InputError(f"sink is {sink} but must be at least 0")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length} but must be at least 1")
        self.sink, self.max_length, self.length = sink, max_length, 0
        limit = max_length if max_length is not None else sink + max(self.spans)
        self.capacity = [min(sink + span, limit) for span in self.spans]
        self.start = [sum(self.capacity[:head]) for head in range(len(self.spans))]
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """(H,) tokens held: min(length, sink + span)."""
        return [min(self.length, capacity) for capacity in self.capacity]

    @property
    def nbytes(self) -> int:
        """Bytes held, of keys and values of the whole batch: B sum_h min(N, sink + span_h) 2 d bytes-per-number."""
        if self.k is None:
            return 0
        return sum(self.lengths) * self.k.shape[0] * self.k.shape[2] * 2 * self.k.element_size()

    def append(self, k: Float[Tensor, "batch heads new d"], v: Float[Tensor, "batch heads new d"]) -> None:
        """Take up new tokens and drop what no later token sees."""
        if k.ndim != 4 or k.shape != v.shape or k.shape[1] != len(self.spans):
            raise InputError(
                f"k and v have shapes {tuple(k.shape)} and {tuple(v.shape)} but must both be "
                f"(batch, {len(self.spans)}, new, d)"
            )
        new, total = k.shape[2], self.length + k.shape[2]
        if self.max_length is not None and total > self.max_length:
            raise InputError(f"k brings {new} tokens to {self.length} but max_length is {self.max_length}")
        if self.k is None:
            self.k, self.v = (k.new_empty(k.shape[0], sum(self.capacity), k.shape[3]) for _ in range(2))
        elif (k.shape[0], k.shape[3], k.dtype) != (self.k.shape[0], self.k.shape[2], self.k.dtype):
            raise InputError(
                f"k is {k.dtype} of shape {tuple(k.shape)} but the cache holds {self.k.dtype} of batch "
                f"{self.k.shape[0]} and width {self.k.shape[2]}"
            )
        token = torch.arange(self.length, total)
        start, ring = torch.tensor(self.start)[:, None], torch.tensor(self.capacity)[:, None] - self.sink
        slot = torch.where(token < self.sink, token, self.sink + (token - self.sink) % ring.clamp_min(1)) + start
        kept = (token < self.sink) | (token >= total - ring)  # a prompt may be longer than the window
        heads, new = kept.nonzero(as_tuple=True)
        index, heads, new = (x.to(k.device) for x in (slot[kept], heads, new))
        self.k.index_copy_(1, index, k.detach()[:, heads, new])
        self.v.index_copy_(1, index, v.detach()[:, heads, new])
        self.length = total

    def view(self, head: int) -> tuple[Float[Tensor, "batch held d"], Float[Tensor, "batch held d"]]:
        """The keys and values that a head holds, the oldest first."""
        if self.k is None:
            raise InputError("the cache is empty: append to it first")
        if not 0 <= head < len(self.spans):
            raise InputError(f"head is {head} but must be between 0 and {len(self.spans) - 1}")
        held, ring = self.lengths[head], self.capacity[head] - self.sink
        order = list(range(held))
        if ring > 0 and self.length > self.sink + ring:  # the ring has wrapped: its oldest token is anywhere in it
            turn = (self.length - self.sink) % ring
            order = [*range(self.sink), *(self.sink + (turn + i) % ring for i in range(ring))]
        slots = self.start[head] + torch.tensor(order, device=self.k.device)
        return self.k[:, slots], self.v[:, slots]


def attention_layers(model: nn.Module) -> list[Attention]:
    """The attention modules of a model, in order; all must be causal and have the same number of heads."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without an Attention of workbench.lib.core.attention")
    for layer in layers:
        if not layer.causal or layer.n_heads != layers[0].n_heads:
            raise InputError("model has attention layers that are not causal or differ in their number of heads")
    return layers


def attention_influence(
    model: nn.Module,
    tokens: Int64[Tensor, "batch time"],
    answers: Bool[Tensor, "batch time"],
    block: int,
) -> Float[Tensor, "layers heads nb nb"]:
    """How much the loss on the answers depends on each block of each head's attention matrix.

    With A the attention matrix and G = dL/dA, masking entry (i, j) and normalising row i again changes the loss, to
    first order in the change of the row, by

        E_ij = -A_ij (G_ij - sum_k A_ik G_ik) / (1 - A_ij)

    (row 0, whose only entry has no other to take its place: -A G). The result is |E|, summed over the entries of a
    block, averaged over the batch. L is the mean loss on the answers of a sample.

    Args:
        model: maps tokens (B, T) to logits (B, T, V); dense.
        tokens: long inputs with answers in them, see `own_answers`; T a multiple of `block`.
        answers: which tokens are answers; each is predicted at the position before it, so none is at position 0.
        block: tokens a block.
    """
    block_count(tokens.shape[-1], block)
    effects = masking_effects(model, tokens, answers)
    return torch.stack([F.avg_pool2d(effect.abs(), block, divisor_override=1).mean(0) for effect in effects])


def masking_effects(
    model: nn.Module, tokens: Int64[Tensor, "batch time"], answers: Bool[Tensor, "batch time"]
) -> Iterator[Float[Tensor, "batch heads time time"]]:
    """E of `attention_influence`, entry by entry and with its sign, layer by layer: each sample of its own loss."""
    layers, inputs, outputs = attention_layers(model), {}, {}
    if any(isinstance(layer, MoA) for layer in layers):
        raise InputError("model has spans already but must be dense: the influence of what is left out is not seen")

    def note(layer: Attention, args: tuple) -> None:
        inputs[layer] = args[0].detach()

    def keep(layer: Attention):
        def hook(_: nn.Module, args: tuple) -> tuple:
            outputs[layer] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (outputs[layer],)

        return hook

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    handles += [layer.out.register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        with torch.enable_grad():
            losses = _answer_losses(model, tokens, answers)
            gradients = torch.autograd.grad(losses.sum(), [outputs[layer] for layer in layers])
    finally:
        for handle in handles:
            handle.remove()
    for layer, gradient in zip(layers, gradients, strict=True):
        with torch.no_grad():
            by_head = gradient.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
            yield _masking_effect(*layer.heads(inputs[layer]), by_head)


def _masking_effect(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
    """E (B, H, T, T) from the heads (B, H, T, d) and the gradient of the loss in their outputs; float32 at least."""
    q, k, v, gradient = (x.float() if x.element_size() < 4 else x for x in (q, k, v, gradient))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    a = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    g = gradient @ v.mT
    mean = (a * g).sum(-1, keepdim=True)
    effect = -a * (g - mean) / (1 - a + torch.finfo(a.dtype).eps)
    effect[..., 0, :] = -(a * g)[..., 0, :]
    return effect.masked_fill(~causal, 0)


def _answer_losses(model: nn.Module, tokens: Tensor, answers: Tensor) -> Float[Tensor, " batch"]:
    """The mean loss (nats) on the answers of each sample."""
    _check_answers(tokens, answers)
    logits = model(tokens, Context())[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return (losses * answers[:, 1:]).sum(1) / answers.sum(1)


def answer_loss(model: nn.Module, tokens: Int64[Tensor, "batch time"], answers: Bool[Tensor, "batch time"]) -> float:
    """The mean over samples of the mean loss (nats) on a sample's answers."""
    with torch.no_grad():
        return float(_answer_losses(model, tokens, answers).mean())


@torch.no_grad()
def own_answers(
    model: nn.Module, tokens: Int64[Tensor, "batch time"], answers: Bool[Tensor, "batch time"]
) -> Int64[Tensor, "batch time"]:
    """The tokens with every answer replaced by what the model says itself, greedily and from left to right."""
    _check_answers(tokens, answers)
    tokens = tokens.clone()
    rank = answers.cumsum(1)
    for turn in range(1, int(rank.max()) + 1):  # the first answer of every sample, the second, ...
        rows, places = (answers & (rank == turn)).nonzero(as_tuple=True)
        logits = model(tokens[rows, : int(places.max())], Context())
        tokens[rows, places] = logits[torch.arange(len(rows)), places - 1].argmax(-1)
    return tokens


def use_spans(model: nn.Module, plan: Plan) -> nn.Module:
    """Put a plan into a model, in place: every attention becomes a `MoA` that shares its projections."""
    layers = attention_layers(model)
    shape = (len(plan.rules), len(plan.rules[0]))
    if shape != (len(layers), layers[0].n_heads):
        raise InputError(f"plan is for {shape} but must be for {(len(layers), layers[0].n_heads)}, (layers, heads)")
    rules = dict(zip(layers, plan.rules, strict=True))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in rules:
                setattr(parent, name, MoA.from_dense(child, rules[child]))
    return model


def best_plan(
    model: nn.Module, plans: Sequence[Plan], tokens: Int64[Tensor, "batch time"], answers: Bool[Tensor, "batch time"]
) -> tuple[Plan, list[float]]:
    """The plan with the least loss on validation answers, of a length that was not profiled; and the loss of each.

    The model keeps the plan.
    """
    if not plans:
        raise InputError("plans is empty but must hold at least one plan")
    if tokens.shape[1] in plans[0].losses:
        raise InputError(f"tokens has length {tokens.shape[1]}, which was profiled; validate at an unseen length")
    losses = [answer_loss(use_spans(model, plan), tokens, answers) for plan in plans]
    best = plans[min(range(len(plans)), key=losses.__getitem__)]
    use_spans(model, best)
    return best, losses


def _check_answers(tokens: Tensor, answers: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape != answers.shape:
        raise InputError(
            f"tokens and answers have shapes {tuple(tokens.shape)} and {tuple(answers.shape)} but must both be "
            "(batch, time)"
        )
    if answers[:, 0].any() or not answers.any(1).all():
        raise InputError("answers must hold a token of each sample, and not its first one, which nothing predicts")
