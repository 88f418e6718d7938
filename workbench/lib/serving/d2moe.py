"""D2MoE: tokens are routed to experts, and each expert they get to a number of bits (2504.15299).

    banks = nested_banks(model, tokens, NestedQuantizer())       # experts as nested codes, one a matrix (`d2moe_code`)
    student = dual_routed(model, banks, widths=(2, 3, 4), target=3.0)
    train_bit_router(student, model, task, TrainConfig(...))     # the model is frozen: KL of its logits, and bits
    set_price(student, tokens)                                   # until the mean number of bits is the target
    trace = bits_wanted(student, tokens)                         # which experts at how many bits, for the schedule

    r(x) = softmax of W [x; gates] + v for each of the K experts of a token, over the widths

What serves such a trace from a slow disk in little memory is `d2moe_schedule` (orders: `d2moe_orders`), in
simulated time, and `d2moe_executor`.

The paper has no public code; of its text we had the abstract. Ours are: straight-through Gumbel noise; a multiplier of
the bits that rises while their mean is above a target, one for all layers; and after training a price for a bit, the
same everywhere, at which the mean is the target, so that arms are compared at equal bits. Of the card's three ways to
better low levels, clipping and refitting are here, training them together and feeding errors on are not.

Tensor letters: N tokens, D model width, E experts, K active experts, W widths, P pairs of a token and an expert.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.kernels.moe_mlp import moe_mlp
from workbench.lib.core.experts import GLUExperts, plan_of, score_of
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.pool import stored_once
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.core.simulation.hardware import Hardware
from workbench.lib.core.simulation.traces import RouterTrace, zipf_markov
from workbench.lib.core.simulation.workload import Simulation, Workload
from workbench.lib.core.task import Batch, LanguageModelling, device_of
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.serving.d2moe_code import NestedQuantizer, grams
from workbench.lib.serving.d2moe_executor import NestedBank
from workbench.lib.serving.d2moe_orders import BitTrace, PlaneCosts, bit_trace
from workbench.lib.serving.d2moe_schedule import POLICIES, D2Sim

METHOD = Method(
    slug="d2moe",
    title="D2MoE: Dual Routing and Dynamic Scheduling for Efficient On-Device MoE-based LLM Serving",
    family="serving",
    year=2025,
    paper="arXiv:2504.15299",
    claim="Routing each token to experts and to bit-widths of a nested code serves faster in less memory at near full "
    "accuracy.",
    objects=("NestedQuantizer", "BitRouter", "dual_routed", "train_bit_router", "set_price", "D2Sim", "simulate"),
    kind="simulator",
)

BITS, BASE, GROUP = 8, 2, 64
SIMULATED = (2, 4)
MOST = 2.0**20  # of a price: no logit is as large
SHOWN = ("tokens_per_second", "bubbles", "peak_bytes", "read_bytes", "bits_used")


class BitBudget(nn.Module):
    """What the bit routers of a model have in common: how many bits they may spend.

    Attributes:
        multiplier: of the mean bits over the largest width, in the loss; while training it follows `target`.
        price: of one bit, taken from the logits in evaluation.
        least, extra: of a request's class: the fewest bits, and what is added to the price; numbers, or one a token.

    Args:
        target: mean bits of a pair.
        multiplier: at first.
        rate: the multiplier moves by exp(rate (mean - target)) a step.
    """

    def __init__(self, target: float, multiplier: float = 0.01, rate: float = 0.1):
        super().__init__()
        if not (target > 0 and multiplier > 0 and rate >= 0):
            raise InputError(
                f"target, multiplier and rate are {target}, {multiplier}, {rate} but must be above 0, the last at least"
            )
        self.target, self.rate = target, rate
        self.register_buffer("multiplier", torch.tensor(float(multiplier)))
        self.register_buffer("price", torch.tensor(0.0))
        self.least: Tensor | int = 0
        self.extra: Tensor | float = 0.0
        self._seen: list[Tensor] = []
        stored_once(self)

    def count(self, bits: Float[Tensor, "tokens k"]) -> None:
        """What a layer spends in this pass."""
        self._seen.append(bits.mean())

    def spent(self) -> Float[Tensor, ""]:
        """Mean bits of the layers that were counted since the last step."""
        return torch.stack(self._seen).mean()

    def forget(self) -> None:
        self._seen.clear()

    def after_step(self) -> None:
        """Called by the training loop."""
        if self._seen:
            self.multiplier *= torch.exp(self.rate * (self.spent().detach() - self.target))
            self.forget()


class BitRouter(nn.Module):
    """Which width each of a token's K experts is computed in.

    In training a choice is drawn by Gumbel noise, in evaluation it is the likeliest, after the price of its bits. Where
    gradients are asked for it has that of the softmax (straight-through).

    Args:
        dim: D.
        num_slots: K.
        widths: bits, rising; of one width alone it is always that one.
        budget: shared by the routers of a model; None for one that is never short.
        temperature: of the noise.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        widths: Sequence[int],
        budget: BitBudget | None = None,
        temperature: float = 1.0,
    ):
        super().__init__()
        if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1:
            raise InputError(f"widths is {tuple(widths)} but must be one or more rising numbers of bits")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature} but must be above 0")
        self.widths, self.num_slots, self.temperature = tuple(widths), num_slots, temperature
        self.budget = budget if budget is not None else BitBudget(float(widths[-1]))
        self.head = nn.Linear(dim + num_slots, num_slots * len(widths))
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def logits(
        self, x: Float[Tensor, "tokens dim"], gates: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens k widths"]:
        said = self.head(torch.cat([x, gates.to(x.dtype)], -1)).unflatten(-1, (self.num_slots, len(self.widths)))
        bits, budget = torch.tensor(self.widths, device=x.device), self.budget
        extra, least = (torch.as_tensor(part, device=x.device) for part in (budget.extra, budget.least))
        if not self.training:
            said = said - (budget.price + extra)[..., None, None] * bits
        enough = bits >= least[..., None, None].clamp(max=self.widths[-1])
        return said.masked_fill(~enough, -torch.inf)

    def forward(
        self, x: Float[Tensor, "tokens dim"], gates: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens k widths"]:
        """1 for the width of each slot, 0 for the others."""
        said = self.logits(x, gates)
        if self.training:
            return F.gumbel_softmax(said, self.temperature, hard=True)
        share = F.one_hot(said.argmax(-1), len(self.widths)).to(x.dtype)
        soft = said.softmax(-1)
        return share + (soft - soft.detach()) if soft.requires_grad else share


class DualExperts(nn.Module):
    """A bank of nested SwiGLU experts, each pair computed in the width that a router says.

    Attributes:
        bits: (N, K) of the last forward, the experts of a token in the order of its routing.

    Args:
        router: as `BitRouter`: a module (N, D), (N, K) -> (N, K, W) with `widths`.
    """

    def __init__(self, bank: NestedBank, router: nn.Module):
        super().__init__()
        self.n_experts, self.router = bank.n_experts, router
        for width in router.widths:  # not stored: the codes are, by whoever has them
            self.register_buffer(f"gate_up_{width}", bank.gate_up.dequant(width), persistent=False)
            self.register_buffer(f"down_{width}", bank.down.dequant(width), persistent=False)
        self.bits: Tensor | None = None

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        share = self.router(x, routing.weights)
        bits = share @ torch.tensor(self.router.widths, dtype=share.dtype, device=share.device)
        self.bits = bits.detach()
        if self.training and isinstance(self.router, BitRouter):
            self.router.budget.count(bits)
        y = None
        for width, part in zip(self.router.widths, share.flatten(0, 1).unbind(-1), strict=True):
            weights = getattr(self, f"gate_up_{width}"), getattr(self, f"down_{width}")
            if part.requires_grad:  # a choice that was not made has a gradient too
                own = replace(routing, weight=routing.weight * part)
            else:
                own = replace(routing, kept=part > 0).served()
            if own.expert.numel():
                made = moe_mlp(x, *weights, plan_of(own), score_of(own, x))
                y = made if y is None else y + made
        return y


@torch.no_grad()
def nested_banks(
    model: nn.Module, tokens: Int64[Tensor, "batch time"], quantizer: NestedQuantizer
) -> dict[str, NestedBank]:
    """The experts of every MoE layer as nested codes, fitted on what they are given of these tokens.

    Raises:
        InputError: a model without MoE layers, or with experts that are no SwiGLU bank.
    """
    layers, seen = moe_layers(model), {}
    if not layers:
        raise InputError("model has no MoE layer, so there are no experts to code")
    for name, layer in layers.items():
        if not isinstance(layer.experts, GLUExperts):
            raise InputError(f"{name} has {type(layer.experts).__name__} but must have a bank of SwiGLU experts")
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs}))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, layer in layers.items():
        x, routing = seen[name]
        given = [x[routing.token[routing.expert == expert]] for expert in range(layer.n_experts)]
        hidden = []
        for own, weight in zip(given, layer.experts.gate_up, strict=True):
            gate, up = (own @ weight.T).chunk(2, -1)
            hidden.append(F.silu(gate) * up)
        found[name] = NestedBank(
            quantizer.fit(layer.experts.gate_up, grams(given)), quantizer.fit(layer.experts.down, grams(hidden))
        )
    return found


