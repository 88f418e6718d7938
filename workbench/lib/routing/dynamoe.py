"""DynaMoE: a variable number of experts per token, and a different number of experts per layer (arXiv:2603.01697).

N tokens, D width, H expert hidden width, L layers, E_l experts in layer l.

Gate (`PercentileGate`, as published): g = softmax(x W / T) with T = 0.5; while training g <- g + 0.1 eps, after the
softmax; the threshold theta_n is the tau-quantile of the token's OWN gate vector; active are the experts with g > theta
(the best one if there is none); their weights are a second softmax, over the active g; y_n = sum_i w_ni E_i(x_n).

What this gate cannot do: the tau-quantile of E values without ties always leaves the same number above it,
`percentile_count(E, tau)` = E - 1 - floor(tau (E - 1)), for every token. The noise changes which experts pass, never
how many. The published gate is top-K routing: the claim that it activates a variable number is refuted by construction.

Gates that do vary (`ThresholdGate`, ours and not the paper's): experts within a factor of the best one, the smallest
set that holds a given probability, or all above a multiple of the uniform share. `calibrate` sets their level such that
the mean number of active experts equals that of a fixed-K router they are compared with.

Schedules (`expert_schedule`): E_l over depth in six shapes. The formulas are inferred from the names; the sixth shape
is taken to be the valley. The paper did not match the number of parameters, so give `total` to do it.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.balance import balance_losses, check_coefficients
from workbench.lib.core.experts import MLPExperts
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import check_finite, check_tokens, check_top_k
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.schedules import expert_schedule
from workbench.lib.core.task import Batch, Task
from workbench.lib.core.train import Hook, State

METHOD = Method(
    slug="dynamoe",
    title="DynaMoE: dynamic token-level expert activation with layer-wise adaptive capacity",
    family="routing",
    year=2026,
    paper="arXiv:2603.01697",
    claim="Giving the early layers more experts than the late ones beats the same number in every layer on images, and "
    "activating a variable number of experts per token lowers the variance of the gradient.",
    objects=(
        "DynaMoEStack",
        "PercentileGate",
        "ThresholdGate",
        "MLPExperts",
        "expert_schedule",
        "calibrate",
        "gradient_noise",
    ),
)

WEIGHTS = ("softmax", "renorm")
RULES = {"relative": (0.0, 1.0), "top_p": (0.0, 1.0), "absolute": (0.0, math.inf)}


class DynamicGate(nn.Module):
    """Base of the gates: g = softmax(x W / T), an active set per token, weights over it. No auxiliary loss by default.

    A subclass gives `active(g (N, E)) -> (N, E) bool`; a token it leaves empty gets its best expert.

    Args:
        temperature: T.
        weight: "softmax": softmax of g over the active set (as published; g lies in [0, 1], so these weights are nearly
            equal); "renorm": g over its sum on the active set.
        noise: standard deviation of the noise added to g while training, after the softmax. It selects; with "renorm"
            the weights are those of the clean g, because a noisy one can be negative.
        coefficients: weight of each balance loss, as in `TopKRouter`.
    """

    top_k = None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        temperature: float = 0.5,
        weight: str = "softmax",
        noise: float = 0.0,
        coefficients: dict[str, float] | None = None,
    ):
        super().__init__()
        check_top_k(1, n_experts)
        if weight not in WEIGHTS:
            raise unknown("weight", weight, WEIGHTS)
        if not temperature > 0:
            raise InputError(f"temperature is {temperature} but must be above 0")
        if not noise >= 0:
            raise InputError(f"noise is {noise} but must be at least 0")
        self.n_experts, self.temperature, self.weight, self.noise = n_experts, temperature, weight, noise
        self.coefficients = check_coefficients(coefficients)
        self.projection = nn.Linear(d_model, n_experts, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def active(self, gates: Float[Tensor, "tokens experts"]) -> Bool[Tensor, "tokens experts"]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        check_tokens(x)
        logits = self.projection(x) / self.temperature
        check_finite(logits)
        probs = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        gates = probs + self.noise * torch.randn_like(probs) if self.training and self.noise else probs
        mask = self.active(gates)
        best = torch.zeros_like(mask).scatter(-1, gates.argmax(-1, keepdim=True), True)
        mask = mask | (best & ~mask.any(-1, keepdim=True))
        if self.weight == "softmax":
            weights = torch.softmax(gates.masked_fill(~mask, -math.inf), dim=-1)
        else:
            weights = probs * mask / (probs * mask).sum(-1, keepdim=True)
        routing = Routing.ragged(mask, weights, probs=probs, logits=logits)
        routing.losses = balance_losses(routing, self.coefficients)
        return routing


class PercentileGate(DynamicGate):
    """The published gate: active is what lies above the tau-quantile of the token's own gates.

    Args:
        tau: 0..1; every token gets `percentile_count(n_experts, tau)` experts.
        options: as in `DynamicGate`; with noise=0 and weight="renorm" this is standard top-K routing with
            renormalised weights.
    """

    def __init__(self, d_model: int, n_experts: int, tau: float = 0.5, *, noise: float = 0.1, **options):
        super().__init__(d_model, n_experts, noise=noise, **options)
        check_tau(tau)
        self.tau = tau

    def active(self, gates: Float[Tensor, "tokens experts"]) -> Bool[Tensor, "tokens experts"]:
        return gates > percentile(gates.detach(), self.tau)


class ThresholdGate(DynamicGate):
    """A gate whose number of active experts does vary. Not in the paper: it is what the paper's claim would need.

    Args:
        rule: "relative": g_i >= level * max_j g_j; "top_p": the smallest set of the best experts that holds at least
            the probability `level`; "absolute": g_i > level / E.
        level: 0..1, for "absolute" any number from 0 up; a buffer, see `calibrate`.
        k_max: at most this many experts, the best ones; default E.
        options: as in `DynamicGate`; no noise.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        rule: str = "relative",
        level: float = 0.5,
        k_max: int | None = None,
        **options,
    ):
        super().__init__(d_model, n_experts, **options)
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        low, high = RULES[rule]
        if not low <= level <= high:
            raise InputError(f"level is {level} but must be between {low:g} and {high:g} for rule {rule!r}")
        k_max = n_experts if k_max is None else k_max
        if not 1 <= k_max <= n_experts:
            raise InputError(f"k_max is {k_max} but must be between 1 and n_experts = {n_experts}")
        self.rule, self.k_max = rule, k_max
        self.register_buffer("level", torch.tensor(level, dtype=torch.float64))

    def active(self, gates: Float[Tensor, "tokens experts"]) -> Bool[Tensor, "tokens experts"]:
        g = gates.detach().double()
        ordered, order = g.sort(dim=-1, descending=True, stable=True)
        if self.rule == "relative":
            chosen = ordered >= self.level * ordered[:, :1]
        elif self.rule == "absolute":
            chosen = ordered > self.level / self.n_experts
        else:  # take an expert while it and all behind it hold more than 1 - level; summed from the small end, so that
            tail = ordered.flip(-1).cumsum(-1).flip(-1)  # rounding never drops the last ones at level 1
            chosen = tail > (1 - self.level) * tail[:, :1]
        chosen[:, self.k_max :] = False
        return torch.zeros_like(chosen).scatter(-1, order, chosen)


