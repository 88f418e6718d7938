"""Is the learning rate that is best for a narrow network best for one eight times as wide, under Muon++? (2601.01306)

Networks 64-w-w-10 without biases learn digits. Every arm trains every width at every rate of an octave grid, always for
as long; the rate is chosen on validation. All arms of Muon's kind put all three matrices into it and start from the
spectral norm that muP asks for; AdamW starts and trains as is usual.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.lib import data
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Classification, mean_by_domain
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.low_rank.muon_pp import METHOD, MuonPP, Spectral, SpectralMonitor, spectral_init_
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ADAMW, JORDAN, RMS, MUON_PP, DECAY, ADAPTIVE = "adamw", "muon-jordan", "muon-rms", "muon++", "decay", "adaptive"

#: Arm of Muon's kind -> options.
MUONS: Mapping[str, Mapping] = {
    JORDAN: {"scale": "jordan"},
    RMS: {"scale": "rms"},
    MUON_PP: {},
    DECAY: {"weight_decay": 0.3},
    ADAPTIVE: {"adaptive": True},
}
OCTAVE = 1.0
NORMS = 0.1
WORST = 10.0  # nats: the loss that a run which diverged is given
TRACED = 6  # parts of a training between which norms are measured

RULE = (
    "The best rate of a width is the lowest point, on validation loss, of the parabola through the best rate of "
    "the grid and its neighbours. The metric is by how many octaves the best rates of the widths differ at most, "
    "for every arm and seed alone; intervals are over seeds, at 95%. (a) The best rate of Muon++ stays within one "
    f"step of the grid: the interval of its metric lies below {OCTAVE:g} octave. (b) It stays where that of Muon "
    "scaled to the size of AdamW's updates does not: the interval of the paired difference lies below 0. (c) Its "
    "weights' RMS operator norms after training, at the rate that is best for the narrowest, largest over widths "
    f"less smallest as a share of the smallest, mean over the three layers, differ by less than {NORMS:.0%}: so "
    "lies the interval. Reproduced if all three hold. Not reproduced if one of the intervals lies wholly on the "
    "other side. Not resolved otherwise. The effect is that of (b)."
)

PRESETS = {
    "smoke": {
        "widths": (16, 32, 64),
        "steps": 11,
        "batch": 32,
        "muon": (-6, -4, -2),
        "adamw": (-8, -6, -4),
        "seeds": 2,
    },
    "small": {
        "widths": (32, 64, 128, 256),
        "steps": 61,
        "batch": 64,
        "muon": (-8, -7, -6, -5, -4, -3, -2),
        "adamw": (-9, -8, -7, -6, -5, -4, -3),
        "seeds": 12,
    },
    "full": {
        "widths": (32, 64, 128, 256, 512, 1024),
        "steps": 801,
        "batch": 64,
        "muon": (-10, -9, -8, -7, -6, -5, -4, -3, -2),
        "adamw": (-11, -10, -9, -8, -7, -6, -5, -4, -3),
        "adaptive": True,
        "seeds": 12,
    },
}


class MLP(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 10) by two hidden layers of a width."""

    def __init__(self, width: int):
        super().__init__()
        sizes = (64, width, width, 10)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes))

    def forward(self, images: Tensor, context: Context | None = None) -> Tensor:
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def arms(settings: Settings) -> list[str]:
    return [ADAMW, *(arm for arm in MUONS if arm != ADAPTIVE or settings.get("adaptive"))]


