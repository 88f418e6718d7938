"""Do a deep residual stack and its one broad layer reach the same losses? (Bermeitinger et al. 2023)

Digits 8 x 8, 25 of a class, of which a network of 8 filters can learn all; both layouts from the same initial values
and the same batches, each at its own best of four rates, so that only the wiring differs. The parallel layers are
trained as the one wide convolution that they are. For one layer the layouts are the same to the last bit
(tests/lib/sharing/test_shallow_again.py); it is trained once, to say what depth and breadth are worth. Beside the claim
stands a task that needs layers one after the other: the parity of six bits, all 64 of whose words are learned.
"""

import itertools
import math
from copy import deepcopy

import torch
from torch import nn

from workbench.beds import images
from workbench.beds.baseline import seeded
from workbench.lib.core.task import Classification, mean_by_domain
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays
from workbench.lib.sharing.shallow_again import (
    METHOD,
    ResidualNetwork,
    equivalence_gap,
    fuse_parallel_convs,
    residual_network,
    to_parallel,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import Scores, edges, sweep
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

DEPTHS = (4, 16)
#: Arm -> task, layout, n.
ARMS = {
    "single": ("digits", "sequential", 1),
    "sequential-4": ("digits", "sequential", 4),
    "parallel-4": ("digits", "parallel", 4),
    "sequential-16": ("digits", "sequential", 16),
    "parallel-16": ("digits", "parallel", 16),
    "parity-sequential": ("parity", "sequential", 4),
    "parity-parallel": ("parity", "parallel", 4),
}
MARGIN = math.log(1.25)
LOWEST, DIVERGED = 1e-8, 100.0  # nats

RULE = (
    "Losses are cross entropies, and compared are their natural logarithms: of the held-out loss, the metric, on test "
    "at the rate that is best on validation; of the training loss, over all training images, at the rate where it is "
    "lowest; for every arm and seed alone. Two layouts are equivalent in a loss if the paired TOST at a margin of "
    "log 1.25, a quarter, says so, and differ if the 90% interval of the difference lies beyond it. (V) Held-out loss: "
    "parallel and sequential are equivalent at 4 and at 16 layers. (T) Training loss: the same. Reproduced if both "
    "hold; not reproduced if the layouts differ in one of the four; not resolved otherwise. V and T are also judged "
    "alone in this way. The effect is parallel minus sequential in held-out loss at 16 layers. Parity is reported and "
    "not judged."
)

COMMON = {"channels": 8, "kernel": 3, "bits": 6, "batch_size": 32}
PRESETS = {
    "smoke": COMMON | {"regime": "few", "steps": 3, "rates": (1e-3, 1e-1), "seeds": 2},
    "small": COMMON | {"regime": "small", "steps": 250, "rates": (1e-4, 5e-4, 2.5e-3, 1.25e-2), "seeds": 25},
    "full": COMMON | {"regime": "whole", "steps": 2500, "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "seeds": 14},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    name, mode, n = ARMS[arm]
    task = parity(settings["bits"]) if name == "parity" else images.make("digits", settings["regime"], seed)
    start = seeded(seed, lambda: network(task, n, settings))  # in whichever layout, the same values
    deep = deepcopy(start)
    if mode == "parallel":
        start.stack = fuse_parallel_convs(to_parallel(start.stack))
    trained: dict[float, tuple[float, nn.Module]] = {}

    def learn(rate: float) -> Scores:
        model = deepcopy(start)
        config = TrainConfig(
            settings["steps"], settings["batch_size"], rate, weight_decay=0.0, seed=seed, eval_every=None
        )
        train(model, task, config)
        trained[rate] = mean_loss(model, task, "train"), model
        return mean_loss(model, task, "validation"), mean_loss(model, task, "test")

    swept = sweep(learn, settings["rates"], DIVERGED, lower_is_better=True)
    if not trained:
        raise FloatingPointError(f"{arm} diverges at every rate of {swept.rates}")
    fitted, best = min(loss for loss, _ in trained.values()), trained[swept.rates[swept.best]][1]
    budget, steps = training_budget(start, task, settings["batch_size"]), settings["steps"] * len(settings["rates"])
    found = swept.extra() | {
        "test_loss": swept.metric,
        "train_loss": fitted,
        "log_train_loss": log(fitted),
        "accuracy": task.evaluate(best, "test")["accuracy"],
    }
    if mode == "sequential":
        converted = deepcopy(best)
        converted.stack = to_parallel(best.stack)
        with torch.no_grad():
            found["gap_before"], found["gap_after"] = (gap(model, task) for model in (deep, best))
        found["converted_loss"] = mean_loss(converted, task, "test")
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, log(swept.metric), found)


def network(task: Classification, n: int, settings: Settings) -> ResidualNetwork:
    shape = tuple(task.data.splits["train"][0].shape[1:])
    return residual_network(shape, settings["channels"], n, task.n_classes, settings["kernel"])


def parity(bits: int) -> Classification:
    """All words of so many bits, -1 and 1, and whether they have an odd number of ones."""
    x = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)))[:, None]
    split = x, (x > 0).sum((1, 2)) % 2
    manifest = {"parity": {"bits": bits, "splits": dict.fromkeys(("train", "validation", "test"), len(x))}}
    return Classification(
        Arrays("parity", dict.fromkeys(("train", "validation", "test"), split), ("even", "odd"), manifest)
    )


