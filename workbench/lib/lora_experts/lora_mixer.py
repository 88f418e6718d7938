"""LoRA-Mixer: LoRAs of several tasks inside the attention projections, and a router that learns to mix them.

"LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing" (2025, arXiv:2507.00029). A projection
W (O, I) of an attention or state-space block, one of q, k, v, o or of the in and out projections, becomes

    y = W x + sum_e a_e(x) s_e B_e A_e x,   a(x) = softmax(Wr x),   Wr (E, I)

"Serial" means that this sum is the projection's output, which attention then consumes; nothing is added after the
block. Two phases build it, each a phase of `set_phase`:

    hard    a batch carries its task labels, and a row uses the expert of its label alone: only that expert's A and B
            get a gradient, exactly as if each LoRA were trained by itself on the frozen base
    soft    dense softmax over ALL experts, so that the router learns from some thousand mixed, unlabelled samples; the
            experts are frozen, or trained under the preserving penalty beta sum ||theta - theta_0||^2. `from_loras`
            starts here, with LoRAs from elsewhere

In use the three likeliest experts are kept, their weights divided by their sum. The loss of the soft phase is

    L = L_task + alpha sum_i p_i f_i -+ lambda mean_x H(a(x)) + preserve

with p_i the mean probability of expert i and f_i its share of the tokens' top K (Specialization Balance Loss, called
RSL in the second version). The paper prints - lambda H, whose minimum is a FLAT distribution, and says of it that it
suppresses flat ones and gives peaked, input-aware routing; its printed gradient agrees with the printed formula. Both
signs are here: `entropy_sign=+1`, the default, penalises entropy as the text describes, -1 is the formula as printed.

There is no released code; what is written above is what is public. Left open and decided here: one router to an
attention or state-space block, on the block's input (`router="projection"` for one each); renormalised top K; alpha and
lambda constant, since no schedule is given.

An optimizer with momentum moves an expert on batches that do not use it, from the gradients of earlier ones. Train one
label at a time, each with its own optimizer, where hard experts have to be exactly those of separate training.

Tensor letters: N tokens, I input width, O output width, E experts, r rank, K experts kept in use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLinear, adapt
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routers import check_finite, check_tokens, check_top_k
from workbench.lib.core.routing import Context, Routing
from workbench.lib.lora_experts.ready_loras import by_layer, fill, highest_ranks, rank_for

METHOD = Method(
    slug="lora-mixer",
    title="LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
    family="lora_experts",
    year=2025,
    paper="arXiv:2507.00029",
    claim="Routing among task LoRAs inside the attention projections beats other mixtures of LoRAs with fewer "
    "parameters and little router data.",
    objects=("LoRAMixer", "from_loras", "to_loras", "set_phase", "specialization_balance_loss"),
)

PHASES = ("hard", "soft")
ROUTERS = ("block", "projection")
FIRST = ("q_proj", "q", "query", "q_lin", "to_q", "qkv", "query_key_value", "c_attn", "in_proj")
SAME_INPUT = ("k_proj", "v_proj", "k", "v", "key", "value", "k_lin", "v_lin", "to_k", "to_v", "in_proj_z", "in_proj_b")
OUTPUT = ("o_proj", "out_proj", "o", "out", "out_lin", "to_out", "c_proj", "dense")
"""Names of the projections of a block: the one whose input the router sees, others that see the same, the output."""

TOP_K = 3


def example() -> nn.Module:
    """Two layers with four trained experts each."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    for layer in adapt(net, "lora-mixer", experts=4, rank=4).layers.values():
        nn.init.normal_(layer.experts.b, std=0.1)
    return net


