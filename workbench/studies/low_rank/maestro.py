"""Does Maestro find smaller networks at kept accuracy, and smaller ones in them, in one training? (2308.14929)

A network 64-128-128-10 learns scikit-learn's digits with SGD. The two hidden layers may lose rank; the head of ten
classes is left out. Every arm is trained at three rates and judged at the one that is best on validation; Maestro at
each weight of its lasso besides, of which the smallest network is taken that validation finds as good as the best.
Networks of the same seed start from the same weights.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from workbench.beds.baseline import MLP, seeded
from workbench.beds.pretrained import pretrained
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core import factored
from workbench.lib.core.budget import count_params
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, Classification
from workbench.lib.core.train import Hook, State, TrainConfig, attended, nobody, train
from workbench.lib.low_rank import maestro, ordered
from workbench.lib.low_rank.maestro import (
    METHOD,
    PrefixSampler,
    decompose,
    extract,
    fit_ranks,
    maestro_loss,
    nested_curve,
    ordered_layers,
    progressive_shrink,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.sweep import edges
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

WIDTHS = (64, 128, 128, 10)
BATCH = 64
EPS = 1e-3
MARGIN = 0.01
SHARES = (0.5, 0.25, 0.125)
"""Of the dense network's parameters: the sizes of the nested networks. Those up to a quarter are in the rule."""
SMALL = SHARES[1:]

DENSE, FACTORS, MAESTRO, FIXED, SVD = "dense", "factors", "maestro", "fixed-rank", "dense-svd"
ARMS = (DENSE, FACTORS, MAESTRO, FIXED, SVD)

RULE = (
    "The metric is the accuracy on test of the network at the rate, and of Maestro the weight of the lasso, that "
    f"validation takes; intervals are paired, over seeds, at 95%. (a) Maestro's network has at most half of the dense "
    f"one's parameters, and loses less than {MARGIN} to it: the interval of the share lies below 0.5, that of the "
    f"difference above -{MARGIN}. (b) At no more than a quarter, and an eighth, of the dense one's parameters the "
    "network nested in it is as good as the SVD of the dense one, cut to the same ranks: both intervals lie above "
    f"-{MARGIN}. Reproduced if both hold. Not reproduced if the share's interval lies above 0.5, or one of the others "
    f"below -{MARGIN}. Not resolved otherwise. The effect is the difference of (a)."
)

COMMON = {"rates": (0.03, 0.1, 0.3), "weights": (1e-2, 3e-3, 1e-3)}
PRESETS = {
    "smoke": {"rates": (0.03,), "weights": (1e-2,), "steps": 60, "seeds": 2},
    "small": COMMON | {"steps": 600, "seeds": 12},
    "full": COMMON | {"steps": 2400, "seeds": 24},
}


class Sampled(nn.Module):
    """A network and the sampler that cuts it, which is saved with it."""

    def __init__(self, network: nn.Module, seed: int):
        super().__init__()
        self.network, self.sampler = network, PrefixSampler(network, seed=seed)

    def forward(self, x, context=None):
        return self.network(x)


class Ordering(Classification):
    """Classification as Maestro trains it: what the cut network learns, and the lasso, are beside the task's loss."""

    def __init__(self, found, weight: float):
        super().__init__(found)
        self.weight = weight

    def loss(self, model: nn.Module, batch: Batch):
        if not model.training:
            return super().loss(model, batch)
        whole, further = maestro_loss(model.network, model.sampler, batch.inputs, batch.targets, self.weight)
        return whole, Context(aux=further)


