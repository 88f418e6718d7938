"""ReMix: LoRAs of equal weight, and a router that learns by reinforcement which of them.

"ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning" (2026, arXiv:2603.10160). Where the weights of a
mixture are learned, most of their mass may end on one LoRA, and the effective support size

    ESS(w) = (sum_i w_i)^2 / sum_i w_i^2

of k active LoRAs falls towards 1. Here every active LoRA has the same constant weight, so that the ESS is k whatever is
learned, and the router P (E, I) is a policy over the choice of the k: with q = softmax(P x), x detached,

    i_1, .., i_k drawn from q one after the other, without replacement
    y = W x + w sum_j B_{i_j} A_{i_j} x            w = 2 / (k r), or 2 / sqrt(k r) as in rsLoRA; not 1 / k
    log Q(i_1 .. i_k) = sum_j [log q_{i_j} - log(1 - sum_{j' < j} q_{i_j'})]

A step draws M selections J_1 .. J_M for the same data, in all layers anew, and has M losses L_m. The LoRAs get the
ordinary gradient of the mean loss, the routers the leave-one-out policy gradient

    G = 1 / (M - 1) sum_m (L_m - mean L) grad log Q(J_m),   log Q summed over layers

which is unbiased for the gradient of E[L]; as a surrogate loss, `rloo_surrogate`. In use the k likeliest LoRAs are
taken: if any set has a probability above 1/2 under Q, it is this one (theorem 2).

    adapted = workbench.adapt(model, "remix", targets="*.mlp.*")
    train(model, ReMixTrainer(task), config, optimizer=adapted.optimizer())     # a task of the workbench
    loss, surrogate = sampled_loss(model, batch, rows); (loss + surrogate).backward()   # a loop of your own

Trained without either, the routers get no gradient but zero, and the selections stay random.

There is no released code. Decided here, because it is not public: a selection is for a whole sequence by default, made
on the mean of the layer's input over it (`granularity`, `prompt`), and its reward is the loss of that sequence alone;
the routers' learning rate is 4 times that of the LoRAs.

Tensor letters: N tokens, S selections, B sequences, I input and O output width, E LoRAs, k active, r rank, M samples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapter, RoutedLinear
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.adapt.sequences import decide, decided
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank
from workbench.lib.core.observe import observing
from workbench.lib.core.recompute import Call, Repeat
from workbench.lib.core.routers import check_finite, check_tokens, check_top_k
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Batch, Task, device_of

METHOD = Method(
    slug="remix",
    title="ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning",
    family="lora_experts",
    year=2026,
    paper="arXiv:2603.10160",
    claim="Learned softmax weights collapse to one LoRA; equal weights with a selection trained by leave-one-out "
    "policy gradients keep all k useful.",
    objects=("ReMixTrainer", "ReMix", "ReMixLinear", "PlackettLuceRouter", "sampled_loss", "rloo_surrogate"),
)

GRANULARITIES = ("sequence", "token")
WEIGHTS: dict[str, Callable[[int], float]] = {"lora": lambda rank: 2 / rank, "rslora": lambda rank: 2 / rank**0.5}
"""The constant weight by the active rank k r."""

Rows = Callable[[nn.Module, Any], Tensor]
"""Gives the loss (B,) of each sequence of a batch, from one forward pass of the model."""


def example() -> nn.Module:
    """A linear layer with four LoRAs beside it, two of which are drawn for each token."""
    layer = ReMixLinear(nn.Linear(32, 32), experts=4, rank=4, top_k=2)
    nn.init.normal_(layer.experts.b, std=0.1)
    return layer


def sample_selection(
    logits: Float[Tensor, "rows experts"], top_k: int, generator: torch.Generator | None = None
) -> Int64[Tensor, "rows k"]:
    """k different experts of each row in the order drawn, without replacement, by Gumbel noise on the logits.

    Args:
        generator: default torch's global one.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits.detach() - noise).topk(top_k, dim=-1).indices