def make(arm: str, width: int, seed: int) -> tuple[MLP, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = MLP(width)
    if arm == ADAMW:
        return model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for layer in model.layers:
        spectral_init_(layer.weight)
    optimizer = MuonPP(model.parameters(), precision="full", **MUONS[arm])
    optimizer.observe(model)
    return model, optimizer


def run(arm: str, seed: int, settings: Settings) -> Row:
    """All widths at all rates, the narrowest first."""
    task, widths = Classification(data.load("digits", fold=seed)), settings["widths"]
    grid = settings["adamw" if arm == ADAMW else "muon"]

    def sweep(width: int, traced: Callable[[int], bool]) -> list[Trained]:
        return [learn(arm, width, 2.0**rate, seed, settings, task, traced(at)) for at, rate in enumerate(grid)]

    narrow = sweep(widths[0], lambda at: True)
    first = least([one.loss for one in narrow])
    trained = [narrow, *(sweep(width, lambda at: at == first) for width in widths[1:])]
    losses = [[one.loss for one in of_width] for of_width in trained]
    best, reused = [lowest(grid, of_width) for of_width in losses], [of_width[first] for of_width in trained]
    extra = {
        "best_rates": best,
        "at_edge": sum(least(of_width) in (0, len(grid) - 1) for of_width in losses),
        "regret": losses[-1][first] - min(losses[-1]),
        "accuracy": reused[-1].accuracy,
        "accuracy_own": trained[-1][least(losses[-1])].accuracy,
        "norm_spread": norm_spread([one.spectra for one in reused]),
        "losses": [[round(loss, 5) for loss in of_width] for of_width in losses],
        "weight_norms": trace(reused, "weight"),
        "update_norms": trace(reused, "update"),
    }
    steps, params = settings["steps"] * len(grid), trained[-1][0].params
    flops = sum(of_width[0].flops for of_width in trained) * steps
    return Row(arm, seed, params, params, flops, steps * len(widths), max(best) - min(best), extra)


class Trained(NamedTuple):
    """One network: validation loss in nats, accuracy on test, what a `SpectralMonitor` found, and what a step costs."""

    loss: float
    accuracy: float
    spectra: Mapping[str, Sequence[Spectral]]
    params: int
    flops: int


def learn(
    arm: str, width: int, lr: float, seed: int, settings: Settings, task: Classification, traced: bool
) -> Trained:
    """Train one network from its start; one whose loss is not finite, or above `WORST`, counts as that."""
    model, optimizer = make(arm, width, seed)
    steps, batch = settings["steps"], settings["batch"]
    monitor = SpectralMonitor((steps - 1) // TRACED)
    config = TrainConfig(steps, batch, lr, warmup=0, final_lr=0.05, clip=math.inf, seed=seed, eval_every=None)
    budget = training_budget(model, task, batch)
    try:
        train(model, task, config, [monitor] if traced else [], optimizer=optimizer)
        loss = min(validation_loss(model, task), WORST)
    except FloatingPointError:
        loss = WORST
    return Trained(loss, task.evaluate(model, "test")[task.metric], monitor.found, budget.params, budget.flops)


def least(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


def lowest(grid: Sequence[float], losses: Sequence[float]) -> float:
    """Where on the grid the parabola through the least loss and its two neighbours is lowest; at an end, that end."""
    at = least(losses)
    if at in (0, len(losses) - 1):
        return float(grid[at])
    before, low, after = losses[at - 1 : at + 2]
    bend = before - 2 * low + after
    step = (grid[at + 1] - grid[at - 1]) / 2
    return grid[at] + (step * (before - after) / (2 * bend) if bend > 0 else 0.0)


def norm_spread(spectra: Sequence[Mapping[str, Sequence[Spectral]]]) -> float:
    """By how much |W|_R of a layer in the end differs over the widths, as a share of the least; mean over layers."""
    last = {name: [found[name][-1].weight for found in spectra] for name in spectra[0]}
    return statistics.fmean(max(norms) / min(norms) - 1 for norms in last.values())


def trace(trained: Sequence[Trained], what: str) -> list[list[float]]:
    """Of the layer between the hidden ones: a list for each width."""
    return [[round(getattr(one, what), 5) for one in found.spectra["layers.1"]] for found in trained]


def validation_loss(model: nn.Module, task: Classification) -> float:
    """Nats."""
    (loss,) = mean_by_domain(task, model, "validation", None, lambda batch: task.loss(model, batch)[0]).values()
    return loss


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    spread, gain = rows.interval(rows.of(MUON_PP)), rows.minus(MUON_PP, RMS)
    norms = rows.interval(rows.of(MUON_PP, "norm_spread"))
    verdict = decide(
        (NOT_REPRODUCED, spread.low > OCTAVE or gain.low > 0 or norms.low > NORMS),
        (REPRODUCED, spread.high < OCTAVE and gain.high < 0 and norms.high < NORMS),
    )
    edges = {arm: sum(rows.of(arm, "at_edge")) for arm in rows.arms}
    reason = (
        f"Octaves between the best rates of widths {settings['widths'][0]} to {settings['widths'][-1]}: Muon++ "
        f"{spread}, beside Muon in the size of AdamW's updates {gain}, which is the effect. Its weights' norms differ "
        f"over the widths by {norms}."
    )
    if sum(edges.values()):
        said = ", ".join(f"{arm} ({count})" for arm, count in edges.items() if count)
        reason += f" Widths and seeds whose best rate is at an end of the grid, so that it may lie beyond: {said}."
    details = {
        "octaves": rows.means(),
        "best_rates": {arm: _columns(rows.of(arm, "best_rates")) for arm in rows.arms},
        "regret": rows.means("regret"),
        "accuracy": rows.means("accuracy"),
        "accuracy_own": rows.means("accuracy_own"),
        "norm_spread": rows.means("norm_spread"),
        "gains": {arm: rows.minus(arm, RMS) for arm in rows.arms if arm != RMS},
    }
    return Judgement.on(gain, verdict, reason, details)


def _columns(lists: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds, of each width."""
    return [sum(column) / len(column) for column in zip(*lists, strict=True)]


STUDY = Study(
    METHOD,
    metric="drift of the best rate",
    unit="octaves",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
    main=MUON_PP,
    # half of the 1.5 octaves that the hidden matrix's rate would have to fall by over a factor of eight, under RMS
    power=Power((JORDAN, RMS), effect=0.75, deviation={"small": (0.5946, 12)}),
)
