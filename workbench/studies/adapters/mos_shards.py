"""Do LoRAs of shared shards beat LoRA with as many trained numbers, and does pure sharing not? (2410.00938)

All arms adapt the same network to digits in negative and out of order (`beds.shifted_digits`), each at its own best
rate of the shared sweep. Its twelve layers are of two types, six up and six down. The draw of the lists is part of the
seed. Arms are compared at equal trained numbers, not at equal rank.
"""

from workbench.beds import shifted_digits as bed
from workbench.lib.adapters.mos_shards import METHOD
from workbench.studies.adapters.sweep import RATES, adapted_row
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.sweep import edges
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

#: Arm -> system and options; 2304 trained numbers at e = 1, 4608 at e = 2.
ARMS = {
    "lora, 1": ("lora", {"rank": 1}),
    "lora, 2": ("lora", {"rank": 2}),
    "pure, 1": ("mos-shards", {"e": 1, "sharing": "pure"}),
    "pure, 2": ("mos-shards", {"e": 2, "sharing": "pure"}),
    "subset, 1": ("mos-shards", {"e": 1, "rank": 4, "private": 0, "shards": 1, "dissociate": False}),
    "subset, 2": ("mos-shards", {"e": 2, "rank": 6, "private": 0, "shards": 1, "dissociate": False}),
    "dissociated, 2": ("mos-shards", {"e": 2, "rank": 6, "private": 0, "shards": 1}),
    "sharded, 2": ("mos-shards", {"e": 2, "rank": 6, "private": 0, "shards": 4}),
    "mos, 1": ("mos-shards", {"e": 1, "rank": 4, "private": 0, "shards": 4}),
    "mos, 2": ("mos-shards", {"e": 2, "rank": 6, "private": 1, "shards": 4}),
}
GAINS = {"mos, 1": "lora, 1", "mos, 2": "lora, 2"}
HURTS = {"pure, 1": "subset, 1", "pure, 2": "subset, 2"}

RULE = (
    "The metric is the accuracy on test at the rate that is best on validation, for every arm and seed alone; "
    "intervals are paired, over seeds, at 95%. (a) At both budgets the interval of MoS less LoRA with as many trained "
    "numbers lies above 0. (b) The interval of subset selection less pure sharing, the mean over both budgets, lies "
    "above 0. Reproduced if both hold. Not reproduced if at either budget the interval of (a) lies below 0, or that of "
    "(b) does. Not resolved otherwise. The effect is the mean over both budgets of MoS less LoRA."
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

    def mean_of(pairs: dict[str, str]) -> list[float]:
        """For each seed the mean over both budgets of the first less the second."""
        values = [[x - y for x, y in zip(rows.of(a), rows.of(b), strict=True)] for a, b in pairs.items()]
        return [sum(at_seed) / len(at_seed) for at_seed in zip(*values, strict=True)]

    gains = {arm: rows.minus(arm, lora) for arm, lora in GAINS.items()}
    gain = rows.interval(mean_of(GAINS))
    unlike = rows.interval(mean_of({subset: pure for pure, subset in HURTS.items()}))
    verdict = decide(
        (NOT_REPRODUCED, any(one.high < 0 for one in gains.values()) or unlike.high < 0),
        (REPRODUCED, all(one.low > 0 for one in gains.values()) and unlike.low > 0),
    )
    said = ", ".join(f"{one} with the numbers of rank {arm[-1]}" for arm, one in gains.items())
    reason = (
        f"Accuracy of MoS less tuned LoRA: {said}; the mean {gain} is the effect. Subset selection less pure sharing "
        f"{unlike}. {edges(rows)}"
    ).rstrip()
    details = {
        "accuracy": rows.means(),
        "gains": gains,
        "subset_minus_pure": unlike,
        "pure_minus_lora": {f"pure, {e}": rows.minus(f"pure, {e}", f"lora, {e}") for e in (1, 2)},
        "best_rate": rows.means("best_rate"),
        "trained": rows.means("trained"),
    }
    return Judgement.on(gain, verdict, reason, details)


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
    main="mos, 2",
    power=Power(("lora, 1", "lora, 2"), effect=0.08, deviation={"small": (0.08621, 12)}),
)
