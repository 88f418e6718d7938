"""Does a sparse mixture of LoRA blocks beat one LoRA of as many trained parameters where tasks conflict? (2404.15159)

Twelve symbol maps that conflict, on the frozen decoder of the shared test-bed; adapters on its feed-forward layers. The
two main arms train exactly the same number of parameters: 8 experts of rank 2 with their routers, and one LoRA of rank
17. To tell "more tasks" from "a better adapter", the same two arms also learn single maps.
"""

import statistics

import torch

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.lib.measures.routing import counts_by_class, effective_support, routing_information
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

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
    "small": bed.SMALL | SINGLE | {"seeds": 4},
    "full": bed.FULL | SINGLE,
}


def arms(settings: Settings) -> list[str]:
    return list(ARMS)


def run(arm: str, seed: int, settings: Settings) -> Row:
    slug, options = ARMS[arm]
    if not arm.startswith("single"):
        adapted, state = bed.adapt_and_train(slug, options, settings, seed)
        return bed.row(arm, seed, adapted, state, **routing_measures(adapted, state.task))
    fewer = {**settings, "steps": max(1, settings["steps"] // settings["single_share"])}
    rows = []
    for i in range(settings["single_tasks"]):
        task = SymbolMaps((bed.OLD + i,), bed.OLD + bed.NEW, bed.LENGTH)
        rows.append(bed.row(arm, seed, *bed.adapt_and_train(slug, options, fewer, seed, task=task)))
    first, values = rows[0], [row.metric for row in rows]
    flops, steps = sum(row.flops for row in rows), sum(row.steps for row in rows)
    extra = {"worst": min(values), "by_task": values, "trained": first.extra["trained"]}
    return Row(arm, seed, first.params, first.active_params, flops, steps, statistics.fmean(values), extra)


@torch.no_grad()
def routing_measures(adapted: Adapted, task: SymbolMaps) -> dict:
    """Of each layer on the validation split: load of the experts by task, effective number of experts by the
    probabilities and by the weights, and what the choice says of the task, in nats beyond chance. Empty for a LoRA."""
    layers = [layer for layer in adapted.layers.values() if isinstance(layer, RoutedFeedForward)]
    if not layers:
        return {}
    seen: dict[RoutedFeedForward, list] = {layer: [] for layer in layers}
    handles = [layer.observe(lambda layer, *decision: seen[layer].append(decision)) for layer in layers]
    task.evaluate(adapted.model)
    for handle in handles:
        handle.remove()
    found: dict[str, list] = {"load_by_task": [], "support": [], "weight_support": [], "task_information": []}
    for layer in layers:
        expert = torch.cat([routing.expert for routing, _ in seen[layer]])
        label = torch.cat([context.domain.repeat_interleave(TOP_K) for _, context in seen[layer]])
        counts = counts_by_class(expert, label, len(task.tasks), EXPERTS)
        found["load_by_task"].append((counts / counts.sum(1, keepdim=True)).tolist())
        found["support"].append(float(effective_support(torch.cat([routing.probs for routing, _ in seen[layer]]))))
        weights = torch.cat([routing.weights for routing, _ in seen[layer]])
        found["weight_support"].append(float((1 / weights.square().sum(1)).mean()))
        found["task_information"].append(float(routing_information(counts, TOP_K).corrected))
    return found


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in ARMS}
    worst = {arm: [row.extra["worst"] for row in rows if row.arm == arm] for arm in ARMS}
    gain = paired_interval(of["mixlora"], of["lora-equal"])
    single = paired_interval(of["single-mixlora"], of["single-lora-equal"])
    here = [a - b for a, b in zip(of["mixlora"], of["lora-equal"], strict=True)]
    there = [a - b for a, b in zip(of["single-mixlora"], of["single-lora-equal"], strict=True)]
    more = paired_interval(here, there)
    if gain.low > 0 and more.low > 0:
        verdict = REPRODUCED
    elif gain.high < 0 or more.high < 0:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    active = paired_interval(of["mixlora"], of["lora-active"])
    balance = paired_interval(of["mixlora"], of["mixlora-no-balance"])
    reason = (
        f"Accuracy on all tasks at once, mixlora minus a LoRA of as many trained parameters {gain}, minus a "
        f"LoRA of the same active rank {active}, minus itself without the balance loss {balance}; on "
        f"single tasks, minus the LoRA of as many parameters {single}; the first gain less this one "
        f"{more}. The effect is the first of these."
    )
    details = {
        "accuracy": {arm: statistics.fmean(values) for arm, values in of.items()},
        "worst_task": {arm: statistics.fmean(values) for arm, values in worst.items()},
        "gain": gain.as_dict(),
        "single_gain": single.as_dict(),
        "gain_less_single_gain": more.as_dict(),
        "minus_active": active.as_dict(),
        "minus_no_balance": balance.as_dict(),
        "worst_minus_equal": paired_interval(worst["mixlora"], worst["lora-equal"]).as_dict(),
    }
    return Judgement(verdict, gain.estimate, (gain.low, gain.high), reason, details)


STUDY = Study(
    slug="mixlora",
    title="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
    claim="LoRA experts in every feed-forward block, chosen per token by a top-k router, beat one LoRA on several "
    "tasks at a comparable number of parameters.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
