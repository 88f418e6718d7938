"""Do gates on frozen LoRAs for two parts of a picture improve these parts beyond merging the LoRAs? (2410.23332)

Scenes with a "face" and a "hand" that are handwritten digits, and a small denoiser that has seen few of them and
blurred, see `glyph_scenes`. A LoRA is trained on close-ups of each part; then both are frozen. Merging adds them at one
fixed scale for each part, the best of a grid on the validation scenes. The gates are trained on whole scenes, as is the
denoiser that is tuned in full for as many steps; judged are the test scenes, with handwritings nobody was trained on.

Beside the rule every arm draws the two boxes of the test scenes anew, and a fixed classifier says how many of the
digits are the wanted ones, and how far they are from real ones.
"""

import sys
from itertools import product
from statistics import fmean

import torch
from torch import Tensor, nn

from workbench.beds import glyph_drawing, glyph_scenes
from workbench.beds.glyph_denoiser import TARGETS, base
from workbench.beds.glyph_scenes import JUDGED_LEVELS, PARTS, REGIONS, GlyphScenes, Scenes, add_noise
from workbench.beds.pretrained import pretrained
from workbench.lib.core import low_rank
from workbench.lib.core.adapt import Adapted
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.modes import evaluating
from workbench.lib.core.observe import observing
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts import mole_diffusion
from workbench.lib.lora_experts.mole_diffusion import attach_mole, scale_sweep, train_region_expert
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

RANK, BATCH = 8, 32
LORA_LR, GATE_LR, TUNE_LR = 2e-3, 1e-2, 1e-3
MARGIN = 0.01  # share of the frozen denoiser's error in the parts

ARMS = ("base", "tuned", "joint", "merged", "local", "global", "mole")
STILL = {"base": "it is the denoiser as it is kept", "merged": "LoRAs that are trained once and kept are added"}
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


def config(steps: int, lr: float, seed: int) -> TrainConfig:
    return TrainConfig(steps, BATCH, lr=lr, weight_decay=0.0, seed=seed, eval_every=None)


def experts(settings: Settings, seed: int) -> tuple[LoRAs, LoRAs]:
    """The LoRAs of faces and of hands, each trained on its close-ups: trained once, then from the cache."""

    def build() -> nn.ModuleDict:
        """A place for the factors, of the right shapes."""
        torch.manual_seed(seed)
        adapted = mole_diffusion.adapt(base(settings), "mole-diffusion", TARGETS, experts=2, rank=RANK)
        return nn.ModuleDict({name.replace(".", "/"): layer.experts for name, layer in adapted.layers.items()})

    def teach(banks: nn.ModuleDict) -> None:
        for e, kind in enumerate(("faces", "hands")):
            task, plan = GlyphScenes(kind), config(settings["expert_steps"], LORA_LR, seed)
            lora = train_region_expert(base(settings), task, plan, TARGETS, rank=RANK)
            for name, (a, b, scale) in lora.items():
                bank = banks[name.replace(".", "/")]
                with torch.no_grad():
                    bank.a[e], bank.b[e], bank.scale[e] = a, b, scale

    recipe = {"channels": list(settings["channels"]), "base_steps": settings["base_steps"]}
    recipe |= {"steps": settings["expert_steps"], "seed": seed, "data": GlyphScenes("closeups").manifest}
    code = [glyph_scenes, low_rank, mole_diffusion, sys.modules[__name__]]
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
    denoiser: nn.Module, loras: tuple[LoRAs, ...], task: GlyphScenes, scales: tuple[float, ...]
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
    task, denoiser = GlyphScenes("scenes", settings["held_out"]), base(settings)
    torch.manual_seed(seed)
    extra, trained, steps = {}, 0, settings["steps"]
    if arm == "base":
        steps = 0
    elif arm == "tuned":
        train(denoiser, task, config(steps, TUNE_LR, seed))
        trained = sum(p.numel() for p in denoiser.parameters())
    elif arm == "joint":
        steps = settings["expert_steps"]
        plan = config(steps, LORA_LR, seed)
        lora = train_region_expert(denoiser, GlyphScenes("closeups"), plan, TARGETS, rank=2 * RANK)
        attach_mole(denoiser, [lora], local_gate=False, global_gate=False)
        trained = sum(a.numel() + b.numel() for a, b, _ in lora.values())
    elif arm == "merged":
        steps, loras = 0, experts(settings, seed)
        extra["sweep"] = {
            part: list(
                scale_sweep(denoiser, [lora], settings["scales"], lambda net, p=part: task.evaluate(net)[p]).values()
            )
            for part, lora in zip(PARTS, loras, strict=True)
        }
        extra["scales"] = merge(denoiser, loras, task, settings["scales"])[1]
    else:
        local, pooled = GATES[arm]
        adapted = attach_mole(denoiser, experts(settings, seed), local_gate=local, global_gate=pooled)
        train(denoiser, task, config(steps, GATE_LR, seed), optimizer=adapted.optimizer(GATE_LR))
        trained = adapted.report()["trained"]
        extra |= gates(adapted, denoiser, task)
    found = task.evaluate(denoiser, "test")
    extra |= {region: found[region] for region in REGIONS} | {"trained": trained}
    extra["by_level"] = [found[f"face@{level}"] / 2 + found[f"hand@{level}"] / 2 for level in JUDGED_LEVELS]
    judge_of_digits = glyph_drawing.classifier(settings)
    extra |= glyph_drawing.drawn(denoiser, judge_of_digits, task, settings["drawing_steps"], seed)
    return trained_row(arm, seed, training_budget(denoiser, task, BATCH), steps, found[task.metric], **extra)


