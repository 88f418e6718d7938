"""Do top-1 LoRA experts undo what mixing domains costs one LoRA, at one LoRA's cost per token? (2401.16160)

A frozen reader of digit strips and three domains whose questions conflict, see `digit_questions`. All arms have
low-rank updates of the same active rank on attention and feed-forward layers, except the one LoRA of K times the rank.
"""

import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.beds.digit_questions import DOMAINS, TARGETS, DigitQuestions, base
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.routing import Context
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.lora_experts.llava_mole import ROUTER_GRADS, Top1Router
from workbench.lib.measures.conflict import cosine_matrix
from workbench.lib.measures.routing import counts_by_class
from workbench.lib.measures.statistics import Interval, paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

EXPERTS = len(DOMAINS)
LORAS = ("lora-single", "lora-mix", "lora-mix-2x", "lora-rank-k")
MOLES = (*(f"mole-{rule}" for rule in ROUTER_GRADS), "mole-oracle", "mole-random")
UNEVEN = ("lora-uneven", "mole-uneven")
OURS = "mole-straight_through"
SHARES = (0.6, 0.2, 0.2)

RULE = (
    "The metric is the share of right answers on the validation split, the mean over three domains; intervals are 95% "
    "paired intervals over seeds unless said otherwise. (a) Conflict: LoRAs trained on one domain each, minus one LoRA "
    "on the mix with as many samples of each domain, lies above 0 on at least one domain (intervals at 1 - 0.05 / 3, "
    "for three domains). (b) MoLE on the mix, with the paper's forward and a straight-through gradient, minus LoRA on "
    "the mix lies above 0 on the mean over domains, and on no domain below 0 (at 1 - 0.05 / 3). (c) MoLE minus LoRA on "
    "the mix with twice the samples lies above 0. (d) It was no lack of capacity: MoLE minus LoRA of K times the rank "
    "lies above 0. Reproduced if all hold. Not reproduced if the mean over domains of the difference in (a), the mean "
    "or one domain in (b), or the difference in (c) or (d) lies below 0. Not resolved otherwise."
)

COMMON = {"batch": 48, "rank": 4, "lr": 3e-3, "arms": (*LORAS, *MOLES)}
PRESETS = {
    "smoke": COMMON | {"base_steps": 15, "steps": 6, "seeds": 1, "batch": 12},
    "small": COMMON | {"base_steps": 800, "steps": 330, "seeds": 3},
    "full": COMMON | {"base_steps": 2000, "steps": 1500, "seeds": 5, "arms": (*LORAS, *MOLES, *UNEVEN)},
}


def arms(settings: Settings) -> list[str]:
    return list(settings["arms"])


class ByDomain(Top1Router):
    """The expert of the domain: what no router of this system is told."""

    def __init__(self, d_model: int):
        super().__init__(d_model, EXPERTS, "balance_only")
        self.requires_grad_(False)

    def scores(self, x: Tensor, context: Context) -> Tensor:
        return 100.0 * F.one_hot(context.domain, EXPERTS).float()


def build(arm: str, seed: int, settings: Settings) -> Adapted:
    """The frozen reader with the adapters of an arm."""
    rank, model = settings["rank"], base(settings)
    torch.manual_seed(seed)
    if arm.startswith("lora"):
        return adapt(model, "lora", TARGETS, rank=rank * EXPERTS if arm == "lora-rank-k" else rank)
    rule = arm.removeprefix("mole-")
    if rule in ROUTER_GRADS or rule == "uneven":
        options = {"router_grad": rule} if rule in ROUTER_GRADS else {}
        return adapt(model, "llava-mole", TARGETS, experts=EXPERTS, rank=rank, **options)
    adapted = adapt(model, "llava-mole", TARGETS, experts=EXPERTS, rank=rank, router_grad="balance_only", balance=0.0)
    for layer in routed(adapted):
        if rule == "oracle":
            layer.router = ByDomain(layer.block.d_model)
        layer.router.requires_grad_(False)
    return adapted


