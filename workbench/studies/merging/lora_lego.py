"""Is a LoRA of clustered pieces better than one of averaged factors, and than the sum of all cut to the same rank?

LoRAs of rank 8 on the digit experts' base (`beds.digit_loras`), merged into one of rank 8 for all eight tasks, under
two conditions that every arm has: adapters that start from one A, and from an A for each task. A row's metric is the
mean of the two. Every arm has one overall scale that is tuned; the paper's method has none ("unscaled" is without it).

Within one adapter: the pieces of a LoRA of rank 16 clustered to a lower rank, against its truncated SVD, on one task a
seed. "cat" is the sum of all adapters, of rank 64, and "ensemble" the mean of eight models' probabilities.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from workbench.beds import digit_experts, digit_loras
from workbench.beds.digit_loras import RANK, Loras
from workbench.lib.core.merge.low_rank import factored_svd, thin_svd, units
from workbench.lib.merging.lora_lego import METHOD, lego_merge, lego_prune
from workbench.studies.core import Power, Settings, Study
from workbench.studies.merging.adapters import (
    Bed,
    dare,
    factorwise,
    knots,
    load,
    mean,
    scaled_row,
    suite_accuracy,
    ties,
    trimmed_row,
)
from workbench.studies.merging.tuning import Update, judged_row, kept_row, weak_experts
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Judgement, all_above, decide

CONDITIONS = ("shared", "independent")
RIVALS = ("factor-average", "factor-ties", "svd", "ties-svd")
"""One adapter of rank 8, as peft's `linear`, `ties`, `svd` and `ties_svd` make it."""

WIDE = 2 * RANK  # rank of the adapter that is pruned
PRUNED = (2, 4, 8, 12)

RULE = (
    "The metric is normalised accuracy on test, the mean over eight tasks and two conditions (adapters that start from "
    "one A, or from an A for each task), every arm at its best overall scale; intervals are 95% paired intervals over "
    "seeds. Reproduced if lora-lego with k = r = 8 minus each of factor-average, factor-ties, svd (the sum of the "
    "updates cut to rank 8) and ties-svd lies above 0. Not reproduced if one of the four lies below 0. Not resolved "
    "otherwise. Not testable if an adapter has less than 0.85 of its own task right."
)