def gates(adapted: Adapted, denoiser: nn.Module, task: GlyphScenes) -> dict:
    """Of the gates on the validation scenes, means over the layers that see 12 x 12 tokens.

    Returns:
        maps: (experts, 12, 12) strength of each expert on the first scene, at a middle level; box_auc: how often a
        token inside the expert's box has a stronger gate than one of the background, by expert; absent: strength of
        each expert in the same scenes without its part, minus in those with it.
    """
    scenes, noise = task.fixed("validation")
    level = torch.full((len(noise),), JUDGED_LEVELS[1])

    def strength(scenes: Scenes) -> Tensor:
        """(scenes, experts, 12, 12)."""
        with evaluating(denoiser), observing(adapted.layers.values(), lambda routing, context: routing.dense()) as seen:
            denoiser(add_noise(scenes.images, noise, level), level, scenes.condition)
        maps = [weights.view(len(noise), -1, 2) for (weights,) in seen.values()]
        wide = torch.stack([w for w in maps if w.shape[1] == 144]).mean(0)
        return wide.transpose(1, 2).unflatten(2, (12, 12))

    maps = strength(scenes)
    inside = nn.functional.max_pool2d(scenes.boxes().float(), 2).bool()
    outside = ~inside.any(1)
    areas, absent = [], []
    for e in range(2):
        a, b = maps[:, e][inside[:, e]], maps[:, e][outside]
        areas.append(float((a[:, None] > b[None, torch.randperm(len(b))[:2000]]).double().mean()))
        without = task.fixed("validation", missing=PARTS[e])[0]
        absent.append(float(strength(without)[:, e].mean() - maps[:, e].mean()))
    return {"maps": maps[0].tolist(), "box_auc": areas, "absent": absent}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    minus = {arm: rows.minus("mole", arm) for arm in ARMS if arm != "mole"}
    frozen, merged, background = minus["base"], minus["merged"], rows.minus("mole", "merged", "background")
    equivalent = rows.tost("mole", "merged", MARGIN * rows.mean("base")).equivalent
    verdict = decide(
        (REPRODUCED, frozen.high < 0 and merged.high < 0 and background.low <= 0),
        (NOT_REPRODUCED, frozen.low > 0 or merged.low > 0 or background.low > 0 or equivalent),
    )
    reason = (
        f"Error in the parts, MoLE minus the frozen denoiser {frozen}, minus the LoRAs merged at their best fixed "
        f"scales {merged}{', shown to be equivalent' if equivalent else ''}, minus the denoiser tuned in full "
        f"{minus['tuned']}; on the background, minus merged {background}. The effect is MoLE minus merged."
    )
    sweeps = rows.of("merged", "sweep")
    details = {
        "error": rows.means(),
        "by_region": {arm: {region: rows.mean(arm, region) for region in REGIONS} for arm in ARMS},
        "minus": minus,
        "background_minus_merged": background,
        "drawn": {arm: {name: rows.mean(arm, name) for name in ("drawn_right", "drawn_distance")} for arm in ARMS},
        "scales": rows.of("merged", "scales"),
        "sweep": {part: [fmean(v) for v in zip(*(s[part] for s in sweeps), strict=True)] for part in PARTS},
        "box_auc": {arm: rows.of(arm, "box_auc") for arm in GATES},
        "absent": {arm: rows.of(arm, "absent") for arm in GATES},
    }
    return Judgement.on(merged, verdict, reason, details)


STUDY = Study(
    mole_diffusion.METHOD,
    metric="error in the parts",
    unit="mean square",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power(("joint", "global"), effect=0.02),
    main="mole",
    trainings=lambda arm: STILL.get(arm, 1),
)
