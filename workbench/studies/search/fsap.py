"""Does a hash without whitespace tell programs apart at once, and as well as a comparison of trees? (FSAP, 2025)

The claim has two halves. That three examples in a prompt are best is said of language models: there is none here, so
this half is not testable here. The rows run the whole of the method all the same, prompts of n examples to accuracies
on digits, with a generator that recombines the examples by rules. What they say of n is evidence neither for nor
against the paper, and no part of the verdict.

The other half is tested: how long the hash takes beside a comparison of syntax trees, and what each finds. Times are no
matter of a row. They are measured apart, with what is found among the methods of real networks, by
`python -m workbench.bench.validation`, and the record travels with the package.
"""

import json
import math
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

from workbench.beds import programs
from workbench.catalogue import PACKAGE
from workbench.lib.search.fsap import METHOD, OfflineGenerator, corpus, fsap_run
from workbench.lib.search.fsap_duplicates import KEYS
from workbench.lib.search.fsap_table import OK, Trial, balanced_mean, compare
from workbench.studies.core import Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.search.fsap_rewritten import OTHER, SAME, found_again
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MOST_SECONDS, LEAST_TIMES, LEAST_FOUND = 1e-3, 100, 0.95
RECORD = PACKAGE / "studies" / "search" / "measured" / "fsap.json"
LABEL = "rule-based generator, not evidence for or against FSAP"
LAYOUT, CHANGED = "layout", "changed"  # the rewritings that the rule reads

RULE = (
    "What n examples do to a language model is not testable here: there is none, and accuracy in the rows is of a "
    "rule-based generator. Judged is the filter of duplicates. From the record that travels with the package: median "
    "seconds of the hash on files of about 350 lines; the time of a comparison by syntax trees (parse, dump, digest), "
    "and of parsing alone, over the hash's, medians of ratios by file, their means over the files with 95% intervals; "
    "and of the methods of real networks that the trees find to be there already, the share that the hash finds too. "
    "From the rows: the share of programs in another layout, and of changed networks, that the hash takes for the one "
    f"they came from. Reproduced if the hash takes under {1000 * MOST_SECONDS:g} ms, both intervals of the ratios lie "
    f"above {LEAST_TIMES}, it finds at least {LEAST_FOUND:.0%} of what the trees find, every other layout, and no "
    f"changed network. Not reproduced if it takes longer, the comparison's interval lies below {LEAST_TIMES}, or it "
    "finds less, misses a layout, or refuses a changed network. Not resolved otherwise: where what the claim's times "
    "are of, parsing or comparing, decides."
)

COMMON = {"corruption": 0.0, "mutation": 0.3}
PRESETS = {
    "smoke": COMMON | {"seeds": 2, "ns": (1, 3), "per_n": 1, "train": 60, "asked": 60, "probes": 4},
    "small": COMMON | {"seeds": 12, "ns": (1, 3, 6), "per_n": 4, "train": 600, "asked": 300, "probes": 56},
    "full": COMMON | {"seeds": 12, "ns": (1, 2, 3, 4, 5, 6), "per_n": 12, "train": 600, "asked": 300, "probes": 56},
}  # fmt: skip


def arm_of(n: int) -> str:
    return f"n{n}"


