"""Does a finer partition of the same ranks into experts learn conflicting tasks better? (2501.15103)

Twelve symbol maps on the frozen decoder of the shared test-bed. All mixtures have R = 16 ranks of which a token uses
4, the same sigmoid gates of sum 4, the same balancing bias and, by a projection to 8 numbers in front of the scores,
nearly the same size of router; what differs is the size b of the blocks that are gated together. An active rank has
scale 1 in every arm, of the LoRAs too. There are fewer steps than the test-bed usually has, so that the LoRA of all 16
ranks does not reach the end of the task.
"""

import math
import statistics

import torch

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core.adapt import Adapted, RoutedLinear
from workbench.lib.measures.routing import counts_by_class, effective_support_size
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

RANKS, ACTIVE, ROUTER_DIM = 16, 4, 8
BLOCKS = (4, 2, 1)  # b, from whole LoRAs of rank 4 to single ranks
SHARED = {"rank": RANKS, "active_rank": ACTIVE, "alpha": ACTIVE}

#: Arm -> system and options.
ARMS = {
    "lora-active": ("lora", {"rank": ACTIVE}),
    "lora-total": ("lora", {"rank": RANKS}),
    "loras-softmax": ("smora", SHARED | {"block_size": 4, "gate": "softmax", "router_dim": ROUTER_DIM}),
    **{f"b={b}": ("smora", SHARED | {"block_size": b, "router_dim": ROUTER_DIM}) for b in BLOCKS},
    "b=1, whole router": ("smora", SHARED),
}
COARSE, FINE = f"b={BLOCKS[0]}", f"b={BLOCKS[-1]}"

RULE = (
    "The metric is the share of right symbols on the validation split, the mean over twelve tasks; all intervals are "
    "95% paired intervals over seeds. (a) Granularity: single ranks (b=1) minus whole LoRAs of rank 4 (b=4), at equal "
    "total and active ranks and nearly equal routers, lies above 0, and no halving of b has an interval below 0. (b) "
    "b=1 minus a LoRA of as many ranks as a token uses lies above 0. Reproduced if both hold. Not reproduced if an "
    "interval of (a) or that of (b) lies below 0. Not resolved otherwise. The LoRA of all 16 ranks is reported beside."
)

PRESETS = {
    "smoke": bed.SMOKE,
    "small": bed.SMALL | {"steps": 250, "seeds": 4},
    "full": bed.FULL | {"steps": 400},
}


def arms(settings: Settings) -> list[str]:
    return list(ARMS)


def run(arm: str, seed: int, settings: Settings) -> Row:
    slug, options = ARMS[arm]
    adapted, state = bed.adapt_and_train(slug, options, settings, seed)
    return bed.row(arm, seed, adapted, state, **(ranks_used(adapted, state.task) if slug == "smora" else {}))


@torch.no_grad()
def ranks_used(adapted: Adapted, task: SymbolMaps) -> dict:
    """Of each layer on the validation split: entropy of the load over blocks as a share of the largest, effective
    support size of the gates, and the mean overlap of two tasks' rank sets; of the last layer the load by task.

    A task's rank set is the distribution of its active ranks, and the overlap of two is the sum of their minima.
    """
    layers: list[RoutedLinear] = list(adapted.layers.values())
    seen: dict[RoutedLinear, list] = {layer: [] for layer in layers}
    handles = [layer.observe(lambda layer, *decision: seen[layer].append(decision)) for layer in layers]
    task.evaluate(adapted.model)
    for handle in handles:
        handle.remove()
    found: dict[str, list] = {"load_entropy": [], "support": [], "overlap": []}
    for layer in layers:
        n, k = layer.n_experts, layer.top_k
        expert = torch.cat([routing.expert for routing, _ in seen[layer]])
        label = torch.cat([context.domain.repeat_interleave(k) for _, context in seen[layer]])
        counts = counts_by_class(expert, label, len(task.tasks), n).double()
        load, by_task = counts.sum(0) / counts.sum(), counts / counts.sum(1, keepdim=True)
        weights = torch.cat([routing.weights for routing, _ in seen[layer]])
        pairs = torch.minimum(by_task[:, None], by_task[None]).sum(-1)
        off = ~torch.eye(len(pairs), dtype=torch.bool)
        found["load_entropy"].append(float(torch.special.entr(load).sum() / math.log(n)))
        found["support"].append(float(effective_support_size(weights).mean()))
        found["overlap"].append(float(pairs[off].mean()))
    return found | {"load_by_task": by_task.tolist()}


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in ARMS}
    gain = paired_interval(of[FINE], of[COARSE])
    halvings = {
        f"b={b // 2} minus b={b}": paired_interval(of[f"b={b // 2}"], of[f"b={b}"])
        for b in BLOCKS
        if f"b={b // 2}" in of
    }
    active, total = paired_interval(of[FINE], of["lora-active"]), paired_interval(of[FINE], of["lora-total"])
    worse = [name for name, interval in halvings.items() if interval.high < 0]
    if gain.high < 0 or active.high < 0 or worse:
        verdict = NOT_REPRODUCED
    elif gain.low > 0 and active.low > 0:
        verdict = REPRODUCED
    else:
        verdict = NOT_RESOLVED
    reason = (
        f"Accuracy, single ranks minus whole LoRAs of rank {BLOCKS[0]} {gain} ("
        + ", ".join(f"{name} {interval}" for name, interval in halvings.items())
        + f"), minus a LoRA of the active rank {active}, minus a LoRA of all ranks {total}. The effect is the first."
    )
    others = [arm for arm in ARMS if arm != FINE]
    details = {
        "accuracy": {arm: statistics.fmean(values) for arm, values in of.items()},
        "worst_task": {arm: statistics.fmean(row.extra["worst"] for row in rows if row.arm == arm) for arm in ARMS},
        "halvings": {name: interval.as_dict() for name, interval in halvings.items()},
        "minus": {arm: paired_interval(of[FINE], of[arm]).as_dict() for arm in others},
        "overlap": {
            arm: statistics.fmean(value for row in rows if row.arm == arm for value in row.extra["overlap"])
            for arm in ARMS
            if ARMS[arm][0] == "smora"
        },
    }
    return Judgement(verdict, gain.estimate, (gain.low, gain.high), reason, details)


STUDY = Study(
    slug="smora",
    title="SMoRA: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
    claim="Routing single ranks of one LoRA beats routing whole LoRAs at equal total and active parameters.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
