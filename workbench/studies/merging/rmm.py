"""Do a mean and a direction of factors serve eight tasks better than one merged adapter, and than small adapters do?

LoRAs of rank 8 on the digit experts' base (`beds.digit_loras`). RMM with p = 1 keeps 0.375 of their numbers and knows
the task; so do each adapter cut to rank 3 by its own SVD, and two directions of whole adapters (PCA of all factors of a
task as one vector), which keep exactly as many. The other baselines make one adapter for all tasks. Every arm has one
tuned scale.

The arms without a word for it start from one A; "independent" ones start from an A for each task, "pt-svd" cut the full
experts' updates. What is not low-rank (biases, norms) is the base's everywhere.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from workbench.beds import digit_experts
from workbench.beds.digit_loras import RANK, Loras
from workbench.lib.core.merge.low_rank import factored_svd, of_positions, positions
from workbench.lib.merging.rmm import METHOD, ReversibleMerge, share
from workbench.studies.core import Power, Settings, Study
from workbench.studies.merging.adapters import (
    Bed,
    dare,
    factorwise,
    knots,
    load,
    mean,
    reverted_kept,
    reverted_row,
    scaled_row,
    ties,
    trimmed_row,
)
from workbench.studies.merging.tuning import judged_row, weak_experts
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Judgement, all_above, decide

P = 1
TASKS = len(digit_experts.TASKS)
CUT = int(RANK * share(P, RANK, TASKS))
"""The rank of adapters of their own that hold as much."""

SINGLE = ("factor-average", "factor-ties", "factor-dare", "task-arithmetic", "ties", "dare", "knots-ties")
"""The arms that make one adapter of eight."""

RULE = (
    "The metric is normalised accuracy on test, the mean over eight tasks; intervals are 95% paired intervals over "
    "seeds, of adapters that start from one A. (a) One model is too few: rmm with p = 1 minus each of the seven merges "
    "into one adapter lies above 0. (b) Its basis is worth what it holds: rmm minus each adapter cut to rank 3 by its "
    "own SVD, which holds as many numbers and knows the task as well, lies above 0. Reproduced if both hold. Not "
    "reproduced if one of these eight intervals lies below 0. Not resolved otherwise. Not testable if an adapter has "
    "less than 0.85 of its own task right."
)

PRESETS = {
    "smoke": digit_experts.SMOKE | {"stride": 8, "seeds": 1},
    "small": digit_experts.SMALL | {"stride": 1, "seeds": 12},
    "full": digit_experts.FULL | {"stride": 1, "seeds": 12},
}


def rmm(p: int, gauge: str = "given") -> Callable[[Bed], list[Loras]]:
    """The adapters as RMM gives them back."""

    def make(bed: Bed) -> list[Loras]:
        merge = ReversibleMerge(bed.loras, p, gauge)
        return [merge.revert(task) for task in range(len(bed.loras))]

    return make


def cut(rank: int) -> Callable[[Bed], list[Loras]]:
    """Each adapter cut to a rank by itself."""

    def make(bed: Bed) -> list[Loras]:
        return [{name: (v, u * s, 1.0) for name in bed.layers for u, s, v in [factored_svd(own[name], rank)]}
                for own in bed.loras]  # fmt: skip

    return make


def factor_pca(kept: int) -> Callable[[Bed], list[Loras]]:
    """The mean and `kept` directions of whole adapters: all factors of all layers of a task as one vector."""

    def make(bed: Bed) -> list[Loras]:
        pools = {name: positions(bed.of(name)) for name in bed.layers}
        whole = torch.cat([pool.flatten(0, 1) for pool in pools.values()])  # (F, n)
        centre = whole.mean(1, keepdim=True)
        u, s, v = torch.linalg.svd(whole - centre, full_matrices=False)
        back = (centre + u[:, :kept] * s[:kept] @ v[:kept]).split([pool[:, :, 0].numel() for pool in pools.values()])
        return [
            {
                name: of_positions(part[:, i].view_as(pools[name][:, :, i]), len(bed.of(name)[0][1]))
                for name, part in zip(pools, back, strict=True)
            }
            for i in range(len(bed.loras))
        ]

    return make


#: Arm -> where its adapters come from, and what serves each task.
REVERSIBLE: dict[str, tuple[str, Callable[[Bed], list[Loras]]]] = {
    "rmm": ("shared", rmm(P)),
    "cut": ("shared", cut(CUT)),
    "factor-pca": ("shared", factor_pca(2)),
    "rmm-independent": ("independent", rmm(P)),
    "rmm-balanced": ("independent", rmm(P, "balanced")),
    "rmm-aligned": ("independent", rmm(P, "aligned")),
    "cut-independent": ("independent", cut(CUT)),
    "rmm-pt-svd": ("pt-svd", rmm(P)),
    "cut-pt-svd": ("pt-svd", cut(CUT)),
}
#: Arm -> what keeps how much of all adapters' numbers, for the curve of accuracy against storage.
CURVES: dict[str, list[tuple[float, Callable[[Bed], list[Loras]]]]] = {
    "rmm": [(share(p, RANK, TASKS), rmm(p)) for p in range(TASKS)],
    "cut": [(rank / RANK, cut(rank)) for rank in range(1, RANK + 1)],
    "factor-pca": [((1 + kept) / TASKS, factor_pca(kept)) for kept in range(TASKS)],
    "rmm-pt-svd": [(share(p, RANK, TASKS), rmm(p)) for p in range(TASKS)],
    "cut-pt-svd": [(rank / RANK, cut(rank)) for rank in range(1, RANK + 1)],
}
ARMS = ("base", *SINGLE, "factor-average-independent", "task-arithmetic-independent", *REVERSIBLE)


def run(arm: str, seed: int, settings: Settings) -> Row:
    if arm in REVERSIBLE:
        return reversible(arm, seed, settings)
    name = arm.removesuffix("-independent")
    bed = load(settings, seed, "shared" if name == arm else "independent")
    if name == "base":
        return judged_row(arm, seed, bed.suite, bed.suite.model)
    if name == "knots-ties":
        return trimmed_row(arm, seed, bed, knots(bed))
    rule = {"ties": ties, "dare": lambda density: dare(density, seed)}.get(name.removeprefix("factor-"))
    make = factorwise if name.startswith("factor-") else dense
    if rule is None:
        return scaled_row(arm, seed, bed, make(bed, mean))
    return trimmed_row(arm, seed, bed, lambda density: make(bed, rule(density)))


def dense(bed: Bed, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """The update of a rule on the updates."""
    return rule(bed.suite.deltas)


def reversible(arm: str, seed: int, settings: Settings) -> Row:
    source, make = REVERSIBLE[arm]
    bed = load(settings, seed, source)

    def kept(points: Sequence[tuple[float, Callable[[Bed], list[Loras]]]]) -> list[list[float]]:
        made = [(stored, [bed.update(own) for own in point(bed)]) for stored, point in points]
        return [[stored, fmean(reverted_kept(bed.suite, updates, "test"))] for stored, updates in made]

    curve = {"curve": kept(CURVES[arm][:: settings["stride"]])} if arm in CURVES else {}
    return reverted_row(arm, seed, bed, [bed.update(own) for own in make(bed)], **curve)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus("rmm", arm) for arm in SINGLE}
    best = max(SINGLE, key=rows.mean)
    basis = rows.minus("rmm", "cut")
    verdict = decide(
        (NOT_TESTABLE, weak_experts(rows)),
        (REPRODUCED, all_above([*gains.values(), basis])),
        (NOT_REPRODUCED, any(interval.high < 0 for interval in (*gains.values(), basis))),
    )
    apart = rows.minus("factor-average", "task-arithmetic")
    gauge = rows.minus("rmm-independent", "rmm")
    reason = (
        f"Normalised accuracy of rmm, p = 1, minus that of the best single merge, {best}, {gains[best]}; minus that of "
        f"adapters cut to rank {CUT}, which hold as many numbers, {basis}; minus two directions of whole adapters "
        f"{rows.minus('rmm', 'factor-pca')}. Averaging factors instead of updates gives {apart}; adapters that start "
        f"from an A of their own change rmm by {gauge}, and aligned ones by {rows.minus('rmm-aligned', 'rmm')}. The "
        "effect is the second of these."
    )
    details = {
        "kept": rows.means(),
        "worst": rows.means("worst"),
        "gains": gains,
        "minus_cut": basis,
        "minus_cut_independent": rows.minus("rmm-independent", "cut-independent"),
        "minus_cut_pt_svd": rows.minus("rmm-pt-svd", "cut-pt-svd"),
        "minus_factor_pca": rows.minus("rmm", "factor-pca"),
        "factors_minus_updates": apart,
        "factors_minus_updates_independent": rows.minus("factor-average-independent", "task-arithmetic-independent"),
        "independent_minus_shared": gauge,
        "aligned_minus_independent": rows.minus("rmm-aligned", "rmm-independent"),
        "balanced_minus_independent": rows.minus("rmm-balanced", "rmm-independent"),
        "curves": {
            arm: [[point[0], fmean(c[i][1] for c in rows.of(arm, "curve"))] for i, point in
                  enumerate(rows.of(arm, "curve")[0])]
            for arm in CURVES
        },
    }  # fmt: skip
    return Judgement.on(basis, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="kept",
    unit="of the adapters' accuracy",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="The basis serves each task better than one merged adapter, and than adapters of their own of its size.",
    power=Power(("task-arithmetic", "cut"), effect=0.03, deviation={"small": (0.0104, 12)}),
    trainings=lambda arm: "merges adapters of the bed",
)
