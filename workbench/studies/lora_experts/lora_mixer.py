"""Do routed task LoRAs inside attention beat mixtures trained jointly, and does a loss save data? (2507.00029)

Six symbol maps on the frozen decoder of the shared test-bed. A LoRA of rank 4 on the attention projections is trained
on each map by itself; then the six are frozen and routers learn to mix them from n strings of all maps, whose map
nobody tells. The rivals learn all maps at once from as many strings in all as the LoRAs and the routers together:
MixLoRA in the feed-forward layers with as many experts of the same rank, and one LoRA of the total rank in attention.

Bounds of what routers can do: the LoRA of the right map, all LoRAs averaged, all LoRAs added. A string names its map in
its first token alone, so in the first attention layer no other token knows the map. The same is therefore done with
LoRAs of the feed-forward layers, whose input has been through attention.
"""

import math
import statistics
import sys
from collections.abc import Iterator

import torch
from torch import nn

from workbench.beds import symbol_maps as bed
from workbench.beds.pretrained import pretrained
from workbench.beds.symbol_maps import SymbolMaps
from workbench.lib.core import low_rank, symbol_maps
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.task import Batch
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.lora_experts import lora_mixer
from workbench.lib.measures.routing import counts_by_class, routing_information, token_entropy
from workbench.lib.measures.statistics import paired_interval, tost
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

EXPERTS, RANK, TOP_K = 6, 4, 3
LR = 3e-3
TARGETS = "*.attention.*"
ELSEWHERE = "feed-forward"  # in the name of an arm: the LoRAs are in the feed-forward layers
MARGIN = 0.01
POOLS = (64, 256, 1024)  # n, strings the routers learn from

#: Arm of the routers -> (n, coefficient of the balance part, of the entropy part, its sign).
ROUTERS = {
    **{f"described, {n}": (n, 0.05, 0.05, 1) for n in POOLS},
    **{f"balance only, {n}": (n, 0.05, 0.0, 1) for n in POOLS},
    "printed, 256": (256, 0.05, 0.05, -1),
    "described / 10, 256": (256, 0.05, 0.005, 1),
    "described x 10, 256": (256, 0.05, 0.5, 1),
    "printed x 10, 256": (256, 0.05, 0.5, -1),
    "task loss only, 256": (256, 0.0, 0.0, 1),
    f"described, {ELSEWHERE}, 1024": (1024, 0.05, 0.05, 1),
}
BOUNDS = ("average", "sum", "told the task", f"told the task, {ELSEWHERE}")
ARMS = (*ROUTERS, *BOUNDS, "mixlora", "lora-total")
FEW, MORE = POOLS[1], POOLS[2]

RULE = (
    "The metric is the share of right symbols on the validation split, the mean over six tasks; all intervals are 95% "
    f"paired intervals over seeds. (a) Rivals: routed task LoRAs with {MORE} router strings minus MixLoRA in the "
    "feed-forward layers, with as many experts of the same rank, fewer parameters and as many strings in all, lies "
    f"above 0. (b) Data: with {FEW} router strings the balance loss with its entropy part, in the sign the paper "
    "describes, minus the balance part alone lies above 0. Reproduced if both hold. Not reproduced if an interval lies "
    f"below 0, or if the two of (b) are shown to be equivalent by a paired TOST at a margin of {MARGIN}. Not resolved "
    "otherwise. The sign the paper prints is reported beside."
)

PRESETS = {
    "smoke": bed.SMOKE | {"expert_steps": 3, "router_steps": 3},
    "small": bed.SMALL | {"expert_steps": 120, "router_steps": 150},
    "full": bed.FULL | {"expert_steps": 400, "router_steps": 400},
}


def arms(settings: Settings) -> list[str]:
    return list(ARMS)


class Few(SymbolMaps):
    """The six maps with only n strings to train on, of any map."""

    def __init__(self, n: int, seed: int):
        super().__init__(range(bed.OLD, bed.OLD + EXPERTS), bed.OLD + bed.NEW, bed.LENGTH)
        self.pool = super().batch("train", n, torch.Generator().manual_seed(seed))

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if split != "train" or domain is not None:
            return super().batch(split, size, generator, domain)
        pick = torch.randint(len(self.pool), (size,), generator=generator)
        return Batch(*(part[pick] for part in (self.pool.inputs, self.pool.targets, self.pool.domain)))


