"""Does progressive sparsification balance the lower layers where the usual balance loss cannot? (2512.16248)

A byte model on Python sources with one active expert per layer. All loads are measured on held-out text in eval mode,
before any capacity limit (there is none), never on the batch a balance loss is acting on.
"""

import copy
import math
import statistics
from collections.abc import Callable
from itertools import cycle
from operator import itemgetter

import torch
from torch import nn

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.task import Task
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.measures.meters import RoutingMeter
from workbench.lib.measures.routing import load_balance_value, load_stats, null_max_vio, total_variation
from workbench.lib.routing.sigma_moe_tiny import METHOD, GlobalBatchRouter, Sparsify, SparsityPlan, active_parameters
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, decide

#: Arm -> options of its router. "lbl-equal-flops" is "lbl" trained until it has cost what "progressive" costs.
ROUTERS = {
    "lbl": {"coefficients": {"lbl": 1e-2}},
    "progressive": {"coefficients": {"lbl": 1e-2}},
    "top1-lbl": {"coefficients": {"top1": 1e-2}},
    "loss-free": {"bias_rate": 1e-3},
    "lbl-equal-flops": {"coefficients": {"lbl": 1e-2}},
    "lbl-weak": {"coefficients": {"lbl": 1e-3}},
}
NEAR_MINIMUM = 1.25  # of the balance loss, whose value is 1 at balance and E at collapse
FOOLED = 2.0  # TV(load) over TV(probability)

RULE = (
    "Lower layers are those with several active experts before the switch; all values are on held-out text. "
    '(a) The balance loss is fooled: in the lower layers of "lbl" the total variation of the load from uniform is at '
    f"least {FOOLED:g} times that of the mean probability, the 95% paired interval of their difference lies above 0, "
    f"and the balance loss is at most {NEAR_MINIMUM} (1 is its value at balance). "
    "(b) The schedule repairs it: the 95% paired interval of the MaxVio of the lower layers, progressive minus lbl at "
    "equal steps, lies below 0, and its bits per byte are worse by no more than the standard deviation of lbl over "
    "the seeds. "
    "(c) top1-lbl has the lowest MaxVio of all arms, mean over all layers and seeds. "
    "Reproduced if (a), (b) and (c) hold. Not reproduced if one of them fails, which for an interval means that the "
    "mean is not on the claimed side of 0. Not resolved otherwise, and always with a single seed."
)

