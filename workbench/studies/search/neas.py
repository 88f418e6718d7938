"""Are networks that are searched for together better than one, and does shrinking by diversity help the search?

MNIST-1D, signals of ten classes. Every arm searches with a supernet of its own, trained for as many steps, and rated
for as many candidates (fewer where parents have no new children); those of the baselines are not shrunk: small
operators go first, and of half the limit no network may be left. What it finds is trained from scratch for as many
steps. It costs at most so many multiplications for one signal, whatever it is made of: one ensemble of two paths, one
network, or two copies of a network of half as many. A supernet of two paths computes more in a step than one of a
single path; the budgets say so.

Ranks are compared on the same ensembles in all arms, drawn from the whole space. Their truth is the accuracy when
trained alone, the mean over all seeds (arm "truth").
"""

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from scipy import stats

from workbench.lib import data
from workbench.lib.core.budget import count_params
from workbench.lib.core.search.evolution import exhaust, top
from workbench.lib.core.search.genomes import EnsembleGenome, PathSpace, sample_genome
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.search.neas import METHOD, EnsembleClassification, EnsembleNet, KPathSupernet, build_standalone
from workbench.lib.search.neas_shrink import Shrinking, candidates, disagreement, jensen_shannon, of_networks, rate
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

EFFECT = 0.03  # accuracy, fixed before any deviation was known
BASELINES = ("single", "seeds")
COMMON = 8
"""Ensembles whose ranks are compared."""

#: Arm -> mode of shrinking, paths, copies of what is found, and where paths may part (at smoke at once: in its few
#: steps every layer then has two paths).
ARMS: Mapping[str, dict[str, Any]] = {
    "neas": {"mode": "diversity"},
    "potential": {"mode": "potential"},
    "random": {"mode": "random"},
    "none": {"mode": "none"},
    "single": {"mode": "none", "k": 1},
    "seeds": {"mode": "none", "k": 1, "copies": 2},
    "truth": {},
    "split-none": {"mode": "none", "splits": (0,)},
    "split-half": {"mode": "none", "splits": (2,)},
    "split-all": {"mode": "none", "splits": (4,)},
}
MODES = ("neas", "potential", "random", "none")
SMALL_ARMS = (*MODES, "single", "seeds", "truth")

RULE = (
    "The metric is accuracy on the test split of what was found, trained from scratch; intervals are 95% paired "
    "intervals over seeds. (a) Neas minus single, one network at the same limit of multiplications, lies above 0. (b) "
    "Neas minus seeds, two seeds of one network at half the limit each, lies above 0. (c) The ranks: with tau, "
    "Kendall's correlation between the supernet's ratings of the common ensembles and their truth, potential minus "
    "none lies above 0, and neas minus potential does not lie below 0. Reproduced if all hold. Not reproduced if (a), "
    "(b) or the difference of potential and none lies below 0, or neas minus potential in tau does. Not resolved "
    "otherwise. Beside it, without a part in the verdict: accuracy and tau minus random, the tau of multiplications "
    "alone, and how the paths of what was found differ."
)

SPACE = {"widths": (8, 8, 16, 16), "strides": (2, 1, 2, 1), "max_macs": 72_000}
SEARCH = {"population": 16, "parents": 5, "generations": 3, "calibration": 256, "scored": 16}
RATES = {"batch_size": 64, "lr": 1e-2}
PRESETS = {
    "smoke": SPACE
    | SEARCH
    | RATES
    | {"seeds": 2, "supernet_steps": 6, "steps": 3, "batch_size": 16, "population": 3, "parents": 2, "generations": 2}
    | {"calibration": 32, "scored": 3, "splits": (0,), "max_macs": 100_000, "arms": SMALL_ARMS},
    "small": SPACE | SEARCH | RATES | {"seeds": 16, "supernet_steps": 150, "steps": 100, "arms": SMALL_ARMS},
    "full": SPACE
    | SEARCH
    | RATES
    | {"seeds": 16, "supernet_steps": 3000, "steps": 2000, "batch_size": 128, "population": 50, "parents": 10}
    | {"generations": 20, "scored": 100, "arms": tuple(ARMS)},
}
SHRUNK_AT = (0.4, 0.7)
"""Two rounds, as shares of the supernet's training."""
FOLDS = 5


