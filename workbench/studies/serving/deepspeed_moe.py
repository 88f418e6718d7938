"""Does a pyramid of residual MoE layers keep the quality of a far larger MoE, and a distilled student too? (2201.05596)

A byte model on Python sources, with an MoE layer in every block, or in every second as the paper has it. All arms have
the same attention and embedding, width, data and steps; for one seed they see the same batches, so differences are
paired. A residual layer computes two blocks a token where the usual one computes one: that, too, is the paper's
comparison, and the operations stand in the table. An expert has as many places at evaluation as in training, as in the
released scripts.

The teacher of a seed is the model of the arm pr-moe at that seed; it is trained once and kept. A student is one layer
shallower: by an eighth of the depth in the paper and in the full preset, by a quarter in the small one.
"""

import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from workbench.beds import python_text as bed
from workbench.beds.baseline import seeded
from workbench.beds.pretrained import pretrained
from workbench.beds.python_text import decoder, python_text
from workbench.lib.core import balance, capacity, moe, routers
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing, outputs
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.serving import deepspeed_moe
from workbench.lib.serving.deepspeed_moe import (
    METHOD,
    ResidualMoE,
    StagedDistillation,
    block_params,
    every_other,
    feed_forward,
    pyramid_experts,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, decide

MARGIN = 0.01 / math.log(2)  # bits per byte: 0.01 nats, what a smaller model may lose
SMALLER = 1.8  # times fewer parameters
TEACHER = "pr-moe"
BASELINES = ("dense", "moe")


@dataclass(frozen=True)
class Arm:
    """What an arm is.

    Attributes:
        experts: of its MoE layers: "none", "all" (n_experts in each), "pyramid", "first half" or "second half" of them.
        residual: whether a fixed MLP is beside the experts.
        top_k: experts a token is sent to.
        taught: of a student, the share of its steps that have a teacher; None: no student.
    """

    experts: str = "all"
    residual: bool = False
    top_k: int = 1
    taught: float | None = None


ARMS: Mapping[str, Arm] = {
    "dense": Arm("none"),
    "moe": Arm(),
    TEACHER: Arm("pyramid", residual=True),
    "student": Arm("pyramid", residual=True, taught=0.0),
    "student-full": Arm("pyramid", residual=True, taught=1.0),
    "student-staged": Arm("pyramid", residual=True, taught=0.6),
    "top-2": Arm(top_k=2),
    "residual": Arm(residual=True),
    "pyramid": Arm("pyramid"),
    "first-half": Arm("first half"),
    "second-half": Arm("second half"),
}
SMALL_ARMS = ("dense", "moe", TEACHER, "student", "student-staged")

RULE = (
    "The metric is bits per byte on the test split; intervals are paired over seeds, and the margin of "
    f"{MARGIN:.4f} bits (0.01 nats) was fixed before the runs. (a) The pyramid: pr-moe minus moe; the 90% interval "
    "lies below the margin (a one-sided test of non-inferiority at 5%), with at least "
    f"{SMALLER} times fewer parameters in the MoE layers, fixed MLPs, coefficients and routers counted. (b) The "
    "student: student-staged minus moe; likewise. (c) The teacher: student-staged minus student, which had none; the "
    "95% interval lies below 0. Not resolved if moe minus dense does not lie below 0, for then there is no quality to "
    "keep. Reproduced if (a) to (c) hold. Not reproduced if (a) or (b) lies above the margin, or (c) above 0. Not "
    "resolved otherwise. The effect is that of (b). Beside it, without a part in the verdict and in the full preset "
    "alone: a teacher to the end, two experts a token, the pyramid and the fixed MLP one without the other, and MoE "
    "layers in one half of the depth."
)

COMMON = {"n_experts": 16, "base": 4, "last": 8, "n_last": 1, "n_heads": 4, "balance": 0.01, "lr": 3e-3, "every": 2}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536, "arms": SMALL_ARMS}
    | {"d_model": 16, "d_hidden": 16, "n_moe_layers": 2, "n_experts": 8, "base": 2, "last": 4, "test_batches": 1},
    "small": COMMON
    | {"seeds": 17, "steps": 250, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "arms": SMALL_ARMS}
    | {"d_model": 64, "d_hidden": 64, "n_moe_layers": 4, "every": 1, "test_batches": 8},
    "full": COMMON
    | {"seeds": 12, "steps": 3000, "batch_size": 16, "seq_len": 128, "cap": 1_500_000, "arms": tuple(ARMS)}
    | {"d_model": 96, "d_hidden": 96, "n_moe_layers": 4, "test_batches": None},
}


