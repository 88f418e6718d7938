"""Is it the learning rate that matters, and does a tuned LoRA keep up with its variants? (2601.22708)

All arms adapt the same network to digits in negative and out of order (`beds.shifted_digits`), at every learning rate
of the shared sweep; each is judged at its own best one. Beside the methods, plain LoRA is trained with another rank,
batch and alpha, so that the range over the rate can be set against the range over everything else.
"""

import torch

from workbench.beds import shifted_digits as bed
from workbench.lib.adapters.lora_variants import FITTED, METHOD
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.train import State, TrainConfig, train
from workbench.studies.adapters.sweep import RATES, swept_row
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import edges, rate_range
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

RANK = 8
FIT_BATCHES = 8

#: Arm -> options of the system; "batch" is that of the training.
ARMS = {
    "lora": {"variant": "lora", "rank": RANK},
    **{
        variant: {"variant": variant, "rank": RANK}
        for variant in ("rslora", "lora+", "dora", "pissa", "milora", "olora", "lora-ga", "adalora")
    },
    "vera": {"variant": "vera", "rank": 64},
    "lora, rank 2": {"variant": "lora", "rank": 2},
    "lora, alpha 2r": {"variant": "lora", "rank": RANK, "alpha": 2.0 * RANK},
    "lora, batch 32": {"variant": "lora", "rank": RANK, "batch": 32},
    "lora, batch 128": {"variant": "lora", "rank": RANK, "batch": 128},
}
VARIANTS = ("rslora", "lora+", "dora", "pissa", "milora", "olora", "lora-ga", "adalora")
FACTORS = {
    "method": ("lora", *VARIANTS),
    "rank": ("lora", "lora, rank 2"),
    "alpha": ("lora", "lora, alpha 2r"),
    "batch": ("lora", "lora, batch 32", "lora, batch 128"),
}
"""Beside the learning rate: what is varied, each arm at its best rate. VeRA trains a ninth as much, and is reported."""
MAY_WIN = "lora+"
TIMES = 3

RULE = (
    "The metric is the accuracy on test at the rate that is best on validation, for every arm and seed alone; "
    "intervals are paired, over seeds. (a) The range of plain LoRA over the rates less three times the largest range "
    "over any other factor (method, rank, alpha, batch), each at its best rate, lies above 0 (95%). (b) No variant but "
    "LoRA+ has an interval of its difference to plain LoRA above 0, at 95% for the seven together. Reproduced if both "
    "hold. Not reproduced if the interval of (a) lies below 0, or (b) does not hold. Not resolved otherwise."
)
LEVEL = 1 - 0.05 / (len(VARIANTS) - 1)

SMOKE_RATES = (1e-3, 1e-1)
PRESETS = {
    "smoke": bed.SMOKE | {"steps": 10, "rates": SMOKE_RATES, "seeds": 2},
    "small": bed.SMALL | {"rates": RATES, "seeds": 12},
    "full": bed.FULL | {"rates": RATES, "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    return swept_row(arm, seed, lambda rate: learn(arm, seed, settings, rate), settings["rates"])


def learn(arm: str, seed: int, settings: Settings, rate: float) -> tuple[Adapted, State]:
    options = dict(ARMS[arm])
    batch, steps, task = options.pop("batch", bed.BATCH), settings["steps"], bed.task(seed)
    if arm == "adalora":
        options["own"] = {"begin": steps // 6, "end": 2 * steps // 3, "every": max(1, steps // 30)}
    model = bed.base(settings, seed)
    torch.manual_seed(seed)
    adapted = adapt(model, METHOD.slug, bed.TARGETS, **options)
    if options["variant"] in FITTED:
        batches = [task.batch("train", batch, torch.Generator().manual_seed(1000 + i)) for i in range(FIT_BATCHES)]
        adapted.adapter.fit(adapted, batches, lambda drawn: task.loss(model, drawn)[0])
    config = TrainConfig(steps, batch, lr=rate, weight_decay=0.0, seed=seed, eval_every=None)
    return adapted, train(model, task, config, optimizer=adapted.optimizer(rate))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    ranges = {"rate": rate_range(rows, "lora")}
    for factor, arms in FACTORS.items():
        scores = [rows.of(arm) for arm in arms]
        ranges[factor] = [max(at_seed) - min(at_seed) for at_seed in zip(*scores, strict=True)]
    others = [max(values) for values in zip(*(ranges[factor] for factor in FACTORS), strict=True)]
    margin = rows.interval([rate - TIMES * other for rate, other in zip(ranges["rate"], others, strict=True)])
    gains = {arm: rows.minus(arm, "lora", level=LEVEL) for arm in VARIANTS}
    above = [arm for arm in VARIANTS if gains[arm].low > 0]
    wins = [arm for arm in above if arm != MAY_WIN]
    verdict = decide((NOT_REPRODUCED, margin.high < 0 or bool(wins)), (REPRODUCED, margin.low > 0))
    mean = {factor: sum(values) / len(values) for factor, values in ranges.items()}
    said = ", ".join(f"{factor} {value:.3f}" for factor, value in mean.items())
    reason = (
        f"Ranges of the accuracy: {said}; over the rates less {TIMES} times the largest other {margin}, which is the "
        f"effect. Tuned variants above tuned LoRA: {', '.join(above) or 'none'}. {edges(rows)}"
    ).rstrip()
    details = {
        "accuracy": rows.means(),
        "ranges": mean,
        "gains": gains,
        "best_rate": rows.means("best_rate"),
        "vera_minus_lora": rows.minus("vera", "lora"),
        "trained": rows.means("trained"),
    }
    return Judgement.on(margin, verdict, reason, details)


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
    main="dora",
    power=Power(("lora", "lora, alpha 2r"), effect=0.03, deviation={"small": (0.02738, 12)}),
)
