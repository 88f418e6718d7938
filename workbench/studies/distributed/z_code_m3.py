"""Do random token selection, aggregation and pruning do what they are said to, in a small model of six languages?

A decoder that reads a prefix in both directions translates between six languages made of one English text, and
denoises them (`beds.translated_text`). Every other block has E experts, top-1, with places for half of the tokens in
training: one in two is dropped at least. Arms that are trained whole differ in who is: whoever comes late in the batch
("position"), the least probable ("probability"), anybody ("random"). All are judged on test text with places for twice
a fair share, by their own policy, as the paper's recipe has it.

"aggregated" grows: a quarter of the steps with E / 2 experts make an ancestor; two copies of it are trained for a
quarter each, each on a half of the text; of these one model of E experts is made, and trained for the last quarter. So
it processes as many tokens, in sum, as the others. Its baseline is "random", from scratch.

After its training, the model of "random" is pruned to half its experts, by utilisation on validation text and at
random. Both, and the whole model, are trained a little on; before and after they are compared.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from workbench.beds.translated_text import Translation
from workbench.lib import data
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.distributed.z_code_m3 import (
    METHOD,
    PARTS,
    aggregate_experts,
    prune_experts,
    served_layer,
    served_shares,
    utilisation,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

BATCHES = 8  # of those by which positions are compared, and utilisation is measured
MARGIN = 0.0433  # bits per letter: 0.03 nats

#: Arm -> who is served.
POLICIES: Mapping[str, str] = {
    "position": "position",
    "probability": "probability",
    "random": "random",
    "aggregated": "random",
    "unrelated": "random",
    "unlimited": "random",
}
GROWN = ("aggregated", "unrelated")
SMALL_ARMS = ("position", "probability", "random", "aggregated")
BASELINES = ("position", "probability")

RULE = (
    "The metric is bits per letter of translations on test text, with places for twice a fair share of tokens; "
    "intervals are paired over seeds. (a) Selection: random minus position: the 95% interval lies below 0. "
    "(b) Aggregation: aggregated minus random, at the same number of tokens: the 95% interval lies below 0. "
    "(c) Pruning: random with half of its experts, those of highest utilisation, after a little more training, minus "
    f"the whole model after the same: the 90% interval lies below the margin of {MARGIN} bits (0.03 nats); and by "
    "utilisation minus by chance, likewise: the mean is not above 0. Reproduced if all three hold. Not reproduced if "
    "(a) or (b) lies above 0, or the first of (c) above the margin. Not resolved otherwise. The effect is random minus "
    "position. Multitask training is not varied."
)

COMMON = {"n_heads": 4, "denoising": 0.5, "balance": 0.01, "jitter": 0.01, "factor": 0.5, "lr": 8e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "tuning": 2, "batch_size": 8, "length": 11, "cap": 65_536, "arms": SMALL_ARMS}
    | {"d_model": 16, "d_hidden": 16, "n_layers": 2, "n_experts": 4, "test_batches": 1},
    "small": COMMON
    | {"seeds": 13, "steps": 400, "tuning": 40, "batch_size": 32, "length": 11, "cap": 262_144, "arms": SMALL_ARMS}
    | {"d_model": 48, "d_hidden": 48, "n_layers": 2, "n_experts": 8, "test_batches": 4},
    "full": COMMON
    | {"seeds": 12, "steps": 8000, "tuning": 400, "batch_size": 32, "length": 127, "cap": 1_048_576}
    | {"d_model": 96, "d_hidden": 192, "n_layers": 4, "n_experts": 16, "test_batches": None, "lr": 3e-3}
    | {"arms": tuple(POLICIES)},
}


def task_of(settings: Settings, shard: tuple[int, int] = (0, 1)) -> Translation:
    texts = data.load("text-domains", domains=("docs",), cap=settings["cap"])
    return Translation(texts, settings["length"], denoising=settings["denoising"], shard=shard)


def build(arm: str, settings: Settings, n_experts: int) -> DecoderLM:
    """The model of an arm; those of all policies start from the same weights."""
    width, hidden = settings["d_model"], settings["d_hidden"]
    factor = n_experts if arm == "unlimited" else settings["factor"]
    capacity = Capacity(factor, POLICIES[arm], evaluation=max(2.0, factor))

    def ffn(layer: int) -> nn.Module:
        if layer % 2 == 0:
            return GLU(width, hidden)
        return served_layer(width, n_experts, hidden, capacity, settings["balance"], settings["jitter"])

    task = task_of(settings)
    return DecoderLM(task.vocab, width, settings["n_layers"], settings["n_heads"], ffn, task.time)


def learn(model: nn.Module, task: Translation, settings: Settings, steps: int, seed: int) -> None:
    train(model, task, TrainConfig(steps, settings["batch_size"], settings["lr"], seed=seed, eval_every=None))


def grown(arm: str, settings: Settings, seed: int) -> nn.Module:
    """Two models of half the experts, of one ancestor or, "unrelated", of none, made one and trained on."""
    quarter, half = settings["steps"] // 4, settings["n_experts"] // 2
    first = build(arm, settings, half)
    if arm == "aggregated":
        learn(first, task_of(settings), settings, quarter, seed)
        branches, each = [first, deepcopy(first)], quarter
    else:
        branches, each = [first, build(arm, settings, half)], quarter * 3 // 2
    for i, branch in enumerate(branches):
        learn(branch, task_of(settings, (i, 2)), settings, each, seed + 1 + i)
    model = aggregate_experts(*branches)
    learn(model, task_of(settings), settings, quarter, seed + 3)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, steps = task_of(settings), settings["steps"]
    torch.manual_seed(seed)
    if arm in GROWN:
        model = grown(arm, settings, seed)
    else:
        model = build(arm, settings, settings["n_experts"])
        learn(model, task, settings, steps, seed)
    extra: dict[str, Any] = by_position(model, task, settings, seed)
    if arm == "random":
        extra |= pruned(model, task, settings, seed)
    budget = training_budget(model, task, settings["batch_size"], seed)
    return trained_row(arm, seed, budget, steps, bits(model, task, settings), **extra)


def bits(model: nn.Module, task: Translation, settings: Settings) -> float:
    return task.evaluate(model, "test", settings["test_batches"])[task.metric]


def by_position(model: nn.Module, task: Translation, settings: Settings, seed: int) -> dict[str, list[float]]:
    """The share of tokens that are served, and bits per letter, in each eighth of a batch: with the places, and on
    batches of the size, of training."""
    made, generator, costs = deepcopy(model), torch.Generator().manual_seed(seed), []
    layers = moe_layers(made).values()
    for layer in layers:
        layer.capacity_factor = replace(layer.capacity_factor, evaluation=None)
    with observing(layers, lambda routing, _: served_shares(routing)[:, :PARTS]) as seen, evaluating(made):
        for _ in range(BATCHES):
            costs.append(task.costs(made, task.batch("test", settings["batch_size"], generator))[0])
    kept, pairs = sum(sum(shares) for shares in seen.values())
    nats = torch.stack(costs).double().unflatten(1, (PARTS, -1)).mean((0, 2, 3))
    return {"served_by_position": (kept / pairs).tolist(), "bits_by_position": (nats / math.log(2)).tolist()}


def pruned(model: nn.Module, task: Translation, settings: Settings, seed: int) -> dict[str, float]:
    """Bits per letter of the whole model, and of half of its experts, before and after training on."""
    half, generator = settings["n_experts"] // 2, torch.Generator().manual_seed(seed)
    held_out = [task.batch("validation", settings["batch_size"], generator) for _ in range(BATCHES)]
    stats = utilisation(model, task, held_out)
    models = {
        "whole": deepcopy(model),
        "utilised": prune_experts(model, half, "utilisation", stats),
        "chance": prune_experts(model, half, "random", generator=generator),
    }
    found = {f"{name}_before": bits(made, task, settings) for name, made in models.items()}
    for name, made in models.items():
        learn(made, task, settings, settings["tuning"], seed + 1)
        found[name] = bits(made, task, settings)
    return found


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    selection, growth = rows.minus("random", "position"), rows.minus("aggregated", "random")
    whole, utilised, chance = (rows.of("random", name) for name in ("whole", "utilised", "chance"))
    pruning = rows.interval([a - b for a, b in zip(utilised, whole, strict=True)], level=0.9)
    criterion = rows.interval([a - b for a, b in zip(utilised, chance, strict=True)], level=0.9)
    verdict = decide(
        (
            REPRODUCED,
            selection.high < 0 and growth.high < 0 and pruning.high < MARGIN and criterion.estimate <= 0,
        ),
        (NOT_REPRODUCED, selection.low > 0 or growth.low > 0 or pruning.low > MARGIN),
    )
    reason = (
        f"Bits per letter: random minus position {selection}; aggregated minus random {growth}; half the experts by "
        f"utilisation minus the whole model, each trained on, {pruning} (90%; the margin is {MARGIN}), minus half by "
        f"chance {criterion} (90%). The effect is random minus position."
    )
    details = {
        "random_minus_position": selection,
        "random_minus_probability": rows.minus("random", "probability"),
        "aggregated_minus_random": growth,
        "utilised_minus_whole": pruning,
        "utilised_minus_chance": criterion,
        "pruned": {
            name: rows.mean("random", name)
            for name in ("whole_before", "utilised_before", "chance_before", "whole", "utilised", "chance")
        },
        "served_by_position": by_part(rows, "served_by_position"),
        "bits_by_position": by_part(rows, "bits_by_position"),
    }
    return Judgement.on(selection, verdict, reason, details)


def by_part(rows: Rows, what: str) -> dict[str, list[float]]:
    """Means over seeds, arm by arm."""
    return {arm: torch.tensor(rows.of(arm, what), dtype=torch.float64).mean(0).tolist() for arm in rows.arms}


STUDY = Study(
    METHOD,
    metric="bits_per_letter",
    unit="bits/letter",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="With places for half of the tokens, serving any of them gives a better translator than serving the first; "
    "two models grown from one ancestor and made one are better than one from scratch at as many tokens; half of the "
    "experts, those of highest utilisation, are as good as all.",
    power=Power(BASELINES, effect=MARGIN, deviation={"small": (0.0506, 12)}),
    main="random",
    trainings=lambda arm: 2 if arm == "aggregated" else 1,
)
