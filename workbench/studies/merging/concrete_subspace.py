"""Does a mask learned on unlabelled inputs make eight tasks interfere less, under fixed weights and under learned ones?

Experts of the digit bed, fine-tuned whole. Arms that learn do so on validation images without labels, and are judged on
test; those called "on test" learn on the test images, as the paper does, where the preset is "transductive". All of
them make the same number of passes forward and back over a batch of each task, and begin with the scale that is best
for task arithmetic.

Every arm has as many points to choose from on validation: scales, or densities and scales, or rates and lengths of
training; a mask per task, which takes eight times the draws, has one rate. A rate is so large that Adam can move a
logit or a weight in all its steps as far as in the paper's, times `REACHES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from workbench.beds import digit_experts as bed
from workbench.kernels.trim_elect_merge import magnitude_threshold, trim_elect_merge
from workbench.lib.core.merge import TaskVectors
from workbench.lib.core.merge.adamerging import AdaMerging, MergedModel, Unlabelled
from workbench.lib.core.train import Hook, State
from workbench.lib.merging.concrete_subspace import METHOD, ConcreteMask, ConcreteModel, ConcreteSubspace
from workbench.studies.core import Power, Settings, Study
from workbench.studies.merging.tuning import (
    POINTS,
    Suite,
    Update,
    grid,
    judged_row,
    load,
    merged_row,
    spread,
    tuned,
    weak_experts,
)
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, Judgement, all_above, any_below, decide

BATCH = 16
"""Inputs of each task in a pass, as in the paper."""

REACHES = (1 / 3, 1.0, 3.0)
LOOKS = POINTS // len(REACHES)
"""Lengths of training to choose from, of each rate."""

MASK_REACH, WEIGHT_REACH = 2.0, 1.0
"""The paper's rate times its steps: 1e-3 for 2000 of the logits and 1000 of the weights."""

SCALES = spread(0.02, 0.48)  # of the sum of the task vectors
TIES = grid(ratio=(0.1, 0.2, 0.4, 0.8), lam=(0.2, 0.3, 0.45, 0.7, 1.0, 1.5))
assert len(SCALES) == len(TIES) == LOOKS * len(REACHES) == POINTS
BASELINES = ("task-arithmetic", "random mask", "adamerging layer")

RULE = (
    "The metric is normalised accuracy on test, the mean over eight tasks; intervals are 95% paired intervals over "
    "seeds. (a) Concrete task arithmetic minus task arithmetic, and minus task arithmetic under a random mask that "
    "keeps half of the weights, each lie above 0. (b) Layer-wise concrete AdaMerging minus layer-wise AdaMerging at as "
    "many passes lies above 0. Reproduced if all three do. Not reproduced if one of them lies below 0. Not resolved "
    "otherwise. Not testable if an expert has less than 0.85 of its own task right."
)

PRESETS = {
    "smoke": bed.SMOKE | {"passes": 24, "stride": 8, "transductive": True, "seeds": 1},
    "small": bed.SMALL | {"passes": 120, "stride": 1, "transductive": False, "seeds": 8},
    "full": bed.FULL | {"passes": 3000, "stride": 1, "transductive": True, "seeds": 12},
}


@dataclass(frozen=True)
class Learned:
    """An arm that learns: what, and on the inputs of which split."""

    granularity: str
    concrete: bool = True
    shared: bool = True
    split: str = "validation"
    reaches: tuple[float, ...] = REACHES

    def merger(self, reach: float, passes: int, init: float, seed: int, batches: Sequence[Any]) -> Any:
        """The merger whose passes are that many, at rates that reach so far."""
        if not self.concrete:
            lr = reach * WEIGHT_REACH / passes
            return AdaMerging(batches, granularity=self.granularity, init=init, lr=lr, steps=passes, seed=seed)
        steps = passes if self.granularity == "fixed" else passes // 3
        lrs = {"mask_lr": reach * MASK_REACH / steps, "lr": reach * WEIGHT_REACH / steps}
        return ConcreteSubspace(
            batches, granularity=self.granularity, init=init, mask_steps=steps, steps=steps, shared=self.shared,
            seed=seed, **lrs,
        )  # fmt: skip