def mean_loss(model: nn.Module, task: Classification, split: str) -> float:
    """Cross entropy on all of a split, nats."""
    (loss,) = mean_by_domain(task, model, split, None, lambda batch: task.loss(model, batch)[0]).values()
    return loss


def gap(model: ResidualNetwork, task: Classification) -> float:
    """How far the layers are from the regime of small ones, on test images: `equivalence_gap`."""
    x = model.stem(task.data.splits["test"][0])
    return equivalence_gap(model.stack, to_parallel(model.stack), x)["rel_gap"]


def log(loss: float) -> float:
    return math.log(max(loss, LOWEST))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    pairs = {n: (f"parallel-{n}", f"sequential-{n}") for n in DEPTHS}
    held = {n: rows.tost(*pair, MARGIN) for n, pair in pairs.items()}
    fit = {n: rows.tost(*pair, MARGIN, "log_train_loss") for n, pair in pairs.items()}

    def said(tests: dict) -> str:
        differ = any(test.ci90[0] > MARGIN or test.ci90[1] < -MARGIN for test in tests.values())
        return decide((NOT_REPRODUCED, differ), (REPRODUCED, all(test.equivalent for test in tests.values())))

    alone = {"held-out loss": said(held), "training loss": said(fit)}
    verdict = decide(
        (NOT_REPRODUCED, NOT_REPRODUCED in alone.values()), (REPRODUCED, set(alone.values()) == {REPRODUCED})
    )
    ratios = "; ".join(
        f"{what}, "
        + ", ".join(
            f"{n} layers {math.exp(t.diff):.3g} [{math.exp(t.ci90[0]):.3g}, {math.exp(t.ci90[1]):.3g}]"
            for n, t in tests.items()
        )
        + f": {alone[what]}"
        for what, tests in (("held-out loss", held), ("training loss", fit))
    )
    deep = "sequential-16"
    reason = (
        f"Losses of the parallel layout over those of the sequential one, with 90% intervals: {ratios}. The effect is "
        f"the logarithm of the ratio of held-out losses at 16 layers. The trained stack of 16, put in parallel as it "
        f"is, has a loss of {rows.mean(deep, 'converted_loss'):.3g} instead of {rows.mean(deep, 'test_loss'):.3g}. "
        f"Parity is learned to {rows.mean('parity-sequential', 'train_loss'):.3g} in sequence and to "
        f"{rows.mean('parity-parallel', 'train_loss'):.3g} in parallel. {edges(rows)}"
    ).rstrip()
    details = {
        "alone": alone,
        "log_ratio_held_out": {str(n): rows.minus(*pair) for n, pair in pairs.items()},
        "log_ratio_training": {str(n): rows.minus(*pair, "log_train_loss") for n, pair in pairs.items()},
        "accuracy_difference": {str(n): rows.minus(*pair, "accuracy") for n, pair in pairs.items()},
        "test_loss": rows.means("test_loss"),
        "train_loss": rows.means("train_loss"),
        "accuracy": rows.means("accuracy"),
        "best_rate": rows.means("best_rate"),
        "gaps": {f"sequential-{n}": [rows.mean(f"sequential-{n}", f"gap_{when}") for when in ("before", "after")]
                 for n in DEPTHS},
    }  # fmt: skip
    return Judgement.on(held[DEPTHS[-1]], verdict, reason, details, claimed=(-MARGIN, MARGIN))


STUDY = Study(
    METHOD,
    metric="log_test_loss",
    unit="log of nats",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main="parallel-4",
    power=Power(("sequential-4", "sequential-16"), effect=MARGIN, level=0.9, deviation={"small": (0.4307, 12)}),
)
