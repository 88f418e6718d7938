"""Do mixtures of random matrices reach LoRA of rank one with half of its trained numbers? (2310.02556)

All arms adapt the same network to digits in negative and out of order (`beds.shifted_digits`), each at its own best
rate of the shared sweep. The rates go higher than those of the variants, as NOLA's best one lies above LoRA's.
"""

from workbench.beds import shifted_digits as bed
from workbench.lib.adapters.nola import METHOD
from workbench.studies.adapters.sweep import adapted_row
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import edges
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LORA, TWICE, WHOLE, HALF, QUARTER = "lora, rank 1", "lora, rank 2", "nola, 2304", "nola, 1152", "nola, 576"

#: Arm -> system and options. LoRA of rank 1 trains 2304 numbers on the twelve layers; NOLA 24 k.
ARMS = {
    LORA: ("lora", {"rank": 1}),
    TWICE: ("lora", {"rank": 2}),
    WHOLE: ("nola", {"rank": 8, "k": 96, "cache": True}),
    HALF: ("nola", {"rank": 8, "k": 48, "cache": True}),
    QUARTER: ("nola", {"rank": 8, "k": 24, "cache": True}),
    "A fixed, rank 1": ("lora-variants", {"variant": "lora-fa", "rank": 1}),
    "vera, rank 8": ("lora-variants", {"variant": "vera", "rank": 8}),
}
MARGIN = 0.01

RULE = (
    "The metric is the accuracy on test at the rate that is best on validation, for every arm and seed alone; "
    f"intervals are paired, over seeds, at 95%. (a) NOLA with half of the trained numbers of LoRA of rank 1 loses "
    f"less than {MARGIN} to it: the interval of the difference lies above -{MARGIN}. (b) NOLA with as many numbers is "
    "better: the interval lies above 0. Reproduced if both hold. Not reproduced if the interval of (a) lies below "
    f"-{MARGIN}, or that of (b) below 0. Not resolved otherwise. The effect is that of (a)."
)

PRESETS = {
    "smoke": bed.SMOKE | {"steps": 10, "rates": (1e-3, 1e-1), "seeds": 2},
    "small": bed.SMALL | {"rates": RATES, "seeds": 12},
    "full": bed.FULL | {"rates": RATES, "seeds": 12},
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    return adapted_row(arm, seed, settings, *ARMS[arm])


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    half, whole = rows.minus(HALF, LORA), rows.minus(WHOLE, LORA)
    verdict = decide(
        (NOT_REPRODUCED, half.high < -MARGIN or whole.high < 0), (REPRODUCED, half.low > -MARGIN and whole.low > 0)
    )
    reason = (
        f"Accuracy beside tuned LoRA of rank 1: NOLA with half of its numbers {half}, which is the effect, with "
        f"as many {whole}, with a quarter {rows.minus(QUARTER, LORA)}. {edges(rows)}"
    ).rstrip()
    details = {
        "accuracy": rows.means(),
        "gains": {arm: rows.minus(arm, LORA) for arm in ARMS if arm != LORA},
        "best_rate": rows.means("best_rate"),
        "trained": rows.means("trained"),
    }
    return Judgement.on(half, verdict, reason, details, claimed=(-MARGIN, float("inf")))


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
    main=HALF,
    power=Power((LORA, TWICE), effect=0.08, deviation={"small": (0.08621, 12)}),
)
