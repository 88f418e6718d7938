"""Does LOST pre-train as well as full rank, and better than what else has as few numbers? (2508.02668)

A small decoder learns Python sources (`beds.python_text`) from the same drawn start in every arm. In its blocks all
linear layers are full, or have a fifth of their numbers: low rank alone, CoLA, SLTrain, LOST, and LOST with columns
that were drawn, and without its SiLU. Embedding (which is the output too), positions and norms stay. Each arm has its
own rate: the best on validation of `RATES`, over two seeds that are not in the study.
"""

import statistics
from collections.abc import Mapping

import torch
from torch import nn

from workbench.beds import python_text as bed
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLU
from workbench.lib.core.factored import FactoredLinear, LowRankLinear, replace_linears
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.low_rank.lost import (
    METHOD,
    CoLALinear,
    LOSTLinear,
    SLTrainLinear,
    importance,
    match_budget,
    shapes_of,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import Scores, edges, sweep
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

TARGETS = "blocks.*"
SPARSE = 0.25
FULL, LOW, COLA, SLTRAIN = "full", "low-rank", "cola", "sltrain"
LOST, RANDOM, LINEAR = "lost", "lost-random", "lost-linear"
ARMS = (FULL, LOW, COLA, SLTRAIN, LOST, RANDOM, LINEAR)
MARGIN = 0.05
RATES = (1e-3, 5e-3, 2e-2, 1e-1)
#: Arm -> the rate whose mean on validation over the seeds 1000 and 1001 was best; none was at an end of `RATES`.
BEST = {FULL: 5e-3, LOW: 5e-3, COLA: 2e-2, SLTRAIN: 5e-3, LOST: 2e-2, RANDOM: 2e-2, LINEAR: 2e-2}

RULE = (
    "The metric is bits per byte on test after training; intervals are paired, over seeds, at 95%. With a fifth of the "
    f"blocks' numbers LOST (a) is within {MARGIN} of full rank or below it: the interval of the difference lies below "
    f"{MARGIN}; (b) is better than low rank alone: the interval lies below 0; (c) is no worse than SLTrain: the "
    f"interval lies below {MARGIN}. Reproduced if all hold. Not reproduced if the interval of (a) or of (c) lies above "
    f"{MARGIN}, or that of (b) above 0. Not resolved otherwise. The effect is that of (a)."
)

MODEL = {"cap": 262_144, "seq_len": 32, "d_model": 64, "n_layers": 2, "n_heads": 4, "batch": 16, "share": 0.2}
PRESETS = {
    "smoke": MODEL
    | {"cap": 16_384, "d_model": 32, "n_layers": 1, "share": 0.4, "steps": 6, "rates": dict.fromkeys(ARMS, 1e-2)}
    | {"seeds": 2},
    "small": MODEL | {"steps": 400, "rates": BEST, "seeds": 12},
    "full": MODEL
    | {"cap": 1_048_576, "seq_len": 256, "d_model": 256, "n_layers": 6, "batch": 32, "steps": 10_000, "rates": RATES}
    | {"seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = bed.python_text(settings)

    def learn(rate: float) -> Scores:
        model = made(arm, seed, settings)
        config = TrainConfig(settings["steps"], settings["batch"], lr=rate, seed=seed, eval_every=None)
        train(model, task, config)
        return task.evaluate(model)[task.metric], task.evaluate(model, "test")[task.metric]

    rates = settings["rates"]
    if isinstance(rates, Mapping):
        rate = rates[arm]
        valid, metric = learn(rate)
        extra, trainings = {"best_rate": rate, "validation": [valid]}, 1
    else:
        swept = sweep(learn, rates, worst=8.0, lower_is_better=True)
        metric, extra, trainings = swept.metric, swept.extra(), len(rates)
    model = made(arm, seed, settings)
    budget, steps = training_budget(model, task, settings["batch"]), settings["steps"] * trainings
    extra |= {"block_params": count_params(model.blocks)} | (chosen(model, seed, settings) if arm == LOST else {})
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, metric, extra)


def made(arm: str, seed: int, settings: Settings) -> nn.Module:
    """The decoder of a seed with the layers of an arm, which start from the same weights as far as they start from any.

    The numbers are those of the largest rank that low rank alone can have; no arm has more, and none less by a column.
    """
    torch.manual_seed(seed)
    model = bed.decoder(settings, lambda layer: GLU(settings["d_model"], 2 * settings["d_model"]))
    if arm == FULL:
        return model
    shapes = shapes_of(model, TARGETS)
    alone = match_budget(shapes, int(settings["share"] * sum(o * i for o, i in shapes.values())), 0.0).rank
    fit = match_budget(shapes, alone * sum(o + i for o, i in shapes.values()), SPARSE)

    def make(layer: nn.Linear, name: str) -> FactoredLinear:
        weight, (o, i) = layer.weight.detach(), shapes[name]
        if arm == LOW:
            return LowRankLinear.from_dense(weight, alone)
        if arm == COLA:
            return CoLALinear(i, o, alone, bias=False)
        if arm == SLTRAIN:
            return SLTrainLinear(i, o, fit.rank, fit.counts[name], bias=False)
        options = {"selection": "random" if arm == RANDOM else "svd", "act": None if arm == LINEAR else "silu"}
        return LOSTLinear.from_dense(weight, fit.rank, fit.columns[name], **options)

    replace_linears(model, make, TARGETS)
    return model


def chosen(model: nn.Module, seed: int, settings: Settings) -> dict[str, float]:
    """What LOST had to choose by: how much the importance of columns varies, of its mean, and what the chosen have."""
    dense = made(FULL, seed, settings)
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LOSTLinear):
            score = importance(dense.get_submodule(name).weight, layer.rank)
            found.append((float(score.std() / score.mean()), float(score[layer.idx].mean() / score.mean())))
    variation, above = zip(*found, strict=True)
    return {"variation": statistics.fmean(variation), "chosen_above_mean": statistics.fmean(above)}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    full, low, sltrain = (rows.minus(LOST, arm) for arm in (FULL, LOW, SLTRAIN))
    verdict = decide(
        (NOT_REPRODUCED, full.low > MARGIN or low.low > 0 or sltrain.low > MARGIN),
        (REPRODUCED, full.high < MARGIN and low.high < 0 and sltrain.high < MARGIN),
    )
    reason = (
        f"Bits per byte of LOST beside full rank {full}, which is the effect; beside low rank alone {low}, CoLA "
        f"{rows.minus(LOST, COLA)}, SLTrain {sltrain}, LOST with columns that were drawn {rows.minus(LOST, RANDOM)} "
        f"and LOST without SiLU {rows.minus(LOST, LINEAR)}. {edges(rows)}"
    ).rstrip()
    details = {
        "bits": rows.means(),
        "beside": {arm: rows.minus(LOST, arm) for arm in rows.arms if arm != LOST},
        "without SiLU, beside low rank alone": rows.minus(LINEAR, LOW),
        "block_params": rows.means("block_params"),
        "best_rate": rows.means("best_rate"),
        "importance": {what: rows.mean(LOST, what) for what in ("variation", "chosen_above_mean")},
    }
    return Judgement.on(full, verdict, reason, details, claimed=(-float("inf"), MARGIN))


STUDY = Study(
    METHOD,
    metric="bits/byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power((FULL, LOW), effect=MARGIN, deviation={"small": (0.03756, 12)}),
)