def layers(arm: str, settings: Settings) -> list[int]:
    """Experts of each layer of an arm; 0 where it is dense. A student lacks the first MoE layer of its teacher."""
    found, n = ARMS[arm], settings["n_moe_layers"]
    all_ = [settings["n_experts"]] * n
    experts = {
        "none": [0] * n,
        "all": all_,
        "pyramid": pyramid_experts(n, settings["base"], settings["last"], settings["n_last"]),
        "first half": all_[: n // 2] + [0] * (n - n // 2),
        "second half": [0] * (n - n // 2) + all_[: n // 2],
    }[found.experts]
    if found.taught is not None:
        experts = experts[1:]
    if settings["every"] == 1:
        return experts
    return every_other(experts) if found.taught is None else [*every_other(experts), 0]


def build(arm: str, seed: int, settings: Settings) -> DecoderLM:
    """The model of one arm; what the arms have in common is drawn first, and so starts from the same weights."""

    def made() -> DecoderLM:
        experts, kind = layers(arm, settings), ARMS[arm]
        model = decoder({**settings, "n_layers": len(experts)})
        width, hidden = settings["d_model"], settings["d_hidden"]
        options = {"residual": kind.residual, "top_k": kind.top_k, "balance": settings["balance"]}
        for block, ffn in zip(model.blocks, feed_forward(experts, width, hidden, **options), strict=True):
            block.ffn = ffn
        return model

    return seeded(seed, made)


def config(seed: int, settings: Settings) -> TrainConfig:
    return TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_every=None)


def teacher(seed: int, settings: Settings, watched: bool = False) -> nn.Module:
    """The trained model of the arm pr-moe: trained once for a seed, then from its file."""
    task = python_text(settings)
    recipe = {key: value for key, value in settings.items() if key not in ("arms", "n_experts", "test_batches")}
    recipe |= {"seed": seed, "data": task.manifest}
    code = [sys.modules[__name__], deepspeed_moe, bed, balance, capacity, moe, routers]

    def teach(model: nn.Module) -> None:
        train(model, task, config(seed, settings))

    return pretrained(TEACHER, recipe, lambda: build(TEACHER, seed, settings), teach, code, watched=watched)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, steps, size = python_text(settings), settings["steps"], settings["batch_size"]
    taught = round(steps * (ARMS[arm].taught or 0))
    if arm == TEACHER:
        model = teacher(seed, settings, watched=True)
    else:
        model, hooks, learned = build(arm, seed, settings), [], task
        if taught:
            learned = StagedDistillation(task, teacher(seed, settings), taught)
            hooks = [learned]
        train(model, learned, config(seed, settings), hooks)
    bits, lost = held_out(model, task, settings["test_batches"])
    budget = training_budget(model, task, size, seed)
    flops = budget.flops * steps
    if taught:  # a teacher's forward pass is a part of what the student costs
        learned.step = 0
        flops += (training_budget(model.train(), learned, size, seed).flops - budget.flops) * taught
    sizes = [n for n in layers(arm, settings) if n]
    params = block_params(sizes, settings["d_model"], settings["d_hidden"], ARMS[arm].residual)
    extra = {"moe_params": params, "dropped": lost, "experts_say": coefficients(model, task)}
    return Row(arm, seed, budget.params, budget.active_params, flops, steps, bits, extra)


def held_out(model: nn.Module, task: LanguageModelling, batches: int | None) -> tuple[float, float]:
    """Bits per byte of test text, and the share of its tokens that found no place, the mean over the MoE layers."""

    def lost(routing: Routing, _: Context) -> Tensor:
        return 1 - routing.kept.double().mean()

    with observing(moe_layers(model).values(), lost) as seen:
        bits = task.evaluate(model, "test", batches)["bits_per_byte"]
    shares = [share for layer in seen.values() for share in layer]
    return bits, float(torch.stack(shares).mean()) if shares else 0.0


def coefficients(model: nn.Module, task: LanguageModelling) -> list[float]:
    """Of each residual layer the mean c_0, the weight of what the experts say, over a batch of validation text."""
    found = [layer.coefficient for layer in moe_layers(model).values() if isinstance(layer, ResidualMoE)]
    with ExitStack() as stack:
        said = [stack.enter_context(outputs(linear)) for linear in found]
        task.evaluate(model, "validation", 1)
    return [float(torch.softmax(logits[0], dim=-1)[:, 0].mean()) for logits in said]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    quality = rows.minus("moe", "dense")
    pyramid, student = (rows.minus(arm, "moe", level=0.9) for arm in (TEACHER, "student-staged"))
    taught = rows.minus("student-staged", "student")
    params = {arm: int(mean) for arm, mean in rows.means("moe_params").items()}
    smaller = {arm: params["moe"] / params[arm] for arm in (TEACHER, "student-staged")}
    kept = pyramid.high < MARGIN and student.high < MARGIN and min(smaller.values()) >= SMALLER
    verdict = decide(
        (NOT_RESOLVED, not quality.high < 0),
        (NOT_REPRODUCED, pyramid.low > MARGIN or student.low > MARGIN or taught.low > 0),
        (REPRODUCED, kept and taught.high < 0),
    )
    reason = (
        f"Bits per byte: moe minus dense {quality}; (a) pr-moe minus moe {pyramid}, (b) student-staged minus moe "
        f"{student} (90%; the margin is {MARGIN:.4f}); (c) student-staged minus student {taught}. The MoE layers have "
        f"{smaller[TEACHER]:.2f} and {smaller['student-staged']:.2f} times fewer parameters than those of moe. The "
        "effect is that of (b)."
    )
    details = {
        "moe_minus_dense": quality,
        "pr_moe_minus_moe": pyramid,
        "student_staged_minus_moe": student,
        "student_staged_minus_student": taught,
        "student_staged_minus_pr_moe": rows.minus("student-staged", TEACHER),
        "times_fewer_moe_params": smaller,
        "dropped": rows.means("dropped"),
        "experts_say": torch.tensor(rows.of(TEACHER, "experts_say"), dtype=torch.float64).mean(0).tolist(),
    }
    beside = {
        "student_staged_minus_student_full": ("student-staged", "student-full"),
        "top_2_minus_moe": ("top-2", "moe"),
        "residual_minus_top_2": ("residual", "top-2"),
        "pyramid_minus_moe": ("pyramid", "moe"),
        "second_half_minus_first_half": ("second-half", "first-half"),
    }
    details |= {name: rows.minus(*pair) for name, pair in beside.items() if {*pair} <= {*rows.arms}}
    return Judgement.on(student, verdict, reason, details, claimed=(-math.inf, MARGIN))


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="A pyramid of residual MoE layers with less than half of the parameters is no worse a language model than "
    "the uniform MoE, nor is a shallower student of it, which gains by the teacher of the first part of its training.",
    power=Power(BASELINES, effect=MARGIN, level=0.9, deviation={"small": (0.0222, 12)}),
    main=TEACHER,
)