def log_probability(logits: Float[Tensor, "rows experts"], index: Int64[Tensor, "rows k"]) -> Float[Tensor, " rows"]:
    """log Q of a selection in its order (Plackett and Luce): each choice among those that are left.

    The chosen ones are taken out of the softmax, which is log q - log(1 - sum q) without its cancellation.
    """
    total, left = logits.new_zeros(logits.shape[0]), torch.ones_like(logits, dtype=torch.bool)
    for choice in index.split(1, dim=1):
        log_q = logits.masked_fill(~left, -torch.inf).log_softmax(-1)
        total = total + log_q.gather(1, choice)[:, 0]
        left = left.scatter(1, choice, False)
    return total


def rloo_surrogate(losses: Tensor, logq: Tensor) -> Float[Tensor, ""]:
    """Its gradient in logq's parameters is the leave-one-out policy gradient G, the mean over the rows.

    Args:
        losses: (M, B) of M independent selections for the same rows; no gradient goes through them.
        logq: (M, B) log Q of those selections, all layers together.
    """
    if losses.shape != logq.shape or losses.shape[0] < 2:
        raise InputError(
            f"losses and logq have shapes {tuple(losses.shape)} and {tuple(logq.shape)} but must have the same, (M, B) "
            "with at least 2 selections for each row: of a single one there is no other to compare with"
        )
    advantage = (losses - losses.mean(0)).detach() / (losses.shape[0] - 1)
    return (advantage * logq).sum(0).mean()


@dataclass
class Selection(Routing):
    """A `Routing` that was drawn.

    Attributes:
        logq: (S,) log Q of each of its independent selections; S is N, or less where several tokens share one.
    """

    logq: Float[Tensor, " selections"] | None = None

    def spread(self, tokens: int) -> "Selection":
        """The same decision for so many consecutive tokens in place of each."""
        indices, weights, probs, logits = (
            part.repeat_interleave(tokens, dim=0) for part in (self.indices, self.weights, self.probs, self.logits)
        )
        return Selection.fixed(indices, weights, self.n_experts, probs=probs, logits=logits, logq=self.logq)


class PlackettLuceRouter(nn.Module):
    """k different experts of constant weight: drawn in training, the k likeliest otherwise.

    Attributes:
        always_sample: draw in evaluation mode as well, to see what the policy does rather than its likeliest choice.

    Args:
        weight: of every chosen expert.
    """

    def __init__(self, d_in: int, n_experts: int, top_k: int, weight: float):
        super().__init__()
        check_top_k(top_k, n_experts)
        if not 0 < weight < float("inf"):
            raise InputError(f"weight is {weight} but must be above 0 and finite")
        self.n_experts, self.top_k, self.weight = n_experts, top_k, weight
        self.coefficients: dict[str, float] = {}
        self.always_sample = False
        self.projection = nn.Linear(d_in, n_experts, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, x: Float[Tensor, "rows d_in"], context: Context | None = None) -> Selection:
        check_tokens(x)
        x = x.detach().to(self.projection.weight.dtype)
        logits = self.projection(x)  # or the policy gradient's noise would reach the LoRAs of earlier layers
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training or self.always_sample:
            index = sample_selection(logits, self.top_k)
        else:
            index = logits.topk(self.top_k, dim=-1).indices
        weights, logq = torch.full_like(logits[:, : self.top_k], self.weight), log_probability(logits, index)
        probs = logits.softmax(-1)
        return Selection.fixed(index, weights.detach(), self.n_experts, probs=probs, logits=logits, logq=logq)


