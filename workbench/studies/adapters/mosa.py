"""Is one adapter better trained in random pieces than whole, with as many forward passes? (2312.02923)

Adapters stand beside the six blocks of a network that learns digits in negative and out of order
(`beds.shifted_digits`), from all training images or from few. MoSA runs every batch twice, so the whole adapter gets
twice the steps, or a consistency loss of its own between two passes of dropout (R-Drop, 2106.14448, which trains on the
labels in both). Every arm is judged at its own best rate.
"""

import copy

import torch

from workbench.beds import shifted_digits as bed
from workbench.lib.adapters.mosa import METHOD, MoSA, TwoPasses
from workbench.lib.core.train import State, TrainConfig, train
from workbench.studies.adapters.sweep import swept_row
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import edges
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

RATES = (8e-3, 4e-2, 2e-1, 8e-1)
"""Up to four times 0.2, the best of the whole adapter at a seed that is not judged. Above 1 there is no training."""
BOTTLENECK, WEIGHT_DECAY = 8, 0.01
FULL, FEW = "all images", "few images"
WHOLE, TWICE, DROP = "whole", "whole, twice the steps", "whole, R-Drop"
TWO, FOUR = "mosa, 2", "mosa, 4"

#: What an arm trains: experts, share, how many passes a batch has, and by how many the steps are multiplied.
KINDS = {
    WHOLE: {"experts": 1, "passes": 1, "times": 1},
    TWICE: {"experts": 1, "passes": 1, "times": 2},
    DROP: {"experts": 1, "passes": 2, "times": 1},
    TWO: {"experts": 2, "passes": 2, "times": 1},
    FOUR: {"experts": 4, "passes": 2, "times": 1},
    "mosa, 2, no consistency": {"experts": 2, "passes": 1, "times": 2},
    "mosa, 2, share none": {"experts": 2, "passes": 2, "times": 1, "share": None},
}
ARMS = (
    *(f"{kind}, {FULL}" for kind in (TWICE, TWO, FOUR)),
    *(f"{kind}, {FEW}" for kind in KINDS),
)
CLAIMED = {f"{kind}, {images}": f"{TWICE}, {images}" for images in (FULL, FEW) for kind in (TWO, FOUR)}
MARGIN = 0.02
LEVEL = 1 - 0.05 / len(CLAIMED)

RULE = (
    "The metric is the accuracy on test, of the merged adapter, at the rate that is best on validation, for every arm "
    "and seed alone. Of MoSA with 2 and with 4 experts, on all images and on few, the paired difference to the whole "
    "adapter with twice the steps has an interval over seeds, at 95% for the four together. Reproduced if one of them "
    f"lies above 0. Not reproduced if all lie below {MARGIN}, the smallest gain that counts. Not resolved otherwise. "
    "The effect is that of the four whose interval begins highest."
)

PRESETS = {
    "smoke": bed.SMOKE | {"steps": 4, "few": 200, "rates": (8e-3, 8e-1), "seeds": 2},
    "small": bed.SMALL | {"steps": 300, "few": 200, "rates": RATES, "seeds": 8},
    "full": bed.FULL | {"steps": 1500, "few": 200, "rates": RATES, "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    kind, _, images = arm.rpartition(", ")
    n, seen = KINDS[kind]["experts"], {"validation": [], "test": [], "alone": []}

    def learn(rate: float) -> tuple[MoSA, State]:
        for scores in seen.values():
            scores.append(0.0)  # stays where the training diverges
        mosa, state = train_arm(kind, seed, settings, rate, settings["few"] if images == FEW else None)
        if n > 1:
            seen["validation"][-1], seen["test"][-1] = (
                score(mosa, state, "union", on) for on in ("validation", "test")
            )
            seen["alone"][-1] = sum(score(mosa, state, expert, "test") for expert in range(n)) / n
        return mosa, state

    extra = {"union_validation": seen["validation"], "union_test": seen["test"], "alone": seen["alone"]}
    return swept_row(arm, seed, learn, settings["rates"], **(extra if n > 1 else {}))


def train_arm(kind: str, seed: int, settings: Settings, rate: float, images: int | None) -> tuple[MoSA, State]:
    how, model, task = KINDS[kind], bed.base(settings, seed), bed.task(seed, images)
    if how["passes"] == 2:
        task = TwoPasses(task.data, w_add=float(kind == DROP))
    torch.manual_seed(seed)
    options = {"experts": how["experts"], "share": how.get("share", "down")}
    mosa = MoSA(model, bed.TARGETS, bed.WIDTH, BOTTLENECK, **options)
    config = TrainConfig(how["times"] * settings["steps"], bed.BATCH, lr=rate, seed=seed, eval_every=None)
    return mosa, train(model, task, config, optimizer=mosa.optimizer(rate, WEIGHT_DECAY))


def score(mosa: MoSA, state: State, of: int | str, split: str) -> float:
    """The accuracy with another merge than the mean."""
    return state.task.evaluate(copy.deepcopy(mosa).merge(of), split)["accuracy"]


def union(row: Row) -> float:
    """What the union of the pieces reaches at the rate that is best for it."""
    found = row.extra["union_validation"]
    return row.extra["union_test"][found.index(max(found))]


def alone(row: Row) -> float:
    """What the experts reach one by one, in the mean, at the merged one's best rate."""
    return row.extra["alone"][row.extra["rates"].index(row.extra["best_rate"])]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus(arm, other, level=LEVEL) for arm, other in CLAIMED.items()}
    best = max(gains, key=lambda arm: gains[arm].low)
    verdict = decide(
        (REPRODUCED, gains[best].low > 0), (NOT_REPRODUCED, all(gain.high < MARGIN for gain in gains.values()))
    )
    experts = [arm for arm in rows.arms if KINDS[arm.rpartition(", ")[0]]["experts"] > 1]
    reason = (
        "Accuracy beside the whole adapter with twice the steps: "
        + ", ".join(f"{arm} {gain}" for arm, gain in gains.items())
        + f"; the effect is that of {best}. {edges(rows)}"
    ).rstrip()
    few = [arm for arm in rows.arms if arm.endswith(FEW) and arm != f"{TWICE}, {FEW}"]
    details = {
        "accuracy": rows.means(),
        "gains": gains,
        "few_images": {arm: rows.minus(arm, f"{TWICE}, {FEW}") for arm in few},
        "union": {arm: sum(map(union, rows.arm(arm))) / len(rows.arm(arm)) for arm in experts},
        "alone": {arm: sum(map(alone, rows.arm(arm))) / len(rows.arm(arm)) for arm in experts},
        "best_rate": rows.means("best_rate"),
        "trained": rows.means("trained"),
    }
    return Judgement.on(gains[best], verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="Training disjoint sparse pieces of one adapter at random and merging them at the end gives a better one "
    "than training it whole, with as many forward passes.",
    main=f"{TWO}, {FEW}",
    power=Power((f"{TWICE}, {FEW}", f"{DROP}, {FEW}"), effect=0.07, level=LEVEL, deviation={"small": (0.04186, 8)}),
)