LEARNED = {
    "adamerging task": Learned("task", concrete=False),
    "adamerging layer": Learned("layer", concrete=False),
    "concrete ta": Learned("fixed"),
    "concrete task": Learned("task"),
    "concrete layer": Learned("layer"),
    "mask per task": Learned("fixed", shared=False, reaches=(1.0,)),
    "adamerging layer on test": Learned("layer", concrete=False, split="test"),
    "concrete ta on test": Learned("fixed", split="test"),
    "concrete layer on test": Learned("layer", split="test"),
}
ARMS = ("base", "task-arithmetic", "ties", "random mask", *LEARNED)


def arms_of(settings: Settings) -> list[str]:
    return [arm for arm in ARMS if settings["transductive"] or arm not in LEARNED or LEARNED[arm].split != "test"]


def summed(deltas: Tensor, scale: float) -> Update:
    return scale * deltas.sum(0)


def ties(deltas: Tensor, ratio: float, lam: float) -> Update:
    thresholds = [magnitude_threshold(row, max(1, int(ratio * len(row)))) for row in deltas]
    return lam * trim_elect_merge(deltas.contiguous(), thresholds=thresholds)


def random_mask(suite: Suite, seed: int) -> Tensor:
    """A draw of zeros and ones at logits of 0, rescaled (P,): what DARE drops, the same for all tasks."""
    mask = ConcreteMask(suite.split(suite.start))
    drawn = mask.draw(hard=True, generator=torch.Generator().manual_seed(seed))
    return torch.cat([drawn[name].flatten() for name in suite.names])


@lru_cache(maxsize=1)
def base_scale(recipe: tuple[tuple[str, Any], ...], seed: int, stride: int) -> float:
    """The scale that is best for task arithmetic."""
    return tuned(load(dict(recipe), seed), summed, grid(scale=SCALES)[::stride])[1]["scale"]


def batches(suite: Suite, split: str) -> list[list[Tensor]]:
    """The inputs of each task, without what does not fill a batch."""
    inputs = [part for task in suite.tasks for part, _ in task.splits[split].values()]
    return [[x for x in own.split(BATCH) if len(x) == BATCH] for own in inputs]


@dataclass
class Look(Hook):
    """Looks at the merge at `LOOKS` lengths of its last training, and keeps the best on validation.

    Attributes:
        steps: of that training; `before` are the passes made by then.
        score: that of the best; `best` has its update, the step "at" and, of a mask, its update with zeros and ones.
        curve: (passes made, entropy of the inputs since the look before, normalised accuracy on validation), the latter
            two means over tasks.
    """

    suite: Suite
    steps: int
    before: int
    stride: int
    score: float = -1.0
    best: dict[str, Any] = field(default_factory=dict)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def after_step(self, state: State) -> None:
        if not last_training(state.model):
            return
        self.losses.append(state.loss / len(self.suite.tasks))
        if state.step + 1 in [round(self.steps * (i + 1) / LOOKS) for i in range(LOOKS)][:: -self.stride]:
            self.look(state.step + 1, state.model)

    def look(self, made: int, model: MergedModel) -> None:
        update = flat(self.suite, model.update())
        kept = fmean(self.suite.kept(self.suite.model_of(update), "validation"))
        self.curve.append((self.before + made, fmean(self.losses), kept))
        self.losses.clear()
        if kept > self.score:
            self.score, self.best = kept, {"update": update, "at": made}
            if isinstance(model, ConcreteModel):
                self.best |= {"density": model.mask.density(), "hard": flat(self.suite, hardened(model))}


def last_training(model: MergedModel) -> bool:
    """Whether no training follows: of a mask alone, or of weights."""
    return not isinstance(model, ConcreteModel) or model.inner_lr is None or model.settled is not None


def hardened(model: ConcreteModel) -> dict[str, Tensor]:
    """The update with the same draw, of zeros and ones."""
    before, model.settled = model.settled, None
    model.settle(hard=True)
    update, model.settled = model.update(), before
    return update


def flat(suite: Suite, update: dict[str, Tensor]) -> Update:
    return torch.cat([update[name].flatten() for name in suite.names])


