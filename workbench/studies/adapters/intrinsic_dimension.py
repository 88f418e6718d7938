"""Does the intrinsic dimension of a task stay as networks grow, and does it rank tasks? (1804.08838)

Networks 64-w-w-10 learn scikit-learn's digits in random subspaces of several dimensions d. What d is needed is compared
over widths w (claim A), over true and shuffled labels of 300 images (B), and over projections (C). A network of one
seed has one start, and its subspaces lie in one another; each d is trained at several learning rates and judged at its
own best one, and so is the network that is trained as a whole, whose accuracy sets the mark.

All subspaces and rates of a network are trained side by side, which takes a tenth of the time: they share the batches
and nothing else.
"""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from workbench.beds.baseline import MLP, seeded
from workbench.lib import data
from workbench.lib.adapters.intrinsic_dimension import METHOD, SubspaceModel, measure_intrinsic_dimension
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, Classification
from workbench.lib.core.train import TrainConfig, make_optimizer, train
from workbench.lib.data.types import Arrays
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import Scores, edges, sweep
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

BATCH = 128
CRITERION = 0.9
IMAGES = 300

#: Arm -> width, projection, labels ("all": the whole task; "true" or "shuffled": those of 300 images, to be learned).
ARMS = {
    "width 16": (16, "fastfood", "all"),
    "width 64": (64, "fastfood", "all"),
    "width 128": (128, "fastfood", "all"),
    "width 64, dense": (64, "dense", "all"),
    "width 64, sparse": (64, "sparse", "all"),
    "300 images": (64, "fastfood", "true"),
    "300 images, shuffled": (64, "fastfood", "shuffled"),
}
WIDTHS = ("width 16", "width 64", "width 128")
PROJECTIONS = ("width 64", "width 64, dense", "width 64, sparse")
TRUE, SHUFFLED = "300 images", "300 images, shuffled"

ALIKE, HARDER = math.log2(1.5), math.log2(5)
PAIRS = 3  # of widths, and of projections

RULE = (
    "d_int90 is where the accuracy, a straight line in log d between the dimensions tried, first reaches nine tenths "
    "of that of the network trained as a whole, both at the rate that is best on validation. The metric is its "
    "logarithm, so ratios are geometric means, paired over seeds. (A) For every two widths, of which the largest "
    "network has 18 times the parameters of the smallest, the interval (95%) of the ratio lies within 1/1.5 to 1.5. "
    "(B) That of shuffled over true labels, by the accuracy on the 300 images that are learned, lies above 5. (C) For "
    "every two projections it lies within 1/1.5 to 1.5. Reproduced if all hold, and every network of (A) and (C) "
    "reached its mark. Not reproduced if an interval of (A) or (C), at 95% for the three together, lies outside, or "
    "that of (B) below 5. Not resolved otherwise. A network that no dimension brings to its mark counts as the largest "
    "tried. The effect is the logarithm (base 2) of the ratio of the widest to the narrowest."
)

#: "rates" are lengths of a step of theta; "whole_rates" those of every parameter.
SWEEP = {"rates": (0.3, 1.5, 6.0, 30.0), "whole_rates": (1e-3, 1e-2, 1e-1)}
PRESETS = {
    "smoke": {
        "dims": (20, 300),
        "dims_of_300": (20, 300),
        "rates": (0.06, 6.0),
        "whole_rates": (1e-3, 1e-1),
        "steps": 30,
        "seeds": 2,
    },
    "small": SWEEP
    | {"dims": (40, 60, 85, 120, 170, 240), "dims_of_300": (40, 80, 160, 320, 640, 1280), "steps": 300, "seeds": 6},
    "full": SWEEP
    | {
        "dims": (20, 30, 40, 50, 60, 75, 90, 110, 135, 165, 200, 250, 300, 400),
        "dims_of_300": (20, 30, 45, 70, 100, 150, 225, 340, 500, 750, 1100, 1600),
        "steps": 2000,
        "seeds": 12,
    },
}