class ReMixLinear(RoutedLinear):
    """y = W x + w sum over k selected LoRAs of B_i A_i x.

    Args:
        base: the frozen layer.
        experts, rank, top_k: E, r and k.
        weight: w as "lora", 2 / (k r), as "rslora", 2 / sqrt(k r), or a number.
        granularity: "sequence", one selection for all tokens of x[b] where x is (B, ..., I); or "token". A layer that
            is given rows (N, I) without a time axis selects for each row.
        prompt: a sequence's selection looks at the mean of its first so many tokens; None for all of them, padding
            included. In a causal model all of them would tell the selection what is to be predicted.
        dropout: of what the LoRAs are given.
    """

    def __init__(
        self,
        base: nn.Linear,
        experts: int = 8,
        rank: int = 8,
        top_k: int = 4,
        weight: str | float = "lora",
        granularity: str = "sequence",
        prompt: int | None = None,
        dropout: float = 0.0,
    ):
        if granularity not in GRANULARITIES:
            raise unknown("granularity", granularity, GRANULARITIES)
        if prompt is not None and prompt < 1:
            raise InputError(f"prompt is {prompt} but must be at least 1 token, or None for the whole sequence")
        bank = LowRankExperts(experts, base.in_features, base.out_features, rank)
        if isinstance(weight, str):
            if weight not in WEIGHTS:
                raise unknown("weight", weight, WEIGHTS)
            check_top_k(top_k, experts)
            weight = WEIGHTS[weight](top_k * rank)
        super().__init__(base, PlackettLuceRouter(base.in_features, experts, top_k, weight), bank, dropout)
        self.granularity, self.prompt = granularity, prompt

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        if self.granularity == "sequence" and x.ndim > 2:
            routing = self.of_sequences(call, tokens.view(len(x), -1, x.shape[-1]))
        else:
            routing = self.router(tokens)
        call.parts["logq"] = routing.logq
        with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):  # off in a reentrant checkpoint
            routing.logq = call.part("logq")
        self.tell(call, routing, self.router.coefficients)
        y = self.base(x) + self.experts(self.dropout(tokens), routing).view(*x.shape[:-1], -1)
        # constant weights: a gradient of zero, for those who expect one of every parameter, such as data parallelism
        return call.carry(y + 0 * routing.logq.sum())

    def of_sequences(self, call: Call | Repeat, x: Float[Tensor, "sequences time d_in"]) -> Selection:
        """One selection for all tokens of a sequence; of one that is generated, that of its prompt."""
        if not call.repeated:
            call.own["decided"] = decided(self, len(x))
        if call.own["decided"] is None:
            chosen = self.router(x[:, : self.prompt].mean(1))
            if not call.repeated:
                decide(self, chosen.indices, chosen.weights, chosen.probs, chosen.logits, chosen.logq)
        else:
            indices, weights, probs, logits, logq = call.own["decided"]
            chosen = Selection.fixed(indices, weights, self.n_experts, probs=probs, logits=logits, logq=logq)
        return chosen.spread(x.shape[1])


class ReMix(Adapter):
    """ReMix on every wanted layer. It is told nothing beside the input.

    Args:
        experts: E.
        rank: r; default 8, or a layer's smaller width where that is less.
        top_k: k; default 4, or E where that is less.
        weight, granularity, prompt, dropout: see `ReMixLinear`.
    """

    slug, router_lr = "remix", 4.0

    def __init__(
        self,
        experts: int = 8,
        rank: int | None = None,
        top_k: int | None = None,
        weight: str | float = "lora",
        granularity: str = "sequence",
        prompt: int | None = None,
        dropout: float = 0.0,
    ):
        self.experts, self.rank = experts, rank
        self.top_k = min(4, experts) if top_k is None else top_k
        self.options = {"weight": weight, "granularity": granularity, "prompt": prompt, "dropout": dropout}

    def linear(self, layer: nn.Linear, name: str) -> ReMixLinear:
        return ReMixLinear(layer, self.experts, fitting_rank(self.rank, layer), self.top_k, **self.options)


ADAPTER = ReMix


