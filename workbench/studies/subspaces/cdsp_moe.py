"""Does parting experts whose gradients conflict make routing tell tasks apart without being told them? (2512.20291)

Three tasks with one head of ten classes, in images of 8 x 8: which digit; whether the digit of an inverted and
transposed image is odd; whether a grating is one of the five finer ones. A small vision transformer has the mixture as
its feed-forward parts. The paper's baseline, separate experts with a balance loss, is told the task in every step, and
is then asked to do without. So it is here with the paper's dropout of tasks as well: what that alone does is not the
conflict's doing. Beside the conflict stand the same model without it, and with the gradients of other experts.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.lib import data
from workbench.lib.core.models import VisionClassifier
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask, Batch
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.measures.information import jensen_shannon, mutual_information
from workbench.lib.subspaces.cdsp_moe import METHOD, CDSPMoELayer, cdsp_layers, two_speeds
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, all_above, any_below, decide

TASKS = ("digit", "odd", "grating")
CLASSES, SIDE, PATCH = 10, 8, 2
TOKENS = (SIDE // PATCH) ** 2
TOP_K = 2

#: Arm -> options of its layers; those of "moe" have one territory of their own each, and nothing else.
CDSP, NO_CONFLICT, SHUFFLED = "cdsp", "no-conflict", "shuffled"
MOE, MOE_DROPOUT, MOE_BLIND = "moe", "moe-dropout", "moe-untold"
ARMS: dict[str, dict] = {
    CDSP: {},
    "cdsp-code": {"variant": "code"},
    "cdsp-ours": {"variant": "ours"},
    NO_CONFLICT: {"conflict": 0.0},
    SHUFFLED: {"shuffle_lag": True},
    MOE: {"p_task_drop": 0.0},
    MOE_DROPOUT: {},
    MOE_BLIND: {"n_tasks": 0},
}
SEPARATE = (MOE, MOE_DROPOUT, MOE_BLIND)
CONTROLS = (NO_CONFLICT, SHUFFLED)
MARGIN = 0.05  # bits

RULE = (
    "The metric is the information, in bits, that the expert of a token of the test split has on its task where no "
    "task is told, less that of shuffled tasks, the mean over the layers; all differences are paired over seeds. "
    "(a) CDSP has more than separate experts trained with the same dropout of tasks. The conflict is why: it has more "
    "(b) than without the conflict's loss and (c) than with the gradients of other experts in it. Reproduced if all "
    "three intervals, at 95%, lie above 0. Not reproduced if one lies below 0, or if the conflict is shown to do "
    f"nothing: (b) or (c) is equivalent to 0 within {MARGIN} bits (TOST at 5%). Not resolved otherwise. The effect is "
    "that of (a)."
)

COMMON = {"d_model": 32, "d_base": 128, "n_experts": 16, "n_layers": 2, "n_heads": 4, "lr": 5e-3, "balance": 0.01}
PRESETS = {
    "smoke": COMMON | {"images": 60, "test_images": 40, "steps": 6, "batch": 6, "every": 3, "seeds": 2}
    | {"d_base": 64},
    "small": COMMON | {"images": 600, "test_images": 300, "steps": 350, "batch": 24, "every": 35, "seeds": 12},
    "full": COMMON | {"images": 1200, "test_images": 340, "steps": 3000, "batch": 64, "every": 100, "seeds": 12},
}  # fmt: skip


class Symbols(ArrayTask):
    """The three tasks. Every token is told the task of its image, but inside `untold`."""

    metric, unit, higher_is_better = "accuracy", "fraction", True

    def __init__(self, images: int, test_images: int, fold: int):
        digits = data.load("digits", fold=fold)
        most = {"train": images, "validation": test_images, "test": test_images}
        splits: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        digest, generator = hashlib.sha256(), torch.Generator().manual_seed(fold)
        for split, (x, y) in digits.splits.items():
            x, y = x[: most[split]], y[: most[split]]
            gratings = grating_images(len(x), generator)
            digest.update(gratings[0].numpy().tobytes())
            turned = (1 - x).transpose(2, 3).contiguous()
            splits[split] = dict(zip(TASKS, ((x, y), (turned, y % 2), gratings), strict=True))
        super().__init__("symbols", splits, digits.manifest | {"gratings": {"sha256": digest.hexdigest()}})
        self.told = True

    def context(self, batch: Batch) -> Context:
        return Context(domain=batch.domain.repeat_interleave(TOKENS) if self.told else None)

    @contextmanager
    def untold(self) -> Iterator[None]:
        self.told = False
        try:
            yield
        finally:
            self.told = True

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.targets)

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs.argmax(-1) == batch.targets).double().mean()


def grating_images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gratings (n, 1, 8, 8) of ten frequencies in any direction and phase, with noise; 1 for one of the finer five."""
    kind = torch.randint(CLASSES, (n, 1, 1), generator=generator)
    angle, phase, contrast = torch.rand(3, n, 1, 1, generator=generator)
    at = torch.arange(SIDE) - (SIDE - 1) / 2
    along = at[:, None] * torch.sin(math.pi * angle) + at * torch.cos(math.pi * angle)
    frequency = 0.06 + 0.04 * kind  # cycles a pixel
    wave = torch.sin(2 * math.pi * (frequency * along + phase)) * (0.5 + 0.5 * contrast)
    noise = 0.1 * torch.randn(n, SIDE, SIDE, generator=generator)
    return (0.5 + 0.5 * wave + noise).clamp(0, 1)[:, None], (kind.flatten() >= CLASSES // 2).long()


def build(arm: str, settings: Settings) -> VisionClassifier:
    """The model of one arm."""
    return VisionClassifier(
        (1, SIDE, SIDE), PATCH, settings["d_model"], settings["n_layers"], settings["n_heads"],
        lambda layer: mixture(arm, settings), CLASSES,
    )  # fmt: skip


def mixture(arm: str, settings: Settings) -> CDSPMoELayer:
    """The feed-forward part of one arm."""
    width, units, experts = (settings[name] for name in ("d_model", "d_base", "n_experts"))
    options = {"n_tasks": len(TASKS), "top_k": TOP_K} | ARMS[arm]
    if arm not in SEPARATE:
        return CDSPMoELayer(width, units, experts, **options)
    options |= {"rank": units // experts, "balance": {"lbl": settings["balance"]}}
    layer = CDSPMoELayer(width, units, experts, conflict=0.0, regularisation=0.0, **options)
    with torch.no_grad():  # links of strength 0 and 1: separate experts
        layer.topology.logits.fill_(-60.0).fill_diagonal_(60.0)
    layer.topology.logits.requires_grad_(False)
    return layer


class Games(Hook):
    """Keeps, every few steps, what the layers say of conflict, links and overlap: means over the layers."""

    def __init__(self, every: int):
        self.every, self.history = every, []

    def after_step(self, state: State) -> None:
        if (state.step + 1) % self.every == 0:
            found = [layer.stats().summary() for layer in cdsp_layers(state.model).values()]
            means = {name: float(torch.stack([each[name] for each in found]).nanmean()) for name in found[0]}
            self.history.append(
                {"step": state.step + 1} | {k: v if math.isfinite(v) else None for k, v in means.items()}
            )


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = Symbols(settings["images"], settings["test_images"], seed)
    torch.manual_seed(seed)
    model, games = build(arm, settings), Games(settings["every"])
    config = TrainConfig(
        settings["steps"], settings["batch"], settings["lr"], weight_decay=0.01, seed=seed, eval_every=None
    )
    budget = training_budget(model, task, settings["batch"], seed)
    state = train(model, task, config, [games], optimizer=two_speeds(model, config))
    told = judged(model, task)
    with task.untold():
        untold = judged(model, task)
    layers = [layer.stats() for layer in cdsp_layers(model).values()]
    off = ~torch.eye(settings["n_experts"], dtype=torch.bool)
    extra = {
        "told": told,
        "untold": untold,
        "accuracy": told["accuracy"],
        "accuracy_untold": untold["accuracy"],
        "information_told": told["information"],
        "cut": fmean(float((layer.strength[off] < 0.1).double().mean()) for layer in layers),
        "half": fmean(float(((layer.strength[off] - 0.5).abs() < 0.05).double().mean()) for layer in layers),
        "history": games.history,
    }
    return trained_row(arm, seed, budget, state.step, untold["information"], **extra)


def judged(model: VisionClassifier, task: Symbols) -> dict:
    """Accuracy, and what the experts of tokens of the test split tell of their task, with or without being told it."""
    counts: list[Tensor] = []
    layers = cdsp_layers(model).values()
    by_task = []
    for domain in range(len(TASKS)):
        only = [batch for batch in task.batches("test", 64) if int(batch.domain[0]) == domain]
        with observing(layers, lambda routing, _: routing.counts) as seen:
            found = evaluated(model, task, only)
        by_task.append(found)
        counts.append(torch.stack([torch.stack(batches).sum(0) for batches in seen.values()]))
    table = torch.stack(counts, 1)  # (layers, tasks, experts)
    information = mutual_information(table, column_k=TOP_K).corrected / math.log(2)
    return {
        "accuracy": fmean(by_task),
        "by_task": by_task,
        "information": float(information.mean()),
        "distance": float(jensen_shannon(table).mean()),
        "routing": (table / table.sum(-1, keepdim=True)).tolist(),
    }


@torch.no_grad()
def evaluated(model: VisionClassifier, task: Symbols, batches: list[Batch]) -> float:
    """Accuracy on some batches."""
    model.eval()
    right = [task.value(model(batch.inputs, task.context(batch)), batch) * len(batch) for batch in batches]
    return float(sum(right)) / sum(map(len, batches))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gains = {arm: rows.minus(CDSP, arm) for arm in ARMS if arm != CDSP}
    nothing = {arm: rows.tost(CDSP, arm, MARGIN) for arm in CONTROLS}
    claimed = [gains[arm] for arm in (MOE_DROPOUT, *CONTROLS)]
    verdict = decide(
        (REPRODUCED, all_above(claimed)),
        (NOT_REPRODUCED, any_below(claimed) or any(test.equivalent for test in nothing.values())),
    )
    idle = [arm for arm, test in nothing.items() if test.equivalent]
    reason = (
        f"Bits that experts tell of an untold task, CDSP minus separate experts with the same dropout of tasks "
        f"{gains[MOE_DROPOUT]}, which is the effect, minus itself without the conflict {gains[NO_CONFLICT]}, minus "
        f"itself with the gradients of other experts {gains[SHUFFLED]}. "
    )
    reason += (
        f"Equivalent within {MARGIN}: CDSP and {' and '.join(idle)}." if idle else "None is shown to be equivalent."
    )
    details = {
        "information": rows.means(),
        "information_told": rows.means("information_told"),
        "gains": gains,
        "equivalence": {arm: {"ci90": test.ci90, "p": test.p} for arm, test in nothing.items()},
        "accuracy": rows.means("accuracy"),
        "accuracy_untold": rows.means("accuracy_untold"),
        "links_below_0.1": rows.means("cut", [arm for arm in ARMS if arm not in SEPARATE]),
        "links_near_half": rows.means("half", [arm for arm in ARMS if arm not in SEPARATE]),
        "parted": {arm: parted(rows, arm) for arm in ARMS if arm not in SEPARATE},
    }
    return Judgement.on(gains[MOE_DROPOUT], verdict, reason, details)


def parted(rows: Rows, arm: str) -> dict[str, float]:
    """Links and overlaps of experts in conflict less those of experts that agree, in the later half of the training."""
    late: Callable[[Row], list[dict]] = lambda row: row.extra["history"][len(row.extra["history"]) // 2 :]  # noqa: E731

    def mean(name: str) -> float:
        values = [
            point[f"{name} in conflict"] - point[f"{name} in agreement"]
            for row in rows.arm(arm) for point in late(row)
            if None not in (point[f"{name} in conflict"], point[f"{name} in agreement"])
        ]  # fmt: skip
        return fmean(values) if values else 0.0

    return {"link": mean("link"), "overlap": mean("overlap")}


STUDY = Study(
    METHOD,
    metric="information",
    unit="bits",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="Penalising the links of experts whose gradients conflict makes the routing of an untold task say more of "
    "it than separate experts with the same dropout of tasks, and than links without that penalty.",
    main=CDSP,
    power=Power((MOE_DROPOUT, MOE), effect=0.1, deviation={"small": (0.09486, 12)}),
)