def run(arm: str, seed: int, settings: Settings) -> Row:
    steps = settings["steps"] * (2 if arm == "lora-mix-2x" else 1)
    if arm == "lora-single":
        # as many rows of each domain as in the mix
        parts = [
            learn(arm, seed, DigitQuestions((name,)), max(1, steps // EXPERTS), settings, seed * EXPERTS + i)
            for i, name in enumerate(DOMAINS)
        ]
    else:
        parts = [learn(arm, seed, DigitQuestions(shares=SHARES if arm in UNEVEN else None), steps, settings, seed)]
    accuracy = {k: v for _, state in parts for k, v in state.metrics.items() if "/" in k}
    by_domain = [accuracy[f"accuracy/{name}"] for name in DOMAINS]
    flops = 0
    for adapted, state in parts:
        batch = state.task.batch("train", settings["batch"], torch.Generator().manual_seed(0))
        budget = measure_budget(adapted.model, state.task, batch)
        flops += budget.flops * state.step
    trained = sum(adapted.report()["trained"] for adapted, _ in parts)
    done = sum(state.step for _, state in parts)
    extra = {"by_domain": by_domain, "trained": trained}
    if arm in ("lora-mix", OURS):
        extra["gradient_cosine"] = gradient_cosine(*parts[0]).tolist()
    if not arm.startswith("lora"):
        extra["load_by_domain"] = load_by_domain(*parts[0])
    return Row(arm, seed, budget.params, budget.active_params, flops, done, statistics.fmean(by_domain), extra)


def learn(
    arm: str, seed: int, task: DigitQuestions, steps: int, settings: Settings, order: int
) -> tuple[Adapted, State]:
    adapted = build(arm, seed, settings)
    config = TrainConfig(steps, settings["batch"], settings["lr"], weight_decay=0.0, seed=order)
    return adapted, train(adapted.model, task, config, optimizer=adapted.optimizer(settings["lr"]))


def routed(adapted: Adapted) -> list[RoutedFeedForward]:
    return [layer for layer in adapted.layers.values() if isinstance(layer, RoutedFeedForward)]


def gradient_cosine(adapted: Adapted, state: State) -> Tensor:
    """(domains, domains) cosine between the gradients of the domains' losses by the trained parameters, at the end."""
    gradients = []
    for domain in range(EXPERTS):
        batch = state.task.batch("validation", 128, torch.Generator().manual_seed(0), domain)
        loss, _ = state.task.loss(adapted.model, batch)
        found = torch.autograd.grad(loss, adapted.parameters(), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    matrix = torch.stack(gradients).double()
    return cosine_matrix(matrix @ matrix.T)


@torch.no_grad()
def load_by_domain(adapted: Adapted, state: State) -> list:
    """(layers, domains, experts) share of a domain's tokens whose likeliest expert it is, on the validation split."""
    layers = routed(adapted)
    seen: dict[RoutedFeedForward, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer, routing, context):
        seen[layer].append((routing.probs.argmax(-1), context.domain))

    handles = [layer.observe(note) for layer in layers]
    state.task.evaluate(adapted.model)
    for handle in handles:
        handle.remove()
    tables = []
    for layer in layers:
        expert, domain = (torch.cat(part) for part in zip(*seen[layer], strict=True))
        counts = counts_by_class(expert, domain, EXPERTS, EXPERTS)
        tables.append((counts / counts.sum(1, keepdim=True)).tolist())
    return tables


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in settings["arms"]}
    by_domain = {
        arm: [[row.extra["by_domain"][i] for row in rows if row.arm == arm] for i in range(EXPERTS)]
        for arm in settings["arms"]
    }
    level = 1 - 0.05 / EXPERTS

    def domains(a: str, b: str) -> list[Interval]:
        return [paired_interval(x, y, level) for x, y in zip(by_domain[a], by_domain[b], strict=True)]

    drop, drops = paired_interval(of["lora-single"], of["lora-mix"]), domains("lora-single", "lora-mix")
    gain, gains = paired_interval(of[OURS], of["lora-mix"]), domains(OURS, "lora-mix")
    twice, wide = paired_interval(of[OURS], of["lora-mix-2x"]), paired_interval(of[OURS], of["lora-rank-k"])
    harmed = any(interval.high < 0 for interval in gains)
    if any(i.low > 0 for i in drops) and gain.low > 0 and not harmed and twice.low > 0 and wide.low > 0:
        verdict = REPRODUCED
    elif harmed or any(i.high < 0 for i in (drop, gain, twice, wide)):
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    reason = (
        "Accuracy, LoRAs of single domains minus one on the mix "
        + ", ".join(f"{name} {i}" for name, i in zip(DOMAINS, drops, strict=True))
        + f"; MoLE on the mix minus LoRA on the mix {gain} ("
        + ", ".join(f"{name} {i}" for name, i in zip(DOMAINS, gains, strict=True))
        + f"), minus LoRA on twice the samples {twice}, minus LoRA of {EXPERTS} times the rank {wide}. "
        "The effect is MoLE minus LoRA on the mix."
    )
    others = [arm for arm in settings["arms"] if arm not in (OURS, *UNEVEN)]
    details = {
        "accuracy": {arm: statistics.fmean(values) for arm, values in of.items()},
        "by_domain": {arm: [statistics.fmean(v) for v in values] for arm, values in by_domain.items()},
        "drop": drop.as_dict(),
        "drop_by_domain": [i.as_dict() for i in drops],
        "gain_by_domain": [i.as_dict() for i in gains],
        "minus": {arm: paired_interval(of[OURS], of[arm]).as_dict() for arm in others},
    }
    if UNEVEN[0] in of:
        details["uneven_gain"] = paired_interval(of[UNEVEN[1]], of[UNEVEN[0]]).as_dict()
    return Judgement(verdict, gain.estimate, (gain.low, gain.high), reason, details)


STUDY = Study(
    slug="llava-mole",
    title="LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
    claim="Top-1 LoRA experts undo the loss that mixing domains causes in one LoRA, at the cost of one LoRA per token.",
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