def check_tau(tau: float) -> None:
    """Raise `InputError` unless 0 <= tau <= 1."""
    if not 0 <= tau <= 1:
        raise InputError(f"tau is {tau} but must be between 0 and 1")


def percentile(gates: Float[Tensor, "tokens experts"], tau: float) -> Float[Tensor, "tokens 1"]:
    """The tau-quantile of each row with linear interpolation, as in `torch.quantile`.

    In float64, and with a rank that is an integer up to rounding taken as one: else two tokens with the same number of
    experts below the threshold could differ in the last bit of it.
    """
    rank = _rank(gates.shape[-1], tau)
    ordered = gates.double().sort(-1).values
    low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
    return torch.lerp(low, high, rank - math.floor(rank))[:, None]


def percentile_count(n_experts: int, tau: float) -> int:
    """Experts that `PercentileGate` gives every token (without ties): E - 1 - floor(tau (E - 1)), at least 1."""
    check_tau(tau)
    return max(1, n_experts - 1 - math.floor(_rank(n_experts, tau)))


def _rank(n: int, tau: float) -> float:
    return round(tau * (n - 1), 9)


@torch.no_grad()
def calibrate(
    gate: ThresholdGate, gates: Float[Tensor, "tokens experts"], mean_active: float, halvings: int = 40
) -> float:
    """Set the level of a gate such that these tokens get `mean_active` experts on average; returns what they get.

    Bisection: the number falls as the level of "relative" and "absolute" rises, and rises with that of "top_p".

    Args:
        gates: probabilities of held tokens, `Routing.probs`.
        mean_active: 1..k_max.
        halvings: of the range of levels.
    """
    if not 1 <= mean_active <= gate.k_max:
        raise InputError(f"mean_active is {mean_active} but must be between 1 and k_max = {gate.k_max}")
    low, high = RULES[gate.rule][0], min(RULES[gate.rule][1], float(gate.n_experts))
    for _ in range(halvings):
        gate.level.fill_((low + high) / 2)
        too_many = _mean_active(gate, gates) > mean_active
        if too_many == (gate.rule == "top_p"):
            high = float(gate.level)
        else:
            low = float(gate.level)
    return _mean_active(gate, gates)


