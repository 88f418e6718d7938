"""Do more experts in the early layers help on images, and does a variable number calm the gradient? (2603.01697)

A stack of mixture layers on small images given as vectors. One "seed" is one random split of the data and one
initialisation; all arms share both, so differences are paired. "Tokens" are images here.
"""

import math
import statistics

import torch
from scipy.stats import ttest_rel
from torch import nn
from torch.nn import functional as F

from workbench.lib import data
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Context
from workbench.lib.core.schedules import SCHEDULES
from workbench.lib.core.task import Classification
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.measures.statistics import holm, paired_interval, spearman
from workbench.lib.routing.dynamoe import (
    Calibrate,
    DynamicGate,
    DynaMoEStack,
    PercentileGate,
    ThresholdGate,
    counts_histogram,
    expert_schedule,
    gradient_noise,
    percentile_count,
)
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

PAPER_EFFECT = 0.0547  # largest gain of descending over uniform in the paper, CIFAR-10
NOISE_BATCHES = 16

RULE = (
    "Accuracy on the test part of random splits, paired by split and initialisation; all schedules have the same total "
    "of experts and the published gate. "
    "Reproduced if the 95% paired interval of descending minus uniform on the first data set lies above 0 and its "
    "p-value stays below 0.05 after Holm's correction over the comparisons of all schedules with uniform. "
    f"Not resolved if the interval includes both 0 and {PAPER_EFFECT} (the paper's largest gain), as it does with a "
    "single seed. Not reproduced otherwise. "
    "That the published gate activates a variable number of experts is no matter of seeds: a percentile of a token's "
    "own gates lets the same number through for every token, so that claim is refuted by construction. Whether a "
    "number that does vary lowers the gradient noise is judged apart, by the 95% paired interval of the log ratio of "
    "the experts' noise, relative against top-k at the same mean number: it holds if the interval lies below 0, fails "
    "if the mean does not, and is open otherwise."
)

COMMON = {
    "total": 30,
    "n_layers": 6,
    "n_min": 2,
    "n_max": 8,
    "d_model": 64,
    "d_hidden": 32,
    "tau": 0.5,
    "batch_size": 64,
    "lr": 1e-3,
    "folds": 5,
}
THRESHOLDS = ("relative", "top_p", "absolute")
SMALL_ARMS = (*SCHEDULES, "top-k", "relative")
PRESETS = {
    "smoke": COMMON
    | {"seeds": 1, "steps": 10, "d_model": 16, "d_hidden": 16, "data": ("digits",)}
    | {"arms": ("uniform", "descending", "wave", "top-k", "relative")},
    "small": COMMON | {"seeds": 5, "steps": 200, "data": ("digits", "mnist-1d"), "arms": SMALL_ARMS},
    "full": COMMON
    | {"seeds": 15, "steps": 1500, "data": ("digits", "mnist-1d")}
    | {"arms": (*SMALL_ARMS, "top_p", "absolute", "pyramid-unmatched", "valley-unmatched")},
}


def arms(settings: Settings) -> list[str]:
    """Arms on the first data set by their names, on the others as "arm@data"."""
    others = settings["data"][1:]
    return [*settings["arms"], *(f"{arm}@{name}" for name in others for arm in settings["arms"])]


def run(arm: str, seed: int, settings: Settings) -> Row:
    kind, _, name = arm.partition("@")
    task = Classification(data.load(name or settings["data"][0], fold=seed % settings["folds"]))
    torch.manual_seed(seed)
    schedule = schedule_of(kind, settings)
    model = Classifier(task, schedule, kind, settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_batches=1)
    noise = NoiseHalfway()
    hooks: list[Hook] = [noise]
    if kind in THRESHOLDS:  # the validation part serves nothing else
        held = next(task.batches("validation", 10_000))
        hooks.append(Calibrate(held, [percentile_count(n, settings["tau"]) for n in schedule]))
    train(model, task, config, hooks)
    budget = measure_budget(model, task, task.batch("train", config.batch_size, torch.Generator()))
    histograms, against_loss = activation(model, task)
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * config.steps,
        steps=config.steps,
        metric=task.evaluate(model, "test")["accuracy"],
        extra={
            "fold": seed % settings["folds"],
            "schedule": schedule,
            "active_histogram": histograms,
            "active_against_loss": against_loss,
            "gradient_noise_router": noise.router,
            "gradient_noise_experts": noise.experts,
        },
    )


