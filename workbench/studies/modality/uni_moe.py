"""Do experts of one modality each, mixed afterwards, answer better than a mixture of copies? (2405.11273)

A frozen decoder of bytes that has read text, and three modalities of which two are rare, see `signal_questions`. Every
arm starts from the same connectors, aligned one by one, and sees as many rows of each modality as every other, in as
many steps: while the paper's arm trains experts apart, the others train on all modalities in equal shares, and then all
go on with the same uneven mix. In rank, too, they have what the two updates of the paper's arm have together.
"""

import sys
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds import signal_questions as bed
from workbench.beds.pretrained import pretrained
from workbench.beds.signal_questions import MODALITIES, WIDTHS, SignalQuestions
from workbench.lib.core import low_rank
from workbench.lib.core.adapt import lora
from workbench.lib.core.budget import Budget
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.routing import counts_by_class, routing_information
from workbench.lib.modality import uni_moe
from workbench.lib.modality.uni_moe import (
    METHOD,
    Expert,
    Learn,
    LinearConnector,
    MultimodalLM,
    QFormerConnector,
    align,
    assemble,
    base_expert,
    train_expert,
    tune,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, any_below, decide

OURS, COPIES, BALANCED, DENSE, FIXED = ARMS = ("three-stage", "copies", "copies-balanced", "dense", "fixed")
APART = (OURS, FIXED)
"""The arms whose experts were trained apart."""
MIXED = (OURS, COPIES, BALANCED)
"""The arms whose router is learned."""
EXPERTS = 1 + len(MODALITIES)
SHARES = (8, 1, 1)
BALANCE = 0.01
EFFECT = 0.03

RULE = (
    "The metric is the share of right answers on the test split, the mean over three modalities; intervals are 95% "
    "paired intervals over seeds. (a) Three-stage minus copies of the base's block lies above 0. (b) The routing is "
    "specialised: the information that the chosen experts have of a token's modality, as a share of the modality's "
    "entropy and the mean over the layers, is larger for three-stage than for copies, its difference above 0. "
    "Reproduced if both hold. Not reproduced if one of the two lies below 0. Not resolved otherwise. Copies with the "
    "balance loss, one dense LoRA, and routing by modality, which no router of this system is told, stand beside it."
)

COMMON = {"d_model": 64, "d_hidden": 128, "n_layers": 2, "seq_len": 48, "n_query": 4, "query_layers": 2}
COMMON |= {"frames": 8, "batch": 20, "rank": 8, "lr": 3e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 1, "cap": 16_384, "base_steps": 10, "align_steps": 3, "expert_steps": 3, "steps": 4}
    | {"d_model": 32, "d_hidden": 48, "batch": 10, "n_query": 2, "query_layers": 1, "test_batches": 1},
    "small": COMMON
    | {"seeds": 12, "cap": 262_144, "base_steps": 800, "align_steps": 60, "expert_steps": 50, "steps": 120}
    | {"test_batches": None},
    "full": COMMON
    | {"seeds": 12, "cap": 1_048_576, "base_steps": 4000, "align_steps": 300, "expert_steps": 300, "steps": 900}
    | {"d_model": 96, "d_hidden": 256, "n_layers": 4, "n_query": 16, "query_layers": 4, "frames": 29}
    | {"test_batches": None},
}


class ByRow(TopKRouter):
    """The expert that was trained for the modality of the row: what no router of this system is told."""

    def __init__(self, n_experts: int):
        super().__init__(n_experts, 1)

    def scores(self, x: Tensor, context: Context) -> Tensor:
        return 100.0 * F.one_hot(context.domain + 1, self.n_experts).to(x.dtype)


def learner(task: SignalQuestions, steps: int, seed: int, settings: Settings) -> Learn:
    config = TrainConfig(steps, settings["batch"], settings["lr"], weight_decay=0.0, seed=seed, eval_every=None)
    return lambda model: train(model, task, config)


def questions(settings: Settings, *modalities: str, shares: tuple[float, ...] | None = None) -> SignalQuestions:
    return SignalQuestions(modalities or MODALITIES, shares, settings["frames"])