def dual_routed(
    model: nn.Module,
    banks: Mapping[str, NestedBank],
    widths: Sequence[int],
    target: float | None = None,
    make: Callable[[MoELayer], nn.Module] | None = None,
) -> nn.Module:
    """A copy of the model whose experts are nested codes behind routers of bits; all but those is frozen.

    Args:
        banks: of `nested_banks`.
        widths: bits that can be chosen.
        target: mean bits of a pair, see `BitBudget`; None: the largest width.
        make: another router of bits for a layer, see `DualExperts`.

    Raises:
        InputError: a width that the codes do not have, or a target outside of the widths.
    """
    if target is not None and not min(widths) <= target <= max(widths):
        raise InputError(f"target is {target} but must be from {min(widths)} to {max(widths)} bits")
    student, budget = deepcopy(model).requires_grad_(False), BitBudget(float(target or max(widths)))
    for name, layer in moe_layers(student).items():
        for width in widths:
            banks[name].gate_up.check(width)
        dim = banks[name].gate_up.cols
        router = BitRouter(dim, layer.top_k, widths, budget) if make is None else make(layer)
        layer.experts = DualExperts(banks[name], router).train(layer.training)
        layer.router.coefficients = {}  # it is not trained
    return student


def budget_of(model: nn.Module) -> BitBudget:
    """The one that the bit routers of a model share."""
    found = next((module for module in model.modules() if isinstance(module, BitBudget)), None)
    if found is None:
        raise InputError("model has no router of bits: dual_routed makes one of it")
    return found


