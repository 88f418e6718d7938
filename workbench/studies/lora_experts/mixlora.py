"""Does a sparse mixture of LoRA blocks beat one LoRA of as many trained parameters where tasks conflict? (2404.15159)

Twelve symbol maps that conflict, on the frozen decoder of the shared test-bed; adapters on its feed-forward layers. The
two main arms train exactly the same number of parameters: 8 experts of rank 2 with their routers, and one LoRA of rank
17. To tell "more tasks" from "a better adapter", the same two arms also learn single maps.
"""

from dataclasses import replace
from statistics import fmean

import torch

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import RoutedLayer
from workbench.lib.core.observe import announcing, observing
from workbench.lib.lora_experts.mixlora import METHOD
from workbench.lib.measures.routing import counts_by_class, effective_support, routing_information
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, adapted_row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

EXPERTS, RANK, TOP_K = 8, 2, 2
EQUAL = EXPERTS * RANK + 1  # the router of a block holds as much as one more rank
MIXTURE = {"experts": EXPERTS, "rank": RANK, "top_k": TOP_K}

#: Arm -> system and options; "single" arms learn one map at a time.
ARMS = {
    "lora-active": ("lora", {"rank": TOP_K * RANK}),
    "lora-equal": ("lora", {"rank": EQUAL}),
    "mixlora": ("mixlora", MIXTURE),
    "mixlora-no-balance": ("mixlora", MIXTURE | {"balance": 0.0}),
    "single-lora-equal": ("lora", {"rank": EQUAL}),
    "single-mixlora": ("mixlora", MIXTURE),
}

RULE = (
    "The metric is the share of right symbols on the validation split, the mean over tasks; all intervals are 95% "
    "paired intervals over seeds. (a) Gain: mixlora minus lora-equal, one LoRA of exactly as many trained parameters, "
    "on twelve conflicting tasks at once lies above 0. (b) Several tasks make it: that gain less the gain of the same "
    "two adapters on single tasks lies above 0. Reproduced if both hold. Not reproduced if one of the two intervals "
    "lies below 0. Not resolved otherwise."
)

SINGLE = {"single_tasks": 3, "single_share": 8}  # single tasks: how many, and steps of all tasks / steps of one
PRESETS = {
    "smoke": bed.SMOKE | SINGLE | {"single_tasks": 1},
    "small": bed.SMALL | SINGLE | {"seeds": 12},
    "full": bed.FULL | SINGLE,
}


def run(arm: str, seed: int, settings: Settings) -> Row:
    if not arm.startswith("single"):
        return learn(arm, seed, settings, bed.new_maps(settings))
    fewer = {**settings, "steps": max(1, settings["steps"] // settings["single_share"])}
    tasks = [bed.new_maps(settings, [i]) for i in range(settings["single_tasks"])]
    rows = [learn(arm, seed, fewer, task) for task in tasks]
    values = [row.metric for row in rows]
    return replace(
        rows[0],
        flops=sum(row.flops for row in rows),
        steps=sum(row.steps for row in rows),
        metric=fmean(values),
        extra={"worst": min(values), "by_task": values, "trained": rows[0].extra["trained"]},
    )


def learn(arm: str, seed: int, settings: Settings, task: SymbolMaps) -> Row:
    slug, options = ARMS[arm]
    adapted, state = bed.adapt_and_train(slug, options, settings, seed, task)
    with observing(announcing(adapted.model)) as seen:
        state.metrics = task.evaluate(adapted.model)
    return adapted_row(arm, seed, adapted, state, **(routing_measures(seen) if seen else {}))


def routing_measures(seen: dict[RoutedLayer, list]) -> dict:
    """Of each layer on the validation split: load of the experts by task, effective number of experts by the
    probabilities and by the weights, and what the choice says of the task, in nats beyond chance."""
    found: dict[str, list] = {"load_by_task": [], "support": [], "weight_support": [], "task_information": []}
    for decisions in seen.values():
        expert = torch.cat([routing.expert for routing, _ in decisions])
        task = torch.cat([context.domain[routing.token] for routing, context in decisions])
        counts = counts_by_class(expert, task, bed.NEW, EXPERTS)
        found["load_by_task"].append((counts / counts.sum(1, keepdim=True)).tolist())
        found["support"].append(float(effective_support(torch.cat([routing.probs for routing, _ in decisions]))))
        weights = torch.cat([routing.weights for routing, _ in decisions])
        found["weight_support"].append(float((1 / weights.square().sum(1)).mean()))
        found["task_information"].append(float(routing_information(counts, TOP_K).corrected))
    return found


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain, single = rows.minus("mixlora", "lora-equal"), rows.minus("single-mixlora", "single-lora-equal")
    here, there = (
        [a - b for a, b in zip(rows.of(f"{kind}mixlora"), rows.of(f"{kind}lora-equal"), strict=True)]
        for kind in ("", "single-")
    )
    more = rows.interval([a - b for a, b in zip(here, there, strict=True)])
    verdict = decide(
        (REPRODUCED, gain.low > 0 and more.low > 0),
        (NOT_REPRODUCED, gain.high < 0 or more.high < 0),
    )
    active, balance = rows.minus("mixlora", "lora-active"), rows.minus("mixlora", "mixlora-no-balance")
    reason = (
        f"Accuracy on all tasks at once, mixlora minus a LoRA of as many trained parameters {gain}, minus a "
        f"LoRA of the same active rank {active}, minus itself without the balance loss {balance}; on "
        f"single tasks, minus the LoRA of as many parameters {single}; the first gain less this one "
        f"{more}. The effect is the first of these."
    )
    details = {
        "accuracy": rows.means(),
        "worst_task": rows.means("worst"),
        "gain": gain,
        "single_gain": single,
        "gain_less_single_gain": more,
        "minus_active": active,
        "minus_no_balance": balance,
        "worst_minus_equal": rows.minus("mixlora", "lora-equal", "worst"),
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
    power=Power(("lora-active", "lora-equal"), effect=0.05, deviation={"small": (0.049, 12)}),
)