class SideBySide(nn.Module):
    """Members of one network in subspaces of its own, one for each of `dims`: images (B, ...) -> logits (M, B, 10).

    A member is the `SubspaceModel` of its dimension: of one seed, P of fewer dimensions is the first columns of P.
    """

    def __init__(self, widest: SubspaceModel, dims: Sequence[int]):
        super().__init__()
        self.widest = widest.requires_grad_(False)
        self.vthetas = nn.ParameterList(torch.zeros(d) for d in dims)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        changes = self.widest.projection(pad_sequence(list(self.vthetas), batch_first=True))
        network, start = self.widest.model, 0
        there = {}
        for name, p in network.named_parameters():
            part = changes[:, start : start + p.numel()]
            there[name], start = p + part.view(-1, *p.shape), start + p.numel()
        return vmap(lambda parameters: functional_call(network, parameters, (x,)))(there)

    def made_matrices(self):
        """What is there to watch: what the first, the middle and the last member add to each matrix."""
        for i in sorted({0, len(self.vthetas) // 2, len(self.vthetas) - 1}):
            v = self.vthetas[i]
            for name, _, pick in self.widest.made_matrices():
                yield f"{i}.{name}", v, lambda v, pick=pick: pick(F.pad(v, (0, self.widest.projection.dims - len(v))))


class Digits(Classification):
    """Of one network, or of several side by side: their mean loss, and their mean accuracy."""

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits = outputs.reshape(-1, self.n_classes)
        return F.cross_entropy(logits, batch.targets.repeat(len(logits) // len(batch)))

    @torch.no_grad()
    def accuracies(self, model: nn.Module, split: str) -> list[float]:
        """Of each network."""
        right, rows = torch.zeros(()), 0
        with evaluating(model):
            for batch in self.batches(split, EVALUATION_BATCH):
                right = right + (model(batch.inputs).argmax(-1) == batch.targets).sum(-1)
                rows += len(batch)
        return (right / rows).reshape(-1).tolist()


def task(labels: str, seed: int) -> Digits:
    """The digits of this fold; or some of its training images alone, with their labels or in another order of them."""
    found = data.load("digits", fold=seed)
    if labels == "all":
        return Digits(found)
    x, y = (part[:IMAGES] for part in found.splits["train"])
    if labels == "shuffled":
        y = y[torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))]
    row = found.manifest[found.name] | {"task": f"{IMAGES} training images, {labels} labels, judged on themselves"}
    splits = dict.fromkeys(found.splits, (x, y))
    return Digits(Arrays(found.name, splits, found.classes, {found.name: row}))


def build(arm: str, seed: int, dims: int | None) -> nn.Module:
    """The network of an arm, to be trained in `dims` dimensions or as a whole."""
    width, projection, _ = ARMS[arm]
    model = seeded(seed, lambda: MLP((64, width, width, 10)))
    return model if dims is None else SubspaceModel(model, dims, projection, seed)


def run(arm: str, seed: int, settings: Settings) -> Row:
    learned = task(ARMS[arm][2], seed)
    dims, rates = settings["dims" if ARMS[arm][2] == "all" else "dims_of_300"], settings["rates"]
    # Not clipped: the norm would be that of all members.
    config = TrainConfig(settings["steps"], BATCH, lr=1.0, weight_decay=0.0, clip=math.inf, seed=seed, eval_every=None)

    def learn(model: nn.Module, scales: Sequence[float]) -> tuple[list[float], list[float]]:
        """Train all of its parameters at a rate, or the vector of each member at its own."""
        optimizer = make_optimizer(model, config)
        if len(scales) > 1:
            vectors = zip(model.vthetas, scales, strict=True)
            optimizer = torch.optim.Adam(
                [{"params": [v], "lr_scale": scale} for v, scale in vectors], betas=(0.9, 0.95)
            )
        else:
            for group in optimizer.param_groups:
                group["lr_scale"] = scales[0]
        train(model, learned, config, optimizer=optimizer)
        return tuple(learned.accuracies(model, split) for split in ("validation", "test"))

    def learn_whole(rate: float) -> Scores:
        validation, test = learn(build(arm, seed, None), [rate])
        return validation[0], test[0]

    members = [(d, rate) for d in dims for rate in rates]
    together = SideBySide(build(arm, seed, dims[-1]), [d for d, _ in members])
    # Adam moves each of d numbers by about its rate, and so theta by d^1/2 times that.
    scores = zip(*learn(together, [rate / d**0.5 for d, rate in members]), strict=True)
    scores = dict(zip(members, scores, strict=True))
    swept = {d: sweep(lambda rate, d=d: scores[d, rate], rates) for d in dims}
    network = build(arm, seed, None)
    whole = sweep(learn_whole, settings["whole_rates"])
    found = measure_intrinsic_dimension(lambda d: swept[d].metric, dims, whole.metric, CRITERION)
    needed = found.crossing or dims[-1]
    beside = [whole, *(swept[d] for pair in pairwise(dims) if pair[0] <= needed <= pair[1] for d in pair)]
    parts, all_of_it = (training_budget(model, learned, BATCH) for model in (together, network))
    flops = config.steps * (parts.flops + len(settings["whole_rates"]) * all_of_it.flops)
    extra = {
        "d_int90": needed,
        "of_the_grid": found.value,
        "reached": int(found.value is not None),
        "whole": whole.metric,
        "whole_rate": whole.rates[whole.best],
        "dims": list(dims),
        "accuracy": list(found.scores),
        "best_rates": [swept[d].rates[swept[d].best] for d in dims],
        "at_edge": int(any(each.extra()["at_edge"] for each in beside)),
        "mean_of_all": sum(test for _, test in scores.values()) / len(scores),
    }
    steps, params = config.steps * (1 + len(settings["whole_rates"])), all_of_it.params
    return Row(arm, seed, params, params, flops, steps, math.log2(needed), extra)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    together = 1 - 0.05 / PAIRS
    within, outside, ratios = True, False, {}
    for arms in (WIDTHS, PROJECTIONS):
        for a, b in combinations(arms, 2):
            gap, wide = rows.minus(b, a), rows.minus(b, a, level=together)
            within &= gap.low > -ALIKE and gap.high < ALIKE
            outside |= wide.low > ALIKE or wide.high < -ALIKE
            ratios[f"{b} / {a}"] = gap
    harder = rows.minus(SHUFFLED, TRUE)
    ratios[f"{SHUFFLED} / {TRUE}"] = harder
    missed = {arm: len(rows.arm(arm)) - sum(rows.of(arm, "reached")) for arm in ARMS}
    missed = {arm: count for arm, count in missed.items() if count}
    solved = not any(arm in missed for arm in (*WIDTHS, *PROJECTIONS))
    verdict = decide(
        (NOT_REPRODUCED, outside or harder.high < HARDER), (REPRODUCED, within and solved and harder.low > HARDER)
    )
    effect = rows.minus(WIDTHS[-1], WIDTHS[0])
    needed = {arm: 2 ** rows.mean(arm) for arm in ARMS}
    said = ", ".join(f"{arm} {value:.0f}" for arm, value in needed.items())
    params = {arm: rows.arm(arm)[0].params for arm in ARMS}
    not_reached = ", ".join(f"{arm} ({count} of {len(rows.arm(arm))} seeds)" for arm, count in missed.items())
    reason = (
        f"d_int90: {said}. In doublings: the widest network over the narrowest, of {params[WIDTHS[-1]]} and "
        f"{params[WIDTHS[0]]} parameters, {effect}, which is the effect (1.5 times is {ALIKE:.3f}); shuffled over true "
        f"labels {harder} (5 times is {HARDER:.3f}). "
        + (f"The mark was not reached by {not_reached}, which counts as the largest d. " if missed else "")
        + edges(rows)
    ).rstrip()
    details = {
        "d_int90": needed,
        "parameters": params,
        "compression": {arm: params[arm] / needed[arm] for arm in ARMS},
        "doublings": ratios,
        "whole": rows.means("whole"),
        "dims": {arm: rows.arm(arm)[0].extra["dims"] for arm in ARMS},
        "accuracy": {arm: [sum(at) / len(at) for at in zip(*rows.of(arm, "accuracy"), strict=True)] for arm in ARMS},
        "not_reached": missed,
    }
    return Judgement.on(effect, verdict, reason, details, claimed=(-ALIKE, ALIKE))


STUDY = Study(
    METHOD,
    metric="log2 of d_int90",
    unit="doublings",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main="width 64",
    power=Power(("width 64, dense", "width 64, sparse"), effect=ALIKE, deviation={"small": (0.3653, 6)}),
)
