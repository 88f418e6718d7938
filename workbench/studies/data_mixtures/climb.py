"""Do shrinking rounds of proxy runs find a better mixture than one round of random ones? (2504.13161)

Text without labels, in clusters; every search may train as many small proxies, on the same data order. What it chooses
trains a larger model, whose bits per byte of held-out text for the purpose are the metric: the proxies are never told
of its test split.
"""

import json
import statistics
from dataclasses import replace
from functools import lru_cache

import torch

from workbench.beds.text_mixtures import PURPOSE, Trainer, clusters, discovered, documents, purity
from workbench.lib.data_mixtures.climb import METHOD, IterativeMixtureSearch, MixtureSpace, SearchResult
from workbench.lib.data_mixtures.optuna_search import OptunaSearch
from workbench.lib.measures.statistics import spearman
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

EFFECT = 0.02  # bits per byte, a tenth of what the best of 28 random proxies gains over the even mixture
BASELINES = ("random", "regmix")

#: Arm -> its search, and which of its mixtures is chosen; None of those that search nothing.
ARMS = {
    "climb": ("rounds", "predicted"),
    "climb-measured": ("rounds", "measured"),
    "regmix": ("one round", "predicted"),
    "random": ("one round", "measured"),
    "bayesian": ("optuna", "measured"),
    "uniform": None,
    "natural": None,
}

RULE = (
    "The metric is bits per byte of the target on test text for the purpose; differences are paired over seeds. (a) "
    "climb minus regmix, one round of as many proxies with the same predictor, and (b) climb minus random, the best "
    "measured of these: both 95% intervals below 0 is reproduced. Not reproduced if either lies above 0, or if the 90% "
    f"interval of (a) lies within {EFFECT:g} on both sides of 0: no difference that matters. Not resolved otherwise. "
    "Beside it, without a part in the verdict: climb-measured (the best measured of climb's), bayesian (optuna's "
    "default sampler), uniform and natural, and the rank correlation of what was foreseen with what was measured, by "
    "round."
)

COMMON = {"seq_len": 64, "batch_size": 16, "merge": 1.2}
#: A model is (width, layers, steps of its warm start, steps, learning rate). Of "small" the baselines were seen at the
#: seeds below 12, and all arms with proxies of 24 steps and targets of 100 (docs/LOG.md).
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "documents": 240, "initial": 12, "schedule": (4, 3, 2), "pool": 200}
    | {"merge": 0.9, "predictor": "quadratic"}
    | {"proxy": (16, 1, 10, 3, 3e-3), "target": (16, 2, 10, 6, 3e-3), "eval_batches": 1, "test_batches": 1}
    | {"seq_len": 32, "batch_size": 4},
    "small": COMMON
    | {
        "seeds": 37,
        "first_seed": 12,
        "documents": 1200,
        "initial": 60,
        "schedule": (16, 8, 4),
        "predictor": "gp",
        "pool": 20_000,
    }
    | {"proxy": (32, 1, 600, 32, 3e-3), "target": (64, 2, 600, 120, 3e-3), "eval_batches": 2, "test_batches": 4},
    "full": COMMON
    | {"seeds": 12, "documents": 6000, "initial": 300, "schedule": (64, 32, 16), "predictor": "trees", "pool": 100_000}
    | {"proxy": (64, 2, 2000, 100, 3e-3), "target": (128, 4, 4000, 1000, 2e-3), "eval_batches": 4, "test_batches": None}
    | {"seq_len": 128},
}


def trainer(settings: Settings, which: str) -> Trainer:
    """The proxy or the target of a preset, on its clusters."""
    source = discovered(settings["documents"], settings["initial"], settings["merge"])
    return Trainer.of(source, PURPOSE, settings, which)


@lru_cache(maxsize=3)  # arms that choose differently from one search share it
def searched(search: str, seed: int, settings: str) -> SearchResult:
    """All proxies of one search; settings as JSON."""
    settings = json.loads(settings)
    proxy, schedule = trainer(settings, "proxy"), settings["schedule"]
    runs = sum(schedule)
    if search == "optuna":
        asked = OptunaSearch(len(proxy.source.share), runs, seed)
    else:
        rounds = schedule if search == "rounds" else [runs]
        space = MixtureSpace(proxy.source.share)
        asked = IterativeMixtureSearch(space, rounds, settings["predictor"], settings["pool"], seed=seed)
    while not asked.done:
        asked.tell([proxy.score(weights, seed) for weights in asked.ask()])
    return asked.result()