class Distilled(LanguageModelling):
    """The task of bit routers: the KL of a teacher's next-byte distribution from the model's, and the price of bits.

    The metric is that of the text.
    """

    def __init__(self, task: LanguageModelling, teacher: nn.Module):
        super().__init__(task.data, task.seq_len)
        self.teacher, self._text = teacher, task

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        budget, batch = budget_of(model), batch.to(device_of(model))
        budget.forget()
        context = Context(domain=batch.domain.repeat_interleave(batch.inputs.shape[1]))
        said = F.log_softmax(model(batch.inputs, context).flatten(0, 1), -1)
        with evaluating(self.teacher):
            truth = F.log_softmax(self.teacher(batch.inputs).flatten(0, 1), -1)
        if model.training:
            most = max(module.widths[-1] for module in model.modules() if isinstance(module, BitRouter))
            context.aux = context.aux + budget.multiplier.clone() * budget.spent() / most
        return F.kl_div(said, truth, log_target=True, reduction="batchmean"), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        return self._text.evaluate(model, split, max_batches)


def train_bit_router(student: nn.Module, teacher: nn.Module, task: LanguageModelling, config: TrainConfig) -> State:
    """Train the bit routers of `dual_routed`, on the logits of the whole model; nothing else changes."""
    return train(student, Distilled(task, teacher), config)


@torch.no_grad()
def set_price(student: nn.Module, tokens: Int64[Tensor, "batch time"], rounds: int = 20) -> float:
    """Put the price of a bit where the mean bits of these tokens come nearest to the target from below: those bits."""
    budget, low, high = budget_of(student), -1.0, 1.0

    def mean(price: float) -> float:
        budget.price.fill_(price)
        return mean_bits(student, tokens)

    while mean(high) > budget.target:
        high *= 2
    while (found := mean(low)) <= budget.target:
        if low < -MOST:  # all that there are is not too much
            return found
        low *= 2
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > budget.target else (low, middle)
    return mean(high)


def mean_bits(student: nn.Module, tokens: Int64[Tensor, "batch time"]) -> float:
    """Bits of a pair of a token and an expert, the mean over all layers."""
    return float(_chosen(student, tokens)[1].double().mean())


def bits_wanted(student: nn.Module, tokens: Int64[Tensor, "requests time"], source: str) -> BitTrace:
    """What the requests want as they go on in step, a token each: experts, and how many bits of them."""
    experts, bits = _chosen(student, tokens)
    return bit_trace(experts, bits, source)


