"""Does it pay to convolve early and attend late? (Kag et al. 2024)

Two textured discs on a noisy ground (`beds.textured_pairs`): a class needs texture, which is near, and order, which is
far. Layouts of eight cells with as many parameters, to 5 %, trained alike. What they take in time is no matter of a
row: it is measured apart by `python -m workbench.bench.layouts`, one thread, and its record travels with the package.
"""

import json
from collections.abc import Mapping
from functools import cache
from operator import itemgetter
from typing import Any

import torch

from workbench.beds import textured_pairs
from workbench.catalogue import PACKAGE
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.search.ascan import LAYOUTS, METHOD, HybridNet, macs, match_params
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

OURS, CONTROLS = "asymmetric", ("reversed", "symmetric")
MARGIN = 0.03  # accuracy that a faster network may lack
BASELINES = ("convolutions", "symmetric")
SMALL_ARMS = ("asymmetric", "reversed", "symmetric", "blocks", "convolutions")
RECORD = PACKAGE / "studies" / "search" / "measured" / "ascan.json"
BATCH = "64"  # images at a time in the record that the rule reads

RULE = (
    "The metric is accuracy on the test split; intervals are 95% paired intervals over seeds. Latency is the median of "
    "ratios in one process of a forward pass of 64 images, one thread, from the record that travels with the package. "
    f"The asymmetric layout dominates another one if it is faster and at most {MARGIN} less accurate: accuracy, "
    f"asymmetric minus the other, lies above -{MARGIN}. Reproduced if it dominates the reversed and the symmetric "
    "layout, and is on the front: no layout of the study that is as fast or faster lies above it in accuracy. Not "
    "reproduced if it is not faster than one of those two, if accuracy, asymmetric minus one of them, lies below "
    f"-{MARGIN}, or if a layout that is as fast or faster lies above it. Not resolved otherwise."
)

COMMON = {"budget": 60_000, "lr": 3e-3, "batch_size": 32, "rows": textured_pairs.ROWS}
FEW = {"train": 40, "validation": 20, "test": 40}
PRESETS = {
    "smoke": COMMON | {"seeds": 2, "steps": 3, "batch_size": 8, "rows": FEW, "arms": SMALL_ARMS},
    "small": COMMON | {"seeds": 12, "steps": 350, "arms": SMALL_ARMS},
    "full": COMMON | {"seeds": 12, "steps": 4000, "batch_size": 64, "budget": 150_000, "arms": tuple(LAYOUTS)},
}


def build(arm: str, settings: Settings) -> HybridNet:
    """The network of one arm."""
    stages, classes = LAYOUTS[arm], len(textured_pairs.CLASSES)
    dims = match_params(stages, settings["budget"], classes, 1, textured_pairs.SIZE)
    return HybridNet(stages, dims, classes, 1, textured_pairs.SIZE)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = textured_pairs.make(seed, settings["rows"])
    torch.manual_seed(seed)
    model = build(arm, settings)
    steps, size = settings["steps"], settings["batch_size"]
    train(model, task, TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=None))
    accuracy = task.evaluate(model, "test")["accuracy"]
    budget = training_budget(model, task, size, seed)
    return trained_row(arm, seed, budget, steps, accuracy, macs=macs(model))


@cache
def latency() -> Mapping[str, float]:
    """Layout -> its time over that of the asymmetric one, as it was measured."""
    return {name: row["ratio"] for name, row in json.loads(RECORD.read_text())["batches"][BATCH].items()}


def judge(rows: Rows, settings: Settings, times: Mapping[str, float] | None = None) -> Judgement:
    """Apply `RULE`; `times` in the place of the record."""
    times = latency() if times is None else times
    gains = {arm: rows.minus(OURS, arm) for arm in rows.arms if arm != OURS}
    slower = {arm: times[arm] > times[OURS] for arm in gains}
    beaten = [arm for arm, gain in gains.items() if not slower[arm] and gain.high < 0]
    verdict = decide(
        (
            NOT_REPRODUCED,
            bool(beaten) or any(not slower[arm] or gains[arm].high < -MARGIN for arm in CONTROLS),
        ),
        (REPRODUCED, all(slower[arm] and gains[arm].low > -MARGIN for arm in CONTROLS)),
    )
    shown = ", ".join(f"{arm} {gain} (it takes {times[arm]:.2f} of the time)" for arm, gain in gains.items())
    reason = (
        f"Accuracy, the asymmetric layout minus: {shown}. "
        + (f"As fast or faster and above it: {', '.join(beaten)}. " if beaten else "")
        + "The effect is asymmetric minus symmetric."
    )
    details: dict[str, Any] = {
        "accuracy": rows.means(),
        "minus": gains,
        "latency": {arm: times[arm] for arm in rows.arms},
        "macs": {arm: int(rows.mean(arm, "macs")) for arm in rows.arms},
        "parameters": {arm: int(rows.mean(arm, lambda row: row.params)) for arm in rows.arms},
    }
    return Judgement.on(gains["symmetric"], verdict, reason, details, claimed=(-MARGIN, float("inf")))


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
    tested="At the same number of parameters, convolutions early and attention late are faster than a symmetric and a "
    "reversed layout and no less accurate, and no layout that is faster still is more accurate.",
    power=Power(BASELINES, effect=0.05, deviation={"small": (0.0145, 12)}),
    main=OURS,
)
