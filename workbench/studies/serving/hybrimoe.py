"""Do greedy schedules, fetches by gain and a cache of recent scores serve faster than what they replace? (2504.05897)

Time is simulated, on traces of routers that were really trained: a seed is a model, its prompts and what it goes on to
say. An expert on the CPU takes what it took one thread of the machine in `measured/hybrimoe.json`, and a transfer what
a copy of its weights took there; the device is 5 to 50 times as fast as the CPU, and every number is a mean over that,
for there was none to measure. The constants in the public code are run beside it and have no part in the metric. How
far the simulator is from real runs stands in the same file.

All arms begin with the experts that the prompts ask for most.
"""

import math
from statistics import fmean
from typing import Any

from workbench.beds import router_traces as bed
from workbench.lib.core.simulation.caches import replay
from workbench.lib.core.simulation.traces import RouterTrace
from workbench.lib.serving.hybrid_schedule import PUBLIC, CostModel, LayerPlan, Rate
from workbench.lib.serving.hybrimoe import CACHES, METHOD, HybridSim, Offload, Step, new_cache
from workbench.studies import measured
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

#: Arm -> how it differs from hybrimoe.
ARMS: dict[str, dict[str, str]] = {
    "fixed": {"cache": "lru", "mode": "fixed", "prefetch": "none"},
    "on-demand": {"cache": "lru", "mode": "device", "prefetch": "none"},
    "hybrimoe": {},
    "no-schedule": {"mode": "fixed"},
    "no-scores": {"cache": "lru"},
    "no-prefetch": {"prefetch": "none"},
    "score-prefetch": {"prefetch": "score"},
    "belady": {"cache": "belady"},
    "best-schedule": {"mode": "optimal"},
}
BASELINES = ("fixed", "on-demand")
PARTS = ("no-schedule", "no-scores", "no-prefetch")

RULE = (
    "The metric is the binary logarithm of the simulated milliseconds per generated token, the mean over three sizes "
    "of the cache (a quarter, a half, three quarters of the experts) and four speeds of the device (5, 10, 20 and 50 "
    "times the CPU's). Intervals are 95% intervals, paired over models. (a) Hybrimoe minus fixed, where experts stay "
    "where they are, and minus on-demand, where the device does all and an LRU cache is its memory: both intervals lie "
    "below 0 at every size of the cache. (b) Each part helps: hybrimoe minus itself with the fixed schedule, with LRU, "
    "without fetching beforehand: all three intervals lie below 0. (c) Hits: the share of a token's experts that the "
    "device has when they are needed, at a quarter and a half, hybrimoe minus itself with LRU: the interval lies above "
    "0. Reproduced if all hold. Not reproduced if one of these intervals lies on the other side of 0. Not resolved "
    "otherwise."
)

RECORD = measured.read(METHOD)
ONE_THREAD, COPY = RECORD.calibration["one_thread"], RECORD.calibration["copy"]
COMMON = {"one_thread": tuple(round(ONE_THREAD[key] * 1e3, 4) for key in ("first", "expert", "token"))}
COMMON |= {"copy": round(COPY * 1e3, 4), "sizes": (0.25, 0.5, 0.75)}
"""Milliseconds, as measured."""
PRESETS = {
    "smoke": COMMON | bed.SMOKE | {"seeds": 2, "ratios": (5, 50)},
    "small": COMMON | bed.SMALL
    | {"prompts": 8, "generated": 32, "first_seed": 1, "seeds": 16, "ratios": (5, 10, 20, 50)},
    "full": COMMON | bed.FULL | {"first_seed": 1, "seeds": 12, "ratios": (5, 10, 20, 50)},
}  # fmt: skip


class Deciding(Offload):
    """An offload whose schedule of a generated token is the best of all; that of a prompt has too many experts."""

    few = 8

    def plan(self, layer: int, step: Step, flight: dict[int, float], link_free: float) -> LayerPlan:
        self.mode = "optimal" if len(step.counts) <= self.few else "greedy"
        return super().plan(layer, step, flight, link_free)


def costs(settings: Settings) -> dict[str, CostModel]:
    """How many times as fast as the CPU the device is -> what takes how long; and what the public code says."""
    first, expert, token = (value / 1e3 for value in settings["one_thread"])
    found = {}
    for ratio in settings["ratios"]:
        device = Rate(first / ratio, expert / ratio, token / ratio)
        dense = device.expert + device.token  # a layer's attention reads about as much as an expert
        found[f"{ratio}x"] = CostModel(Rate(first, expert, token), device, settings["copy"] / 1e3, dense)
    return found | {"public": PUBLIC}


def run(arm: str, seed: int, settings: Settings) -> Row:
    trace = bed.trace(settings, seed)
    cells, how = {}, ARMS[arm]
    for size in settings["sizes"]:
        capacity = round(size * trace.n_experts)
        for name, cost in costs(settings).items():
            offload = (Deciding if how.get("mode") == "optimal" else Offload).of(trace, cost, capacity, **how)
            found = HybridSim(trace, cost, offload).run().metrics
            numbers = (1e3 * found.token_seconds, 1e3 * found.first_token_seconds, found.hit_rate)
            cells[f"{size:.0%} {name}"] = [round(value, 5) for value in numbers]
    counted = {key: value for key, value in cells.items() if not key.endswith("public")}
    by_size = {f"{size:.0%}": _logs(counted, f"{size:.0%} ") for size in settings["sizes"]}
    hits = {f"{size:.0%}": fmean(v[2] for k, v in counted.items() if k.startswith(f"{size:.0%} "))
            for size in settings["sizes"]}  # fmt: skip
    extra: dict[str, Any] = {
        "by_size": by_size,
        "hits": hits,
        "first_token": _logs(counted, "", 1),
        "token_ms": {f"{size:.0%}": [round(cells[f"{size:.0%} {name}"][0], 3) for name in costs(settings)]
                     for size in settings["sizes"]},
    }  # fmt: skip
    if arm == "hybrimoe":
        extra |= {"reuse": trace.reuse(), "foreseen": trace.foreseen(), "replay": replays(trace, settings)}
    budget = training_budget(bed.base(settings, seed), bed.make_task(settings), settings["batch"])
    return trained_row(arm, seed, budget, settings["steps"], fmean(by_size.values()), **extra)


