"""Does routing blocks of an adapter by task adapt to new tasks better than routing whole ones? (2211.03831)

Tasks made of two parts, on the frozen decoder of the shared test-bed: a map takes the symbols 0 to 4 by one of three
permutations and 5 to 9 by one of three others. Seven of the nine combinations are learned together; then each target is
learned from a few strings: the other two combinations, and three maps that share nothing. The LoRA that all tasks share
has the rank of a task's update, and beside it there is one of the rank of all skills together.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor, nn

from workbench.beds import symbol_maps as bed
from workbench.beds.symbol_maps import SYMBOLS, SymbolMaps
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.modes import evaluating
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts.mhr import METHOD, TUNE, allocations, monitors, to_new_tasks
from workbench.lib.measures.conflict import cosine_matrix
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, adapted_row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

PARTS = 3
COMBINED = tuple(range(bed.OLD, bed.OLD + PARTS * PARTS))
HELD_OUT = (bed.OLD + 3, bed.OLD + 7)  # parts 1 and 0, parts 2 and 1
UNRELATED = tuple(range(bed.OLD + PARTS * PARTS, bed.OLD + bed.NEW))
SEEN = tuple(task for task in COMBINED if task not in HELD_OUT)
TARGETS = (*HELD_OUT, *UNRELATED)

ROUTER_LR = 0.1
RANK, SKILLS, HEADS, DROPOUT = 2, 6, 8, 0.2
SHARED = {"experts": SKILLS, "rank": RANK, "alpha": RANK, "tasks": len(SEEN), "router_lr": ROUTER_LR / bed.LR}

#: Arm -> system and options.
ARMS = {
    "lora": ("lora", {"rank": RANK}),
    "lora-total": ("lora", {"rank": RANK * SKILLS}),
    "poly": ("mhr", SHARED | {"heads": 1}),
    "mhr": ("mhr", SHARED | {"heads": HEADS}),
    "mhr, task dropout": ("mhr", SHARED | {"heads": HEADS, "task_dropout": DROPOUT}),
    "mhr, fixed routing": ("mhr", SHARED | {"heads": HEADS}),
    "average": ("mhr", SHARED | {"heads": HEADS, "tune": "skills"}),
}

RULE = (
    "The metric is the share of right symbols on the validation split after learning a target from a few strings with "
    "everything trained, the mean over five targets; all intervals are 95% paired intervals over seeds. (a) MHR minus "
    "Poly, the same skills routed as wholes, lies above 0. (b) MHR minus one shared LoRA of the rank of a task's "
    "update lies above 0. (c) It is not the size: MHR minus a shared LoRA of the rank of all skills lies above 0. "
    "Reproduced if all hold. Not reproduced if one of the intervals lies below 0. Not resolved otherwise. Tuning the "
    "router alone and tuning the average are reported beside."
)

PRESETS = {
    "smoke": bed.SMOKE | {"shots": 8, "few_steps": 2},
    "small": bed.SMALL | {"shots": 32, "few_steps": 60, "seeds": 4},
    "full": bed.FULL | {"shots": 32, "few_steps": 200},
}


class PartMaps(SymbolMaps):
    """Symbol maps of the test-bed's vocabulary in which the combined tasks share their parts."""

    name = "part-maps"

    def __init__(self, tasks: Sequence[int], held_out: int = 256):
        super().__init__(tasks, bed.OLD + bed.NEW, bed.LENGTH, held_out=held_out)
        half, drawn = SYMBOLS // 2, torch.Generator().manual_seed(1)
        low, high = ([torch.randperm(half, generator=drawn) for _ in range(PARTS)] for _ in range(2))
        for i, task in enumerate(COMBINED):
            self.maps[task] = torch.cat([low[i // PARTS], half + high[i % PARTS]])
        digest = hashlib.sha256(self.maps.numpy().tobytes()).hexdigest()
        self.manifest |= {"name": self.name, "sha256": digest}


def run(arm: str, seed: int, settings: Settings) -> Row:
    slug, options = ARMS[arm]
    model = bed.base(settings)
    torch.manual_seed(seed)
    adapted = adapt(model, slug, bed.TARGETS, **options)
    if arm == "mhr, fixed routing":
        for layer in adapted.layers.values():
            nn.init.normal_(layer.router.logits, std=2.0)
            layer.router.logits.requires_grad_(False)
    task = PartMaps(SEEN, settings["held_out"])
    config = TrainConfig(settings["steps"], settings["batch"], lr=bed.LR, weight_decay=0.0, seed=seed)
    state = train(model, task, config, optimizer=adapted.optimizer(bed.LR))
    extra = {"seen": state.metrics[task.metric], "alignment": alignment(adapted, task, settings["batch"])}
    if slug == "mhr":
        watched = [monitors(layer.router) for layer in adapted.layers.values()]
        extra["monitors"] = {name: fmean(values[name] for values in watched) for name in watched[0]}
        extra["allocation"] = list(allocations(adapted).values())[-1].tolist()
    row = adapted_row(arm, seed, adapted, state, **extra)
    tune = ("all",) if slug == "lora" else ("skills",) if arm == "average" else TUNE
    few = few_shots(adapted, tune, settings, seed)
    return replace(row, metric=fmean(few[tune[0]]), extra=row.extra | {"few": few})


def few_shots(adapted: Adapted, tune: Sequence[str], settings: Settings, seed: int) -> dict[str, list[float]]:
    """Accuracy on each target by what is tuned, always from the same trained adapters."""
    learned = {name: p.detach().clone() for name, p in adapted.named_parameters().items() if ".router." not in name}
    parameters = dict(adapted.model.named_parameters())
    config = TrainConfig(settings["few_steps"], settings["shots"], lr=bed.LR, weight_decay=0.0, seed=seed)
    found: dict[str, list[float]] = {}
    for what in tune:
        for target in TARGETS:
            with torch.no_grad():
                for name, value in learned.items():
                    parameters[name].copy_(value)
            if adapted.adapter.slug == "mhr":
                torch.manual_seed(seed)
                to_new_tasks(adapted, what)
            task = PartMaps((target,), settings["held_out"]).only(settings["shots"], seed)
            state = train(adapted.model, task, config, optimizer=adapted.optimizer(bed.LR))
            found.setdefault(what, []).append(state.metrics[task.metric])
    return found


def alignment(adapted: Adapted, task: SymbolMaps, rows: int) -> float:
    """Mean cosine between the gradients of two tasks' losses by the adapters, without the routers; evaluation mode."""
    parameters = [p for name, p in adapted.named_parameters().items() if ".router." not in name]
    gradients: list[Tensor] = []
    with evaluating(adapted.model), torch.enable_grad():
        for domain in range(len(task.tasks)):
            batch = task.batch("validation", rows, torch.Generator().manual_seed(0), domain)
            found = torch.autograd.grad(task.loss(adapted.model, batch)[0], parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    matrix = torch.stack(gradients).double()
    cosine = cosine_matrix(matrix @ matrix.T)
    return float(cosine[~torch.eye(len(cosine), dtype=torch.bool)].nanmean())


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    minus = {arm: rows.minus("mhr", arm) for arm in ARMS if arm != "mhr"}
    judged = [minus[arm] for arm in ("poly", "lora", "lora-total")]
    verdict = decide((REPRODUCED, all_above(judged)), (NOT_REPRODUCED, any_below(judged)))
    router, average = (
        rows.interval(rows.of("mhr", lambda row, what=what: fmean(row.extra["few"][what]) - row.metric))
        for what in ("router", "skills")
    )
    reason = (
        f"Accuracy on new tasks from {settings['shots']} strings, MHR minus Poly {judged[0]}, minus one LoRA of the "
        f"rank of an update {judged[1]}, minus one of the rank of all skills {judged[2]}; of MHR, tuning the router "
        f"alone minus everything {router}, tuning the average minus everything {average}. The effect is MHR minus Poly."
    )
    details = {
        "accuracy": rows.means(),
        "minus": minus,
        "few": {arm: by_target(rows.of(arm, "few")) for arm in ARMS},
        "seen": rows.means("seen"),
        "alignment": rows.means("alignment"),
        "router_minus_all": router,
        "average_minus_all": average,
    }
    return Judgement.on(minus["poly"], verdict, reason, details)


def by_target(few: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """What is tuned -> the accuracy on each target, means over the seeds."""
    return {what: [fmean(v) for v in zip(*(seed[what] for seed in few), strict=True)] for what in few[0]}


STUDY = Study(
    METHOD,
    metric="few-shot accuracy",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power(("poly", "lora", "lora-total"), effect=0.01),
)