def _mean_active(gate: ThresholdGate, gates: Tensor) -> float:
    return float(gate.active(gates).sum(-1).clamp(min=1).double().mean())


class Calibrate(Hook):
    """Calibrates every `ThresholdGate` of the model on a held batch, before the first step and every few steps.

    Args:
        batch: rows that are used for nothing else.
        mean_active: of each MoE layer.
        every: steps between calibrations.
    """

    def __init__(self, batch: Batch, mean_active: Sequence[float], every: int = 10):
        self.batch, self.mean_active, self.every = batch, tuple(mean_active), every

    def before_step(self, state: State) -> None:
        if state.step % self.every:
            return
        layers = moe_layers(state.model).values()
        with evaluating(state.model), observing(layers, lambda routing, _: routing.probs) as seen:
            state.task.loss(state.model, self.batch)
        for (layer, (probs,)), mean_active in zip(seen.items(), self.mean_active, strict=True):
            calibrate(layer.router, probs, mean_active)


class DynaMoEStack(nn.Module):
    """L layers x <- LayerNorm(x + MoE_l(x)) with E_l experts each, (..., D) -> (..., D).

    Args:
        schedule: E_l, see `expert_schedule`.
        gate_factory: E_l -> the gate of that layer.

    Parameters: sum_l E_l (2 D H + H + D) of the experts, D sum_l E_l of the gates, 2 D L of the norms.
    """

    def __init__(self, schedule: Sequence[int], gate_factory: Callable[[int], nn.Module], d_model: int, d_hidden: int):
        super().__init__()
        self.layers = nn.ModuleList(MoELayer(gate_factory(n), MLPExperts(n, d_model, d_hidden)) for n in schedule)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in schedule)

    def forward(self, x: Float[Tensor, "*batch dim"], context: Context | None = None) -> Float[Tensor, "*batch dim"]:
        context = context if context is not None else Context()
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x, context))
        return x


def gradient_noise(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """Noise of the gradient over minibatches at fixed weights, per MoE layer, gate and experts apart.

    V = mean_j Var_m(grad_mj) / mean_j (mean_m grad_mj)^2 over the parameters j of a group and M >= 2 minibatches m; the
    variance is the unbiased one; NaN where every gradient is zero. Keys: "<layer>/router", "<layer>/experts". The model
    keeps its mode: in training mode the noise of the gate is part of V. Gradients are left as they were found.
    """
    groups = {
        f"{name}/{part}": [p for p in getattr(layer, part).parameters() if p.requires_grad]
        for name, layer in moe_layers(model).items()
        for part in ("router", "experts")
    }
    trained = [p for group in groups.values() for p in group]
    sums = {p: torch.zeros_like(p, dtype=torch.float64) for p in trained}
    squares = {p: torch.zeros_like(p, dtype=torch.float64) for p in trained}
    count = 0
    for batch in batches:
        loss, context = task.loss(model, batch)
        grads = torch.autograd.grad(loss + context.aux, trained, allow_unused=True)
        count += 1
        for p, grad in zip(trained, grads, strict=True):
            if grad is not None:  # the gate has no gradient where every token has one expert of weight 1
                sums[p] += grad
                squares[p] += grad.double().square()
    if count < 2:
        raise InputError(f"batches holds {count} minibatches but must hold at least 2")
    noise = {}
    for name, group in groups.items():
        of_mean = sum(float((sums[p] / count).square().sum()) for p in group)
        of_all = sum(float(squares[p].sum()) for p in group)
        noise[name] = (of_all - count * of_mean) / (count - 1) / of_mean if of_mean > 0 else math.nan
    return noise


def counts_histogram(routing: Routing) -> Int64[Tensor, " active"]:
    """How many tokens have 1, 2, ..., E active experts, (E,): a single bar for `PercentileGate`."""
    return torch.bincount(routing.active_counts, minlength=routing.n_experts + 1)[1:]


def example() -> nn.Module:
    schedule = expert_schedule("descending", n_layers=3, n_min=2, n_max=6)
    return DynaMoEStack(schedule, lambda n: PercentileGate(32, n, tau=0.5), d_model=32, d_hidden=32)
