"""Do copies of hot experts, gathered for a step, take away the stragglers? Simulated. (2502.02581)

The loads are those of routers that were really trained (`beds.router_traces`), step after step as their text goes on,
their shares of experts to a power: 0 is even, 1 as it was. A row is a policy on one drawn cluster and model
(`hecate_sim.drawn`), on a quarter of the trace's prompts, drawn as well. Only times are simulated: that every policy
computes the same is held by tests on real processes.
"""

import math
import random
from functools import cache

from workbench.beds import router_traces
from workbench.lib.core.simulation.traces import RouterTrace
from workbench.lib.distributed.hecate import METHOD
from workbench.lib.distributed.hecate_sim import POLICIES, HecateSim, drawn, loads_of
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

OURS, BASELINES = "hecate", ("ep", "relayout", "fsdp")
POWERS = (0.0, 1.0, 2.0, 4.0)
SKEWED = POWERS[1:]
SLACK = 0.02  # of the logarithm of a time: what copies may cost where loads are even

RULE = (
    "Times are simulated, of a step's mixtures; the metric is the mean of their logarithms (milliseconds, base 2) over "
    f"the skewed loads, powers {', '.join(f'{p:g}' for p in SKEWED)} of the trace's shares. Intervals are 95% paired "
    "intervals of logarithms of ratios over draws. (a) At each of these powers hecate is faster than each of ep, "
    "relayout and fsdp: log(theirs / hecate's) lies above 0. (b) The gain grows with skew: log(ep / hecate) at power "
    f"{SKEWED[-1]:g} minus at power {SKEWED[0]:g} lies above 0. (c) At power 0, where nothing is to gain, "
    f"log(ep / hecate) lies above -{SLACK}. Reproduced if all hold. Not reproduced if one of (a) or (b) lies below 0, "
    f"or (c) below -{SLACK}. Not resolved otherwise."
)

COMMON = {"policies": POLICIES}
PRESETS = {
    "smoke": COMMON | {"seeds": 2, "steps": 4, "every": 2, "trace": "SMOKE"},
    "small": COMMON | {"first_seed": 200, "seeds": 16, "steps": 24, "every": 12, "trace": "SMALL"},
    "full": COMMON | {"seeds": 48, "steps": 96, "every": 50, "trace": "FULL"},
}


@cache
def said(name: str) -> RouterTrace:
    """What the bed's routers said, at one of its presets."""
    return router_traces.trace(getattr(router_traces, name))


def run(arm: str, seed: int, settings: Settings) -> Row:
    machine, trace = drawn(seed), said(settings["trace"])
    tokens = machine.tokens * machine.devices * trace.top_k
    draw = random.Random(f"prompts {seed}")
    prompts = draw.sample(range(len(trace.probs)), max(1, len(trace.probs) // 4))
    times, stragglers, copied, parts = {}, {}, {}, {}
    for power in POWERS:
        loads = loads_of(trace, settings["steps"], tokens, power, prompts)
        found = HecateSim(machine, loads, arm, settings["every"]).run()
        layers = [layer for step in found for layer in step]
        seconds = sum(layer.seconds for layer in layers)
        times[f"{power:g}"] = 1e3 * seconds / len(found)
        stragglers[f"{power:g}"] = sum(layer.straggler for layer in layers) / len(layers)
        copied[f"{power:g}"] = sum(layer.copied for layer in layers) / len(layers)
        parts[f"{power:g}"] = {name: sum(layer.parts[name] for layer in layers) / seconds for name in layers[0].parts}
    metric = sum(math.log2(times[f"{power:g}"]) for power in SKEWED) / len(SKEWED)
    params = round(machine.chunk_bytes / 2) * trace.n_experts * trace.n_layers
    extra = {"times": times, "stragglers": stragglers, "copied": copied, "parts": parts, "devices": machine.devices}
    return Row(arm, seed, params, params * trace.top_k // trace.n_experts, 0, 0, metric, extra)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""

    def gains(other: str, power: float) -> list[float]:
        pairs = zip(rows.of(other, "times"), rows.of(OURS, "times"), strict=True)
        return [math.log(theirs[f"{power:g}"] / ours[f"{power:g}"]) for theirs, ours in pairs]

    faster = {(other, power): rows.interval(gains(other, power)) for other in BASELINES for power in SKEWED}
    most, least = gains("ep", SKEWED[-1]), gains("ep", SKEWED[0])
    grows = rows.interval([a - b for a, b in zip(most, least, strict=True)])
    even = rows.interval(gains("ep", POWERS[0]))
    verdict = decide(
        (NOT_REPRODUCED, any_below([*faster.values(), grows]) or even.high < -SLACK),
        (REPRODUCED, all_above([*faster.values(), grows]) and even.low > -SLACK),
    )
    mean = [sum(each) / len(SKEWED) for each in zip(*(gains("ep", power) for power in SKEWED), strict=True)]
    gain = rows.interval(mean)
    worst, at = min((interval.low, key) for key, interval in faster.items())
    reason = (
        f"Simulated: log(time of ep / of hecate) over skewed loads {gain}; of all comparisons the least sure is "
        f"{at[0]} at power {at[1]:g}, {faster[at]}; from power {SKEWED[0]:g} to {SKEWED[-1]:g} the gain over ep rises "
        f"by {grows}; with even loads it is {even}. The effect is the first of these."
    )
    powers = [f"{power:g}" for power in POWERS]

    def means(name: str) -> dict[str, dict[str, float]]:
        found = {arm: rows.of(arm, name) for arm in rows.arms}
        return {arm: {p: sum(each[p] for each in of) / len(of) for p in powers} for arm, of in found.items()}

    details = {
        "gain": {
            other: {f"{power:g}": rows.interval(gains(other, power)) for power in POWERS}
            for other in rows.arms
            if other != OURS
        },
        "grows": grows,
        "even": even,
        "least_sure": worst,
        "basis": drawn(0).basis,
    } | {name: means(name) for name in ("times", "stragglers", "copied")}
    return Judgement.on(gain, verdict, reason, details, claimed=(0.0, math.inf))


STUDY = Study(
    METHOD,
    metric="step",
    unit="doublings of a ms, simulated",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: settings["policies"],
    run=run,
    judge=judge,
    tested="Simulated on drawn clusters, with loads of routers that were really trained: copies of hot experts, as "
    "many as save more than they take, are faster than fixed experts, moved ones and gathering all, the "
    "more the more skewed loads are, and cost nothing where they are even. The paper's 3.54 takes its machines.",
    power=Power(("ep", "relayout"), effect=0.07, deviation={"small": (0.0193, 12)}),
    main=OURS,
    trainings=lambda arm: "reckons steps, and trains nothing",
)