def run(arm: str, seed: int, settings: Settings) -> Row:
    n = int(arm[1:])
    generator = OfflineGenerator(seed, settings["mutation"], settings["corruption"])
    sets = [programs.images(name, seed, settings["train"], settings["asked"]) for name in programs.SETS]
    trials = fsap_run(generator, sets, programs.own_sandbox(), (n,), settings["per_n"], seed)
    valid = [trial for trial in trials if trial.kind == OK]
    kinds = sorted({trial.kind for trial in trials})
    again = found_again(generator, corpus(programs.SETS[0]), n, settings["probes"], seed)
    steps = len(valid) * (settings["train"] // 10)
    extra: dict[str, Any] = {
        "requested": len(trials), "valid": len(valid), "kinds": [trial.kind for trial in trials],
        "sets": [trial.dataset for trial in valid], "accuracies": [trial.accuracy for trial in valid],
        "clipped": sum(len(trial.shown) - 1 < n for trial in trials),
    }  # fmt: skip
    extra |= {f"{kind}/{key}": share for (kind, key), share in again.items()}
    extra |= {f"kind {kind}": extra["kinds"].count(kind) for kind in kinds}
    params = round(statistics.fmean(trial.params for trial in valid)) if valid else 0
    flops = 6 * 10 * sum(trial.macs for trial in valid) * (settings["train"] // 10)
    return Row(arm, seed, params, params, flops, steps, _balanced(trials), extra)


def _balanced(trials: list[Trial]) -> float:
    """The balanced mean of one setting; NaN where no program was valid."""
    try:
        (only,) = balanced_mean(trials).values()
    except ValueError:
        return math.nan
    return only.mean


@cache
def measured() -> Mapping[str, Any]:
    """What `workbench.bench.validation` kept."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def judge(rows: Rows, settings: Settings, record: Mapping[str, Any] | None = None) -> Judgement:
    """Apply `RULE`; `record` in the place of the one that travels."""
    record = measured() if record is None else record
    seconds, compared, parsed = record["seconds"]["whitespace"], record["tree_ratio"], record["parse_ratio"]
    known, sized = record["methods"], record["sized"]
    share = known["both"] / known["tree"]
    table = {
        kind: {key: statistics.fmean(row.extra[f"{kind}/{key}"] for row in rows) for key in KEYS}
        for kind in (*SAME, *OTHER)
    }
    every, none = table[LAYOUT]["whitespace"] == 1, table[CHANGED]["whitespace"] == 0
    wrong = seconds >= MOST_SECONDS or share < LEAST_FOUND or not every or not none
    verdict = decide(
        (NOT_REPRODUCED, wrong or compared["ci95"][1] < LEAST_TIMES),
        (REPRODUCED, compared["ci95"][0] > LEAST_TIMES and parsed["ci95"][0] > LEAST_TIMES),
    )
    reason = (
        f"The hash takes {1000 * seconds:.2f} ms for about 350 lines; a comparison of trees takes "
        f"{_times(compared)} as long, and parsing alone {_times(parsed)}; called again and again, "
        f"{_times(record['tree_again'])} and {_times(record['parse_again'])}. Of {known['codes']} methods of real "
        f"networks the trees find {known['tree']} to be there already, and the hash {share:.1%} of these; it refuses "
        f"{known['merged']} that the trees do not. It finds {'every' if every else 'not every'} other layout, and "
        f"takes {'no' if none else 'a'} changed network for another. The effect is the comparison's ratio. What n "
        "examples do to a language model is not testable here."
    )
    trials = [
        Trial(int(row.arm[1:]), name, "", OK, accuracy=accuracy)
        for row in rows
        for name, accuracy in zip(row.extra["sets"], row.extra["accuracies"], strict=True)
    ]
    details: dict[str, Any] = {
        "examples": LABEL,
        "accuracy": rows.means(),
        "success": {arm: _total(rows, arm, "valid") / _total(rows, arm, "requested") for arm in rows.arms},
        "kinds": {arm: _kinds(rows, arm) for arm in rows.arms},
        "against_one": [
            {"n": one.n, "dataset": one.dataset, "difference": one.difference, "p_holm": one.adjusted, "d": one.d}
            for one in compare(trials)
        ],
        "found_again": table,
        "methods": dict(known),
        "milliseconds": {name: 1000 * spent for name, spent in record["seconds"].items()},
        "by_lines": {str(one["lines"]): {name: 1000 * one[name] for name in record["seconds"]} for one in sized},
        "few_shot": "not testable here: it needs language models that write programs",
    }
    effect = compared["mean"], tuple(compared["ci95"])
    return Judgement(verdict, *effect, reason, details, sd=compared["sd"], claimed=(LEAST_TIMES, math.inf))


def _times(interval: Mapping[str, Any]) -> str:
    low, high = interval["ci95"]
    return f"{interval['mean']:.0f} times [{low:.0f}, {high:.0f}]"


def _total(rows: Rows, arm: str, what: str) -> int:
    return sum(rows.of(arm, what))


def _kinds(rows: Rows, arm: str) -> dict[str, int]:
    all_there = [kind for kinds in rows.of(arm, "kinds") for kind in kinds]
    return {kind: all_there.count(kind) for kind in sorted(set(all_there))}


STUDY = Study(
    METHOD,
    metric="balanced mean accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: [arm_of(n) for n in settings["ns"]],
    run=run,
    judge=judge,
    tested="A hash without whitespace takes under a millisecond for a program, a hundredth of what a comparison by "
    "syntax trees takes, and finds the same duplicates. Nothing is tested of the number of examples, which is a matter "
    "of language models: that part is not testable here.",
    main=arm_of(3),
    trainings=lambda arm: "trains each program that comes back in a process of its own",
)