def kept(name: str, seed: int, settings: Settings, build, teach, **recipe) -> nn.Module:
    """What comes before the mixture: trained once for a seed, then from its file."""
    recipe |= {key: value for key, value in settings.items() if key not in ("seeds", "steps", "test_batches")}
    recipe |= {"seed": seed, "data": questions(settings).manifest}
    return pretrained(name, recipe, build, teach, [uni_moe, low_rank, lora, bed, sys.modules[__name__]])


def start(seed: int, settings: Settings) -> MultimodalLM:
    """The frozen decoder with new connectors."""
    lm, width = bed.base(settings), settings["d_model"]
    torch.manual_seed(seed)
    heard = QFormerConnector(WIDTHS["speech"], width, settings["n_query"], settings["query_layers"])
    seen = {name: LinearConnector(WIDTHS[name], width) for name in MODALITIES if name != "speech"}
    return MultimodalLM(lm, {name: seen.get(name, heard) for name in MODALITIES})


def aligned(seed: int, settings: Settings) -> MultimodalLM:
    """The same after stage 1."""

    def teach(model: MultimodalLM) -> None:
        for name in MODALITIES:
            align(model, name, learner(questions(settings, name), settings["align_steps"], 4 * seed, settings))

    return kept("uni-moe-aligned", seed, settings, lambda: start(seed, settings), teach)


def apart(modality: str, seed: int, settings: Settings) -> tuple[Expert, nn.Module]:
    """The expert of a modality, and the projection that has learned with it: stage 2."""
    model = aligned(seed, settings)
    projection = model.connectors[modality].projection
    base = base_expert(model)

    def teach(parts: nn.ModuleDict) -> None:
        torch.manual_seed(seed)
        learn = learner(questions(settings, modality), settings["expert_steps"], 4 * seed + 1, settings)
        expert = train_expert(model, modality, learn, settings["rank"])
        parts["blocks"].load_state_dict(nn.ModuleList(expert.blocks).state_dict())

    parts = {"blocks": nn.ModuleList(base.blocks), "projection": projection}
    made = kept("uni-moe-expert", seed, settings, lambda: nn.ModuleDict(parts), teach, modality=modality)
    return Expert(modality, tuple(made["blocks"]), base.base), made["projection"]


def build(arm: str, seed: int, settings: Settings) -> tuple[MultimodalLM, list[float]]:
    """The model of an arm before it is tuned; of the paper's also the test accuracy of each expert alone."""
    model, alone = aligned(seed, settings), []
    experts = [base_expert(model)] * EXPERTS
    if arm in APART:
        for number, name in enumerate(MODALITIES):
            experts[number + 1], projection = apart(name, seed, settings)
            model.connectors[name].projection.load_state_dict(projection.state_dict())
            if arm == OURS:
                alone.append(accuracy_alone(model, experts[number + 1], settings))
    if arm == DENSE:
        return model, alone
    torch.manual_seed(seed)
    made = assemble(model, experts, balance=BALANCE if arm == BALANCED else 0.0)
    if arm == FIXED:
        for layer in moe_layers(made).values():
            layer.router = ByRow(EXPERTS)
    return made, alone


def accuracy_alone(model: MultimodalLM, expert: Expert, settings: Settings) -> float:
    """What an expert has right of its own modality where it serves every token."""
    before = [block.ffn for block in model.lm.blocks]
    try:
        for block, ffn in zip(model.lm.blocks, expert.blocks, strict=True):
            block.ffn = ffn
        return questions(settings, expert.name).evaluate(model, "test", settings["test_batches"])["accuracy"]
    finally:
        for block, ffn in zip(model.lm.blocks, before, strict=True):
            block.ffn = ffn