def run(arm: str, seed: int, settings: Settings) -> Row:
    target, proxy = trainer(settings, "target"), trainer(settings, "proxy")
    share, runs, extra = target.source.share, 0, {}
    if ARMS[arm] is None:
        weights = share if arm == "natural" else torch.full_like(share, 1 / len(share))
    else:
        search, which = ARMS[arm]
        found = searched(search, seed, json.dumps(dict(settings)))
        weights, foreseen = found.best_predicted if which == "predicted" else found.best_measured
        runs = len(found.scores)
        extra = {"foreseen": foreseen, "best_so_far": found.scores.cummin(0).values.tolist(), "ranks": ranks(found)}
    task = target.task(weights)
    model = target.learn(weights, seed, watched=True)
    test = task.evaluate(model, "test", settings["test_batches"])
    extra |= {
        "weights": [round(value, 4) for value in weights.tolist()],
        "proxy": proxy.score(
            weights, seed
        ),  # of what is chosen, once more or for the first time: not a run of the search
        "by_kind": [test[f"{task.metric}/{kind}"] for kind in task.domains],
        "runs": runs,
    }
    if arm == "natural":
        made = settings["documents"], settings["initial"], settings["merge"]
        extra |= purity(clusters(*made), documents(made[0]))
    row = trained_row(arm, seed, training_budget(model, task, target.batch_size, seed), target.steps, test[task.metric])
    each = training_budget(proxy.warm(), proxy.task(weights), proxy.batch_size, seed).flops * proxy.steps
    return replace(row, flops=row.flops + runs * each, extra=extra)


def ranks(found: SearchResult) -> list[float]:
    """Rank correlation of foreseen and measured scores in each round after the first."""
    rounds = [found.rounds == number for number in range(1, int(found.rounds.max()) + 1)]
    if found.best_predicted is None:
        return []
    return [spearman(found.foreseen[new].tolist(), found.scores[new].tolist()).estimate for new in rounds]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    one_round, random = rows.minus("climb", "regmix"), rows.minus("climb", "random")
    narrow = rows.minus("climb", "regmix", level=0.9)
    verdict = decide(
        (REPRODUCED, one_round.high < 0 and random.high < 0),
        (NOT_REPRODUCED, one_round.low > 0 or random.low > 0 or (narrow.low > -EFFECT and narrow.high < EFFECT)),
    )
    measured, bayesian = rows.minus("climb-measured", "random"), rows.minus("climb", "bayesian")
    natural = rows.minus("climb", "natural")
    reason = (
        f"Bits per byte: climb minus regmix {one_round}; climb minus random {random}; beside them climb-measured minus "
        f"random {measured}, climb minus bayesian {bayesian}, climb minus natural {natural}. The effect is climb minus "
        "regmix."
    )
    by_round = [*zip(*rows.of("climb", "ranks"), strict=True)]
    details = {
        "climb_minus_regmix": one_round,
        "climb_minus_random": random,
        "climb_measured_minus_random": measured,
        "climb_minus_bayesian": bayesian,
        "climb_minus_uniform": rows.minus("climb", "uniform"),
        "climb_minus_natural": natural,
        "proxy": rows.means("proxy"),
        "seed_noise_of_a_proxy": spread(rows.of("uniform", "proxy")),
        "seed_noise_of_the_target": spread(rows.of("uniform")),
        "foreseen_minus_proxy": rows.interval(
            [row.extra["foreseen"] - row.extra["proxy"] for row in rows.arm("climb")]
        ),
        "rank_correlation_by_round": [mean_of_numbers(found) for found in by_round],
        "proxies_rank_the_targets": mean_of_numbers(agreement(rows)),
    }
    return Judgement.on(one_round, verdict, reason, details)


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; NaN of one."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def agreement(rows: Rows) -> list[float]:
    """For each seed, the rank correlation over the arms of the proxy's score with the target's metric."""
    proxies, targets = (zip(*(rows.of(arm, what) for arm in rows.arms), strict=True) for what in ("proxy", "metric"))
    return [spearman(*pair).estimate for pair in zip(proxies, targets, strict=True)]


def mean_of_numbers(values: list[float]) -> float:
    """Mean of those that are numbers; NaN where none is."""
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=tuple(ARMS),
    run=run,
    judge=judge,
    tested="At 28 proxy runs each, a model trained on the mixture that three shrinking rounds choose is better on the "
    "purpose than on the one that a single round chooses, by the same predictor or as its best measured.",
    power=Power(BASELINES, effect=EFFECT, deviation={"small": (0.0421, 12)}),
    main="climb",
)
