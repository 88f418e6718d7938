"""Is a network that mixes by wavelets as accurate as others of its size, and lighter to train? (Jeevan et al. 2022)

Digits, 25 of a class, brought from 8 x 8 to 16 x 16; every network halves them once in its stem. At each of three
budgets WaveMix (two blocks of two levels, the way up by interpolation, as in the small models of the paper's authors)
stands beside a residual, a depthwise-separable, a ConvMixer and a transformer network whose parameters are the same
within 5 %; all see the same batches at the same rate, which was chosen on the rivals alone. Without dropout, which such
small networks do not survive. So few steps are enough for all but the transformer, which learns half of the digits.

What the wavelet itself is worth is measured beside the claim: the same network with other fixed transforms in its
place. So is the way up by transposed convolutions, which has most of the parameters of the paper's larger models.
"""

import statistics
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from workbench.beds import images
from workbench.beds.baseline import seeded
from workbench.kernels.memory import saved_bytes
from workbench.lib.core.task import Classification
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Arrays
from workbench.lib.search.wavemix import METHOD, WaveMix
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.search.wavemix_rivals import convmixer, resnet, separable, vit
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

SIDE, CLASSES = 16, 10
BUDGETS = {"3k": 12, "6k": 16, "12k": 24}
"""Name -> the width of WaveMix, whose parameters are the budget."""
RIVALS = {
    "resnet": (resnet, {"3k": (6, 13), "6k": (8, 17), "12k": (13, 24)}),
    "separable": (separable, {"3k": (17, 32), "6k": (23, 45), "12k": (36, 72)}),
    "convmixer": (convmixer, {"3k": (25, 2), "6k": (37, 2), "12k": (48, 3)}),
    "vit": (vit, {"3k": (12, 18), "6k": (16, 28), "12k": (24, 52)}),
}
CONTROLS = ("unshuffle", "orthogonal", "average")  # at the largest budget, with the parameters of WaveMix
LARGEST = "12k"
ARMS = [
    *(f"{name}-{budget}" for budget in BUDGETS for name in ("wavemix", *RIVALS)),
    *CONTROLS,
    "deconv",
]
MARGIN = 0.02

RULE = (
    "Accuracy on held-out images, and the bytes that a training step keeps for its backward pass, weights aside. At a "
    "budget WaveMix is on the front if for each of the four rivals the 90% interval of WaveMix minus the rival lies "
    f"above -{MARGIN:g}, and below the front if for a rival the 95% interval lies below 0 and it is not on the front. "
    "Reproduced if it is on the front at two budgets at least, and keeps fewer bytes than the residual network at "
    "every budget; not reproduced if it is below the front at two budgets at least, or keeps no fewer bytes than the "
    "residual network at two; not resolved otherwise. The effect is WaveMix minus the residual network in accuracy, "
    "the mean over the budgets of each seed. Other transforms, and the transposed convolution, are reported and not "
    "judged."
)