def space_of(settings: Settings) -> PathSpace:
    """Four layers of seven operators (six where the shape changes), for signals of 40."""
    return PathSpace(1, 40, 10, settings["widths"], settings["strides"])


def common(space: PathSpace) -> list[EnsembleGenome]:
    """The ensembles whose ranks are compared, the same for all seeds."""
    generator, found = torch.Generator().manual_seed(2021), {}
    while len(found) < COMMON:
        found[sample_genome(space.everything, 2, generator)] = None
    return list(found)


def task_of(seed: int) -> EnsembleClassification:
    return EnsembleClassification(data.load("mnist-1d", fold=seed % FOLDS))


def supernet_of(
    arm: str, seed: int, settings: Settings, task: EnsembleClassification
) -> tuple[KPathSupernet, Shrinking]:
    """The trained and shrunk supernet of an arm, and what shrank it."""
    options, steps = ARMS[arm], settings["supernet_steps"]
    torch.manual_seed(seed)
    supernet = KPathSupernet(space_of(settings), options.get("k", 2), options.get("splits", settings.get("splits")))
    at = [max(1, round(share * steps)) for share in SHRUNK_AT]
    shrinking = Shrinking(options["mode"], at, *judged_on(task, settings), n=settings["scored"])
    config = TrainConfig(steps, settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    train(supernet, task, config, [shrinking])
    return supernet, shrinking


def judged_on(task: EnsembleClassification, settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training signals that norms are calibrated on, and the validation split, which candidates are rated on."""
    return task.data.splits["train"][0][: settings["calibration"]], *task.data.splits["validation"]


def alone(genome: EnsembleGenome, seed: int, settings: Settings, task: EnsembleClassification) -> EnsembleNet:
    """The network of a genome, trained from scratch."""
    torch.manual_seed(seed)
    net = build_standalone(genome, space_of(settings))
    steps, size = settings["steps"], settings["batch_size"]
    train(net, task, TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=None))
    return net


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, space = task_of(seed), space_of(settings)
    if arm == "truth":
        return truth(seed, settings, task, space)
    supernet, shrinking = supernet_of(arm, seed, settings, task)
    batch, k, copies = judged_on(task, settings), supernet.k, ARMS[arm].get("copies", 1)
    sizes = {name: settings[name] for name in ("population", "parents", "generations")}
    limit = settings["max_macs"] // copies
    asked = candidates(supernet.kept, k, space, limit, splits=supernet.splits, seed=seed, **sizes)
    rated = exhaust(asked, lambda genome: rate(supernet, genome, *batch))
    genome = top(rated, 1)[0]
    # copies differ in what they start from and in the order of what they see
    nets = [alone(genome, 1000 * copy + seed, settings, task) for copy in range(copies)]
    inputs, targets = task.data.splits["test"]
    logits = of_networks(nets, inputs)
    members = [float((one.argmax(-1) == targets).double().mean()) for one in logits.unbind(1)]
    extra = {
        "genome": genome.encode(),
        "macs": copies * genome.macs(space),
        "rating": rated[genome],
        "candidates": len(rated),
        "members": members,
        "disagreement": disagreement(logits),
        "divergence": jensen_shannon(logits[:, 0], logits[:, 1]) if logits.shape[1] > 1 else 0.0,
        "kept": [len(ops) for ops in supernet.kept],
        "search_flops": search_flops(supernet, settings),
    }
    if arm in MODES:
        extra["common"] = [rate(supernet, one, *batch) for one in common(space)]
        extra["scores"] = [
            [layer, op, *(round(value, 6) if math.isfinite(value) else 0.0 for value in its)]
            for (layer, op), its in shrinking.scores.items()
        ]
    accuracy = float((logits.mean(1).argmax(-1) == targets).double().mean())
    return _row(arm, seed, nets, settings, task, accuracy, extra)


def truth(seed: int, settings: Settings, task: EnsembleClassification, space: PathSpace) -> Row:
    """The common ensembles, each trained alone."""
    nets = [alone(genome, seed, settings, task) for genome in common(space)]
    inputs, targets = task.data.splits["test"]
    reached = [float((of_networks([net], inputs).mean(1).argmax(-1) == targets).double().mean()) for net in nets]
    macs = [genome.macs(space) for genome in common(space)]
    return _row(
        "truth", seed, nets, settings, task, sum(reached) / COMMON, {"accuracies": reached, "macs_of_each": macs}
    )


def search_flops(supernet: KPathSupernet, settings: Settings) -> int:
    """Of the supernet's training: six operations for a multiplication of the mean ensemble of the whole space."""
    generator, space = torch.Generator().manual_seed(0), supernet.space
    drawn = [sample_genome(space.everything, supernet.k, generator, supernet.splits).macs(space) for _ in range(200)]
    return round(6 * sum(drawn) / len(drawn) * settings["batch_size"] * settings["supernet_steps"])


def _row(
    arm: str,
    seed: int,
    nets: list[EnsembleNet],
    settings: Settings,
    task: EnsembleClassification,
    accuracy: float,
    extra: dict[str, Any],
) -> Row:
    budgets = [training_budget(net, task, settings["batch_size"], seed) for net in nets]
    flops = settings["steps"] * sum(budget.flops for budget in budgets) + extra.get("search_flops", 0)
    params = sum(map(count_params, nets))
    return Row(arm, seed, params, params, flops, settings["steps"], accuracy, extra)


def taus(rows: Rows) -> dict[str, list[float]]:
    """Mode -> Kendall's tau between its ratings of the common ensembles and the truth, one a seed; 0 if constant."""
    reached = torch.tensor(rows.of("truth", "accuracies"), dtype=torch.float64).mean(0).tolist()
    return {arm: [_tau(ratings, reached) for ratings in rows.of(arm, "common")] for arm in MODES if arm in rows.arms}


def _tau(a: list[float], b: list[float]) -> float:
    value = float(stats.kendalltau(a, b).statistic)
    return value if math.isfinite(value) else 0.0


def _member(row: Row) -> float:
    return sum(row.extra["members"]) / len(row.extra["members"])


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    single, seeds, by_seed = rows.minus("neas", "single"), rows.minus("neas", "seeds"), taus(rows)

    def rise(a: str, b: str) -> Any:
        return rows.interval([x - y for x, y in zip(by_seed[a], by_seed[b], strict=True)])

    shrunk, diverse = rise("potential", "none"), rise("neas", "potential")
    above = all(interval.low > 0 for interval in (single, seeds, shrunk)) and diverse.high >= 0
    below = any(interval.high < 0 for interval in (single, seeds, shrunk, diverse))
    verdict = decide((REPRODUCED, above), (NOT_REPRODUCED, below))
    mean_taus = {arm: sum(values) / len(values) for arm, values in by_seed.items()}
    reached = torch.tensor(rows.of("truth", "accuracies"), dtype=torch.float64).mean(0).tolist()
    by_macs = _tau(rows.of("truth", "macs_of_each")[0], reached)
    others = {arm: rows.minus("neas", arm) for arm in ("potential", "random", "none")}
    reason = (
        f"Accuracy: neas minus single {single}, minus seeds {seeds}; tau: potential minus none {shrunk}, neas minus "
        f"potential {diverse}, where multiplications alone have {by_macs:.2f}. The effect is neas minus single."
    )
    found = [arm for arm in rows.arms if arm != "truth"]
    details = {
        "minus_single": single,
        "minus_seeds": seeds,
        "tau_potential_minus_none": shrunk,
        "tau_neas_minus_potential": diverse,
        "tau_neas_minus_random": rise("neas", "random"),
        "tau": mean_taus,
        "tau_of_macs": by_macs,
        "minus_modes": others,
        "macs": rows.means("macs", found),
        "flops": {arm: int(rows.mean(arm, lambda row: row.flops)) for arm in found},
        "split": {arm: rows.mean(arm, lambda row: row.extra["genome"][0]) for arm in found},
        "member": {
            arm: rows.mean(arm, lambda row: sum(row.extra["members"]) / len(row.extra["members"])) for arm in found
        },
        "disagreement": rows.means("disagreement", found),
        "divergence": rows.means("divergence", found),
    }
    return Judgement.on(single, verdict, reason, details)


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
    tested="Two paths found together under a limit of multiplications are better than one network and than two seeds "
    "of a smaller one at the same limit, and a supernet shrunk by potential and diversity ranks them better.",
    power=Power(BASELINES, effect=EFFECT, deviation={"small": (0.0393, 12)}),
    main="neas",
    trainings=lambda arm: "it trains the common ensembles apart, to know their ranks" if arm == "truth" else 1,
)
