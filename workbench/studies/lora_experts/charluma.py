"""Does a low-rank projector with a router per programming language write more correct chart code? (2604.24559)

Pictures of charts of real data, and a small model that reads them and knows the languages apart, see `beds`. Each
arm changes the projector alone; it is trained alone first, then together with the decoder, the encoder being frozen.

Executed means, of Python, run in another process and its figure read; of R and LaTeX, read by a strict parser of the
templates' grammar, whether or not their renderers are installed.
"""

import copy
import statistics

import torch
from torch import Tensor, nn

from workbench.beds.chart_to_code import WIDTH, ChartToCode, base
from workbench.beds.charts import VALIDATION, ChartScripts, measures
from workbench.lib.charts import LANGUAGES
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

OURS = "ours"
DECISIVE = ("shared", "shared-router", "lora-active", "lora-total")
ARMS = (OURS, *DECISIVE, "per-language")
ABLATIONS = ("no-warm-up", "trained-a", "pairing-index", "all-columns", "unaligned")
RANK, POOL = 8, 16
LORA_ACTIVE = RANK // 2
"""Of two layers of one width, as many parameters as r rows of A and r columns of B."""
LORA_TOTAL = (RANK * WIDTH + POOL * WIDTH + len(LANGUAGES) * POOL * WIDTH) // (4 * WIDTH)
"""As many as A, pool and routers together."""

RULE = (
    "The metric is the F1 of the facts (kind, labels, colours, values, legend, grid) of the charts that the scripts "
    "written for held-out pictures draw, 0 for one that draws none, the mean over three languages; intervals are 95% "
    "paired intervals over seeds. The projector with a pool and a router per language, minus (a) one projector that is "
    "trained whole and shared, (b) the same pool with one router for all languages, (c) a LoRA of the active and (d) "
    "one of the total number of parameters. Reproduced if all four differences lie above 0, not reproduced if one of "
    "them lies below 0, not resolved otherwise. One projector per language is reported beside them."
)

COMMON = {"batch": 24, "base_batch": 32, "lr": 3e-3, "arms": ARMS}
PRESETS = {
    "smoke": COMMON | {"charts": 96, "base_steps": 10, "warmup_steps": 2, "steps": 4, "seeds": 1, "batch": 6},
    "small": COMMON | {"charts": 1040, "base_steps": 1600, "warmup_steps": 25, "steps": 100, "seeds": 3},
    "full": COMMON
    | {"charts": 6040, "base_steps": 8000, "warmup_steps": 250, "steps": 3000, "seeds": 5, "arms": (*ARMS, *ABLATIONS)},
}


def arms(settings: Settings) -> list[str]:
    return list(settings["arms"])


class PerLanguage(nn.Module):
    """A projector for each language, all alike at first; told its language as adapted layers are."""

    def __init__(self, projector: nn.Module):
        super().__init__()
        self.each = nn.ModuleList(copy.deepcopy(projector) for _ in LANGUAGES)
        self.language: Tensor | None = None

    def told(self, language: Tensor) -> "PerLanguage":
        self.language = language
        return self

    def __enter__(self) -> None:
        """The language is set already."""

    def __exit__(self, *error) -> None:
        self.language = None

    def forward(self, h: Tensor) -> Tensor:
        every = torch.stack([projector(h) for projector in self.each], 1)
        return every[torch.arange(len(h), device=h.device), self.language]