def learned_row(arm: str, seed: int, suite: Suite, settings: Settings) -> Row:
    """The row of an arm that learns, at its best rate and length."""
    what, passes, stride = LEARNED[arm], int(settings["passes"]), int(settings["stride"])
    init = base_scale(tuple((key, settings[key]) for key in bed.SMALL), seed, stride)
    vectors = TaskVectors(suite.model, [suite.model_of(delta) for delta in suite.deltas], exclude="head.*")
    inputs = batches(suite, what.split)
    manifest = {key: value for task in suite.tasks for key, value in task.manifest.items()}
    task = Unlabelled(inputs, tuple(bed.TASKS), manifest)
    looks = {}
    for reach in what.reaches[:: min(stride, 2)]:
        merger = what.merger(reach, passes, init, seed, inputs)
        steps = merger.mask_steps if what.granularity == "fixed" else merger.steps
        looks[reach] = Look(suite, steps, passes - steps, stride)
        merger.learned(vectors, [looks[reach]], task)
    reach, best = max(looks.items(), key=lambda item: item[1].score)
    chosen = {"init": init, "reach": reach, "at": best.best["at"], "validation": best.score}
    extra: dict[str, Any] = {"curve": best.curve, "chosen": chosen, "passes": passes}
    if what.concrete:
        extra["density"] = list(best.best["density"].values())
        extra["hard"] = fmean(suite.kept(suite.model_of(best.best["hard"]), "test"))
    row = merged_row(arm, seed, suite, best.best["update"], passes, **extra)
    # a pass is over a batch of each task; the few operations a weight that merging itself takes are not counted
    return replace(row, flops=row.flops * BATCH * len(suite.tasks) // bed.BATCH)


def run(arm: str, seed: int, settings: Settings) -> Row:
    suite, stride = load(settings, seed), int(settings["stride"])
    if arm == "base":
        return judged_row(arm, seed, suite, suite.model)
    if arm in LEARNED:
        return learned_row(arm, seed, suite, settings)
    merge: Callable[..., Update] = ties if arm == "ties" else summed
    points = TIES if arm == "ties" else grid(scale=SCALES)
    if arm == "random mask":
        mask = random_mask(suite, seed)
        update, chosen = tuned(suite, lambda deltas, scale: scale * mask * deltas.sum(0), points[::stride])
    else:
        update, chosen = tuned(suite, merge, points[::stride])
    return merged_row(arm, seed, suite, update, chosen=chosen)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    plain, random = rows.minus("concrete ta", "task-arithmetic"), rows.minus("concrete ta", "random mask")
    layer, task = (rows.minus(f"concrete {each}", f"adamerging {each}") for each in ("layer", "task"))
    verdict = decide(
        (NOT_TESTABLE, weak_experts(rows)),
        (REPRODUCED, all_above([plain, random, layer])),
        (NOT_REPRODUCED, any_below([plain, random, layer])),
    )
    reason = (
        f"Normalised accuracy of concrete task arithmetic minus that of task arithmetic {plain}, minus that under a "
        f"random mask {random}; of concrete AdaMerging minus AdaMerging at as many passes, layer-wise {layer}, "
        f"task-wise {task}. The effect is the first."
    )
    learned = [arm for arm in LEARNED if arm in rows.arms]
    concrete = [arm for arm in learned if LEARNED[arm].concrete]
    details = {
        "kept": rows.means(),
        "worst": rows.means("worst"),
        "gains": {"task-arithmetic": plain, "random mask": random, "adamerging layer": layer, "adamerging task": task},
        "layer_minus_ta": rows.minus("concrete layer", "concrete ta"),
        "concrete_ta_minus_adamerging_layer": rows.minus("concrete ta", "adamerging layer"),
        "shared_minus_per_task": rows.minus("concrete ta", "mask per task"),
        "on_test": {
            arm: rows.minus(f"{arm} on test", other)
            for arm, other in (("concrete layer", "adamerging layer on test"), ("concrete ta", "task-arithmetic"))
            if f"{arm} on test" in learned
        },
        "hard": rows.means("hard", concrete),
        "density": {arm: [fmean(each) for each in zip(*rows.of(arm, "density"), strict=True)] for arm in concrete},
        "curves": {arm: rows.of(arm, "curve")[0] for arm in learned},
        "chosen": {arm: rows.of(arm, "chosen") for arm in rows.arms if arm != "base"},
    }
    return Judgement.on(plain, verdict, reason, details)


def trainings(arm: str) -> int | str:
    """Of the first rate."""
    if arm not in LEARNED:
        return "it merges experts of the bed"
    return 2 if LEARNED[arm].concrete and LEARNED[arm].granularity != "fixed" else 1


STUDY = Study(
    METHOD,
    metric="kept",
    unit="of the experts' accuracy",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms_of,
    run=run,
    judge=judge,
    main="concrete ta",  # one training, of the mask
    power=Power(BASELINES, effect=0.03, deviation={"small": (0.0115, 8)}),
    trainings=trainings,
)