def schedule_of(kind: str, settings: Settings) -> list[int]:
    """Experts per layer of an arm: its shape at the common total, or "<shape>-unmatched"; other arms are uniform."""
    shape = kind.removesuffix("-unmatched")
    total = settings["total"] if shape == kind else None
    shape = shape if shape in SCHEDULES else "uniform"
    return expert_schedule(shape, settings["n_layers"], settings["n_min"], settings["n_max"], total)


class Classifier(nn.Module):
    """A linear map into the stack and one out of it, (B, ...) -> (B, C)."""

    def __init__(self, task: Classification, schedule: list[int], kind: str, settings: Settings):
        super().__init__()
        width = settings["d_model"]
        inputs = task.data.splits["train"][0][0].numel()
        self.embedding = nn.Linear(inputs, width)
        self.stack = DynaMoEStack(schedule, lambda n: gate(kind, n, settings), width, settings["d_hidden"])
        self.head = nn.Linear(width, task.n_classes)

    def forward(self, x, context: Context | None = None):
        return self.head(self.stack(self.embedding(x.flatten(1)), context))


def gate(kind: str, n_experts: int, settings: Settings) -> DynamicGate:
    width = settings["d_model"]
    if kind in THRESHOLDS:
        return ThresholdGate(width, n_experts, kind, weight="renorm")
    if kind == "top-k":  # without noise and with these weights the percentile gate is exactly top-K
        return PercentileGate(width, n_experts, settings["tau"], noise=0.0, weight="renorm")
    return PercentileGate(width, n_experts, settings["tau"])


