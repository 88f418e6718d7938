"""Do gates on frozen LoRAs for two parts of a picture improve these parts beyond merging the LoRAs? (2410.23332)

Scenes with a "face" and a "hand" that are handwritten digits, and a small denoiser that has seen few of them and
blurred, see `glyph_scenes`. A LoRA is trained on close-ups of each part; then both are frozen. Merging adds them at one
fixed scale for each part, the best of a grid on the validation scenes. The gates are trained on whole scenes, as is the
denoiser that is tuned in full for as many steps; judged are the test scenes, with handwritings nobody was trained on.

Beside the rule every arm draws the two boxes of the test scenes anew, and a fixed classifier says how many of the
digits are the wanted ones, and how far they are from real ones.
"""

import statistics
import sys
from itertools import product

import torch
from torch import nn

from workbench.beds import glyph_denoiser as bed
from workbench.beds import glyph_drawing as drawing
from workbench.beds.pretrained import pretrained
from workbench.lib.core import low_rank
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts import mole_diffusion
from workbench.lib.lora_experts.mole_diffusion import attach_mole, scale_sweep, train_region_expert
from workbench.lib.measures.statistics import paired_interval, tost
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

RANK, BATCH = 8, 32
LORA_LR, GATE_LR, TUNE_LR = 2e-3, 1e-2, 1e-3
MARGIN = 0.01  # share of the frozen denoiser's error in the parts

ARMS = ("base", "tuned", "joint", "merged", "local", "global", "mole")
GATES = {"local": (True, False), "global": (False, True), "mole": (True, True)}

RULE = (
    "The metric is the mean square error of the predicted noise inside the boxes of face and hand on test scenes, the "
    "mean over five noise levels; lower is better; all intervals are 95% paired intervals over seeds. (a) MoLE minus "
    "the frozen denoiser lies below 0. (b) MoLE minus the two LoRAs merged at the best fixed scales, chosen on "
    "validation scenes, lies below 0. (c) MoLE minus these on the background does not lie above 0. Reproduced if all "
    "hold. Not reproduced if the interval of (a), (b) or (c) lies above 0, or if the two of (b) are shown to be "
    f"equivalent by a paired TOST at a margin of {MARGIN} of the frozen denoiser's error. Not resolved otherwise."
)

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
PRESETS = {
    "smoke": {"base_steps": 2, "expert_steps": 2, "steps": 2, "held_out": 16, "seeds": 1}
    | {"channels": (16, 16, 16), "scales": (0.0, 1.0), "classifier_steps": 2, "drawing_steps": 2},
    "small": {"base_steps": 400, "expert_steps": 120, "steps": 100, "held_out": 64, "seeds": 3}
    | {"channels": (16, 32, 48), "scales": SCALES, "classifier_steps": 300, "drawing_steps": 25},
    "full": {"base_steps": 2000, "expert_steps": 600, "steps": 500, "held_out": 256, "seeds": 5}
    | {"channels": (16, 32, 48), "scales": SCALES, "classifier_steps": 1000, "drawing_steps": 25},
}


def arms(settings: Settings) -> list[str]:
    return list(ARMS)


def experts(settings: Settings, seed: int) -> tuple[LoRAs, LoRAs]:
    """The LoRAs of faces and of hands, each trained on its close-ups: trained once, then from the cache."""

    def build() -> nn.ModuleDict:
        """A place for the factors, of the right shapes."""
        torch.manual_seed(seed)
        adapted = mole_diffusion.adapt(bed.base(settings), "mole-diffusion", bed.TARGETS, experts=2, rank=RANK)
        return nn.ModuleDict({name.replace(".", "/"): layer.experts for name, layer in adapted.layers.items()})

    def teach(banks: nn.ModuleDict) -> None:
        for e, kind in enumerate(("faces", "hands")):
            config = TrainConfig(settings["expert_steps"], BATCH, lr=LORA_LR, weight_decay=0.0, seed=seed)
            task = bed.GlyphScenes(kind, settings["held_out"])
            lora = train_region_expert(bed.base(settings), task, config, bed.TARGETS, rank=RANK)
            for name, (a, b, scale) in lora.items():
                bank = banks[name.replace(".", "/")]
                with torch.no_grad():
                    bank.a[e], bank.b[e], bank.scale[e] = a, b, scale

    recipe = {"channels": list(settings["channels"]), "base_steps": settings["base_steps"]}
    recipe |= {"steps": settings["expert_steps"], "seed": seed, "data": bed.GlyphScenes("closeups").manifest}
    code = [bed, low_rank, mole_diffusion, sys.modules[__name__]]
    banks = pretrained("glyph-loras", recipe, build, teach, code)
    return tuple(
        {
            name.replace("/", "."): (bank.a[e].detach(), bank.b[e].detach(), float(bank.scale[e]))
            for name, bank in banks.items()
        }
        for e in range(2)
    )