COMMON = {"batch_size": 32, "rate": 1e-2}
PRESETS = {
    "smoke": COMMON | {"regime": "few", "steps": 2, "seeds": 2},
    "small": COMMON | {"regime": "small", "steps": 150, "seeds": 12},
    "full": COMMON | {"regime": "whole", "steps": 2000, "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = enlarged(images.make("digits", settings["regime"], seed))
    model = seeded(seed, lambda: network(arm))
    size, steps = settings["batch_size"], settings["steps"]
    budget = training_budget(deepcopy(model), task, size)  # a copy: its batch norms see the batch too
    kept = kept_bytes(deepcopy(model), task, size)
    train(model, task, TrainConfig(steps, size, settings["rate"], seed=seed, eval_every=None))
    accuracy = task.evaluate(model, "test")["accuracy"]
    fitted = task.evaluate(model, "train")["accuracy"]
    return trained_row(arm, seed, budget, steps, accuracy, kept_bytes=kept, train_accuracy=fitted)


def network(arm: str) -> nn.Module:
    """The untrained network of an arm."""
    name, _, budget = arm.partition("-")
    if name in RIVALS:
        build, widths = RIVALS[name]
        return build(CLASSES, *widths[budget])
    if name == "deconv":
        return WaveMix(1, CLASSES, dim=16, depth=2, levels=2, stride=2, ff=9, up="deconv", dropout=0.0)
    dim, mixer = BUDGETS[budget or LARGEST], "haar" if name == "wavemix" else name
    return WaveMix(1, CLASSES, dim, depth=2, levels=2, stride=2, up="upsample", dropout=0.0, mixer=mixer)


def enlarged(task: Classification) -> Classification:
    """The same images with sides of `SIDE`, bilinear."""
    data = task.data
    splits = {
        split: (F.interpolate(x, SIDE, mode="bilinear", align_corners=False), y)
        for split, (x, y) in data.splits.items()
    }
    return Classification(Arrays(data.name, splits, data.classes, data.manifest))


def kept_bytes(model: nn.Module, task: Classification, size: int) -> int:
    """Bytes an image that a training step on `size` of them keeps for its backward pass, without the weights."""
    batch = task.batch("train", size, torch.Generator().manual_seed(0))
    return saved_bytes(lambda: task.loss(model.train(), batch)[0], model.parameters()) // size


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    on_front, below, heavier = {}, {}, {}
    for budget in BUDGETS:
        ours, theirs = f"wavemix-{budget}", [f"{name}-{budget}" for name in RIVALS]
        on_front[budget] = all(rows.minus(ours, rival, level=0.9).low > -MARGIN for rival in theirs)
        below[budget] = not on_front[budget] and any(rows.minus(ours, rival).high < 0 for rival in theirs)
        heavier[budget] = rows.mean(ours, "kept_bytes") >= rows.mean(f"resnet-{budget}", "kept_bytes")
    verdict = decide(
        (NOT_REPRODUCED, sum(below.values()) >= 2 or sum(heavier.values()) >= 2),
        (REPRODUCED, sum(on_front.values()) >= 2 and not any(heavier.values())),
    )
    gains = [
        [a - b for a, b in zip(rows.of(f"wavemix-{budget}"), rows.of(f"resnet-{budget}"), strict=True)]
        for budget in BUDGETS
    ]
    effect = rows.interval([statistics.fmean(of_seed) for of_seed in zip(*gains, strict=True)])
    accuracy, kept = rows.means(), rows.means("kept_bytes")
    said = "; ".join(
        f"at {budget}, "
        + ", ".join(f"{name} {accuracy[f'{name}-{budget}']:.3f}" for name in ("wavemix", *RIVALS))
        + f", {kept[f'wavemix-{budget}'] / kept[f'resnet-{budget}']:.2f} of the residual network's bytes, "
        + ("on the front" if on_front[budget] else "below the front" if below[budget] else "neither on nor below it")
        for budget in BUDGETS
    )
    ours = f"wavemix-{LARGEST}"
    controls = {arm: rows.minus(ours, arm) for arm in (*CONTROLS, "deconv")}
    reason = (
        f"Accuracy {said}. At {LARGEST} Haar is ahead of "
        + ", ".join(f"{arm} by {gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" for arm, gap in controls.items())
        + "."
    )
    details = {
        "on_front": on_front,
        "below_front": below,
        "differences": {
            f"{name}-{budget}": rows.minus(f"wavemix-{budget}", f"{name}-{budget}")
            for budget in BUDGETS
            for name in RIVALS
        },
        "haar_minus": controls,
        "accuracy": accuracy,
        "train_accuracy": rows.means("train_accuracy"),
        "kept_bytes": kept,
        "params": rows.means(lambda row: row.params),
        "flops": rows.means(lambda row: row.flops),
    }
    return Judgement.on(effect, verdict, reason, details, claimed=(-MARGIN, float("inf")))


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="of the images",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main=f"wavemix-{LARGEST}",
    tested="Accuracy not more than 0.02 below four kinds of networks of the same parameters, with fewer bytes kept for "
    "the backward pass than a residual network.",
    power=Power(("resnet-6k", "convmixer-6k"), effect=MARGIN, level=0.9, deviation={"small": (0.01282, 12)}),
)