def specialization_balance_loss(
    prob: Float[Tensor, "tokens experts"],
    top_k: int,
    alpha: float,
    lam: float,
    entropy_sign: int = 1,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """alpha sum_i p_i f_i + entropy_sign lambda mean H, and its two parts without their factors.

    Args:
        prob: softmax of the router, in [0, 1], rows of sum 1.
        top_k: K, of the share f_i of the tokens' top K; f has sum 1 and no gradient.
        entropy_sign: +1 penalises entropy, as the paper describes; -1 rewards it, as the paper prints.
        mask: False for tokens that do not count, such as padding.

    Returns:
        The loss, and {"balance": sum p f, between 0 and 1, 1/E at uniform p; "entropy": mean H in nats, 0 to log E}.
    """
    check_top_k(top_k, prob.shape[1])
    _check_sign(entropy_sign)
    prob = prob if mask is None else prob[mask]
    if prob.shape[0] == 0:
        raise InputError("mask leaves no token but must leave at least one")
    chosen = torch.bincount(prob.topk(top_k, dim=-1).indices.flatten(), minlength=prob.shape[1])
    balance = (prob.mean(0) * chosen / chosen.sum()).sum()
    # an expert whose probability is 0 in floating point adds nothing; its derivative would be infinite
    entropy = torch.special.entr(prob.clamp(min=torch.finfo(prob.dtype).tiny)).sum(-1).mean()
    return alpha * balance + entropy_sign * lam * entropy, {"balance": balance, "entropy": entropy}


class MixerRouter(nn.Module):
    """One-hot by task label in the hard phase; in the soft one dense softmax, or its top K in evaluation mode.

    Attributes:
        top_k: None, since it varies: 1 in the hard phase, E where the soft one trains, `top_k_eval` where it is used.
        coefficients: {"balance": alpha, "entropy": entropy_sign lambda}, of the soft phase.
    """

    top_k = None

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        top_k_eval: int,
        phase: str = "soft",
        balance: float = 0.01,
        entropy: float = 0.01,
        entropy_sign: int = 1,
    ):
        super().__init__()
        check_top_k(top_k_eval, n_experts)
        _check_sign(entropy_sign)
        for name, value in (("balance", balance), ("entropy", entropy)):
            if not value >= 0:
                raise InputError(f"{name} is {value} but must be at least 0")
        if phase not in PHASES:
            raise unknown("phase", phase, PHASES)
        self.n_experts, self.top_k_eval, self.phase = n_experts, top_k_eval, phase
        self.coefficients = {"balance": balance, "entropy": entropy_sign * entropy}
        self.projection = nn.Linear(d_in, n_experts, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def set_top_k(self, top_k: int) -> None:
        """Change K in use from the next forward on; no parameter changes."""
        check_top_k(top_k, self.n_experts)
        self.top_k_eval = top_k

    def forward(self, x: Float[Tensor, "tokens d_in"], context: Context) -> Routing:
        check_tokens(x)
        return self.by_label(context.domain, x) if self.phase == "hard" else self.by_input(x, context.mask)

    def by_label(self, label: Tensor | None, x: Tensor) -> Routing:
        if label is None:
            raise InputError("task is not given but the hard phase routes by it: `with adapted.given(task=...)`")
        if not 0 <= int(label.min()) <= int(label.max()) < self.n_experts:
            wrong = label.min() if label.min() < 0 else label.max()
            raise InputError(f"task holds {int(wrong)} but must be between 0 and experts - 1 = {self.n_experts - 1}")
        one_hot = nn.functional.one_hot(label.long(), self.n_experts).to(_wide(x.dtype))
        return Routing.fixed(label.long()[:, None], torch.ones_like(one_hot[:, :1]), self.n_experts, probs=one_hot)

    def by_input(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        logits = self.projection(x.to(self.projection.weight.dtype))
        check_finite(logits)
        logits = logits.to(_wide(x.dtype))
        probs = logits.softmax(-1)
        if self.training:
            indices = torch.arange(self.n_experts, device=x.device).expand(x.shape[0], -1)
            weights = probs
        else:
            weights, indices = probs.topk(self.top_k_eval, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
        if mask is None or mask.any():
            _, losses = specialization_balance_loss(probs, self.top_k_eval, 1.0, 1.0, mask=mask)
        else:  # padding alone
            losses = dict.fromkeys(self.coefficients, 0 * probs.sum())
        return Routing.fixed(indices, weights, self.n_experts, probs=probs, logits=logits, losses=losses)


class MixerLinear(RoutedLinear):
    """One projection with its experts.

    Attributes:
        ranks: (E,) rank each expert came with, a buffer; the rows of A and columns of B above it are zero. An expert of
            rank 0 does nothing here.
        start_a, start_b: theta_0 of the preserving penalty, buffers; only where `preserve` is above 0.
        block: the decision this projection shares with others, if it does.
    """

    def __init__(self, base: nn.Linear, router: MixerRouter, experts: LowRankExperts, preserve: float = 0.0):
        super().__init__(base, router, experts)
        if not preserve >= 0:
            raise InputError(f"preserve is {preserve} but must be at least 0")
        self.preserve, self.block = preserve, None
        self.register_buffer("ranks", torch.full((experts.n_experts,), experts.rank))
        if preserve:
            self.register_buffer("start_a", experts.a.detach().clone())
            self.register_buffer("start_b", experts.b.detach().clone())

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        routing = None if self.block is None else self.block.taken(self, x)
        if routing is None:
            routing = self.router(tokens, call.context)
            if self.block is not None:
                self.block.made(self, x, routing)
        else:
            routing = replace(routing, losses={})  # they count once, where the decision was made
        coefficients = self.router.coefficients
        if self.preserve and self.experts.a.requires_grad:
            routing = replace(routing, losses=routing.losses | {"preserve": self.drift()})
            coefficients = coefficients | {"preserve": self.preserve}
        self.tell(call, routing, {name: coefficients[name] for name in routing.losses})
        path = "dense" if routing.top_k == self.n_experts else None
        return call.carry(self.base(x) + self.experts(tokens, routing, path).view(*x.shape[:-1], -1))

    def drift(self) -> Float[Tensor, ""]:
        """||theta - theta_0||^2 over all experts of this layer."""
        return (self.experts.a - self.start_a).square().sum() + (self.experts.b - self.start_b).square().sum()

    def enter(self, phase: str, freeze_experts: bool) -> None:
        """Begin a phase: theta_0 is where the experts are now."""
        self.router.phase = phase
        self.router.requires_grad_(phase == "soft")
        self.experts.requires_grad_(not freeze_experts)
        if self.preserve:
            self.start_a.copy_(self.experts.a.detach())
            self.start_b.copy_(self.experts.b.detach())


class Block:
    """One decision for the projections of an attention or state-space block, made from the block's input.

    The first projection makes it, the output projection takes it, and so do others that are given the very same
    tensor. One that sees other tokens, such as the keys of a cross-attention, has the shared router look at these.
    """

    def __init__(self, first: MixerLinear, others: Mapping[str, MixerLinear]):
        self.first, self.outputs = first, [layer for name, layer in others.items() if name in OUTPUT]
        self.others, self.routing, self.x = frozenset(others.values()), None, None
        self.early: set[MixerLinear] = set()  # called before the first one, as keys may be
        self.waiting: set[MixerLinear] = set()  # not called since
        for layer in (first, *others.values()):
            layer.block = self
            layer.router = first.router

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"routing": None, "x": None, "early": set(), "waiting": set()}  # it has seen no forward

    def made(self, layer: MixerLinear, x: Tensor, routing: Routing) -> None:
        if layer is self.first:
            self.waiting, self.early = set(self.others - self.early), set()
            self.routing, self.x = (routing, x) if self.waiting else (None, None)

    def taken(self, layer: MixerLinear, x: Tensor) -> Routing | None:
        """The decision for this layer's tokens; None where it has to be made from its own input."""
        routing, same = self.routing, x is self.x
        if layer is self.first or routing is None:
            self.early |= {layer} - {self.first}
            return None
        self.waiting.discard(layer)
        if not self.waiting:  # no tensor of this forward outlives the block, nor meets what a checkpoint repeats of it
            self.routing, self.x = None, None
        output = layer in self.outputs and x.shape[:-1].numel() == routing.n_tokens
        return routing if same or output else None


class LoRAMixer(Adapter):
    """Task LoRAs in every wanted projection. The task is wanted in the hard phase only, which is an error without it.

    Args:
        experts: E, one to a task.
        rank: r; default 8, or a layer's smaller width where that is less; or by the name of the layer.
        alpha: numerator of the scale of new experts; default r, so that the scale is 1.
        top_k: K in use, of the soft phase; default 3, or E where that is less. Training is dense.
        phase: "hard" routes by the task it is told, "soft" by the input, whatever it is told.
        balance, entropy: alpha and lambda of the loss.
        entropy_sign: +1 as described, -1 as printed; see the module.
        preserve: beta of the preserving penalty, for trained experts.
        freeze_experts: train the routers alone.
        router: "block", one for the projections of an attention or state-space block (recognised by their names; any
            other layer has its own), or "projection", one each.
    """

    slug = "lora-mixer"
    facts = ("task",)

    def __init__(
        self,
        experts: int = 4,
        rank: int | dict[str, int] | None = None,
        alpha: float | None = None,
        top_k: int | None = None,
        phase: str = "soft",
        balance: float = 0.01,
        entropy: float = 0.01,
        entropy_sign: int = 1,
        preserve: float = 0.0,
        freeze_experts: bool = False,
        router: str = "block",
    ):
        if router not in ROUTERS:
            raise unknown("router", router, ROUTERS)
        self.experts, self.rank, self.alpha, self.preserve = experts, rank, alpha, preserve
        self.phase, self.freeze_experts, self.sharing = phase, freeze_experts, router
        top_k = min(TOP_K, experts) if top_k is None else top_k
        self.router = (experts, top_k, phase, balance, entropy, entropy_sign)

    def linear(self, layer: nn.Linear, name: str) -> MixerLinear:
        rank = rank_for(self.rank, layer, name)
        bank = LowRankExperts(self.experts, layer.in_features, layer.out_features, rank, self.alpha)
        return MixerLinear(layer, MixerRouter(layer.in_features, *self.router), bank, self.preserve)

    def finish(self, adapted: Adapted) -> None:
        if self.sharing == "block":
            for parts in _blocks(adapted.layers):
                first = parts.pop(next(name for name in parts if name in FIRST))
                width = first.base.in_features  # another input, such as the values of MobileBERT, has its own router
                Block(first, {n: part for n, part in parts.items() if n in OUTPUT or part.base.in_features == width})
        for layer in adapted.layers.values():
            layer.enter(self.phase, self.freeze_experts)


ADAPTER = LoRAMixer


def set_phase(adapted: Adapted, phase: str, freeze_experts: bool = False) -> None:
    """Begin the hard or the soft phase; a saved adaptation continues in the phase it was in.

    In the hard phase routers are not trained. `freeze_experts` leaves nothing but them to train in the soft one.
    Optimizers made before keep what they were given: make a new one.
    """
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    if phase == "hard" and freeze_experts:
        raise InputError("freeze_experts is True but the hard phase trains nothing else")
    for layer in adapted.layers.values():
        layer.enter(phase, freeze_experts)
    adapted.options |= {"phase": phase, "freeze_experts": freeze_experts}


def from_loras(model: nn.Module, loras: Sequence[LoRAs | str | Path], **options) -> Adapted:
    """The mixture of LoRAs that are there already: frozen experts, and new routers in the soft phase.

    Args:
        loras: of each expert the LoRAs by layer name, or a folder of Hugging Face's peft with them. Ranks may differ;
            an expert without a LoRA for a layer does nothing there.
        options: of `LoRAMixer`, other than experts and rank. Experts are frozen by default.

    Raises:
        InputError: as `read_loras`; or a layer that the model lacks or that has other widths, all in one message.
    """
    experts = by_layer(model, loras, nn.Linear)
    options = {"freeze_experts": True} | options
    adapted = adapt(model, "lora-mixer", list(experts), experts=len(loras), rank=highest_ranks(experts), **options)
    for name, layer in adapted.layers.items():
        layer.ranks.copy_(fill(layer.experts, experts[name]))
        layer.enter(adapted.adapter.phase, adapted.adapter.freeze_experts)
    return adapted


def to_loras(adapted: Adapted) -> list[LoRAs]:
    """The LoRAs of each expert, at the rank it came with: what `from_loras` was given, where it was."""
    found: list[LoRAs] = [{} for _ in next(iter(adapted.layers.values())).ranks]
    for name, layer in adapted.layers.items():
        bank = layer.experts
        for e, rank in enumerate(layer.ranks.tolist()):
            if rank:
                found[e][name] = bank.a[e, :rank].detach(), bank.b[e, :, :rank].detach(), float(bank.scale[e])
    return found


def _blocks(layers: Mapping[str, MixerLinear]) -> list[dict[str, MixerLinear]]:
    """The projections of each block by their own names, for blocks that have a first one and some other."""
    parents: dict[str, dict[str, MixerLinear]] = {}
    for name, layer in layers.items():
        parent, _, part = name.rpartition(".")
        if part in (*FIRST, *SAME_INPUT, *OUTPUT):
            parents.setdefault(parent, {})[part] = layer
    return [parts for parts in parents.values() if len(parts) > 1 and any(part in FIRST for part in parts)]


def _check_sign(sign: int) -> None:
    if sign not in (-1, 1):
        raise InputError(f"entropy_sign is {sign} but must be 1 (penalise entropy) or -1 (as printed)")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