def scaled(loras: tuple[LoRAs, ...], scales: tuple[float, ...]) -> list[LoRAs]:
    return [
        {name: (a, b, s * scale) for name, (a, b, s) in lora.items()} for lora, scale in zip(loras, scales, strict=True)
    ]


def merge(
    denoiser: nn.Module, loras: tuple[LoRAs, ...], task: bed.GlyphScenes, scales: tuple[float, ...]
) -> tuple[Adapted, tuple[float, ...]]:
    """The LoRAs added at the fixed scales, of pairs of these, that are best on the validation scenes; and that pair."""

    def error(scales: tuple[float, ...]) -> float:
        adapted = attach_mole(denoiser, scaled(loras, scales), local_gate=False, global_gate=False)
        try:
            return task.evaluate(denoiser)[task.metric]
        finally:
            adapted.remove()

    best = min(product(scales, repeat=2), key=error)
    return attach_mole(denoiser, scaled(loras, best), local_gate=False, global_gate=False), best


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, denoiser = bed.GlyphScenes("scenes", settings["held_out"]), bed.base(settings)
    torch.manual_seed(seed)
    extra, trained, steps = {}, 0, settings["steps"]
    if arm == "base":
        steps = 0
    elif arm == "tuned":
        train(denoiser, task, TrainConfig(steps, BATCH, lr=TUNE_LR, weight_decay=0.0, seed=seed, eval_batches=1))
        trained = sum(p.numel() for p in denoiser.parameters())
    elif arm == "joint":
        steps = settings["expert_steps"]
        config = TrainConfig(steps, BATCH, lr=LORA_LR, weight_decay=0.0, seed=seed, eval_batches=1)
        lora = train_region_expert(denoiser, bed.GlyphScenes("closeups"), config, bed.TARGETS, rank=2 * RANK)
        attach_mole(denoiser, [lora], local_gate=False, global_gate=False)
        trained = sum(a.numel() + b.numel() for a, b, _ in lora.values())
    else:
        loras = experts(settings, seed)
        if arm == "merged":
            steps = 0
            extra["sweep"] = {
                part: list(
                    scale_sweep(
                        denoiser, [lora], settings["scales"], lambda net, p=part: task.evaluate(net)[p]
                    ).values()
                )
                for part, lora in zip(bed.PARTS, loras, strict=True)
            }
            extra["scales"] = merge(denoiser, loras, task, settings["scales"])[1]
        else:
            local, pooled = GATES[arm]
            adapted = attach_mole(denoiser, loras, local_gate=local, global_gate=pooled)
            config = TrainConfig(steps, BATCH, lr=GATE_LR, weight_decay=0.0, seed=seed, eval_batches=1)
            train(denoiser, task, config, optimizer=adapted.optimizer(GATE_LR))
            trained = adapted.report()["trained"]
            extra |= gates(adapted, denoiser, task)
    found = task.evaluate(denoiser, "test")
    extra |= {region: found[region] for region in bed.REGIONS} | {"trained": trained}
    extra["by_level"] = [found[f"face@{level}"] / 2 + found[f"hand@{level}"] / 2 for level in bed.JUDGED_LEVELS]
    extra |= drawing.drawn(denoiser, drawing.classifier(settings), task, settings["drawing_steps"], seed)
    budget = measure_budget(denoiser, task, task.batch("train", BATCH, torch.Generator().manual_seed(0)))
    return Row(arm, seed, budget.params, budget.active_params, budget.flops * steps, steps, found[task.metric], extra)