PRESETS = {
    "smoke": digit_experts.SMOKE | {"stride": 8, "seeds": 1},
    "small": digit_experts.SMALL | {"stride": 1, "seeds": 12},
    "full": digit_experts.FULL | {"stride": 1, "seeds": 12},
}
ABLATIONS = {
    "none": {"reweight_params": False, "reweight_output": False},
    "params": {"reweight_output": False},
    "output": {"reweight_params": False},
    "both": {},
}
#: Arm -> options of LEGO.
LEGO = {
    "lora-lego": {},
    "lora-lego-means": {"reweight_params": False},
    "lora-lego-canonical": {"canonical": True},
    "lora-lego-half": {"rank": RANK // 2},
    "lora-lego-32": {"rank": 4 * RANK},
}
ARMS = (
    "base",
    *RIVALS,
    "svd-half",
    "svd-32",
    "cat",
    "dare-svd",
    "knots-svd",
    "ensemble",
    *LEGO,
    "prune-lego",
    "prune-svd",
)


class Ensemble(nn.Module):
    """Images -> the mean of the models' probabilities, as log-probabilities."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor, context=None) -> Tensor:
        return torch.stack([model(images).softmax(1) for model in self.models]).mean(0).log()


def lego(bed: Bed, **options) -> Update:
    return bed.update({name: lego_merge(bed.of(name), **options).factors for name in bed.layers})


def cut(bed: Bed, update: Update, rank: int = RANK) -> Update:
    """The best of a rank for each matrix of an update."""
    parts = bed.suite.split(update)
    found = {name: thin_svd(parts[f"{name}.weight"], rank) for name in bed.layers}
    return bed.update({name: (u * s) @ v for name, (u, s, v) in found.items()})


#: Arm -> update, of the merges without options.
PLAIN: dict[str, Callable[[Bed], Update]] = {
    "factor-average": lambda bed: factorwise(bed, mean),
    "cat": lambda bed: bed.suite.deltas.mean(0),
    "svd": lambda bed: cut(bed, bed.suite.deltas.mean(0)),
    "svd-half": lambda bed: cut(bed, bed.suite.deltas.mean(0), RANK // 2),
    "svd-32": lambda bed: cut(bed, bed.suite.deltas.mean(0), 4 * RANK),
}
#: Arm -> update of a density and a seed.
TRIMMED: dict[str, Callable[[Bed, int], Callable[[float], Update]]] = {
    "factor-ties": lambda bed, seed: lambda density: factorwise(bed, ties(density)),
    "ties-svd": lambda bed, seed: lambda density: cut(bed, ties(density)(bed.suite.deltas)),
    "dare-svd": lambda bed, seed: lambda density: cut(bed, dare(density, seed)(bed.suite.deltas)),
    "knots-svd": lambda bed, seed: of_rank(bed, knots(bed)),
}


def of_rank(bed: Bed, merge: Callable[[float], Update]) -> Callable[[float], Update]:
    return lambda density: cut(bed, merge(density))


def run(arm: str, seed: int, settings: Settings) -> Row:
    if arm.startswith("prune-"):
        return prune(arm, seed, settings)
    rows = [merge(arm, seed, load(settings, seed, source)) for source in CONDITIONS]
    both = zip(*(row.extra["by_task"] for row in rows), strict=True)
    extra = {"by_task": [fmean(pair) for pair in both]}
    for key in ("worst", "weakest_expert"):
        extra[key] = min(row.extra[key] for row in rows)
    for key in ("accuracy", "recovered", "base_kept", "base_accuracy", "own_accuracy"):
        extra[key] = fmean(row.extra[key] for row in rows)
    for name, row in zip(CONDITIONS, rows, strict=True):
        extra[name] = row.metric
        extra |= {
            f"{name}_{key}": row.extra[key] for key in ("unscaled", "chosen", "curve", "pieces") if key in row.extra
        }
    first = rows[0]
    return Row(arm, seed, first.params, first.active_params, 0, 0, fmean(row.metric for row in rows), extra)


def merge(arm: str, seed: int, bed: Bed) -> Row:
    if arm == "base":
        return judged_row(arm, seed, bed.suite, bed.suite.model)
    if arm == "ensemble":
        kept = bed.suite.kept(Ensemble([bed.suite.model_of(delta) for delta in bed.suite.deltas]).eval(), "test")
        return kept_row(arm, seed, bed.suite, bed.suite.model, kept)
    if arm in TRIMMED:
        return trimmed_row(arm, seed, bed, TRIMMED[arm](bed, seed))
    if arm in PLAIN:
        return scaled_row(arm, seed, bed, PLAIN[arm](bed))
    extra = {"curve": curve(bed, seed), "pieces": pieces(bed, seed)} if arm == "lora-lego" else {}
    return scaled_row(arm, seed, bed, lego(bed, seed=seed, **LEGO[arm]), **extra)


def curve(bed: Bed, seed: int) -> list[list[float]]:
    """For some ranks: k, and what is kept without a scale by each of `ABLATIONS`."""
    ranks = [RANK // 2, RANK, 2 * RANK, 4 * RANK][:: min(2, bed.stride)]
    updates = ((k, lego(bed, rank=k, seed=seed, **options)) for k in ranks for options in ABLATIONS.values())
    found = [(k, fmean(bed.suite.kept(bed.suite.model_of(update), "test"))) for k, update in updates]
    return [[k, *(kept for other, kept in found if other == k)] for k in ranks]


def pieces(bed: Bed, seed: int) -> list[list[float]]:
    """For each layer: clusters with pieces of several tasks, clusters that cancel, and A's share of what decides them.

    That is, of the squared distance of all pieces from their mean.
    """
    found = []
    for name in bed.layers:
        merged, pool = lego_merge(bed.of(name), seed=seed), units(bed.of(name))[0]
        by_number = (pool - pool.mean(0)).square().sum(0)
        found.append([merged.mixed, merged.cancelled, float(by_number[: merged.a.shape[1]].sum() / by_number.sum())])
    return found


def prune(arm: str, seed: int, settings: Settings) -> Row:
    """One adapter made smaller, k by k, without a scale; the metric is at half its rank."""
    bed = load(settings, seed, "shared")
    task = seed % len(digit_experts.TASKS)
    recipe = {key: settings[key] for key in digit_experts.SMALL}
    wide = digit_loras.adapter(list(digit_experts.TASKS)[task], "shared", recipe, seed, rank=WIDE)
    whole = suite_accuracy(bed.suite, task, bed.update(wide), "test")

    def kept(k: int) -> float:
        return suite_accuracy(bed.suite, task, bed.update(_pruned(arm, wide, k, seed)), "test") / whole

    found = [[k, kept(k)] for k in PRUNED]
    row = kept_row(arm, seed, bed.suite, bed.suite.model, [dict(map(tuple, found))[WIDE // 2]] * len(bed.loras))
    extra = {"curve": found, "whole": whole, "worst": row.metric, "weakest_expert": row.extra["weakest_expert"]}
    return Row(arm, seed, row.params, row.active_params, 0, 0, row.metric, extra)


def _pruned(arm: str, wide: Loras, k: int, seed: int) -> Loras:
    if arm == "prune-lego":
        return {name: lego_prune(lora, k, seed=seed).factors for name, lora in wide.items()}
    return {name: (v, u * s, 1.0) for name, lora in wide.items() for u, s, v in [factored_svd(lora, k)]}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus("lora-lego", arm) for arm in RIVALS}
    verdict = decide(
        (NOT_TESTABLE, weak_experts(rows)),
        (REPRODUCED, all_above(gains.values())),
        (NOT_REPRODUCED, any(interval.high < 0 for interval in gains.values())),
    )
    by_condition = {name: {arm: rows.minus("lora-lego", arm, name) for arm in RIVALS} for name in CONDITIONS}
    gain, best = gains["factor-average"], max(RIVALS, key=rows.mean)
    reason = (
        f"Normalised accuracy at rank {RANK}, lora-lego minus the average of the factors {gain}, minus the best of the "
        f"four rivals, {best}, {gains[best]}; with the length of the mean left as it is "
        f"{rows.minus('lora-lego-means', 'lora-lego')}, with canonical pieces "
        f"{rows.minus('lora-lego-canonical', 'lora-lego')}. At half the rank of one adapter, clustered minus truncated "
        f"{rows.minus('prune-lego', 'prune-svd')}. The effect is the first of these."
    )
    unscaled = {name: rows.means(f"{name}_unscaled", ("factor-average", "svd", *LEGO)) for name in CONDITIONS}
    details = {
        "kept": rows.means(),
        "worst": rows.means("worst"),
        "gains": gains,
        "gains_by_condition": by_condition,
        "unscaled": unscaled,
        "means_minus_lengths": rows.minus("lora-lego-means", "lora-lego"),
        "canonical_minus_plain": rows.minus("lora-lego-canonical", "lora-lego"),
        "half_minus_svd": rows.minus("lora-lego-half", "svd-half"),
        "32_minus_svd": rows.minus("lora-lego-32", "svd-32"),
        "minus_ensemble": rows.minus("lora-lego", "ensemble"),
        "pruned_minus_cut": rows.minus("prune-lego", "prune-svd"),
        "pruned": {arm: average(rows.of(arm, "curve")) for arm in ("prune-lego", "prune-svd")},
        "ablations": {name: average(rows.of("lora-lego", f"{name}_curve")) for name in CONDITIONS},
    }
    return Judgement.on(gain, verdict, reason, details)


def average(tables: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean of tables of one shape."""
    return torch.tensor(tables, dtype=torch.float64).mean(0).tolist()


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
    tested="At the adapters' own rank, clustered pieces beat averaged factors, TIES on them, and both cut to that rank "
    "from the updates.",
    power=Power(("factor-average", "svd"), effect=0.03, deviation={"small": (0.00523, 12)}),
    trainings=lambda arm: "merges adapters of the bed",
)