class Shrink(Hook):
    """After every epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def after_step(self, state: State) -> None:
        if (state.step + 1) % self.epoch == 0:
            try:
                progressive_shrink(state.model, EPS)
            except InputError as error:  # as lost as one that diverges
                raise FloatingPointError(f"step {state.step}: {error}") from error


def build(arm: str, seed: int, ranks: Mapping[str, int] | None = None) -> nn.Module:
    """The network of an arm before it is trained; `ranks` are of the hidden layers, where they are fixed."""
    network = seeded(seed, lambda: MLP(WIDTHS))
    if arm == DENSE:
        return network
    decompose(network, skip_last=True)
    if arm == FIXED:
        return extract(network, ranks)
    return Sampled(network, seed) if arm == MAESTRO else network


def learned(
    arm: str, seed: int, settings: Settings, rate: float, weight: float = 0.0, ranks: Mapping[str, int] | None = None
) -> nn.Module:
    """The network of an arm, trained."""
    found = data.load("digits", fold=seed)
    task = Ordering(found, weight) if arm == MAESTRO else Classification(found)
    epoch = math.ceil(len(found.splits["train"][1]) / BATCH)

    def teach(model: nn.Module) -> None:
        # not decayed: the lasso alone is to shrink what it shrinks
        config = TrainConfig(settings["steps"], BATCH, lr=rate, warmup=0, weight_decay=0.0, seed=seed, eval_every=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        train(model, task, config, [Shrink(epoch)] if arm == MAESTRO else [], optimizer=optimizer)

    recipe = {"arm": arm, "seed": seed, "rate": rate, "weight": weight, "steps": settings["steps"]}
    recipe |= {"ranks": dict(ranks or {}), "data": found.manifest}
    code = [sys.modules[__name__], maestro, ordered, factored]
    made = pretrained("maestro", recipe, lambda: build(arm, seed, ranks), teach, code, watched=True)
    return made.network if arm == MAESTRO else made


class Chosen(NamedTuple):
    """What validation takes of an arm: the network as it was trained, and as it is used."""

    trained: nn.Module
    used: nn.Module
    rate: float
    weight: float
    validation: float


def choose(arm: str, seed: int, settings: Settings, ranks: Mapping[str, int] | None = None) -> Chosen:
    """The network that is best on validation; of Maestro the smallest of those that are as good but for the margin.

    A training that diverges, or in which a layer loses all of its components, is none to choose.
    """
    task, found = Classification(data.load("digits", fold=seed)), []
    for weight in settings["weights"] if arm == MAESTRO else (0.0,):
        for rate in settings["rates"]:
            try:
                network = learned(arm, seed, settings, rate, weight, ranks)
            except FloatingPointError:
                continue
            used = extract(network) if arm == MAESTRO else network
            found.append(Chosen(network, used, rate, weight, task.evaluate(used)[task.metric]))
    if not found:
        raise FloatingPointError(f"{arm} diverges at every rate of {settings['rates']}")
    if arm == MAESTRO:
        best = max(one.validation for one in found)
        fit = [one for one in found if one.validation >= best - MARGIN]
        return min(fit, key=lambda one: (count_params(one.used), -one.validation))
    return max(found, key=lambda one: one.validation)


def run(arm: str, seed: int, settings: Settings) -> Row:
    found = data.load("digits", fold=seed)
    task, dense = Classification(found), count_params(build(DENSE, seed))
    budgets = [int(share * dense) for share in SHARES]

    def accuracy(network: nn.Module) -> float:
        return task.evaluate(network, "test")[task.metric]

    ranks, nested_ranks = None, []
    if arm in (FIXED, SVD):
        with attended(nobody):  # not what this arm trains
            best = choose(MAESTRO, seed, settings)
        ranks = {name: layer.rank for name, layer in ordered_layers(best.trained).items()}
        nested_ranks = [fit_ranks(best.trained, budget) for budget in budgets]
    chosen = choose(DENSE if arm == SVD else arm, seed, settings, ranks if arm == FIXED else None)
    used, extra = chosen.used, {}
    if arm in (FACTORS, MAESTRO):
        layers = ordered_layers(chosen.trained)
        curve = nested_curve(chosen.trained, accuracy, budgets)
        extra = {"ranks": [layer.rank for layer in layers.values()], "nested": [small.metric for small in curve]}
        extra |= {"nested_ranks": [list(small.ranks.values()) for small in curve]}
    elif arm == SVD:  # the SVD of a dense layer is what a layer of Maestro begins with
        cut = decompose(chosen.trained, skip_last=True).model
        used = extract(cut, ranks)
        extra = {"nested": [accuracy(extract(cut, these)) for these in nested_ranks]}
        extra |= {"nested_own": [small.metric for small in nested_curve(cut, accuracy, budgets)]}
    # of Maestro at all ranks, and its cut network as dear as the whole one: a bound
    plain = build(FACTORS if arm == MAESTRO else DENSE if arm == SVD else arm, seed, ranks)
    trainings = len(settings["rates"]) * (len(settings["weights"]) if arm == MAESTRO else 1)
    flops = training_budget(plain, task, BATCH).flops * (2 if arm == MAESTRO else 1)
    extra |= {
        "rate": chosen.rate,
        "at_edge": int(len(settings["rates"]) > 1 and chosen.rate in (settings["rates"][0], settings["rates"][-1])),
        "weight": chosen.weight,
        "validation": chosen.validation,
        "share": count_params(used) / dense,
    }
    steps, params = settings["steps"] * trainings, count_params(used)
    return Row(arm, seed, params, params, flops * steps, steps, accuracy(used), extra)


def reached(place: int, own: bool = False) -> Callable[[Row], float]:
    """What reads the accuracy of the nested network of a size; of the SVD, at Maestro's ranks or its own."""
    return lambda row: row.extra["nested_own" if own and row.arm == SVD else "nested"][place]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gap, share = rows.minus(MAESTRO, DENSE), rows.interval(rows.of(MAESTRO, "share"))
    sizes = {f"{size:g} of the parameters": place for place, size in enumerate(SHARES)}
    nested = {name: rows.minus(MAESTRO, SVD, reached(place)) for name, place in sizes.items()}
    own = {name: rows.minus(MAESTRO, SVD, reached(place, own=True)) for name, place in sizes.items()}
    small, alone = (list(found.values())[-len(SMALL) :] for found in (nested, own))
    within = all(one.low > -MARGIN for one in (gap, *small)) and share.high < 0.5
    outside = any(one.high < -MARGIN for one in (gap, *small)) or share.low > 0.5
    verdict = decide((NOT_REPRODUCED, outside), (REPRODUCED, within))
    reason = (
        f"Maestro's network has {share.estimate:.3f} [{share.low:.3f}, {share.high:.3f}] of the dense one's parameters "
        f"and {gap} of its accuracy, which is the effect; beside the dense one's SVD at the same ranks "
        f"{rows.minus(MAESTRO, SVD)}, and beside a network of these ranks from the start {rows.minus(MAESTRO, FIXED)}. "
        f"Nested in it, beside the SVD at equal ranks: at a quarter {small[0]}, at an eighth {small[1]}; beside "
        f"the SVD at ranks of its own of the same size {alone[0]} and {alone[1]}. {edges(rows)}"
    ).rstrip()
    details = {
        "accuracy": rows.means(),
        "share": rows.means("share"),
        "nested": {
            arm: [sum(at) / len(at) for at in zip(*rows.of(arm, "nested"), strict=True)]
            for arm in (MAESTRO, FACTORS, SVD)
        }
        | {f"{SVD}, its own ranks": [sum(at) / len(at) for at in zip(*rows.of(SVD, "nested_own"), strict=True)]},
        "nested minus SVD": nested,
        "nested minus SVD at its own ranks": own,
        "ranks": [sum(at) / len(at) for at in zip(*rows.of(MAESTRO, "ranks"), strict=True)],
        "rates": rows.means("rate"),
        "weight": rows.mean(MAESTRO, "weight"),
    }
    return Judgement.on(gap, verdict, reason, details, claimed=(-MARGIN, float("inf")))


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
    power=Power((DENSE, FACTORS), effect=MARGIN, deviation={"small": (0.008185, 12)}),
)