@torch.no_grad()
def gates(adapted: Adapted, denoiser: nn.Module, task: bed.GlyphScenes) -> dict:
    """Of the gates on the validation scenes, means over the layers that see 12 x 12 tokens.

    Returns:
        maps: (experts, 12, 12) strength of each expert on the first scene, at a middle level; box_auc: how often a
        token inside the expert's box has a stronger gate than one of the background, by expert; absent: strength of
        each expert in the same scenes without its part, minus in those with it.
    """
    seen: list[torch.Tensor] = []
    handles = [
        layer.observe(lambda layer, routing, _: seen.append(routing.dense())) for layer in adapted.layers.values()
    ]
    scenes, noise = task.fixed("validation")
    level = torch.full((len(noise),), bed.JUDGED_LEVELS[1])
    denoiser.eval()

    def strength(scenes: bed.Scenes) -> torch.Tensor:
        """(scenes, experts, 12, 12)."""
        seen.clear()
        denoiser(bed.add_noise(scenes.images, noise, level), level, scenes.condition)
        maps = [w.view(len(noise), -1, 2) for w in seen]
        wide = torch.stack([w for w in maps if w.shape[1] == 144]).mean(0)
        return wide.transpose(1, 2).unflatten(2, (12, 12))

    maps = strength(scenes)
    inside = nn.functional.max_pool2d(scenes.boxes().float(), 2).bool()
    outside = ~inside.any(1)
    areas, absent = [], []
    for e in range(2):
        a, b = maps[:, e][inside[:, e]], maps[:, e][outside]
        areas.append(float((a[:, None] > b[None, torch.randperm(len(b))[:2000]]).double().mean()))
        without = task.fixed("validation", missing=bed.PARTS[e])[0]
        absent.append(float(strength(without)[:, e].mean() - maps[:, e].mean()))
    for handle in handles:
        handle.remove()
    return {"maps": maps[0].tolist(), "box_auc": areas, "absent": absent}


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    of = {arm: [row.metric for row in rows if row.arm == arm] for arm in ARMS}
    ground = {arm: [row.extra["background"] for row in rows if row.arm == arm] for arm in ARMS}
    minus = {arm: paired_interval(of["mole"], of[arm]) for arm in ARMS if arm != "mole"}
    background = paired_interval(ground["mole"], ground["merged"])
    margin = MARGIN * statistics.fmean(of["base"])
    equivalent = len(of["mole"]) > 1 and tost(of["mole"], of["merged"], margin, paired=True).equivalent
    if minus["base"].high < 0 and minus["merged"].high < 0 and background.low <= 0:
        verdict = REPRODUCED
    elif minus["base"].low > 0 or minus["merged"].low > 0 or background.low > 0 or equivalent:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    reason = (
        f"Error in the parts, MoLE minus the frozen denoiser {minus['base']}, minus the LoRAs merged at their best "
        f"fixed scales {minus['merged']}{', shown to be equivalent' if equivalent else ''}, minus the denoiser tuned "
        f"in full {minus['tuned']}; on the background, minus merged {background}. The effect is MoLE minus merged."
    )
    details = {
        "error": {arm: statistics.fmean(values) for arm, values in of.items()},
        "by_region": {
            arm: {
                region: statistics.fmean(row.extra[region] for row in rows if row.arm == arm) for region in bed.REGIONS
            }
            for arm in ARMS
        },
        "minus": {arm: interval.as_dict() for arm, interval in minus.items()},
        "background_minus_merged": background.as_dict(),
        "drawn": {
            arm: {
                name: statistics.fmean(row.extra[name] for row in rows if row.arm == arm)
                for name in ("drawn_right", "drawn_distance")
            }
            for arm in ARMS
        },
        "scales": [row.extra["scales"] for row in rows if row.arm == "merged"],
        "sweep": {
            part: [
                statistics.fmean(v)
                for v in zip(*(r.extra["sweep"][part] for r in rows if r.arm == "merged"), strict=True)
            ]
            for part in bed.PARTS
        },
        "box_auc": {arm: [row.extra["box_auc"] for row in rows if row.arm == arm] for arm in GATES},
        "absent": {arm: [row.extra["absent"] for row in rows if row.arm == arm] for arm in GATES},
    }
    merged = minus["merged"]
    return Judgement(verdict, merged.estimate, (merged.low, merged.high), reason, details)


STUDY = Study(
    slug="mole-diffusion",
    title="MoLE: Enhancing Human-centric Text-to-image Diffusion via Mixture of Low-rank Experts",
    claim="Frozen LoRAs for face and hand, gated per token and per image, improve these parts beyond what merging the "
    "two does.",
    metric="error in the parts",
    unit="mean square",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