class Experts(nn.Module):
    """The factors of the LoRAs of all maps, by layer."""

    def __init__(self, loras: list[LoRAs]):
        super().__init__()
        for e, lora in enumerate(loras):
            for name, (a, b, scale) in lora.items():
                key = f"{e} {name}".replace(".", "/")
                for part, value in (("a", a), ("b", b), ("scale", torch.tensor(scale))):
                    self.register_buffer(f"{key} {part}", value.clone())

    def loras(self) -> list[LoRAs]:
        found: list[LoRAs] = [{} for _ in range(EXPERTS)]
        for key, value in self.named_buffers():
            e, name, part = key.replace("/", ".").split(" ")
            found[int(e)].setdefault(name, {})[part] = value
        return [{name: (v["a"], v["b"], float(v["scale"])) for name, v in lora.items()} for lora in found]


def experts(settings: Settings, seed: int, targets: str = TARGETS) -> list[LoRAs]:
    """The LoRAs of the six maps, each trained by itself: trained once, then from the cache."""
    model = bed.base(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = adapt(model, "lora-mixer", targets, experts=EXPERTS, rank=RANK, phase="hard")

    def build() -> Experts:
        return Experts(lora_mixer.to_loras(adapted))

    def teach(kept: Experts) -> None:
        for e in range(EXPERTS):
            task = SymbolMaps((bed.OLD + e,), bed.OLD + bed.NEW, bed.LENGTH)
            with adapted.given(task=e):
                train(adapted.model, task, config(settings["expert_steps"], seed), optimizer=adapted.optimizer(LR))
        kept.load_state_dict(build().state_dict())

    recipe = {key: settings[key] for key in ("base_steps", "expert_steps")} | {"seed": seed, "batch": bed.BATCH}
    recipe["targets"] = targets
    code = [symbol_maps, low_rank, lora_mixer, bed, sys.modules[__name__]]
    return pretrained("symbol-maps-loras", recipe, build, teach, code).loras()


def config(steps: int, seed: int) -> TrainConfig:
    return TrainConfig(steps, bed.BATCH, lr=LR, weight_decay=0.0, seed=seed)


def run(arm: str, seed: int, settings: Settings) -> Row:
    n = ROUTERS[arm][0] if arm in ROUTERS else MORE
    task = Few(n, seed)
    if arm in ("mixlora", "lora-total"):
        model, steps = bed.base(settings), EXPERTS * settings["expert_steps"] + settings["router_steps"]
        torch.manual_seed(seed)
        if arm == "mixlora":
            adapted = adapt(model, "mixlora", bed.TARGETS, experts=EXPERTS, rank=RANK)
        else:
            adapted = adapt(model, "lora", TARGETS, rank=EXPERTS * RANK)
        state = train(model, bed.new_maps(EXPERTS), config(steps, seed), optimizer=adapted.optimizer(LR))
        return bed.row(arm, seed, adapted, state)
    model, loras = bed.base(settings), experts(settings, seed, bed.TARGETS if ELSEWHERE in arm else TARGETS)
    torch.manual_seed(seed)
    _, balance, entropy, sign = ROUTERS.get(arm, (n, 0.0, 0.0, 1))
    options = {"balance": balance, "entropy": entropy, "entropy_sign": sign}
    if arm.startswith("told the task"):
        options["phase"], options["freeze_experts"] = "hard", False
    if arm == "sum":  # E times the average
        loras = [{name: (a, b, EXPERTS * scale) for name, (a, b, scale) in lora.items()} for lora in loras]
    adapted = lora_mixer.from_loras(model, loras, top_k=EXPERTS if arm in ("average", "sum") else TOP_K, **options)
    if arm in ROUTERS:
        state = train(model, task, config(settings["router_steps"], seed), optimizer=adapted.optimizer(LR))
    else:
        for layer in adapted.layers.values():
            nn.init.zeros_(layer.router.projection.weight)
        state = State(model, task, adapted.optimizer(LR), config(1, seed), metrics=task.evaluate(model))
    extra = measures(adapted, task) if arm in ROUTERS else {"trained": 0} if arm in ("average", "sum") else {}
    return bed.row(arm, seed, adapted, state, **extra)


@torch.no_grad()
def measures(adapted: Adapted, task: SymbolMaps) -> dict:
    """On the validation split, means over the blocks: entropy of a token's routing as a share of log E, divergence
    (Kullback-Leibler) of the top-K load from uniform in nats, and what the likeliest expert says of the task in nats
    beyond chance; accuracy with 1, 2 and 3 experts in use; of the last block the load by task; the experts' sizes.
    """
    in_use = {}
    deciding = list({layer.router: layer for layer in adapted.layers.values()}.values())
    for k in range(1, TOP_K + 1):
        for layer in deciding:
            layer.router.set_top_k(k)
        if k < TOP_K:
            in_use[str(k)] = task.evaluate(adapted.model)[task.metric]
    seen: dict[int, list] = {}
    handles = [
        layer.observe(lambda layer, *seen_now, i=i: seen.setdefault(i, []).append(seen_now))
        for i, layer in enumerate(deciding)
    ]
    in_use[str(TOP_K)] = task.evaluate(adapted.model)[task.metric]
    for handle in handles:
        handle.remove()
    entropies, divergences, information = [], [], []
    for decisions in seen.values():
        probs = torch.cat([routing.probs for routing, _ in decisions])
        label = torch.cat([context.domain for _, context in decisions])
        load = torch.bincount(torch.cat([routing.expert for routing, _ in decisions]), minlength=EXPERTS).double()
        counts = counts_by_class(probs.argmax(-1), label, EXPERTS, EXPERTS)
        entropies.append(float(token_entropy(probs)))
        divergences.append(math.log(EXPERTS) - float(torch.special.entr(load / load.sum()).sum()))
        information.append(float(routing_information(counts).corrected))
    sizes = torch.stack(
        [torch.stack([layer.experts.delta(e).norm() for e in range(EXPERTS)]) for layer in adapted.layers.values()]
    )
    return {
        "entropy": statistics.fmean(entropies),
        "load_divergence": statistics.fmean(divergences),
        "task_information": statistics.fmean(information),
        "accuracy_in_use": in_use,
        "load_by_task": (counts / counts.sum(1, keepdim=True)).tolist(),
        "expert_norms": sizes.norm(dim=0).tolist(),
    }


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in ARMS}
    ours, few, plain = of[f"described, {MORE}"], of[f"described, {FEW}"], of[f"balance only, {FEW}"]
    rivals, data = paired_interval(ours, of["mixlora"]), paired_interval(few, plain)
    equivalent = len(few) > 1 and tost(few, plain, MARGIN, paired=True).equivalent
    if rivals.low > 0 and data.low > 0:
        verdict = REPRODUCED
    elif rivals.high < 0 or data.high < 0 or equivalent:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    printed = paired_interval(of[f"printed, {FEW}"], plain)
    there = paired_interval(of[f"described, {ELSEWHERE}, {MORE}"], of["mixlora"])
    less = paired_interval(few, of[f"balance only, {MORE}"])
    reason = (
        f"Accuracy, routed task LoRAs with {MORE} router strings minus MixLoRA {rivals}; with {FEW} strings, the "
        f"described sign minus balance alone {data}{', shown to be equivalent' if equivalent else ''}, the printed "
        f"sign minus balance alone {printed}, the described sign minus balance alone with {MORE} strings {less}. With "
        f"the LoRAs in the feed-forward layers the first difference is {there}. The effect is the first of these."
    )
    trained = {arm: next(row.extra["trained"] for row in rows if row.arm == arm) for arm in ARMS}
    details = {
        "accuracy": {arm: statistics.fmean(values) for arm, values in of.items()},
        "minus": {arm: paired_interval(ours, of[arm]).as_dict() for arm in ARMS if of[arm] is not ours},
        "data": data.as_dict(),
        "printed": printed.as_dict(),
        "trained": trained,
        "equivalent": equivalent,
    } | {
        name: {arm: statistics.fmean(_values(rows, arm, name)) for arm in ROUTERS}
        for name in ("entropy", "load_divergence", "task_information")
    }
    return Judgement(verdict, rivals.estimate, (rivals.low, rivals.high), reason, details)


def _values(rows: list[Row], arm: str, name: str) -> Iterator[float]:
    return (row.extra[name] for row in rows if row.arm == arm)


STUDY = Study(
    slug="lora-mixer",
    title="LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
    claim="Routing among task LoRAs inside the attention projections beats other mixtures of LoRAs with fewer "
    "parameters and little router data.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