@contextmanager
def requests(student: nn.Module, least: Tensor | int = 0, extra: Tensor | float = 0.0) -> Iterator[None]:
    """Inside, tokens are of classes of quality: (N,) or one for all.

    Args:
        least: the fewest bits that a token is served with, if there are so many.
        extra: added to the price of a bit; below 0 for those who get more.
    """
    budget = budget_of(student)
    before = budget.least, budget.extra
    budget.least, budget.extra = least, extra
    try:
        yield
    finally:
        budget.least, budget.extra = before


def _chosen(student: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and bits, (time, batch, layers, K)."""
    layers, said = [*moe_layers(student).values()], {}
    handles = [
        layer.experts.register_forward_hook(
            lambda module, inputs, output: said.update({module: (inputs[1].indices, module.bits)})
        )
        for layer in layers
    ]
    try:
        with evaluating(student):
            student(tokens)
    finally:
        for handle in handles:
            handle.remove()
    parts = zip(*(said[layer.experts] for layer in layers), strict=True)
    experts, bits = (torch.stack(part, 1).unflatten(0, tokens.shape).transpose(0, 1) for part in parts)
    return experts, bits.round().long()


def by_rank(trace: RouterTrace, widths: Sequence[int]) -> BitTrace:
    """What a trace of routers would want if the likelier of a token's experts got more bits: no bit router said so."""
    place = (len(widths) - 1 - torch.arange(trace.top_k)).clamp(min=0)
    experts = trace.chosen().transpose(0, 1)
    bits = torch.tensor(widths)[place].expand_as(experts)
    return bit_trace(experts, bits, f"{trace.source}; bits by rank")


def simulate(hardware: Hardware, workload: Workload) -> Simulation:
    """A workload on a machine by its numbers: experts on its disk, or behind its link where no disk is known, and as
    many planes as the budget holds in its device.

    All prompts go on in step, a token each. An expert takes the time to read the planes of its level in the device's
    memory, or that to multiply if it is longer. What a layer does before its experts is taken to cost as much as one
    expert of one token. The likelier a token's expert, the more bits it gets, from `SIMULATED`: the trace has no router
    of bits. HEBF is compared with the other orders and with experts that are always whole, in 8 bits.
    """
    device = hardware.need("device").device
    channel = hardware.disk or hardware.need("link").link
    weights = workload.expert_bytes / workload.weight_bytes
    if weights < GROUP:
        raise InputError(
            f"expert_bytes is {workload.expert_bytes:g} but must be at least {GROUP * workload.weight_bytes:g}: "
            f"{GROUP} weights share a scale"
        )
    sizes = {bits: round(weights * (bits / 8 + 4 * (bits - BASE + 1) / GROUP)) for bits in range(BASE, BITS + 1)}
    tokens = sorted({1, workload.trace.probs.shape[0] * workload.trace.top_k})

    def seconds(n: int, level: int) -> float:
        return max(sizes[level] / device.memory_bandwidth, n * workload.expert_flops / device.flops)

    compute = {level: RateTable(tuple(tokens), tuple(seconds(n, level) for n in tokens)) for level in sizes}
    costs = PlaneCosts(sizes, channel.model, compute, seconds(1, BITS), hardware.label)
    trace, rows, own = by_rank(workload.trace, SIMULATED), [], None
    for policy in ("hebf", *(name for name in POLICIES if name != "hebf")):
        run = D2Sim(trace, costs, policy, int(workload.budget_bytes)).run()
        own = own or run
        rows.append({"policy": policy} | {name: run.to_dict()[name] for name in SHOWN})
    end = own.timeline.makespan
    shown = own.timeline.between(end * (1 - 2 / len(trace.steps)), end)
    words = f"{workload}; of an expert {', '.join(map(str, SIMULATED))} bits"
    return Simulation(METHOD.slug, hardware.label, words, rows, shown)


def example() -> Callable[[int], dict[str, Any]]:
    """Four requests in half of the memory that all bits take, from a disk of 100 MB/s; no machine was measured."""
    sizes = {bits: 49_152 * bits + 24_576 * (bits - 1) for bits in range(2, 9)}
    compute = {level: RateTable((1, 4, 16), (4e-4, 5e-4, 8e-4)) for level in sizes}
    costs = PlaneCosts(sizes, LinkModel(1e-4, 1e-8), compute, 1e-4, "simulated, calibrated by nothing: an example")

    def simulate(seed: int) -> dict[str, Any]:
        trace = by_rank(zipf_markov(seed, prompts=4, generated=8, layers=2, experts=8, top_k=2), (2, 4))
        budget = 8 * sizes[8]
        return {policy: D2Sim(trace, costs, policy, budget).run().to_dict() for policy in POLICIES}

    return simulate
