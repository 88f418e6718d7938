"""Do top-1 LoRA experts undo what mixing domains costs one LoRA, at one LoRA's cost per token? (2401.16160)

A frozen reader of digit strips and three domains whose questions conflict, see `digit_questions`. All arms have
low-rank updates of the same active rank on attention and feed-forward layers, except the one LoRA of K times the rank.
"""

from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.beds.digit_questions import DOMAINS, TARGETS, DigitQuestions, base
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.train import State, TrainConfig, train
from workbench.lib.lora_experts.llava_mole import METHOD, ROUTER_GRADS, Top1Router
from workbench.lib.measures.conflict import cosine_matrix
from workbench.lib.measures.routing import counts_by_class
from workbench.lib.measures.statistics import Interval
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, any_below, decide

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

COMMON = {"batch": 48, "held_out": 256, "rank": 4, "lr": 3e-3, "arms": (*LORAS, *MOLES)}
PRESETS = {
    "smoke": COMMON | {"base_steps": 15, "steps": 6, "seeds": 1, "batch": 12, "held_out": 16},
    "small": COMMON | {"base_steps": 800, "steps": 330, "seeds": 12},
    "full": COMMON | {"base_steps": 2000, "steps": 1500, "seeds": 5, "arms": (*LORAS, *MOLES, *UNEVEN)},
}


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
    for layer in announcing(model):
        if rule == "oracle":
            layer.router = ByDomain(layer.block.d_model)
        layer.router.requires_grad_(False)
    return adapted


def run(arm: str, seed: int, settings: Settings) -> Row:
    held_out, steps = settings["held_out"], settings["steps"] * (2 if arm == "lora-mix-2x" else 1)
    if arm == "lora-single":  # as many rows of each domain as in the mix
        tasks, steps = [DigitQuestions((name,), held_out=held_out) for name in DOMAINS], max(1, steps // EXPERTS)
        orders = [seed * EXPERTS + i for i in range(EXPERTS)]
    else:
        tasks = [DigitQuestions(shares=SHARES if arm in UNEVEN else None, held_out=held_out)]
        orders = [seed]
    parts, accuracy = [], {}
    for task, order in zip(tasks, orders, strict=True):
        adapted, state = learn(arm, seed, task, steps, settings, order)
        with observing(announcing(adapted.model), likeliest) as seen:
            accuracy |= task.evaluate(adapted.model)
        parts.append((adapted, state))
    by_domain = [accuracy[f"accuracy/{name}"] for name in DOMAINS]
    budgets = [training_budget(state.model, state.task, settings["batch"]) for _, state in parts]
    flops = sum(budget.flops * state.step for budget, (_, state) in zip(budgets, parts, strict=True))
    extra = {"by_domain": by_domain, "trained": sum(adapted.report()["trained"] for adapted, _ in parts)}
    if arm in ("lora-mix", OURS):
        extra["gradient_cosine"] = gradient_cosine(*parts[0]).tolist()
    if seen:
        extra["load_by_domain"] = [load_by_domain(decisions) for decisions in seen.values()]
    done = sum(state.step for _, state in parts)
    return Row(arm, seed, budgets[-1].params, budgets[-1].active_params, flops, done, fmean(by_domain), extra)


def learn(
    arm: str, seed: int, task: DigitQuestions, steps: int, settings: Settings, order: int
) -> tuple[Adapted, State]:
    adapted = build(arm, seed, settings)
    config = TrainConfig(steps, settings["batch"], settings["lr"], weight_decay=0.0, seed=order, eval_every=None)
    return adapted, train(adapted.model, task, config, optimizer=adapted.optimizer(settings["lr"]))


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


def likeliest(routing: Routing, context: Context) -> tuple[Tensor, Tensor]:
    return routing.probs.argmax(-1), context.domain


def load_by_domain(decisions: list[tuple[Tensor, Tensor]]) -> list:
    """(domains, experts) share of a domain's tokens whose likeliest expert it is, of one layer."""
    counts = counts_by_class(*(torch.cat(part) for part in zip(*decisions, strict=True)), EXPERTS, EXPERTS)
    return (counts / counts.sum(1, keepdim=True)).tolist()


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    level = 1 - 0.05 / EXPERTS

    def domains(a: str, b: str) -> dict[str, Interval]:
        return {
            name: rows.minus(a, b, lambda row, i=i: row.extra["by_domain"][i], level) for i, name in enumerate(DOMAINS)
        }

    drop, drops = rows.minus("lora-single", "lora-mix"), domains("lora-single", "lora-mix")
    gain, gains = rows.minus(OURS, "lora-mix"), domains(OURS, "lora-mix")
    twice, wide = rows.minus(OURS, "lora-mix-2x"), rows.minus(OURS, "lora-rank-k")
    hurt, harmed = any(interval.low > 0 for interval in drops.values()), any_below(gains.values())
    verdict = decide(
        (REPRODUCED, hurt and gain.low > 0 and not harmed and twice.low > 0 and wide.low > 0),
        (NOT_REPRODUCED, harmed or any_below([drop, gain, twice, wide])),
    )
    reason = (
        "Accuracy, LoRAs of single domains minus one on the mix "
        + ", ".join(f"{name} {i}" for name, i in drops.items())
        + f"; MoLE on the mix minus LoRA on the mix {gain} ("
        + ", ".join(f"{name} {i}" for name, i in gains.items())
        + f"), minus LoRA on twice the samples {twice}, minus LoRA of {EXPERTS} times the rank {wide}. "
        "The effect is MoLE minus LoRA on the mix."
    )
    details = {
        "accuracy": rows.means(),
        "by_domain": {
            arm: [rows.mean(arm, lambda row, i=i: row.extra["by_domain"][i]) for i in range(EXPERTS)]
            for arm in rows.arms
        },
        "drop": drop,
        "drop_by_domain": list(drops.values()),
        "gain_by_domain": list(gains.values()),
        "minus": {arm: rows.minus(OURS, arm) for arm in rows.arms if arm not in (OURS, *UNEVEN)},
    }
    if UNEVEN[0] in rows.arms:
        details["uneven_gain"] = rows.minus(UNEVEN[1], UNEVEN[0])
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: settings["arms"],
    run=run,
    judge=judge,
    version=2,
    power=Power(("lora-mix", "lora-rank-k"), effect=0.1, deviation={"small": (0.0875, 12)}),
    main=OURS,
)