class NoiseHalfway(Hook):
    """Gradient noise of every layer half-way through training: before the loss is so small that only noise is left."""

    def after_step(self, state: State) -> None:
        if state.step + 1 != max(1, state.config.steps // 2):
            return
        generator = torch.Generator().manual_seed(state.config.seed)
        size = state.config.batch_size
        batches = (state.task.batch("train", size, generator) for _ in range(NOISE_BATCHES))
        noise = gradient_noise(state.model, state.task, batches)
        layers = list(moe_layers(state.model))
        self.router = [noise[f"{layer}/router"] for layer in layers]
        self.experts = [noise[f"{layer}/experts"] for layer in layers]


@torch.no_grad()
def activation(model: nn.Module, task: Classification) -> tuple[list[list[int]], list[float]]:
    """On the test part, noise off: how many images have 1, 2, ... active experts, per layer; and Spearman's rho, with
    its interval, of an image's mean number of active experts with its loss (NaN where the number is the same for all).
    """
    layers = list(moe_layers(model).values())
    histograms = [torch.zeros(layer.n_experts, dtype=torch.int64) for layer in layers]
    counts: list[torch.Tensor] = []

    def count(layer, routing, context):
        histograms[layers.index(layer)] += counts_histogram(routing)
        counts.append(routing.active_counts)

    model.eval()
    handles = [layer.observe(count) for layer in layers]
    active, losses = [], []
    for batch in task.batches("test", 64):
        counts.clear()
        losses += F.cross_entropy(model(batch.inputs), batch.targets, reduction="none").tolist()
        active += torch.stack(counts).double().mean(0).tolist()
    for handle in handles:
        handle.remove()
    rho = spearman(active, losses)
    return [histogram.tolist() for histogram in histograms], [rho.estimate, rho.low, rho.high]


def judge(rows: list[Row], settings: Settings) -> Judgement:
    by_data: dict[str, dict[str, list[Row]]] = {name: {} for name in settings["data"]}
    for row in rows:
        kind, _, name = row.arm.partition("@")
        by_data[name or settings["data"][0]].setdefault(kind, []).append(row)
    results = {name: judge_data(by_arm) for name, by_arm in by_data.items()}
    first = results[settings["data"][0]]
    found = first["schedules"]["descending"]
    low, high = found["ci"]
    if low > 0 and found["holm_p"] < 0.05:
        verdict = REPRODUCED
    elif low <= 0 and high >= PAPER_EFFECT:
        verdict = NOT_RESOLVED
    else:
        verdict = NOT_REPRODUCED
    reason = (
        f"Accuracy on {settings['data'][0]}, descending minus uniform (Holm p {found['holm_p']:.3g}; uniform leaves "
        f"{100 * first['room']:.1f} points of room, the paper gains up to {100 * PAPER_EFFECT:.2f}). A variable number "
        "of experts per token is refuted by construction: the published gate gives every token the same number; less "
        f"gradient noise from a number that does vary: {first['less_gradient_noise']}."
    )
    for name in settings["data"][1:]:
        other = results[name]["schedules"]["descending"]
        reason += " On {}: {:.3g} [{:.3g}, {:.3g}].".format(name, other["difference"], *other["ci"])
    return Judgement(verdict, found["difference"], (low, high), reason, results)


def judge_data(arms: dict[str, list[Row]]) -> dict:
    """Everything that is compared on one data set."""
    accuracy = {arm: [row.metric for row in rows] for arm, rows in arms.items()}
    others = [kind for kind in SCHEDULES if kind != "uniform" and kind in accuracy]
    p_values = [p_value(accuracy[kind], accuracy["uniform"]) for kind in others]
    adjusted = p_values if math.isnan(p_values[0]) else holm(p_values).tolist()
    schedules = {}
    for kind, p in zip(others, adjusted, strict=True):
        interval = paired_interval(accuracy[kind], accuracy["uniform"])
        schedules[kind] = {"difference": interval.estimate, "ci": [interval.low, interval.high], "holm_p": p}
    ratio = paired_interval(log_noise(arms["relative"]), log_noise(arms["top-k"]))
    if ratio.n < 2 or ratio.estimate < 0 <= ratio.high:
        less_noise = "open"
    else:
        less_noise = "holds" if ratio.estimate < 0 else "fails"
    published = [row for kind in SCHEDULES for row in arms.get(kind, [])]
    return {
        "accuracy": {arm: statistics.fmean(values) for arm, values in accuracy.items()},
        "room": 1 - statistics.fmean(accuracy["uniform"]),
        "schedules": schedules,
        "published_gate_varies": any(bars(row) > 1 for row in published),
        "mean_active": {arm: statistics.fmean(map(mean_active, rows)) for arm, rows in arms.items()},
        "gradient_noise_log_ratio": [ratio.estimate, ratio.low, ratio.high],
        "less_gradient_noise": less_noise,
        "active_against_loss": [row.extra["active_against_loss"][0] for row in arms["relative"]],
    }


def p_value(a: list[float], b: list[float]) -> float:
    """Two-sided p of a paired t-test; NaN for one pair, 0 or 1 for differences without any spread."""
    differences = {x - y for x, y in zip(a, b, strict=True)}
    if len(a) < 2:
        return math.nan
    if len(differences) == 1:
        return float(differences == {0.0})
    return float(ttest_rel(a, b).pvalue)


def log_noise(rows: list[Row]) -> list[float]:
    """Mean over the layers of the log gradient noise of the experts, by seed."""
    return [statistics.fmean(map(math.log, row.extra["gradient_noise_experts"])) for row in rows]


def bars(row: Row) -> int:
    """The largest number of different active counts in any layer."""
    return max(sum(n > 0 for n in histogram) for histogram in row.extra["active_histogram"])


def mean_active(row: Row) -> float:
    """Active experts per image and layer."""
    histograms = row.extra["active_histogram"]
    return statistics.fmean(sum((k + 1) * n for k, n in enumerate(h)) / sum(h) for h in histograms)


STUDY = Study(
    slug="dynamoe",
    title="DynaMoE: dynamic token-level expert activation with layer-wise adaptive capacity",
    claim="On images, more experts in the early layers than in the late ones beat the same number in every layer; and "
    "a variable number of active experts per token lowers the variance of the gradient.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
