"""Do several outputs, of which only the best is penalised, deblur better than one? (Liu et al. 2022)

Crops of photographs, blurred by the motion of a window (`beds/moving_crops.py`). The knob is how ambiguous the label
is: the middle frame of the motion always, as in the sets of the paper, or any of the frames. Every arm is the same
small NAFNet with the same first weights, as far as they have the same shape, on the same batches in the same order.

What is judged is what can be used without the label: one output, chosen on the validation images. The best output of
each image takes the label to find; that oracle is reported beside what it gives to heads that are all penalised, and to
independent networks.
"""

from collections.abc import Iterable
from statistics import fmean

import torch
from torch import Tensor, nn

from workbench.beds import moving_crops
from workbench.beds.baseline import seeded
from workbench.errors import unknown
from workbench.lib.core.modes import evaluating
from workbench.lib.core.nafnet import NAFNet
from workbench.lib.core.routing import Context
from workbench.lib.core.task import EVALUATION_BATCH, Batch, Restoration, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.imaging.multi_output_deblur import (
    METHOD,
    MultiOutput,
    OutputReport,
    output_report,
    winner_loss,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

HEADS = 4
KINDS = ("single", "wide", "winner", "plain", "all", "independent")
"""One output; one that is the mean of the heads; the best of the heads and their means; of the heads alone; all heads
penalised; as many networks of one output."""
AMBIGUITIES = (0, 3)
ARMS = [
    *(f"{kind}-{ambiguity}" for ambiguity in AMBIGUITIES for kind in ("single", "winner")),
    *("wide-0", "plain-3", "all-3", "independent-3"),
]
LEAST = 0.04
"""dB that the best single output gains at least in the paper (0.04 to 0.08)."""

RULE = (
    "PSNR on photographs held out. With the middle frame as the label, as in the paper's sets: the best single output, "
    "chosen on validation images, minus the network of one output. Reproduced if the 95% interval of this lies above 0 "
    "and that of the best output of each image minus the one output, too; not reproduced if the first lies wholly "
    f"below {LEAST:g} dB, the least of the paper, or the second below 0; not resolved otherwise. The other ambiguities "
    "and controls are reported and not judged."
)

COMMON = {"width": 8, "batch_size": 16, "rate": 5e-3}
PRESETS = {
    "smoke": COMMON | moving_crops.SMOKE | {"steps": 2, "seeds": 2},
    "small": COMMON | moving_crops.SMALL | {"steps": 300, "seeds": 21},
    "full": COMMON | moving_crops.FULL | {"width": 16, "steps": 20_000, "seeds": 12},
}


class Deblurring(Restoration):
    """Restoration by several outputs: only the best is penalised, and announced as an image's expert; or all are."""

    def __init__(self, task: Restoration, penalise: str = "best"):
        super().__init__(task.name, task.splits, task.manifest)
        if penalise not in ("best", "all"):
            raise unknown("penalise", penalise, ("best", "all"))
        self.penalise = penalise

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch, context = batch.to(device_of(model)), Context()
        outputs = model(batch.inputs, context)
        if self.penalise == "all":
            parts = [winner_loss(output[:, None], batch.targets)[0] for output in outputs.unbind(1)]
            return torch.stack(parts).mean(), context
        loss, winner = winner_loss(outputs, batch.targets)
        model.won(winner, context)
        return loss, context

    def value(self, outputs: Tensor, batch: Batch) -> Tensor:
        report = output_report(outputs, batch.targets)
        return torch.tensor(report.per_output[report.best_single])


class OneOfAll(nn.Module):
    """One output, the mean of the heads: their parameters, and nothing to choose."""

    def __init__(self, backbone: nn.Module, heads: int):
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return (x + self.backbone(x).unflatten(1, (self.heads, x.shape[1])).mean(1))[:, None]

    def won(self, winner: Tensor, context: Context) -> None:
        """There is but one."""


class Several(nn.Module):
    """The outputs of independent networks of one output."""

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return torch.cat([network(x) for network in self.networks], 1)


def network(kind: str, width: int) -> nn.Module:
    """The untrained network of a kind of arm."""
    heads = 1 if kind in ("single", "independent") else HEADS
    backbone = NAFNet(1, width, out_ch=heads)
    return OneOfAll(backbone, heads) if kind == "wide" else MultiOutput(backbone, heads, multiplex=kind != "plain")


def run(arm: str, seed: int, settings: Settings) -> Row:
    kind, _, ambiguity = arm.partition("-")
    task = Deblurring(
        moving_crops.make(settings["crops"], settings["size"], int(ambiguity)), "all" if kind == "all" else "best"
    )
    size, steps = settings["batch_size"], settings["steps"]
    trained = []
    for member in range(HEADS if kind == "independent" else 1):
        own = seed + 1000 * member
        model = seeded(own, lambda: network(kind, settings["width"]))
        budget = training_budget(model, task, size)
        config = TrainConfig(steps, size, settings["rate"], weight_decay=1e-3, seed=own, eval_every=None)
        train(model, task, config)
        trained.append(model)
    model = trained[0] if len(trained) == 1 else Several(trained)
    chosen = report(model, task, "validation").best_single
    found = report(model, task, "test")
    return trained_row(
        arm,
        seed,
        budget,
        steps * len(trained),
        found.per_output[chosen],
        best_overall=found.best_overall,
        worst=found.worst,
        usage=list(found.usage),
        spoiled=spoiled(task),
    )


def report(model: nn.Module, task: Restoration, split: str) -> OutputReport:
    """The outputs for a whole split."""
    with evaluating(model):
        batches = list(task.batches(split, EVALUATION_BATCH))
        outputs = torch.cat([model(batch.inputs) for batch in batches])
    return output_report(outputs, torch.cat([batch.targets for batch in batches]))


def spoiled(task: Restoration) -> float:
    """What the blurred images themselves reach."""
    blurred, label = task.splits["test"][task.domains[0]]
    return output_report(blurred[:, None], label).best_overall


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    single = {a: rows.minus(f"winner-{a}", f"single-{a}") for a in AMBIGUITIES}
    overall = {a: oracle(rows, f"winner-{a}", f"single-{a}") for a in AMBIGUITIES}
    verdict = decide(
        (NOT_REPRODUCED, single[0].high < LEAST or overall[0].high < 0),
        (REPRODUCED, single[0].low > 0 and overall[0].low > 0),
    )
    controls = {
        "wide-0 minus single-0": rows.minus("wide-0", "single-0"),
        "winner-3 minus plain-3, best of each": oracle(rows, "winner-3", "plain-3", both=True),
        "all-3 minus single-3, best of each": oracle(rows, "all-3", "single-3"),
        "independent-3 minus single-3, best of each": oracle(rows, "independent-3", "single-3"),
    }

    def said(gaps: dict) -> str:
        return ", ".join(
            f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] at {name}" for name, gap in gaps.items()
        )

    reason = (
        f"Over one output, by frames that the label may be off the middle: the best single output {said(single)} dB; "
        f"the best output of each image, which takes the label to find, {said(overall)} dB. "
        f"That oracle gives {controls['all-3 minus single-3, best of each'].estimate:+.3f} dB at 3 to heads that are "
        f"all penalised, and {controls['independent-3 minus single-3, best of each'].estimate:+.3f} to "
        f"{HEADS} independent networks."
    )
    details = {
        "single": {str(a): gap for a, gap in single.items()},
        "overall": {str(a): gap for a, gap in overall.items()},
        "controls": controls,
        "psnr": rows.means(),
        "spoiled": rows.means("spoiled"),
        "usage": {arm: [fmean(share) for share in zip(*rows.of(arm, "usage"), strict=True)] for arm in rows.arms},
        "params": rows.means(lambda row: row.params),
    }
    return Judgement.on(single[0], verdict, reason, details, claimed=(LEAST, 0.08))


def oracle(rows: Rows, arm: str, other: str, both: bool = False):
    """The best output of each image of an arm, minus the chosen (`both`: the best) output of another."""
    theirs = rows.of(other, "best_overall") if both else rows.of(other)
    return rows.interval([a - b for a, b in zip(rows.of(arm, "best_overall"), theirs, strict=True)])


STUDY = Study(
    METHOD,
    metric="psnr",
    unit="dB",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    main="winner-0",
    tested="PSNR of the best single output, chosen on validation images, over a network of one output, and of the best "
    "output of each image.",
    power=Power(("single-0", "wide-0"), effect=LEAST, deviation={"small": (0.06113, 12)}),
)
