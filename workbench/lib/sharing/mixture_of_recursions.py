"""Mixture-of-Recursions: one block of layers, and for every token the number of times it is applied.

Bae et al. 2025, "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation"
(arXiv:2507.10524; raymin0223/mixture_of_recursions). A recursive Transformer applies one block R times to all tokens.
Here a router of one number a token decides who goes on. Only those are computed, seen by others and cached.

- `ExpertChoiceMoR`: a recursion takes the k tokens of a sequence that its router scores highest, out of those that the
  one before took. That looks at later tokens; so a loss teaches the router to say by itself, for each token alone,
  whether it will be taken, and in evaluation this is asked.
- `TokenChoiceMoR`: a router tells each token its depth at the start.

Keys and values are those of the tokens in the same recursion (kv="cache"), or those that the first recursion made of
all tokens (kv="share").

Where the printed method and the released code part, or leave a choice:

- The released update adds the gated output of the block, which holds its input already: h + s f(h). It is "paper". At
  s = 1 that is no recursive Transformer; h + s (f(h) - h) is, and is "residual".
- The released expert choice goes on choosing the k best in evaluation, which looks into the future. Here it asks the
  threshold, and the k best only where `evaluate_by` says so, to measure what that flatters. A recursion that takes all
  candidates in training, as the first one does, takes all in evaluation: it was never taught to refuse one.
- The released random router draws the gate as well. Here the choice alone is drawn, the gate stays learned: it is the
  control that says whether it matters who is taken.

Tensor letters: N tokens (B x T), B batch, T time, D model width, R recursions, k tokens a recursion takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.attention import Attention
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import Block
from workbench.lib.core.observe import Announcing
from workbench.lib.core.routers import LinearRouter, check_finite
from workbench.lib.core.routing import Context, Routing
from workbench.lib.sharing.recursions import (
    KV,
    Decoding,
    Memory,
    MoRCache,
    OwnKeys,
    RecursiveBlock,
    SharedKeys,
    SharedStack,
    gathered,
    mor_flops,
    narrowed,
    shared_layers,
)

__all__ = [
    "Decoding",
    "ExpertChoiceMoR",
    "MoRCache",
    "MoRStats",
    "RecursiveBlock",
    "SharedStack",
    "TokenChoiceMoR",
    "mor_flops",
    "shared_layers",
]

METHOD = Method(
    slug="mixture-of-recursions",
    title="Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
    family="sharing",
    year=2025,
    paper="arXiv:2507.10524",
    claim="A shared block applied a learned number of times per token reaches lower perplexity at equal training FLOPs "
    "with fewer parameters.",
    objects=(
        "ExpertChoiceMoR",
        "TokenChoiceMoR",
        "RecursiveBlock",
        "SharedStack",
        "MoRStats",
        "MoRCache",
        "Decoding",
        "mor_flops",
        "shared_layers",
    ),
)

UPDATES = ("paper", "residual")
SAMPLINGS = ("aux_loss", "aux_router")
SELECTIONS = ("threshold", "top-k")


def example() -> nn.Module:
    """One layer, up to three times; each recursion takes the best two thirds, then third, of a sequence."""
    layer = Block(32, GLU(32, 64), Attention(32, 4, causal=True, rope=True))
    return ExpertChoiceMoR(RecursiveBlock([layer]), n_recursions=3)


@dataclass
class MoRStats:
    """What one forward decided.

    Attributes:
        active: (R, B, T) who took part in each recursion.
        scores: (R, B, T) the factor each output was added with; 0 where it was not.
        logits: (R, B, T) what was asked: of expert choice, whether a token passes (above 0) by itself.
        losses: auxiliary losses by name, unweighted scalars.
        sampling_accuracy: (R,) share of a recursion's candidates that the threshold would have decided as the k best
            did; None where it decided itself, or nobody asks it.
    """

    active: Bool[Tensor, "recursions batch time"]
    scores: Float[Tensor, "recursions batch time"]
    logits: Float[Tensor, "recursions batch time"]
    losses: dict[str, Tensor] = field(default_factory=dict)
    sampling_accuracy: Float[Tensor, " recursions"] | None = None

    @property
    def depth(self) -> Int64[Tensor, "batch time"]:
        """How often the block was applied to each token."""
        return self.active.sum(0)


class _Recursions(Announcing):
    """What both ways to choose have in common; announces recursions as the places a token is sent to."""

    recursive = True
    top_k = None

    def __init__(self, block: RecursiveBlock, n_recursions: int, kv: str):
        super().__init__()
        if n_recursions < 1:
            raise InputError(f"n_recursions is {n_recursions} but must be at least 1")
        if kv not in KV:
            raise unknown("kv", kv, KV)
        self.block, self.n_recursions, self.kv = block, n_recursions, kv

    @property
    def n_experts(self) -> int:
        """R: a recursion stands where others have an expert."""
        return self.n_recursions

    def forward(self, x: Float[Tensor, "..."], context: Context | None = None) -> Float[Tensor, "..."]:
        """(B, T, D) -> (B, T, D); a single sequence (T, D) is a batch of one. Losses are added to `context.aux`."""
        return self.recur(x, context)[0]

    def recur(self, x: Float[Tensor, "..."], context: Context | None = None) -> tuple[Tensor, MoRStats]:
        """The same, and what was decided on the way."""
        if x.ndim not in (2, 3) or x.shape[-1] != self.block.width or 0 in x.shape:
            raise InputError(
                f"x has shape {tuple(x.shape)} but must be (time, {self.block.width}) or (batch, time, "
                f"{self.block.width}) with at least one token"
            )
        context = context if context is not None else Context()
        batch = x if x.ndim == 3 else x[None]
        y, stats = self._pass(batch, context, SharedKeys() if self.kv == "share" else OwnKeys())
        self._tell(stats, context)
        return y.view_as(x), stats

    def cache(self) -> MoRCache:
        """An empty cache for a text that grows."""
        return MoRCache(self.kv, self.n_recursions, len(self.block.layers))

    @torch.no_grad()
    def step(
        self, x: Float[Tensor, "batch new dim"], cache: MoRCache, context: Context | None = None
    ) -> Float[Tensor, "batch new dim"]:
        """The output at new tokens that continue the text in `cache`, which takes them up; any number at a time."""
        if cache.policy != self.kv:
            raise InputError(f"cache has the policy {cache.policy!r} but must have {self.kv!r}, as this module")
        context = context if context is not None else Context()
        y, stats = self._pass(x, context, cache)
        cache.length += x.shape[1]
        self._tell(stats, context)
        return y

    def _tell(self, stats: MoRStats, context: Context) -> None:
        for name, loss in stats.losses.items():
            context.aux = context.aux + self._coefficients()[name] * loss
        if self.observed:
            parts = (stats.active, stats.scores, stats.logits)
            mask, scores, logits = (part.movedim(0, -1).flatten(0, 1) for part in parts)
            self.announce(Routing.ragged(mask, scores, logits=logits, losses=stats.losses), context)

    def _recursion(
        self, r: int, h: Tensor, active: Tensor, gate: Tensor | None, update: str, context: Context, memory: Memory
    ) -> Tensor:
        """One recursion of the active tokens: they are gathered, computed, gated and put back; the others stay."""
        if not bool(active.any()):
            return h
        places, real = gathered(active)
        index = places[..., None].expand(-1, -1, h.shape[-1])
        old, inner = h.gather(1, index), narrowed(context, places, real, h.shape[1])
        new = self.block(old, inner, memory.length + places, memory.attend(r, real))
        context.aux = context.aux + inner.aux
        if gate is not None:
            score = gate.gather(1, places)[..., None]
            new = old + score * (new if update == "paper" else new - old)
        return h.scatter(1, index, new if real is None else torch.where(real[..., None], new, old))


class ExpertChoiceMoR(_Recursions):
    """Each recursion takes its k best tokens of every sequence, out of those that the recursion before took.

    In training mode k_r = max(1, floor(c_r T)) tokens of the highest logits z_r = g_r(h), which looks at the whole
    sequence. In evaluation mode all candidates with sigmoid(z_r) > 1/2, which looks at a token alone; or simply all,
    where c_r is that of the recursion before. A taken token becomes h + s f(h), or h + s (f(h) - h), with
    s = alpha sigmoid(z_r).

    Args:
        block: f.
        n_recursions: R, the most that a token passes.
        capacities: c_1 .. c_R, in (0, 1] and none above the one before; None for (R - r + 1) / R.
        alpha: of the score; at 0 the module is the identity.
        aux_coeff: weight of the loss "sampling", the sum over recursions of the mean cross-entropy between z_r and who
            was taken, over the candidates. Its gradient reaches the hidden states.
        kv: "cache" or "share", see the module.
        update: "paper", h + s f(h), or "residual", h + s (f(h) - h).
        sampling: "aux_loss"; or "aux_router", where a second router a recursion learns who is taken, from hidden
            states that get no gradient of it, and is asked in evaluation.
        choice: "learned"; or "random", where tokens are drawn at the same capacities, in evaluation each candidate with
            probability c_r / c_(r-1), and nothing has to learn who is taken.
        warmup: steps over which all capacities come down from 1 along a cosine; 0 for none.

    Attributes:
        evaluate_by: "threshold"; or "top-k", to measure what the look at later tokens is worth.
    """

    def __init__(
        self,
        block: RecursiveBlock,
        n_recursions: int,
        capacities: Sequence[float] | None = None,
        alpha: float = 0.1,
        aux_coeff: float = 1e-3,
        kv: str = "cache",
        update: str = "paper",
        sampling: str = "aux_loss",
        choice: str = "learned",
        warmup: int = 0,
    ):
        super().__init__(block, n_recursions, kv)
        if capacities is None:
            capacities = [(n_recursions - r) / n_recursions for r in range(n_recursions)]
        self.capacities = [float(capacity) for capacity in capacities]
        falling = all(a >= b for a, b in zip([1.0, *self.capacities], self.capacities, strict=False))
        if len(self.capacities) != n_recursions or not falling or not self.capacities[-1] > 0:
            raise InputError(
                f"capacities is {self.capacities} but must be {n_recursions} shares above 0 and at most 1, none above "
                "the one before"
            )
        for name, value in (("alpha", alpha), ("aux_coeff", aux_coeff), ("warmup", warmup)):
            if not value >= 0:
                raise InputError(f"{name} is {value} but must be at least 0")
        allowed = {"update": (update, UPDATES), "sampling": (sampling, SAMPLINGS)}
        allowed["choice"] = (choice, ("learned", "random"))
        for name, (value, values) in allowed.items():
            if value not in values:
                raise unknown(name, value, values)
        self.alpha, self.aux_coeff, self.warmup, self.update, self.choice = alpha, aux_coeff, warmup, update, choice
        self.evaluate_by = "threshold"
        self.routers = _routers(block.width, n_recursions)
        second = sampling == "aux_router" and choice == "learned"
        self.samplers = _routers(block.width, n_recursions) if second else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def capacity(self, recursion: int) -> float:
        """c_r of a recursion (0-based), at the step that training has reached."""
        capacity = self.capacities[recursion]
        if not self.warmup or not self.training:
            return capacity
        progress = min(1.0, int(self.steps) / self.warmup)
        return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * progress))

    def kept(self, recursion: int, time: int) -> int:
        """k_r = max(1, floor(c_r T))."""
        return max(1, math.floor(self.capacity(recursion) * time + 1e-9))

    def after_step(self) -> None:
        """Called by the training loop after each optimizer step."""
        self.steps += 1

    def _coefficients(self) -> dict[str, float]:
        return {"sampling": self.aux_coeff}

    def _pass(self, x: Tensor, context: Context, memory: Memory) -> tuple[Tensor, MoRStats]:
        if context.mask is not None and not bool(context.mask.all()):
            raise InputError("context.mask leaves tokens out, but expert choice takes shares of whole sequences")
        if self.evaluate_by not in SELECTIONS:
            raise unknown("evaluate_by", self.evaluate_by, SELECTIONS)
        best = self.training or self.evaluate_by == "top-k"
        if best and isinstance(memory, MoRCache):
            raise InputError(
                "the k best of a text that still grows are not known: call eval(), evaluate_by='threshold'"
            )
        h, active = x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        chosen, scores, questions, losses, accuracies = [], [], [], [], []
        for r in range(self.n_recursions):
            logits = self.routers[r](h).squeeze(-1)
            check_finite(logits)
            asked = logits if self.samplers is None else self.samplers[r](h.detach()).squeeze(-1)
            taken = self._best(r, logits, active) if best else self._passed(r, asked, active)
            if best and self.choice == "learned":
                target = taken[active].to(asked.dtype)
                losses.append(F.binary_cross_entropy_with_logits(asked[active], target))
                accuracies.append((self._passed(r, asked, active) == taken)[active].double().mean())
            gate = self.alpha * torch.sigmoid(logits)
            # shared keys are those of all tokens: the first recursion computes all, and puts back those it took
            everyone = self.kv == "share" and r == 0 and not bool(taken.all())
            computed = torch.ones_like(taken) if everyone else taken
            after = self._recursion(r, h, computed, gate, self.update, context, memory)
            h = torch.where(taken[..., None], after, h) if everyone else after
            active = taken
            chosen.append(taken)
            scores.append(torch.where(taken, gate, 0))
            questions.append(asked)
        stats = MoRStats(torch.stack(chosen), torch.stack(scores), torch.stack(questions))
        if losses:
            stats.losses["sampling"], stats.sampling_accuracy = sum(losses), torch.stack(accuracies)
        return h, stats

    def _best(self, r: int, logits: Tensor, active: Tensor) -> Tensor:
        """(B, T) the k of highest logits among the candidates, or k drawn ones."""
        marks = torch.rand_like(logits) if self.choice == "random" else logits.detach()
        best = marks.masked_fill(~active, -math.inf).topk(self.kept(r, logits.shape[1]), dim=1).indices
        return torch.zeros_like(active).scatter(1, best, True)

    def _passed(self, r: int, asked: Tensor, active: Tensor) -> Tensor:
        """(B, T) the candidates that their own logit lets pass, or drawn ones; all where none was ever refused."""
        share = self.capacities[r] / (self.capacities[r - 1] if r else 1.0)
        if share == 1:
            return active
        return active & (torch.rand_like(asked) < share if self.choice == "random" else asked > 0)


def _routers(width: int, n: int) -> nn.ModuleList:
    routers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(n))
    for router in routers:
        nn.init.normal_(router.weight, std=0.02)
    return routers


class DepthRouter(LinearRouter):
    """p = softmax(W x) over the depths, of which a token has one: `LinearRouter` with K = 1."""

    def __init__(self, d_model: int, n_recursions: int, **options):
        super().__init__(d_model, n_recursions, 1, renormalize=False, **options)

    def set_top_k(self, top_k: int) -> None:
        if top_k != 1:
            raise InputError(f"top_k is {top_k} but this rule always has 1: a token has one depth")


class TokenChoiceMoR(_Recursions):
    """A router tells every token at the start how often the block is applied to it; the output is x + p f(..f(x)).

    It looks at a token alone, in training too. The recursions of a token are not gated one by one: p, alpha times the
    probability of the depth that was chosen, is the factor of the last.

    Args:
        block, n_recursions, kv: as in `ExpertChoiceMoR`.
        balance: "loss" for the loss R sum_i f_i P_i of weight `coeff`, with a z-loss of weight `z_coeff`; "bias" for a
            bias on the choice that moves by `bias_rate` towards an even load; None for neither. Without one of them all
            tokens soon have one depth.
        alpha: of the score.
    """

    def __init__(
        self,
        block: RecursiveBlock,
        n_recursions: int,
        balance: str | None = "loss",
        coeff: float = 0.1,
        z_coeff: float = 1e-5,
        bias_rate: float = 1e-3,
        alpha: float = 1.0,
        kv: str = "cache",
    ):
        super().__init__(block, n_recursions, kv)
        if balance not in ("loss", "bias", None):
            raise unknown("balance", balance, ("loss", "bias"))
        if not alpha >= 0:
            raise InputError(f"alpha is {alpha} but must be at least 0")
        options = {"coefficients": {"lbl": coeff, "z": z_coeff}} if balance == "loss" else {}
        options |= {"bias_rate": bias_rate} if balance == "bias" else {}
        self.alpha, self.router = alpha, DepthRouter(block.width, n_recursions, **options)

    def _coefficients(self) -> dict[str, float]:
        return self.router.coefficients

    def _pass(self, x: Tensor, context: Context, memory: Memory) -> tuple[Tensor, MoRStats]:
        routing = self.router(x.flatten(0, 1), context)
        depth = routing.indices.view(x.shape[:2]) + 1
        gate = self.alpha * routing.weights.view(x.shape[:2])
        active = torch.stack([depth > r for r in range(self.n_recursions)])
        h = x
        for r in range(self.n_recursions):
            h = self._recursion(r, h, active[r], None, "", context, memory)
        last = torch.stack([depth == r + 1 for r in range(self.n_recursions)])
        logits = routing.logits.view(*x.shape[:2], -1).movedim(-1, 0)
        stats = MoRStats(active, torch.where(last, gate, 0), logits, dict(routing.losses))
        return x + gate[..., None] * h, stats
