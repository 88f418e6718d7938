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
import sys
from statistics import fmean

import torch
from torch import nn

from workbench.beds import symbol_maps as bed
from workbench.beds.pretrained import pretrained
from workbench.lib.core import low_rank
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.observe import observing
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.lora_experts import lora_mixer
from workbench.lib.measures.routing import counts_by_class, routing_information, token_entropy
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, adapted_row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

EXPERTS, RANK, TOP_K = 6, 4, 3
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
    "smoke": bed.SMOKE | {"expert_steps": 12, "router_steps": 3},
    "small": bed.SMALL | {"expert_steps": 120, "router_steps": 150},
    "full": bed.FULL | {"expert_steps": 400, "router_steps": 400},
}


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
            task, plan = bed.new_maps(settings, [e]), config(settings, settings["expert_steps"], seed)
            with adapted.given(task=e):
                train(adapted.model, task, plan, optimizer=adapted.optimizer(bed.LR))
        kept.load_state_dict(build().state_dict())

    recipe = {key: settings[key] for key in ("base_steps", "expert_steps", "batch")} | {"seed": seed}
    recipe["targets"] = targets
    code = [low_rank, lora_mixer, bed, sys.modules[__name__]]
    return pretrained("symbol-maps-loras", recipe, build, teach, code).loras()


def config(settings: Settings, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(steps, settings["batch"], lr=bed.LR, weight_decay=0.0, seed=seed, eval_every=None)


def run(arm: str, seed: int, settings: Settings) -> Row:
    model, task = bed.base(settings), bed.new_maps(settings, range(EXPERTS))
    if arm in ("mixlora", "lora-total"):
        steps = EXPERTS * settings["expert_steps"] + settings["router_steps"]
        torch.manual_seed(seed)
        if arm == "mixlora":
            adapted = adapt(model, "mixlora", bed.TARGETS, experts=EXPERTS, rank=RANK)
        else:
            adapted = adapt(model, "lora", TARGETS, rank=EXPERTS * RANK)
    else:
        adapted, steps = mixture(arm, seed, model, settings), settings["router_steps"]
    if arm in BOUNDS:
        state = State(model, task, adapted.optimizer(bed.LR), config(settings, 1, seed))
    else:
        task = task.only(ROUTERS[arm][0], seed) if arm in ROUTERS else task
        state = train(model, task, config(settings, steps, seed), optimizer=adapted.optimizer(bed.LR))
    if arm in ROUTERS:
        return adapted_row(arm, seed, adapted, state, **measures(adapted, state))
    state.metrics = task.evaluate(model)
    return adapted_row(arm, seed, adapted, state, **({"trained": 0} if arm in ("average", "sum") else {}))


def mixture(arm: str, seed: int, model: nn.Module, settings: Settings) -> Adapted:
    """The frozen LoRAs on the base, under routers that are to be trained or under the fixed ones of a bound."""
    loras = experts(settings, seed, bed.TARGETS if ELSEWHERE in arm else TARGETS)
    torch.manual_seed(seed)
    _, balance, entropy, sign = ROUTERS.get(arm, (0, 0.0, 0.0, 1))
    options = {"balance": balance, "entropy": entropy, "entropy_sign": sign}
    if arm.startswith("told the task"):
        options |= {"phase": "hard", "freeze_experts": False}
    if arm == "sum":  # E times the average
        loras = [{name: (a, b, EXPERTS * scale) for name, (a, b, scale) in lora.items()} for lora in loras]
    adapted = lora_mixer.from_loras(model, loras, top_k=EXPERTS if arm in ("average", "sum") else TOP_K, **options)
    if arm in BOUNDS:
        for layer in adapted.layers.values():
            nn.init.zeros_(layer.router.projection.weight)
    return adapted


def measures(adapted: Adapted, state: State) -> dict:
    """Evaluates the state, with 1, 2 and then the 3 experts in use that it was trained with.

    On the validation split, means over the blocks: entropy of a token's routing as a share of log E, divergence
    (Kullback-Leibler) of the top-K load from uniform in nats, and what the likeliest expert says of the task in nats
    beyond chance; accuracy by the number of experts in use; of the last block the load by task; the experts' sizes.
    """
    in_use = {}
    deciding = list({layer.router: layer for layer in adapted.layers.values()}.values())
    for k in range(1, TOP_K + 1):
        for layer in deciding:
            layer.router.set_top_k(k)
        with observing(deciding) as seen:
            state.metrics = state.task.evaluate(adapted.model)
        in_use[str(k)] = state.metrics[state.task.metric]
    entropies, divergences, information = [], [], []
    for decisions in seen.values():
        probs = torch.cat([routing.probs for routing, _ in decisions])
        label = torch.cat([context.domain for _, context in decisions])
        load = torch.bincount(torch.cat([routing.expert for routing, _ in decisions]), minlength=EXPERTS).double()
        counts = counts_by_class(probs.argmax(-1), label, EXPERTS, EXPERTS)
        entropies.append(float(token_entropy(probs)))
        divergences.append(math.log(EXPERTS) - float(torch.special.entr(load / load.sum()).sum()))
        information.append(float(routing_information(counts).corrected))
    with torch.no_grad():
        sizes = torch.stack(
            [torch.stack([layer.experts.delta(e).norm() for e in range(EXPERTS)]) for layer in adapted.layers.values()]
        )
    return {
        "entropy": fmean(entropies),
        "load_divergence": fmean(divergences),
        "task_information": fmean(information),
        "accuracy_in_use": in_use,
        "load_by_task": (counts / counts.sum(1, keepdim=True)).tolist(),
        "expert_norms": sizes.norm(dim=0).tolist(),
    }


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    ours, few, plain = f"described, {MORE}", f"described, {FEW}", f"balance only, {FEW}"
    rivals, data = rows.minus(ours, "mixlora"), rows.minus(few, plain)
    equivalent = rows.tost(few, plain, MARGIN).equivalent
    verdict = decide(
        (REPRODUCED, rivals.low > 0 and data.low > 0),
        (NOT_REPRODUCED, rivals.high < 0 or data.high < 0 or equivalent),
    )
    printed = rows.minus(f"printed, {FEW}", plain)
    reason = (
        f"Accuracy, routed task LoRAs with {MORE} router strings minus MixLoRA {rivals}; with {FEW} strings, the "
        f"described sign minus balance alone {data}{', shown to be equivalent' if equivalent else ''}, the printed "
        f"sign minus balance alone {printed}, the described sign minus balance alone with {MORE} strings "
        f"{rows.minus(few, f'balance only, {MORE}')}. With the LoRAs in the feed-forward layers the first difference "
        f"is {rows.minus(f'described, {ELSEWHERE}, {MORE}', 'mixlora')}. The effect is the first of these."
    )
    details = {
        "accuracy": rows.means(),
        "minus": {arm: rows.minus(ours, arm) for arm in ARMS if arm != ours},
        "data": data,
        "printed": printed,
        "trained": {arm: rows.of(arm, "trained")[0] for arm in ARMS},
        "equivalent": equivalent,
    } | {name: rows.means(name, ROUTERS) for name in ("entropy", "load_divergence", "task_information")}
    return Judgement.on(rivals, verdict, reason, details)


STUDY = Study(
    lora_mixer.METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power((f"balance only, {FEW}", f"task loss only, {FEW}"), effect=0.05),
    main=f"described, {MORE}",
    trainings=lambda arm: "LoRAs that are trained once and kept are put together" if arm in BOUNDS else 1,
)