COMMON = {"n_layers": 4, "n_heads": 4, "low": (4, 2), "switch_at": 0.7, "arms": tuple(ROUTERS)[:-1]}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 1, "steps": 20, "batch_size": 4, "seq_len": 32, "cap": 16_384, "points": 4, "test_batches": 1}
    | {"d_model": 16, "n_heads": 2, "n_experts": 8, "d_hidden": 16},
    "small": COMMON
    | {"seeds": 3, "steps": 280, "batch_size": 16, "seq_len": 64, "cap": 524_288, "points": 7, "test_batches": 8}
    | {"d_model": 64, "n_experts": 32, "d_hidden": 32},
    "full": COMMON
    | {"seeds": 5, "steps": 2000, "batch_size": 32, "seq_len": 64, "cap": 4_194_304, "points": 40, "test_batches": 32}
    | {"d_model": 64, "n_layers": 6, "n_experts": 96, "d_hidden": 48, "low": (4, 4, 2), "switch_at": 0.9}
    | {"arms": tuple(ROUTERS)},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    plan, steps, flops = budget(arm, model, task, settings)
    curve = HeldOut(every=max(1, steps // settings["points"]))
    config = TrainConfig(steps, settings["batch_size"], seed=seed, eval_every=None)
    train(model, task, config, [Sparsify(plan), curve])
    metrics, meter = held_out(model, task, "test", settings["test_batches"])
    load, stats = loads(meter), load_stats(loads(meter))
    probability = torch.stack([meter.importance(layer) for layer in meter.layers])
    confidence = torch.stack([meter.confidence(layer) for layer in meter.layers])
    null = null_max_vio(int(load[0].sum()), settings["n_experts"], generator=torch.Generator().manual_seed(0))
    extra = {
        "bits_per_byte": metrics["bits_per_byte"],
        "active_params_at_start": active_parameters(model, plan, 0),
        "switch_step": plan.switches[0] if plan.switches else None,
        "max_vio": numbers(stats.max_vio),
        "min_deviation": numbers(stats.min_deviation),
        "dead": numbers(stats.dead),
        "balance_loss": numbers(load_balance_value(load, probability)),
        "top1_loss": numbers(settings["n_experts"] * probability.square().sum(-1) / confidence),
        "confidence": numbers(confidence),
        "tv_load": numbers(total_variation(load)),
        "tv_probability": numbers(total_variation(probability)),
        "null_max_vio": numbers(null),
        "load": numbers(load / load.sum(-1, keepdim=True)),
        "probability": numbers(probability),
        "curve": curve.points,
    }
    metric = stats.max_vio[: len(settings["low"])].mean().item()
    active = active_parameters(model, plan, steps)
    return Row(arm, seed, count_params(model), active, flops, steps, metric, extra)


def build(arm: str, settings: Settings) -> DecoderLM:
    def ffn(_: int) -> nn.Module:
        router = GlobalBatchRouter(settings["d_model"], settings["n_experts"], **ROUTERS[arm])
        return MoELayer(router, GLUExperts(settings["n_experts"], settings["d_model"], settings["d_hidden"]))

    return decoder(settings, ffn)


def budget(arm: str, model: nn.Module, task: Task, settings: Settings) -> tuple[SparsityPlan, int, int]:
    """The plan of an arm, its steps, and the floating-point operations of the whole training."""
    steps, n_layers = settings["steps"], settings["n_layers"]
    constant = SparsityPlan.constant(n_layers)
    progressive = SparsityPlan.progressive(n_layers, steps, settings["low"], settings["switch_at"])
    dense, sparse = (step_flops(model, task, progressive, at, settings) for at in (0, steps))
    switch = progressive.switches[0]
    total = switch * dense + (steps - switch) * sparse
    if arm == "progressive":
        return progressive, steps, total
    if arm == "lbl-equal-flops":
        steps = round(total / sparse)
    return constant, steps, steps * sparse


def step_flops(model: nn.Module, task: Task, plan: SparsityPlan, step: int, settings: Settings) -> int:
    model = copy.deepcopy(model)  # a pass in training mode would be counted by its routers
    plan.apply(model, step)
    return measure_budget(model, task, task.batch("train", settings["batch_size"], torch.Generator())).flops


def held_out(model: nn.Module, task: Task, split: str, max_batches: int) -> tuple[dict[str, float], RoutingMeter]:
    """Metrics of a split, and the routing of all its tokens, in eval mode."""
    layers = moe_layers(model)
    meter = RoutingMeter(list(layers), [layer.n_experts for layer in layers.values()], top_k=None)
    names = cycle(layers)  # each pass goes through them in this order
    with observing(layers.values(), lambda routing, _: meter.update(next(names), routing.mask(), routing.probs)):
        return task.evaluate(model, split, max_batches), meter


def loads(meter: RoutingMeter) -> torch.Tensor:
    """Pairs per expert, (layers, experts)."""
    return torch.stack([meter.counts(layer).pairs.diagonal() for layer in meter.layers])


class HeldOut(Hook):
    """Records loss and MaxVio of every layer on one batch of held-out text, every few steps."""

    def __init__(self, every: int):
        self.every = every
        self.points: dict[str, list] = {"step": [], "bits_per_byte": [], "max_vio": []}

    def after_step(self, state: State) -> None:
        if (state.step + 1) % self.every:
            return
        metrics, meter = held_out(state.model, state.task, "validation", 1)
        self.points["step"].append(state.step + 1)
        self.points["bits_per_byte"].append(round(metrics["bits_per_byte"], 6))
        self.points["max_vio"].append(numbers(load_stats(loads(meter)).max_vio))


def numbers(values: torch.Tensor) -> list:
    """As nested lists, rounded to what a figure can show."""
    return (values.double() * 1e6).round().div(1e6).tolist()


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""

    def lower(name: str) -> Callable[[Row], float]:
        return lambda row: statistics.fmean(row.extra[name][: len(settings["low"])])

    max_vio = rows.means(lambda row: statistics.fmean(row.extra["max_vio"]))
    bits, value = rows.means("bits_per_byte"), rows.mean("lbl", lower("balance_loss"))
    tv_load, tv_probability = rows.of("lbl", lower("tv_load")), rows.of("lbl", lower("tv_probability"))
    ratio = statistics.fmean(tv_load) / statistics.fmean(tv_probability)
    gap = rows.interval([load - probability for load, probability in zip(tv_load, tv_probability, strict=True)])
    repair = rows.minus("progressive", "lbl", lower("max_vio"))
    worse = bits["progressive"] - bits["lbl"]
    spread = statistics.stdev(rows.of("lbl", "bits_per_byte")) if repair.n > 1 else math.inf
    most_balanced = min(max_vio, key=max_vio.get)
    parts = {
        "a: load far from uniform while P is near it": status(
            ratio >= FOOLED and value <= NEAR_MINIMUM and gap.estimate > 0, gap.low > 0
        ),
        "b: the schedule lowers MaxVio": status(repair.estimate < 0, repair.high < 0),
        "b: at equal quality": status(worse <= spread, math.isfinite(spread)),
        "c: top-1 loss the most balanced": status(most_balanced == "top1-lbl", True),
    }
    states = parts.values()
    verdict = decide(
        (NOT_RESOLVED, repair.n < 2), (NOT_REPRODUCED, "fails" in states), (REPRODUCED, "open" not in states)
    )
    equal_flops = rows.minus("progressive", "lbl-equal-flops", "bits_per_byte")
    return Judgement.on(
        repair,
        verdict,
        "MaxVio of the lower layers on held-out text, progressive minus constant top-1 at equal steps ("
        + "; ".join(f"{part}: {found}" for part, found in parts.items())
        + ").",
        {
            "parts": parts,
            "tv_load_over_tv_probability": ratio,
            "balance_loss_of_lbl": value,
            "bits_per_byte_progressive_minus_lbl": worse,
            "bits_per_byte_spread_of_lbl": spread,
            "bits_per_byte_progressive_minus_equal_flops": [equal_flops.estimate, equal_flops.low, equal_flops.high],
            "max_vio_all_layers": max_vio,
            "max_vio_lower_layers": rows.means(lower("max_vio")),
            "bits_per_byte": bits,
            "active_params_start_end": {r.arm: [r.extra["active_params_at_start"], r.active_params] for r in rows},
        },
    )


def status(on_the_claimed_side: bool, shown: bool) -> str:
    """ "holds", "fails" (not on the claimed side) or "open" (on it, but the seeds do not show it)."""
    if not on_the_claimed_side:
        return "fails"
    return "holds" if shown else "open"


STUDY = Study(
    METHOD,
    metric="max_vio_lower",
    unit="max/mean load - 1",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    power=Power(("lbl", "loss-free"), effect=0.5),
    main="progressive",
)
