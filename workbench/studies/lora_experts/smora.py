"""Does a finer partition of the same ranks into experts learn conflicting tasks better? (2501.15103)

Twelve symbol maps on the frozen decoder of the shared test-bed. All mixtures have R = 16 ranks of which a token uses
4, the same sigmoid gates of sum 4, the same balancing bias and, by a projection to 8 numbers in front of the scores,
nearly the same size of router; what differs is the size b of the blocks that are gated together. An active rank has
scale 1 in every arm, of the LoRAs too. There are fewer steps than the test-bed usually has, so that the LoRA of all 16
ranks does not reach the end of the task.
"""

import math
from itertools import chain
from statistics import fmean

import torch

from workbench.beds import symbol_maps as bed
from workbench.lib.core.adapt import RoutedLayer
from workbench.lib.core.observe import announcing, observing
from workbench.lib.lora_experts.smora import METHOD
from workbench.lib.measures.routing import counts_by_class, effective_support_size
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, adapted_row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, any_below, decide

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
MIXTURES = [arm for arm, (slug, _) in ARMS.items() if slug == "smora"]
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


def run(arm: str, seed: int, settings: Settings) -> Row:
    slug, options = ARMS[arm]
    adapted, state = bed.adapt_and_train(slug, options, settings, seed)
    with observing(announcing(adapted.model)) as seen:
        state.metrics = state.task.evaluate(adapted.model)
    return adapted_row(arm, seed, adapted, state, **(ranks_used(seen) if seen else {}))


def ranks_used(seen: dict[RoutedLayer, list]) -> dict:
    """Of each layer on the validation split: entropy of the load over blocks as a share of the largest, effective
    support size of the gates, and the mean overlap of two tasks' rank sets; of the last layer the load by task.

    A task's rank set is the distribution of its active ranks, and the overlap of two is the sum of their minima.
    """
    found: dict[str, list] = {"load_entropy": [], "support": [], "overlap": []}
    for layer, decisions in seen.items():
        expert = torch.cat([routing.expert for routing, _ in decisions])
        task = torch.cat([context.domain[routing.token] for routing, context in decisions])
        counts = counts_by_class(expert, task, bed.NEW, layer.n_experts).double()
        load, by_task = counts.sum(0) / counts.sum(), counts / counts.sum(1, keepdim=True)
        weights = torch.cat([routing.weights for routing, _ in decisions])
        pairs = torch.minimum(by_task[:, None], by_task[None]).sum(-1)
        off = ~torch.eye(len(pairs), dtype=torch.bool)
        found["load_entropy"].append(float(torch.special.entr(load).sum() / math.log(layer.n_experts)))
        found["support"].append(float(effective_support_size(weights).mean()))
        found["overlap"].append(float(pairs[off].mean()))
    return found | {"load_by_task": by_task.tolist()}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain, active = rows.minus(FINE, COARSE), rows.minus(FINE, "lora-active")
    halvings = {f"b={b} minus b={2 * b}": rows.minus(f"b={b}", f"b={2 * b}") for b in BLOCKS[1:]}
    verdict = decide(
        (NOT_REPRODUCED, any_below([gain, active, *halvings.values()])),
        (REPRODUCED, gain.low > 0 and active.low > 0),
    )
    reason = (
        f"Accuracy, single ranks minus whole LoRAs of rank {BLOCKS[0]} {gain} ("
        + ", ".join(f"{name} {interval}" for name, interval in halvings.items())
        + f"), minus a LoRA of the active rank {active}, minus a LoRA of all ranks {rows.minus(FINE, 'lora-total')}. "
        "The effect is the first."
    )
    details = {
        "accuracy": rows.means(),
        "worst_task": rows.means("worst"),
        "halvings": halvings,
        "minus": {arm: rows.minus(FINE, arm) for arm in ARMS if arm != FINE},
        "overlap": {arm: fmean(chain.from_iterable(rows.of(arm, "overlap"))) for arm in MIXTURES},
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
    power=Power(("lora-active", "lora-total"), effect=0.1),
    main=FINE,
)