def run(arm: str, seed: int, settings: Settings) -> Row:
    even, uneven = questions(settings), questions(settings, shares=SHARES)
    model, alone = build(arm, seed, settings)
    together = 0 if arm in APART else len(MODALITIES) * settings["expert_steps"]
    budgets: list[Budget] = []
    losses: list[float] = []

    def learn(model: nn.Module) -> None:
        budgets.append(training_budget(model, uneven, settings["batch"]))
        if together:
            learner(even, together, 4 * seed + 2, settings)(model)
        losses.append(learner(uneven, settings["steps"], 4 * seed + 3, settings)(model).loss)

    torch.manual_seed(seed)
    tune(model, learn, settings["rank"] * (1 if arm in APART else 2))
    with observing(moe_layers(model).values(), by_modality) as seen:
        found = uneven.evaluate(model, "test", settings["test_batches"])
    by_task = [found[f"accuracy/{name}"] for name in MODALITIES]
    extra = {"by_modality": by_task, "alone": alone, "loss": losses[0]}  # of the last batch
    if seen:
        counts = torch.stack([sum(each) for each in seen.values()])
        extra["share"] = (counts / counts.sum(-1, keepdim=True)).tolist()
        found_out = routing_information(counts, top_k=1 if arm == FIXED else 2, null="first_order").normalised
        extra["information"] = float(found_out.mean())
    steps = together + settings["steps"]
    before = settings["align_steps"], settings["expert_steps"] * (arm in APART)
    flops = sum(n * cost for n, cost in zip(before, costs_before(tuple(settings.items())), strict=True))
    flops += budgets[0].flops * steps
    steps += len(MODALITIES) * sum(before)
    return Row(arm, seed, budgets[0].params, budgets[0].active_params, flops, steps, found["accuracy"], extra)


@cache
def costs_before(settings: tuple) -> tuple[int, int]:
    """Operations of one step for each modality, in stage 1 and in stage 2."""
    values = dict(settings)
    model, costs = start(0, values), ([], [])
    for name in MODALITIES:
        task = questions(values, name)

        def measure(made: nn.Module, found: list, task: SignalQuestions = task) -> None:
            found.append(training_budget(made, task, values["batch"]).flops)

        align(model, name, partial(measure, found=costs[0]))
        train_expert(model, name, partial(measure, found=costs[1]), values["rank"])
    return sum(costs[0]), sum(costs[1])


def by_modality(routing: Routing, context: Context) -> Tensor:
    """(modalities, experts) pairs of the tokens that are there, by the modality of their row."""
    domain = context.domain[context.mask].repeat_interleave(routing.top_k)
    return counts_by_class(routing.only(context.mask).expert, domain, len(MODALITIES), routing.n_experts)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain, informed = rows.minus(OURS, COPIES), rows.minus(OURS, COPIES, "information")
    verdict = decide(
        (REPRODUCED, gain.low > 0 and informed.low > 0),
        (NOT_REPRODUCED, any_below([gain, informed])),
    )
    others = {arm: rows.minus(OURS, arm) for arm in rows.arms if arm not in (OURS, COPIES)}
    reason = (
        f"Accuracy, three-stage minus copies {gain}; what experts tell of the modality, as a share, three-stage minus "
        f"copies {informed}. Accuracy, three-stage minus "
        + ", minus ".join(f"{arm} {interval}" for arm, interval in others.items())
        + ". The effect is three-stage minus copies."
    )
    alone = [rows.mean(OURS, lambda row, i=i: row.extra["alone"][i]) for i in range(len(MODALITIES))]
    scores = {
        arm: [rows.mean(arm, lambda row, i=i: row.extra["by_modality"][i]) for i in range(len(MODALITIES))]
        for arm in rows.arms
    }
    relative = {arm: [a - b for a, b in zip(each, alone, strict=True)] for arm, each in scores.items()}
    details = {
        "accuracy": rows.means(),
        "by_modality": scores,
        "alone": alone,
        "gap": {arm: max(each) - min(each) for arm, each in relative.items()},
        "information": rows.means("information", [arm for arm in rows.arms if arm in MIXED]),
        "gain": gain,
        "informed": informed,
        "minus": others,
        "share": {
            arm: torch.tensor(rows.of(arm, "share"), dtype=torch.float64).mean(0).tolist()
            for arm in rows.arms
            if arm in MIXED
        },
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
    tested="Experts that were trained on one modality each and then mixed answer more questions, the mean over the "
    "modalities, than a mixture of copies that saw as much, and their routing knows more of the modality.",
    power=Power((COPIES, DENSE), effect=EFFECT, deviation={"small": (0.0133, 12)}),
    main=OURS,
    trainings=lambda arm: 1 if arm in APART else 2,
)
