"""Experts choose tokens, and what makes that honest in a causal model.

The choice looks at the whole batch: whether a token is among the best of an expert depends on the tokens after it. The
loss of such a model is therefore that of a model which has seen a little of what it predicts. So there are two modes:

    "expert_choice"   as in training: each expert takes the C tokens that its router scores highest
    "auxiliary"       causal: an expert takes a token if a small auxiliary router, which sees that token alone, says so

The auxiliary routers (Lin et al. 2024, MoMa, 2407.21770; Raposo et al. 2024, 2404.02258) are trained after the model,
which is frozen then, to say what the choice would have been. They decide who computes and never how much it counts: the
combine weight is that of the main router in both modes. `by_mode` gives any result in both.

Tensor letters: N tokens, D model width, E experts, C tokens per expert.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.observe import quiet
from workbench.lib.core.routers import check_finite, check_mask, check_tokens, check_top_k
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import Task
from workbench.lib.core.train import TrainConfig, step_seed

MODES = ("expert_choice", "auxiliary")
SCORES = ("softmax", "sigmoid")

T = TypeVar("T")


class AuxiliaryRouter(nn.Module):
    """Whether each expert would choose a token, from that token alone: logits silu(x W1) W2, W1 (D, D/2), W2 (D/2, E).

    D^2 / 2 + D E / 2 parameters.
    """

    def __init__(self, d_model: int, n_experts: int):
        super().__init__()
        self.hidden = nn.Linear(d_model, d_model // 2, bias=False)
        self.out = nn.Linear(d_model // 2, n_experts, bias=False)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens experts"]:
        return self.out(F.silu(self.hidden(x)))


class ExpertChoiceRouter(nn.Module):
    """Experts choose tokens: each takes the C tokens that it scores highest (Zhou et al. 2022, 2202.09368).

    Perfectly balanced by construction; a token may get none or several experts. Tokens outside `context.mask`, such as
    padding, are chosen by none and count in no capacity. In the mode "expert_choice" the choice looks at the whole
    batch, future tokens included; see the module for the other.

    Args:
        capacity: mean number of experts per token; C = ceil(capacity * N / E), at most N, of the N tokens that count.
            As a share of the tokens, c_e in MoMa, it is capacity / E.
        score: of a token, which is its combine weight as well: "softmax" over the experts, or "sigmoid", which does not
            depend on the other experts.
        gumbel: in training, choose and weigh by the logits plus the difference of two Gumbel variables, which is
            logistic; with "sigmoid" a token's score is then above 1/2 with its own probability.

    Attributes:
        mode: one of `MODES`; set by `deciding`.
        auxiliary: the `AuxiliaryRouter`, once there is one; a state dict that has one brings it.
    """

    top_k = None

    def __init__(
        self, d_model: int, n_experts: int, capacity: float = 2.0, score: str = "softmax", gumbel: bool = False
    ):
        super().__init__()
        check_top_k(1, n_experts)
        if not 0 < capacity <= n_experts:
            raise InputError(f"capacity is {capacity} but must be above 0 and at most n_experts = {n_experts}")
        if score not in SCORES:
            raise unknown("score", score, SCORES)
        self.n_experts, self.capacity, self.score, self.gumbel = n_experts, capacity, score, gumbel
        self.coefficients: dict[str, float] = {}
        self.mode = MODES[0]
        self.projection = nn.Linear(d_model, n_experts, bias=False)
        self.auxiliary: AuxiliaryRouter | None = None
        nn.init.normal_(self.projection.weight, std=0.02)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if self.auxiliary is None and f"{prefix}auxiliary.out.weight" in state_dict:
            weight = self.projection.weight
            self.auxiliary = AuxiliaryRouter(weight.shape[1], self.n_experts).to(weight)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def chooses(self) -> bool:
        """Whether there is a choice: at capacity E every expert takes every token, which is causal as it is."""
        return self.capacity < self.n_experts

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        mask = None if context is None else context.mask
        check_tokens(x)
        check_mask(mask, len(x))
        logits = self.projection(x)
        check_finite(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.gumbel and self.training:
            logits = logits + logistic_like(logits)
        if self.score == "softmax":
            weights = probs = torch.softmax(logits, dim=-1)
        else:
            weights = torch.sigmoid(logits)
            probs = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        chosen = self.choose(x, weights, mask)
        return Routing.ragged(chosen, weights, probs=probs, logits=logits)

    def choose(
        self,
        x: Float[Tensor, "tokens dim"],
        scores: Float[Tensor, "tokens experts"],
        mask: Bool[Tensor, " tokens"] | None,
    ) -> Bool[Tensor, "tokens experts"]:
        """Who takes whom, in the mode that is set."""
        if self.mode == MODES[0]:
            return highest(scores, self.capacity, mask)
        if not self.chooses:
            chosen = torch.ones_like(scores, dtype=torch.bool)
        elif self.auxiliary is None:
            raise InputError(
                "the mode is 'auxiliary' but this router has no auxiliary router: `train_auxiliary_routers` first"
            )
        else:
            chosen = self.auxiliary(x) > 0
        return chosen if mask is None else chosen & mask[:, None]


def highest(
    scores: Float[Tensor, "tokens experts"], capacity: float, mask: Bool[Tensor, " tokens"] | None = None
) -> Bool[Tensor, "tokens experts"]:
    """Of each expert the C = ceil(capacity * N / E) tokens of highest score, of the N where `mask` holds; at most N."""
    n = len(scores) if mask is None else int(mask.sum())
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    tokens = scores.topk(min(math.ceil(capacity * n / scores.shape[1]), n), dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, tokens, True)


def logistic_like(logits: Tensor) -> Tensor:
    """Draws of the logistic distribution, that of the difference of two Gumbel variables, from torch's generator."""
    return torch.logit(torch.rand_like(logits), eps=torch.finfo(logits.dtype).eps)