def build(arm: str, seed: int, settings: Settings) -> tuple[ChartToCode, list[nn.Parameter], Adapted | None]:
    """The base with the projector of an arm, the parameters trained in its projector, and the adaptation if any."""
    model = base(settings)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    adapted = None
    if arm == "shared":
        model.projector.requires_grad_(True)
    elif arm == "per-language":
        model.projector = PerLanguage(model.projector)
        model.projector.requires_grad_(True)
        model.tell = model.projector.told
    elif arm in ("lora-active", "lora-total", "all-columns"):
        rank = {"lora-active": LORA_ACTIVE, "lora-total": LORA_TOTAL, "all-columns": POOL // 2}[arm]
        adapted = adapt(model, "lora", "projector.*", rank=rank)
    else:
        options = {"shared-router": {"languages": 1}, "trained-a": {"train_a": True}}.get(arm, {})
        options |= {"pairing": "index"} if arm == "pairing-index" else {}
        adapted = adapt(model, "charluma", "projector.*", rank=RANK, pool=POOL, **options)
        if arm != "shared-router":
            model.tell = lambda language: adapted.given(language=language)
    trained = list(model.projector.parameters()) if adapted is None else adapted.parameters()
    return model, trained, adapted


def run(arm: str, seed: int, settings: Settings) -> Row:
    charts = settings["charts"]
    third = (charts - VALIDATION) // len(LANGUAGES)
    # In three languages a third of the charts make as many scripts as all of them in one each.
    with_control = "unaligned" in settings["arms"]
    task = ChartScripts(
        charts, aligned=arm != "unaligned", train_charts=third if with_control and arm != "unaligned" else None
    )
    model, trained, adapted = build(arm, seed, settings)
    alone = 0 if arm == "no-warm-up" else settings["warmup_steps"]
    rest = settings["steps"] + settings["warmup_steps"] - alone
    lr, batch = settings["lr"], settings["batch"]
    if alone:
        config = TrainConfig(alone, batch, lr, warmup=5, weight_decay=0.0, seed=2 * seed)
        train(model, task, config, optimizer=torch.optim.AdamW(trained, lr=lr, weight_decay=0.0))
    model.decoder.requires_grad_(True)
    both = [*trained, *model.decoder.parameters()]
    config = TrainConfig(rest, batch, lr, warmup=10, weight_decay=0.0, seed=2 * seed + 1)
    state = train(model, task, config, optimizer=torch.optim.AdamW(both, lr=lr, weight_decay=0.0))
    found = measures(task.write(model))
    budget = measure_budget(model, task, task.batch("train", batch, torch.Generator().manual_seed(0)))
    extra = found | {"loss": state.metrics["loss"], "trained": sum(p.numel() for p in trained)}
    if adapted is not None and adapted.adapter.slug == "charluma":
        extra |= columns_by_language(model, task, adapted)
    steps = alone + rest
    return Row(
        arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, found["mean_f1"], extra
    )  # fmt: skip


@torch.no_grad()
def columns_by_language(model: ChartToCode, task: ChartScripts, adapted: Adapted) -> dict:
    """How often each language chooses each column for held-out pictures, and how many columns serve all languages."""
    layer = next(iter(adapted.layers.values()))
    tables = []
    for batch in task.batches("validation", VALIDATION):
        model.image_tokens(batch.inputs, batch.domain)
        index, _ = layer.selection
        tables.append(torch.bincount(index.flatten(), minlength=layer.n_experts) / len(index))
    used = torch.stack(tables) > 0
    return {
        "columns": torch.stack(tables).tolist(),
        "columns_used": int(used.any(0).sum()),
        "columns_of_all": int(used.all(0).sum()),
    }


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in settings["arms"]}
    minus = {arm: paired_interval(of[OURS], values) for arm, values in of.items() if arm != OURS}
    decisive = [minus[arm] for arm in DECISIVE]
    if all(interval.low > 0 for interval in decisive):
        verdict = REPRODUCED
    elif any(interval.high < 0 for interval in decisive):
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    reason = (
        "F1 of what the scripts draw, the projector with a router per language minus "
        + ", ".join(f"{name} {minus[name]}" for name in (*DECISIVE, "per-language"))
        + ". The effect is the difference to one shared projector."
    )
    mean = {
        name: {
            arm: {
                language: statistics.fmean(row.extra[name][language] for row in rows if row.arm == arm)
                for language in LANGUAGES
            }
            for arm in of
        }
        for name in ("executes", "f1", "value_f1", "colour_f1")
    }
    used = {row.seed: [row.extra["columns_of_all"], row.extra["columns_used"]] for row in rows if row.arm == OURS}
    details = mean | {
        "mean_f1": {arm: statistics.fmean(values) for arm, values in of.items()},
        "minus": {arm: interval.as_dict() for arm, interval in minus.items()},
        "columns_of_all_and_used": {str(seed): counts for seed, counts in used.items()},
        "how": {"python": "executed", "r": "parsed", "latex": "parsed"},
    }
    effect = minus["shared"]
    return Judgement(verdict, effect.estimate, (effect.low, effect.high), reason, details)


STUDY = Study(
    slug="charluma",
    title="CharLuMA / Chart2NCode: Aligned Multi-View Scripts for Universal Chart-to-Code Generation",
    claim="A low-rank projector with one router per programming language writes more correct chart code than a shared "
    "projector.",
    metric="spec_f1",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
