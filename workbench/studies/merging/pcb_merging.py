"""Does grading weights keep more of eight experts than the hard choices of TIES, and than a plain sum?

Full experts of eight ways of showing digits (`beds.digit_experts`), all weights but the head's merged as one vector.
Every method with a share that stays and a lambda chooses among the same 24 pairs on validation, task arithmetic among
24 lambdas. A share of 1 drops next to nothing. The average alone has nothing to choose.

Beside the claim: the two other forms of the agreement, PCB without one of its parts, and fewer tasks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from operator import mul
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.beds import digit_experts
from workbench.kernels.pcb_merge.reference import shares, weighted
from workbench.lib.merging.pcb_merging import METHOD, pcb_merge, pcb_scores, pcb_terms
from workbench.studies.core import Power, Settings, Study
from workbench.studies.merging import tuning
from workbench.studies.merging.adapters import dare, mean, ties
from workbench.studies.merging.tuning import Suite, Update, grid, spread, tuned, weak_experts
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Judgement, all_above, any_below, decide

FEWER = (2, 4)  # of the eight tasks, the first
RATIOS = (0.05, 0.2, 0.5, 1.0)
LAMBDAS = tuple(2 ** (j / 2) for j in range(-3, 3))  # of means of what stays; 1 among them
SUMS = spread(0.02, 0.48)  # of the sum over eight tasks
assert len(SUMS) == len(RATIOS) * len(LAMBDAS)

RULE = (
    "The metric is normalised accuracy on test, the mean over eight tasks; intervals are 95% paired intervals over "
    "seeds. Reproduced if pcb minus ties and pcb minus task-arithmetic both lie above 0. Not reproduced if one of the "
    "two lies below 0. Not resolved otherwise. Not testable if an expert has less than 0.85 of its own task right."
)

PRESETS = {
    "smoke": digit_experts.SMOKE | {"stride": 7, "seeds": 1},
    "small": digit_experts.SMALL | {"stride": 1, "seeds": 12},
    "full": digit_experts.FULL | {"stride": 1, "seeds": 12},
}

Stack = Float[Tensor, "tasks weights"]
Merge = Callable[[float], Update]
"""The update of a share that stays."""


def graded(
    score: Callable[[Stack, Stack], Stack], inter: str = "pairwise_tanh", grade: Callable[[Stack], Stack] = lambda s: s
) -> Callable[[Stack], Merge]:
    """The method with a score of its own of the intra and the inter term, and grades of its own of what stays."""

    def prepare(stack: Stack) -> Merge:
        clipped, *terms = pcb_terms(stack, inter)
        found, ones = score(*terms), stack.new_ones(len(stack))
        return lambda ratio: weighted(clipped, grade(shares(found, int(stack.shape[1] * (1 - ratio)))), ones)

    return prepare


#: Arm -> stack -> share that stays -> update; lambda times it is merged.
SPARSE: dict[str, Callable[[Stack], Merge]] = {
    "ties": lambda stack: lambda ratio: ties(ratio)(stack),
    "pcb": lambda stack: lambda ratio: pcb_merge(stack, ratio),
    "pcb-sum-tanh": graded(mul, "sum_tanh"),
    "pcb-softmax": graded(mul, "paper_softmax"),
    "pcb-no-intra": graded(lambda intra, inter: inter),
    "pcb-no-inter": graded(lambda intra, inter: intra),
    "pcb-no-rescale": graded(mul, grade=lambda share: (share > 0).to(share)),
}
PARTS = ("pcb-no-intra", "pcb-no-inter", "pcb-no-rescale")
RIVALS = ("ties", "task-arithmetic")
ARMS = ("base", "average", "task-arithmetic", "ties", "dare", "pcb", "pcb-sum-tanh", "pcb-softmax", *PARTS)


def run(arm: str, seed: int, settings: Settings) -> Row:
    suite = tuning.load(settings, seed)
    if arm == "base":
        return tuning.judged_row(arm, seed, suite, suite.model)
    if arm == "average":
        return tuning.merged_row(arm, seed, suite, mean(suite.deltas))
    stride, scores = int(settings["stride"]), []
    update, chosen = tune(arm, seed, suite, stride, scores)
    extra: dict[str, Any] = {"chosen": chosen}
    if arm in (*RIVALS, "pcb"):
        extra["fewer"] = [[n, fewer(arm, seed, suite, n, stride)] for n in FEWER]
    if arm != "task-arithmetic":
        extra["curve"] = [[*point.values(), score] for point, score in zip(points(stride), scores, strict=True)]
    if arm == "pcb":
        extra["survivors"] = survivors(suite.deltas, chosen["ratio"])  # which differs from seed to seed
    return tuning.merged_row(arm, seed, suite, update, **extra)


def tune(
    arm: str, seed: int, suite: Suite, stride: int, scores: list[float] | None = None
) -> tuple[Update, dict[str, Any]]:
    """The best update of an arm on validation, and what was chosen; `scores` takes those of all points."""
    if arm == "task-arithmetic":
        total = suite.deltas.sum(0)
        return tuned(suite, lambda deltas, lam: lam * total, grid(lam=SUMS)[::stride], scores)
    merge = SPARSE[arm](suite.deltas) if arm in SPARSE else lambda ratio: dare(ratio, seed)(suite.deltas)
    made = lru_cache(merge)
    return tuned(suite, lambda deltas, ratio, lam: lam * made(ratio), points(stride), scores)


def points(stride: int) -> list[dict[str, float]]:
    """The pairs of a share and a lambda that a method chooses among."""
    return grid(ratio=RATIOS, lam=LAMBDAS)[::stride]


def fewer(arm: str, seed: int, suite: Suite, n: int, stride: int) -> float:
    """Normalised accuracy on the first n tasks, merged and tuned by themselves."""
    fields = {name: getattr(suite, name)[:n] for name in ("deltas", "tasks", "base", "own", "own_validation")}
    part = replace(suite, **fields)
    update, _ = tune(arm, seed, part, stride)
    return fmean(part.kept(part.model_of(update), "test"))


def survivors(stack: Stack, ratio: float) -> list[float]:
    """The share of weights at which 0, 1, ... n tasks are left."""
    alive = (pcb_scores(stack, ratio)[1] > 0).sum(0)
    return (torch.bincount(alive, minlength=len(stack) + 1) / stack.shape[1]).tolist()


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus("pcb", arm) for arm in RIVALS}
    verdict = decide(
        (NOT_TESTABLE, weak_experts(rows)),
        (REPRODUCED, all_above(gains.values())),
        (NOT_REPRODUCED, any_below(gains.values())),
    )
    lost = {arm: rows.minus("pcb", arm) for arm in PARTS}
    reason = (
        f"Normalised accuracy of pcb minus ties {gains['ties']}, minus task arithmetic {gains['task-arithmetic']}, "
        f"minus dare {rows.minus('pcb', 'dare')}, minus the average {rows.minus('pcb', 'average')}. Of its parts, "
        f"grades give {lost['pcb-no-rescale']}, agreement {lost['pcb-no-inter']}, size {lost['pcb-no-intra']}. The "
        "effect is the first of these."
    )
    chosen = {arm: [row.extra["chosen"] for row in rows.arm(arm)] for arm in ARMS[2:]}
    details = {
        "kept": rows.means(),
        "worst": rows.means("worst"),
        "gains": gains,
        "minus_dare": rows.minus("pcb", "dare"),
        "minus_average": rows.minus("pcb", "average"),
        "parts": lost,
        "forms": {arm: rows.minus(arm, "pcb") for arm in ("pcb-sum-tanh", "pcb-softmax")},
        "fewer": {arm: averaged(rows.of(arm, "fewer")) for arm in (*RIVALS, "pcb")},
        "curve": {arm: averaged(rows.of(arm, "curve")) for arm in ARMS[3:]},
        "chosen": chosen,
    }
    return Judgement.on(gains["ties"], verdict, reason, details)


def averaged(tables: list) -> list:
    """The mean of tables of one shape."""
    return torch.tensor(tables, dtype=torch.float64).mean(0).tolist()


STUDY = Study(
    METHOD,
    metric="kept",
    unit="of the experts' accuracy",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="With lambda and the share that stays chosen alike on validation, it keeps more of eight experts' accuracy "
    "than TIES, and than task arithmetic.",
    power=Power(("task-arithmetic", "ties"), effect=0.01, deviation={"small": (0.00555, 12)}),
    main="pcb",
    trainings=lambda arm: "merges the experts of the bed",
)