def sampled_loss(
    model: nn.Module, batch: Any, rows: Rows, samples: int = 4, chunk: int | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(mean loss, surrogate) of M selections for the same batch; the sum of the two is what to differentiate.

    Args:
        model: with ReMix layers, in training mode: only then anything is drawn.
        batch: a tensor, or a `Batch`, mapping, tuple or list of tensors, all with the B sequences first.
        rows: see `Rows`. The model's layers may see the B sequences as such or flattened to B T tokens.
        samples: M, at least 2.
        chunk: selections of one forward pass, over chunk B rows; default all M at once. Smaller ones keep the rows of a
            forward few, at the same memory: the graphs of all M live until the backward pass.
    """
    chunk = samples if chunk is None else chunk
    if samples < 2:
        raise InputError(f"samples is {samples} but must be at least 2: a selection is judged against the others")
    if not 1 <= chunk <= samples:
        raise InputError(f"chunk is {chunk} but must be between 1 and samples = {samples}")
    layers = [module for module in model.modules() if isinstance(module, ReMixLinear)]
    if not layers:
        raise InputError(f"model is a {type(model).__name__} without a ReMix layer, so nothing is drawn")
    losses, logq = [], []
    for first in range(0, samples, chunk):
        n = min(chunk, samples - first)
        drawn: list[Tensor] = []
        with observing(layers, lambda routing, _, to=drawn: to.append(routing.logq)):  # in the order of the forward
            loss = rows(model, _repeated(batch, n))
        if loss.ndim != 1 or loss.numel() % n:
            raise InputError(f"rows gave a loss of shape {tuple(loss.shape)} but must give one for each sequence, (B,)")
        losses.append(loss.view(n, -1))
        logq.append(sum(part.view(*losses[-1].shape, -1).sum(-1) for part in drawn))
    losses, logq = torch.cat(losses), torch.cat(logq)
    return losses.mean(), rloo_surrogate(losses, logq)


class ReMixTrainer:
    """A task whose loss is that of M selections a batch, and whose auxiliary loss is the surrogate: for `train`.

    In evaluation mode, and in all else, it is the task itself.

    Args:
        task: any task of the workbench.
        samples, chunk: see `sampled_loss`.
        rows: loss of each sequence of a `Batch`; default `row_losses(task)`.
    """

    def __init__(self, task: Task, samples: int = 4, chunk: int | None = None, rows: Rows | None = None):
        if samples < 2:
            raise InputError(f"samples is {samples} but must be at least 2: a selection is judged against the others")
        self.task, self.samples, self.chunk, self.rows = task, samples, chunk, rows or row_losses(task)
        self.name, self.domains, self.manifest = task.name, task.domains, task.manifest
        self.metric, self.unit, self.higher_is_better = task.metric, task.unit, task.higher_is_better

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        return self.task.batch(split, size, generator, domain)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        return self.task.batches(split, size)

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        return self.task.evaluate(model, split, max_batches)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        if not model.training:
            return self.task.loss(model, batch)
        loss, surrogate = sampled_loss(model, batch.to(device_of(model)), self.rows, self.samples, self.chunk)
        return loss, Context(aux=surrogate)


def row_losses(task: Task) -> Rows:
    """The loss of each row by itself, for any task whose loss calls the model once and reads its output row by row.

    The model runs once; then the task's own loss is asked again for each row, with the output that is there. A function
    written for one task does the same faster.
    """

    def rows(model: nn.Module, batch: Batch) -> Tensor:
        recorder = _Recorder(model)
        task.loss(recorder, batch)
        if not isinstance(recorder.output, Tensor) or len(recorder.output) != len(batch):
            raise InputError(f"task {task.name!r} has a model whose output is no tensor (B, ...): give rows of its own")
        parts = (
            replace(batch, **{name: getattr(batch, name)[i : i + 1] for name in ("inputs", "targets", "domain")})
            for i in range(len(batch))
        )
        outputs = recorder.output.split(1)
        return torch.stack([task.loss(_Replay(y), part)[0] for y, part in zip(outputs, parts, strict=True)])

    return rows


class _Recorder(nn.Module):
    """Calls a model and keeps its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        self.output = self.model(*inputs, **keywords)
        return self.output


class _Replay(nn.Module):
    """Says what it was given, whatever it is asked."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output
        self.place = nn.Parameter(output.detach()[:0], requires_grad=False)  # says which device this is on

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        return self.output


def _repeated(batch: Any, times: int) -> Any:
    """All rows once, then all rows again, and so on."""
    if isinstance(batch, Tensor):
        return batch.repeat(times, *[1] * (batch.ndim - 1))
    if isinstance(batch, Batch):
        return Batch(*(_repeated(part, times) for part in (batch.inputs, batch.targets, batch.domain)))
    if isinstance(batch, Mapping):
        return {key: _repeated(value, times) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_repeated(part, times) for part in batch)
    raise InputError(f"batch holds a {type(batch).__name__} but must be made of tensors with the sequences first")