def replays(trace: RouterTrace, settings: Settings) -> dict[str, dict[str, float]]:
    """Size -> rule -> the share of hits where all that is missing is brought in: generated tokens, after each other."""
    found: dict[str, dict[str, float]] = {}
    chosen, probs = trace.chosen()[:, trace.prompt :], trace.probs[:, trace.prompt :]
    for size in settings["sizes"]:
        capacity = round(size * trace.n_experts)
        if capacity < trace.top_k:
            continue
        for rule in CACHES:
            hits = asked = 0
            for layer in range(trace.n_layers):
                steps, scores = chosen[:, :, layer].flatten(0, 1).tolist(), probs[:, :, layer].flatten(0, 1).tolist()
                one = replay(new_cache(rule, capacity, trace, steps), steps, scores)
                hits, asked = hits + one.hits, asked + one.requests
            found.setdefault(f"{size:.0%}", {})[rule] = hits / asked
    return found


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    sizes = [f"{size:.0%}" for size in settings["sizes"]]
    below = {
        f"{arm} {size}": rows.minus("hybrimoe", arm, lambda row, size=size: row.extra["by_size"][size])
        for arm in BASELINES
        for size in sizes
    }
    parts = {arm: rows.minus("hybrimoe", arm) for arm in PARTS}
    hits = rows.minus("hybrimoe", "no-scores", lambda row: fmean(row.extra["hits"][size] for size in sizes[:2]))
    claimed = [*below.values(), *parts.values()]
    verdict = decide(
        (REPRODUCED, all(interval.high < 0 for interval in claimed) and hits.low > 0),
        (NOT_REPRODUCED, any(interval.low > 0 for interval in claimed) or hits.high < 0),
    )
    gain = rows.minus("hybrimoe", "fixed")
    first = {arm: rows.minus("hybrimoe", arm, "first_token") for arm in BASELINES}
    demand = rows.minus("hybrimoe", "on-demand")
    reason = (
        f"Doublings of the time per token, hybrimoe minus fixed {gain} (a factor of {2**-gain.estimate:.2f}), minus "
        f"on-demand {demand}; minus itself with the fixed schedule {parts['no-schedule']}, with LRU "
        f"{parts['no-scores']}, without fetching {parts['no-prefetch']}. Hits at a quarter and a half, minus those "
        f"with LRU: {hits}. The first of these is the effect. Times are {RECORD.label}."
    )
    replayed = rows.of("hybrimoe", "replay")
    details = {
        "minus_baselines_by_size": below,
        "minus_parts": parts,
        "hits_minus_lru": hits,
        "first_token_minus_baselines": first,
        "minus_score_prefetch": rows.minus("hybrimoe", "score-prefetch"),
        "minus_belady": rows.minus("hybrimoe", "belady"),
        "minus_best_schedule": rows.minus("hybrimoe", "best-schedule"),
        "speeds": [*costs(settings)],
        "token_ms": {arm: _means(rows.of(arm, "token_ms")) for arm in rows.arms},
        "hits": {arm: {size: rows.mean(arm, lambda row, size=size: row.extra["hits"][size]) for size in sizes}
                 for arm in rows.arms},
        "replay": {size: {rule: fmean(found[size][rule] for found in replayed) for rule in CACHES}
                   for size in replayed[0]},
        "reuse": rows.mean("hybrimoe", "reuse"),
        "foreseen": [fmean(values) for values in zip(*rows.of("hybrimoe", "foreseen"), strict=True)],
        "simulator": {"median_error": RECORD.median_error, "configurations": len(RECORD.rows)},
    }  # fmt: skip
    return Judgement.on(gain, verdict, reason, details)


def _logs(cells: dict[str, list[float]], start: str, at: int = 0) -> float:
    return fmean(math.log2(values[at]) for key, values in cells.items() if key.startswith(start))


def _means(found: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Name -> the means of its columns."""
    columns = {key: zip(*(one[key] for one in found), strict=True) for key in found[0]}
    return {key: [round(fmean(column), 3) for column in own] for key, own in columns.items()}


STUDY = Study(
    METHOD,
    metric="log2_ms_per_token",
    unit="doublings of the time per token",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=tuple(ARMS),
    run=run,
    judge=judge,
    tested="On traces of small trained routers, in simulated time, HybriMoE generates faster than a fixed mapping and "
    "than loading on demand at every size of the cache, and each of its three parts makes it faster.",
    power=Power(BASELINES, effect=0.1, deviation={"small": (0.1305, 12)}),
    main="hybrimoe",
    trainings=lambda arm: "offloads what routers of the bed have said, on simulated time",
)
