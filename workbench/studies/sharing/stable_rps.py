"""Are hashed weights as good as a smaller network and as pruning, at equal memory, and as the dense one at none?
(2310.11611)

A perceptron 64-128-128-10 (25,856 weights) on scikit-learn's digits, by SGD with momentum and a cosine, every arm at
its own best of five rates: what shares takes the mean of its gradients, and wants a rate many times that of a dense
network. "rps-0.01" has one hundredth of the weights stored. So many has a smaller perceptron of as many parameters in
all; and so many weights are left by a mask, chosen before training (magnitude, SNIP, SynFlow, at random) or, with the
network trained once, by what became large (lottery ticket, rewound). The places of what is left are not counted, which
is generous to them. "roast-0.1" are ROAST's tiles without the scaling of gradients, at one rate for several scales s
of the array: the scaled one computes the same whatever s is (tests/lib/sharing/test_stable_rps.py), so one is enough.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from operator import itemgetter
from statistics import fmean

import torch
from torch import Tensor, nn

from workbench.beds.baseline import MLP, seeded
from workbench.lib import data
from workbench.lib.core.budget import count_params
from workbench.lib.core.prune import apply_masks, highest, masks_at_start, prunable
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.sharing.stable_rps import (
    METHOD,
    GradScaler,
    RoastTileMapper,
    SharedParameterStore,
    compress_model,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import Scores, edges, sweep
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

RIVALS = ("small", "synflow", "snip", "magnitude", "random")
"""What has as many numbers as an arm of shared weights."""

DENSE, WHOLE, ROAST, LOTTERY = "dense", "rps-1", "roast-0.1", "lottery-0.01"
MAIN, SMALL, SYNFLOW = "rps-0.01", "small-0.01", "synflow-0.01"
MARGIN, EFFECT = 0.05, 0.08

RULE = (
    "The metric is the accuracy on test at the rate that is best on validation, for every arm and seed alone; all "
    f"intervals are paired, over seeds, at 95%. (a) At zero compression nothing is lost: {WHOLE} minus dense is above "
    f"-{MARGIN}. (b) At every memory, rps minus each of {', '.join(RIVALS)} that is there is above -{MARGIN}. (c) At "
    f"high compression it beats the lottery ticket: {MAIN} minus {LOTTERY} is above 0. (d) It is the stable one: "
    f"rps-0.1 minus {ROAST} is above 0, roast at the one rate that is best for all scales together. Reproduced if all "
    f"hold. Not reproduced if an interval of (a) or (b) lies below -{MARGIN}, or one of (c) or (d) below 0. Not "
    f"resolved otherwise. The effect is {MAIN} minus {SMALL}."
)

FEW = (DENSE, WHOLE, "rps-0.1", "small-0.1", "synflow-0.1", MAIN, SMALL, SYNFLOW, "snip-0.01", LOTTERY, ROAST)
MANY = (DENSE, WHOLE, *(f"{kind}-{part}" for part in (0.1, 0.01, 0.003) for kind in ("rps", *RIVALS, "lottery")), ROAST)
COMMON = {"arms": FEW, "hidden": 128, "batch_size": 64, "momentum": 0.9, "scales": (0.01, 0.2), "tile": 16}
PRESETS = {
    "smoke": COMMON | {"hidden": 64, "steps": 4, "rates": (0.05, 5.0), "tile": 4, "seeds": 2},
    "small": COMMON | {"steps": 300, "rates": (0.03, 0.1, 0.3, 1.0, 3.0), "seeds": 15},
    "full": COMMON
    | {"arms": MANY, "hidden": 256, "steps": 2000, "rates": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)}
    | {"scales": (0.005, 0.01, 0.05, 0.2), "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    kind, _, part = arm.partition("-")
    task = Classification(data.load("digits", fold=seed))
    scales = settings["scales"] if kind == "roast" else (0.05,)
    starts = {scale: start(kind, float(part or 1), seed, settings, task, scale) for scale in scales}
    by_scale = []

    def learn(rate: float) -> Scores:
        scores = [fitted(make(), rate, seed, settings, task, kind != "roast") for make in starts.values()]
        by_scale.append([test for _, test in scores])
        return fmean(validation for validation, _ in scores), fmean(by_scale[-1])

    swept = sweep(learn, settings["rates"])
    model = next(iter(starts.values()))()
    budget, stored = training_budget(model, task, settings["batch_size"]), stored_numbers(model)
    steps = settings["steps"] * (len(settings["rates"]) * len(scales) + (kind == "lottery"))
    found = swept.extra() | {"stored": stored, "by_scale": by_scale[swept.best]}
    return Row(arm, seed, stored, stored, budget.flops * steps, steps, swept.metric, found)


def start(
    kind: str, part: float, seed: int, settings: Settings, task: Classification, scale: float
) -> Callable[[], nn.Module]:
    """What makes the model of an arm as it starts, again and again. Those of one seed begin with the same weights."""
    widths = (64, settings["hidden"], settings["hidden"], 10)
    dense = seeded(seed, lambda: MLP(widths))
    kept = math.floor(part * sum(layer.weight.numel() for layer in prunable(dense).values()))
    masks: dict[str, Tensor] = {}
    if kind == "small":
        dense = seeded(seed, lambda: MLP(smaller(widths, kept + sum(widths[1:]))))
    elif kind == "rps":
        seeded(seed, lambda: compress_model(dense, part, std=scale))
    elif kind == "roast":
        mapper = RoastTileMapper(settings["tile"], settings["tile"])
        seeded(seed, lambda: compress_model(dense, part, mapper, std=scale))
    elif kind == "lottery":
        trained = deepcopy(dense)
        fitted(trained, settings["rates"][1], seed, settings, task)
        masks = highest({name: layer.weight.detach().abs() for name, layer in prunable(trained).items()}, kept)
    elif kind != DENSE:
        batch = task.batch("train", settings["batch_size"], torch.Generator().manual_seed(seed))
        loss = partial(lambda batch, model: task.loss(model, batch)[0], batch)
        masks = seeded(seed, lambda: masks_at_start(dense, kind, kept, loss, batch.inputs))

    def make() -> nn.Module:
        model = deepcopy(dense)
        apply_masks(model, masks)
        return model

    return make


def smaller(widths: tuple[int, ...], parameters: int) -> tuple[int, ...]:
    """The widths with the widest hidden layers, of one size, that have no more parameters."""

    def count(hidden: int) -> int:
        return hidden * (widths[0] + hidden + widths[-1]) + 2 * hidden + widths[-1]

    hidden = next(size for size in range(widths[1], 0, -1) if size == 1 or count(size) <= parameters)
    return (widths[0], hidden, hidden, widths[-1])


def stored_numbers(model: nn.Module) -> int:
    """What has to be kept of a model: of masked weights those that are left."""
    masked = sum(int((mask == 0).sum()) for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    return count_params(model) - masked


def fitted(
    model: nn.Module, rate: float, seed: int, settings: Settings, task: Classification, scaled: bool = True
) -> Scores:
    """Train a model, and score it on validation and on test; one that diverges scores 0.

    Args:
        scaled: whether gradients of shared weights are.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=settings["momentum"])
    for group in optimizer.param_groups:
        group["lr_scale"] = rate  # of a rate of 1: that of a config may not be higher
    if scaled and any(isinstance(module, SharedParameterStore) for module in model.modules()):
        GradScaler(model).attach(optimizer)
    config = TrainConfig(settings["steps"], settings["batch_size"], lr=1.0, clip=math.inf, seed=seed, eval_every=None)
    try:
        train(model, task, config, optimizer=optimizer)
    except FloatingPointError:
        return 0.0, 0.0
    return task.evaluate(model)["accuracy"], task.evaluate(model, "test")["accuracy"]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    whole = rows.minus(WHOLE, DENSE)
    named = [(arm, *arm.partition("-")[::2]) for arm in rows.arms]
    rivals = {arm: rows.minus(f"rps-{part}", arm) for arm, kind, part in named if kind in RIVALS}
    tickets = {arm: rows.minus(f"rps-{part}", arm) for arm, kind, part in named if kind == "lottery"}
    stable = rows.minus("rps-0.1", ROAST)
    near, better = [whole, *rivals.values()], [tickets[LOTTERY], stable]
    verdict = decide(
        (NOT_REPRODUCED, any_below(near, -MARGIN) or any_below(better)),
        (REPRODUCED, all_above(near, -MARGIN) and all_above(better)),
    )
    lost = [arm for arm, interval in rivals.items() if interval.high < -MARGIN]
    reason = (
        f"Accuracy of shared weights minus a smaller network of as many parameters, at 0.01: {rivals[SMALL]}, which is "
        f"the effect; minus the dense one at no compression {whole}; minus synflow at 0.01 {rivals[SYNFLOW]}; minus "
        f"the lottery ticket at 0.01 {tickets[LOTTERY]}; minus ROAST over its scales, at 0.1, {stable}. "
        f"Shown to be worse by {MARGIN} than: {', '.join(lost) or 'none'}. {edges(rows)}"
    ).rstrip()
    details = {
        "accuracy": rows.means(),
        "stored": rows.means("stored"),
        "best_rate": rows.means("best_rate"),
        "minus_rivals": rivals,
        "minus_lottery": tickets,
        "roast_by_scale": [fmean(scores) for scores in zip(*rows.of(ROAST, "by_scale"), strict=True)],
    }
    return Judgement.on(rivals[SMALL], verdict, reason, details, claimed=(-MARGIN, math.inf))


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    main=MAIN,
    power=Power((SMALL, SYNFLOW), effect=EFFECT, deviation={"small": (0.1004, 12)}),
)