def expert_choice_routers(model: nn.Module) -> dict[str, ExpertChoiceRouter]:
    """The routers of a model whose experts choose, by their module name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertChoiceRouter)}


@contextmanager
def deciding(model: nn.Module, mode: str) -> Iterator[None]:
    """All `ExpertChoiceRouter`s of a model in this mode inside, in their own afterwards.

    Raises:
        InputError: an unknown mode, or a router that has no auxiliary router for it.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    routers = expert_choice_routers(model)
    if mode == MODES[1]:
        lacking = [name for name, router in routers.items() if router.chooses and router.auxiliary is None]
        if lacking:
            raise InputError(
                f"mode is {mode!r} but {lacking[0]} has no auxiliary router: `train_auxiliary_routers` first"
            )
    before = {router: router.mode for router in routers.values()}
    for router in before:
        router.mode = mode
    try:
        yield
    finally:
        for router, own in before.items():
            router.mode = own


def by_mode(model: nn.Module, measure: Callable[[], T]) -> dict[str, T]:
    """What is measured of a model in each of `MODES`; of one without any choice it is the same, and measured once."""
    found = {}
    for mode in MODES:
        with deciding(model, mode):
            found[mode] = measure()
        if not any(router.chooses for router in expert_choice_routers(model).values()):
            return dict.fromkeys(MODES, found[mode])
    return found


def train_auxiliary_routers(model: nn.Module, task: Task, config: TrainConfig) -> None:
    """Give every router of a trained model that chooses an auxiliary one, and train these alone.

    The loss is the binary cross-entropy with the main router's choice, over the tokens that count. The model runs in
    evaluation mode, without noise, without gradients and unobserved, on training batches of `config.batch_size` rows:
    as many as it was trained on, because who is chosen depends on who else is there. Evaluation and hooks are left out.
    """
    routers = {name: router for name, router in expert_choice_routers(model).items() if router.chooses}
    for router in routers.values():
        if router.auxiliary is None:
            weight = router.projection.weight
            router.auxiliary = AuxiliaryRouter(weight.shape[1], router.n_experts).to(weight)
    trained = [p for router in routers.values() for p in router.auxiliary.parameters()]
    if not trained:
        return
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    with _chosen(model, routers) as seen:
        for step in range(config.steps):
            generator = torch.Generator().manual_seed(step_seed(config.seed, step))
            seen.clear()
            task.loss(model, task.batch("train", config.batch_size, generator))
            if not seen:  # all of a modality whose experts have no choice
                continue
            with torch.enable_grad():
                loss = sum(
                    F.binary_cross_entropy_with_logits(router.auxiliary(x), chosen.to(x.dtype))
                    for router, x, chosen in seen
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def auxiliary_accuracy(
    model: nn.Module, task: Task, split: str, batch_size: int, batches: int, seed: int = 0
) -> dict[str, float]:
    """Share of (token, expert) pairs on which an auxiliary router says what the choice is, by the name of its router.

    On random batches of a split, of as many rows as in training. To say "no" always has 1 - capacity / E.
    """
    routers = {name: router for name, router in expert_choice_routers(model).items() if router.auxiliary is not None}
    right, pairs = [dict.fromkeys(routers.values(), 0) for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)
    with _chosen(model, routers) as seen:
        for _ in range(batches):
            seen.clear()
            task.loss(model, task.batch(split, batch_size, generator))
            for router, x, chosen in seen:
                right[router] += int(((router.auxiliary(x) > 0) == chosen).sum())
                pairs[router] += chosen.numel()
    return {name: right[router] / pairs[router] for name, router in routers.items() if pairs[router]}


@contextmanager
def _chosen(model: nn.Module, routers: dict[str, ExpertChoiceRouter]) -> Iterator[list]:
    """Inside, a forward of the model adds (router, x, whom each expert chose of it), of the tokens that count."""
    seen: list[tuple[ExpertChoiceRouter, Tensor, Tensor]] = []

    def see(router: ExpertChoiceRouter, inputs: tuple, named: dict, routing: Routing) -> None:
        x, *context = *inputs, *named.values()
        mask = context[0].mask if context and context[0] is not None else None
        chosen = routing.mask()
        seen.append((router, x, chosen) if mask is None else (router, x[mask], chosen[mask]))

    hooks = [router.register_forward_hook(see, with_kwargs=True) for router in routers.values()]
    try:
        with deciding(model, MODES[0]), evaluating(model), quiet(model):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
