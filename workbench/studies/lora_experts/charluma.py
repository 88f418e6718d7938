"""Does a low-rank projector with a router per programming language write more correct chart code? (2604.24559)

Pictures of charts of real data, and a small model that reads them and knows the languages apart, see `beds`. Each
arm changes the projector alone; it is trained alone first, then together with the decoder, the encoder being frozen.

Executed means, of Python, run in another process and its figure read; of R and LaTeX, read by a strict parser of the
templates' grammar, whether or not their renderers are installed.
"""

import copy

import torch
from torch import Tensor, nn

from workbench.beds.chart_to_code import WIDTH, ChartToCode, base
from workbench.beds.charts import ChartScripts, measures
from workbench.lib.charts import LANGUAGES
from workbench.lib.core.adapt import adapt
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts.charluma import METHOD
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

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

COMMON = {"held_out": 40, "batch": 24, "base_batch": 32, "lr": 3e-3, "arms": ARMS}
PRESETS = {
    "smoke": COMMON
    | {"charts": 64, "held_out": 8, "base_steps": 10, "warmup_steps": 2, "steps": 4, "seeds": 1, "batch": 6},
    "small": COMMON | {"charts": 1040, "base_steps": 1600, "warmup_steps": 25, "steps": 100, "seeds": 3},
    "full": COMMON
    | {"charts": 6040, "base_steps": 8000, "warmup_steps": 250, "steps": 3000, "seeds": 5, "arms": (*ARMS, *ABLATIONS)},
}


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


def build(arm: str, seed: int, settings: Settings) -> tuple[ChartToCode, list[nn.Parameter]]:
    """The base with the projector of an arm, and the parameters trained in its projector."""
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
    return model, list(model.projector.parameters()) if adapted is None else adapted.parameters()


def run(arm: str, seed: int, settings: Settings) -> Row:
    charts, held_out, lr = settings["charts"], settings["held_out"], settings["lr"]
    # In three languages a third of the charts make as many scripts as all of them in one each.
    fewer = "unaligned" in settings["arms"] and arm != "unaligned"
    third = (charts - held_out) // len(LANGUAGES)
    task = ChartScripts(charts, aligned=arm != "unaligned", train_charts=third if fewer else None, held_out=held_out)
    model, trained = build(arm, seed, settings)

    def learn(parameters: list[nn.Parameter], steps: int, warmup: int, order: int) -> None:
        config = TrainConfig(steps, settings["batch"], lr, warmup, weight_decay=0.0, seed=order, eval_every=None)
        train(model, task, config, optimizer=torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0))

    alone = 0 if arm == "no-warm-up" else settings["warmup_steps"]
    steps = settings["steps"] + settings["warmup_steps"]
    if alone:
        learn(trained, alone, 5, 2 * seed)
    model.decoder.requires_grad_(True)
    learn([*trained, *model.decoder.parameters()], steps - alone, 10, 2 * seed + 1)
    with observing(announcing(model), lambda routing, context: routing.counts / routing.n_tokens) as seen:
        loss = task.evaluate(model)["loss"]  # a batch of each language
    extra = {"loss": loss, "trained": sum(p.numel() for p in trained)} | measures(task.write(model))
    for columns in seen.values():
        extra |= columns_by_language(torch.stack(columns))
    budget = training_budget(model, task, settings["batch"])
    return trained_row(arm, seed, budget, steps, extra["mean_f1"], **extra)


def columns_by_language(columns: Tensor) -> dict:
    """How often each language chooses each column for held-out pictures, and how many columns serve all languages."""
    used = columns > 0
    return {
        "columns": columns.tolist(),
        "columns_used": int(used.any(0).sum()),
        "columns_of_all": int(used.all(0).sum()),
    }


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    minus = {arm: rows.minus(OURS, arm) for arm in rows.arms if arm != OURS}
    decisive = [minus[arm] for arm in DECISIVE]
    verdict = decide((REPRODUCED, all_above(decisive)), (NOT_REPRODUCED, any_below(decisive)))
    reason = (
        "F1 of what the scripts draw, the projector with a router per language minus "
        + ", ".join(f"{name} {minus[name]}" for name in (*DECISIVE, "per-language"))
        + ". The effect is the difference to one shared projector."
    )
    details = {
        name: {
            arm: {of: rows.mean(arm, lambda row, of=of, name=name: row.extra[name][of]) for of in LANGUAGES}
            for arm in rows.arms
        }
        for name in ("executes", "f1", "value_f1", "colour_f1")
    }
    details |= {
        "mean_f1": rows.means(),
        "minus": minus,
        "columns_of_all_and_used": {
            str(row.seed): [row.extra["columns_of_all"], row.extra["columns_used"]] for row in rows.arm(OURS)
        },
        "how": {"python": "executed", "r": "parsed", "latex": "parsed"},
    }
    return Judgement.on(minus["shared"], verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="spec_f1",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: settings["arms"],
    run=run,
    judge=judge,
    power=Power(("shared", "per-language"), effect=0.02),
    main=OURS,
    trainings=lambda arm: 1 if arm == "no-warm-up" else 2,
)
