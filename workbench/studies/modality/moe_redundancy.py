"""Does a frozen text model learn to draw in adapters of image tokens alone, better when it is split into experts?

A model of bytes learns Python's documentation and Unicode names, then draws characters from their names. All arms of a
seed start from one text model, whose blocks are split into experts in the middle of its training, or, for "dense", are
not; and they see the same pictures in the same order, so differences are paired. The adapters of the two have the same
number of parameters up to 0.3 percent: the rank of the dense blocks' is larger.
"""

import itertools
import math
from operator import itemgetter

import torch
from torch import Tensor

from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.data.glyphs import FACES
from workbench.lib.measures.information import jensen_shannon
from workbench.lib.measures.redundancy import mean_pair
from workbench.lib.measures.routing import counts_by_class
from workbench.lib.measures.statistics import Interval
from workbench.lib.modality.moe_redundancy import (
    KINDS,
    METHOD,
    ExtendedLM,
    TextView,
    apply_partial_lora,
    expert_redundancy,
    start_rows,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.modality.names_to_glyphs import BOI, NEW, NamesToGlyphs, frequent, text_model, text_task
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

#: Arm -> the text model, the start of the image rows, and what is trained beside these.
ARMS = {
    "gw": ("moe", "gw", "plora"),
    "random": ("moe", "random", "plora"),
    "permuted": ("moe", "permuted", "plora"),
    "dense": ("dense", "gw", "plora"),
    "lora": ("moe", "gw", "lora"),
    "full": ("moe", "gw", "full"),
    "mean": ("moe", "mean", "plora"),
    "linear": ("moe", "linear", "plora"),
}
SMALL_ARMS = ("gw", "random", "permuted", "dense", "lora", "full")
BASELINES = ("random", "permuted")
MARGIN = 0.04  # bits per image token: two percent; and what twelve seeds of the baselines can show
ANOTHER = 10_000  # added to a seed: numbers that have nothing to do with what else is drawn from it

RULE = (
    "The metric is bits per image token (49 codes and the end of the image) of held-out characters; intervals are "
    "paired over seeds. (a) Text: in every arm with partial LoRA and at every seed, the logits of held-out text, and "
    "those of a name before its picture, are bit for bit those before the training. (b) Experts: gw minus dense, "
    "adapters of as many parameters on the text model that was not split: the 90% interval lies below the margin of "
    f"{MARGIN} bits, fixed before the runs (one-sided non-inferiority at 5%). (c) Pathways: the Jensen-Shannon "
    "distance between the experts that text and image tokens of the test rows are sent to, mean over layers, after the "
    "training minus before it: the 95% interval lies above 0. Reproduced if all hold. Not reproduced if (a) fails "
    "anywhere, or the interval of (b) lies above the margin or that of (c) below 0. Not resolved otherwise. The "
    "geometry of the start has an answer of its own: gw minus permuted, the same rows given to other codes, on the "
    "metric and on the mean over all training batches. It makes no difference if both are equivalent to 0 by the "
    f"paired TOST at {MARGIN}; else it helps if the 95% interval of one of the two lies below 0 and of none above, and "
    "harms the other way round."
)

COMMON = {"n_heads": 4, "balance": 0.01, "base_lr": 4e-3, "lr": 1e-2}
PRESETS = {
    "smoke": COMMON
    | {"faces": ("DejaVuSansMono",), "d_model": 16, "d_hidden": 32, "n_layers": 1, "n_experts": 4, "top_k": 2}
    | {"cap": 16_384, "base_steps": 4, "split_steps": 2, "base_batch": 4, "steps": 6, "batch_size": 4, "seeds": 2}
    | {"attention_rank": 4, "expert_rank": 2, "router_rank": 4, "dense_rank": 4}
    | {"test_batches": 1, "text_batches": 1, "arms": SMALL_ARMS},
    "small": COMMON
    | {"faces": ("DejaVuSans",), "d_model": 64, "d_hidden": 128, "n_layers": 2, "n_experts": 8, "top_k": 2}
    | {"cap": 262_144, "base_steps": 400, "split_steps": 250, "base_batch": 8, "steps": 150, "batch_size": 8}
    | {"attention_rank": 8, "expert_rank": 4, "router_rank": 7, "dense_rank": 12}
    | {"seeds": 12, "test_batches": 4, "text_batches": 2, "arms": SMALL_ARMS},
    "full": COMMON
    | {"faces": FACES, "d_model": 128, "d_hidden": 256, "n_layers": 4, "n_experts": 8, "top_k": 2}
    | {"cap": 1_048_576, "base_steps": 8000, "split_steps": 4000, "base_batch": 32, "steps": 3000, "batch_size": 32}
    | {"attention_rank": 16, "expert_rank": 8, "router_rank": 7, "dense_rank": 23}
    | {"seeds": 12, "test_batches": None, "text_batches": None, "arms": tuple(ARMS)},
}


def build(arm: str, seed: int, settings: Settings, task: NamesToGlyphs) -> ExtendedLM:
    """The frozen text model with what is trained in an arm."""
    base, start, trained = ARMS[arm]
    model = text_model(base, seed, settings)
    for layer in moe_layers(model).values():
        layer.router.coefficients.clear()  # a part of the frozen model, which nobody balances any more
    torch.manual_seed(seed)
    ranks = {"*.attention.*": settings["attention_rank"], "*.router.*": settings["router_rank"]}
    ranks |= {"*.experts": settings["expert_rank"]}
    if base == "dense":
        ranks = {"*.attention.*": settings["attention_rank"], "*.ffn.*": settings["dense_rank"]}
    images = None
    if trained == "full":
        model.requires_grad_(True)
    else:
        images = apply_partial_lora(model, ranks, everywhere=trained == "lora")
    text = model.embedding.weight.detach()[frequent(text_task(settings))]
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(NEW - len(task.codebook), text.shape[1], generator=generator) * text.std()
    rows = start_rows(start, task.codebook, text, seed + ANOTHER)
    return ExtendedLM(model, torch.cat([ends, rows]), images)


class _Course(Hook):
    """Loss and gradient norm of every step."""

    def __init__(self):
        self.losses, self.norms = [], []

    def after_step(self, state: State) -> None:
        self.losses.append(state.loss)
        self.norms.append(state.grad_norm)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, text = NamesToGlyphs(settings["faces"]), text_task(settings)
    model, steps, size = build(arm, seed, settings, task), settings["steps"], settings["batch_size"]
    batches, rows = settings["test_batches"], task.rows["test"][:64]
    said, alike = said_of_text(model, text, rows), redundancy(model, rows)
    at_start, ways_at_start = held_out(model, task, batches)
    course = _Course()
    lr = settings["base_lr" if ARMS[arm][2] == "full" else "lr"]
    config = TrainConfig(steps, size, lr, weight_decay=0.0, seed=seed, eval_every=None)
    train(model, task, config, [course])
    same = [torch.equal(a, b) for a, b in zip(said, said_of_text(model, text, rows), strict=True)]
    bits, ways = held_out(model, task, batches)
    on_the_way = torch.tensor(course.losses, dtype=torch.float64) / math.log(2)
    norms = torch.tensor(course.norms[steps // 2 :])
    extra = {
        "text_is_the_same": int(all(same)),
        "text_bits": text.evaluate(TextView(model), "test", settings["text_batches"])["bits_per_byte"],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "at_start": at_start,
        "on_the_way": float(on_the_way.mean()),
        "curve": [round(float(part.mean()), 4) for part in on_the_way.chunk(8)],
        "norm_deviation": float(norms.std() / norms.mean()),
        "wrong_name": task.bits(model, task.with_wrong_names("test"), batches),
        "pathways": [ways_at_start, ways],
        "redundancy": {kind: [alike[kind], value] for kind, value in redundancy(model, rows).items()},
    }
    return trained_row(arm, seed, training_budget(model, task, size, seed), steps, bits, **extra)


@torch.no_grad()
def said_of_text(model: ExtendedLM, text: LanguageModelling, rows: Tensor) -> list[Tensor]:
    """Logits of held-out text, and of names with their pictures behind them, up to where the picture begins."""
    with evaluating(model):
        before = (rows[:, :-1] == BOI).cumsum(1) == 0
        plain = [model(batch.inputs, text_only=True) for batch in itertools.islice(text.batches("test", 16), 2)]
        return [*plain, model(rows[:, :-1], text_only=True)[before]]


def held_out(model: ExtendedLM, task: NamesToGlyphs, batches: int | None) -> tuple[float, float | None]:
    """Bits per image token, and the Jensen-Shannon distance between the experts of text and of image tokens, mean over
    layers; None where there are no experts."""

    def count(routing: Routing, context: Context) -> Tensor:
        real = routing.only(context.mask)
        return counts_by_class(real.expert, context.modality[context.mask][real.token], len(KINDS), real.n_experts)

    with observing(moe_layers(model).values(), count) as seen:
        bits = task.evaluate(model, "test", batches)[task.metric]
    counts = [sum(parts) for parts in seen.values()]
    return bits, float(jensen_shannon(torch.stack(counts)).mean()) if counts else None


def redundancy(model: ExtendedLM, rows: Tensor) -> dict[str, float | None]:
    """Mean cosine between the outputs of two experts, on the text and on the image tokens of some rows."""
    if not moe_layers(model):
        return dict.fromkeys(KINDS)
    return {kind: float(mean_pair(expert_redundancy(model, rows[:, :-1], kind)).mean()) for kind in KINDS}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    partial = [arm for arm in rows.arms if ARMS[arm][2] == "plora"]
    kept = all(value for arm in partial for value in rows.of(arm, "text_is_the_same"))
    experts = rows.minus("gw", "dense", level=0.9)
    apart = rows.interval([after - before for before, after in rows.of("gw", "pathways")])
    verdict = decide(
        (REPRODUCED, kept and experts.high < MARGIN and apart.low > 0),
        (NOT_REPRODUCED, not kept or experts.low > MARGIN or apart.high < 0),
    )
    shape, way = rows.minus("gw", "permuted"), rows.minus("gw", "permuted", "on_the_way")
    equal = [rows.tost("gw", "permuted", MARGIN, what) for what in ("metric", "on_the_way")]
    answer = geometry(shape, way, all(test.equivalent for test in equal))
    effect = rows.minus("gw", "dense")
    reason = (
        f"Text is {'' if kept else 'NOT '}the same to the bit in all {len(partial)} arms with partial LoRA. Bits per "
        f"image token, gw minus dense {experts} (90%; the margin is {MARGIN}). Distance between the pathways of text "
        f"and image, after minus before {apart}. The geometry of the start {answer}: gw minus permuted {shape}, on the "
        f"way {way}; gw minus random {rows.minus('gw', 'random')}. The effect is gw minus dense."
    )
    with_experts = [arm for arm in rows.arms if ARMS[arm][0] == "moe"]
    details = {
        "gw_minus_dense": effect,
        "pathways_after_minus_before": apart,
        "geometry": {"answer": answer, "minus_permuted": shape, "minus_permuted_on_the_way": way},
        "gw_minus_random": rows.minus("gw", "random"),
        "gw_minus_random_on_the_way": rows.minus("gw", "random", "on_the_way"),
        "gw_minus_lora": rows.minus("gw", "lora"),
        "gw_minus_full": rows.minus("gw", "full"),
        "bits": rows.means(),
        "bits_at_start": rows.means("at_start"),
        "wrong_name": rows.means("wrong_name"),
        "text_bits": rows.means("text_bits"),
        "trained": {arm: int(mean) for arm, mean in rows.means("trained").items()},
        "norm_deviation": rows.means("norm_deviation"),
        "redundancy": {
            kind: {
                arm: [rows.mean(arm, lambda row, kind=kind, i=i: row.extra["redundancy"][kind][i]) for i in range(2)]
                for arm in with_experts
            }
            for kind in KINDS
        },
    }
    return Judgement.on(effect, verdict, reason, details)


def geometry(end: Interval, way: Interval, equal: bool) -> str:
    """What the order of the start's rows does, in words, from two differences and whether both are equivalent to 0."""
    below, above = any(x.high < 0 for x in (end, way)), any(x.low > 0 for x in (end, way))
    if equal:
        return "makes no difference"
    if below != above:
        return "helps" if below else "harms"
    return "is not resolved"


STUDY = Study(
    METHOD,
    metric="bits_per_image_token",
    unit="bits/token",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="A frozen text model split into experts learns to draw in adapters of image tokens no worse than one that "
    "was not split does in as many parameters, text stays the same to the bit, and image tokens take pathways of their "
    "own.",
    power=Power(BASELINES, effect=MARGIN, deviation={"small": (0.0403, 12)}),
    main="gw",
)
