"""Do projections for each modality take a Mamba model to the dense loss in fewer steps? (2501.16295)

A decoder of Mamba blocks on the stream of glyphs and their names (`beds.glyph_stream`; full: with speech in front,
`beds.spoken_stream`), everything in tokens, as the paper's second and third setting. Every row of a batch has as many
tokens of image as any other. A token costs the same in all arms but the wider dense one, and one seed gives all arms
the same batches; what the arms have in common starts from the same weights, the part of text included.

The share of the steps, and so of the FLOPs, after which an arm is where dense ends is read off the losses on a little
validation text along the training, by lines between them. It is a fraction of what dense was given: a rate that falls
to the end of the training makes it larger than at a constant one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter

import torch
from torch import Tensor

from workbench.beds.glyph_stream import GlyphStream
from workbench.beds.spoken_stream import SpokenStream
from workbench.lib.core.budget import count_params
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.task import EVALUATION_BATCH
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.glyphs import FACES
from workbench.lib.modality.mixture_of_mamba import (
    METHOD,
    PROJECTIONS,
    MixtureOfMambaBlock,
    mamba_decoder,
    step_sizes,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MARGIN = 0.01
"""Bits per token: a gain below this in one modality is none."""
BASELINES = ("dense", "dense-total")

#: Arm -> what is split. "dense-total" is dense, and as wide as makes it as large as "all".
ARMS: Mapping[str, tuple[str, ...]] = {
    "dense": (),
    "dense-total": (),
    "all": PROJECTIONS,
    "in+out": ("in", "out"),
    "x+dt": ("x", "dt"),
    **{name: (name,) for name in PROJECTIONS},
}
SMALL_ARMS = ("dense", "dense-total", "all", "in+out", "x+dt")
STREAMS = {"glyphs": GlyphStream, "spoken": SpokenStream}
QUANTILES = (0.1, 0.5, 0.9)

RULE = (
    "The metric is bits per token on the test split, the unweighted mean over the modalities; intervals are paired "
    "over seeds, 95%. Of each modality alone: all, with the four projections split, minus dense, at the same steps and "
    f"FLOPs. Not reproduced if in one of them the interval lies above -{MARGIN} bits, the smallest gain that counts. "
    "Reproduced if not so, and it lies below 0 in every modality. Not resolved otherwise. "
    "Beside it, without a part in the verdict: after what share of dense's steps all is where dense ends; the gain in "
    "image minus that in text; the synergy, the gain of all minus the gains of the splits that it is made of; and all "
    "minus a dense model of as many parameters in total."
)

COMMON = {"d_state": 8, "lr": 3e-3, "stream": "glyphs"}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 10, "batch_size": 4, "faces": FACES[4:5], "d_model": 16, "n_layers": 1}
    | {"eval_batches": 1, "test_batches": 1, "arms": SMALL_ARMS},
    "small": COMMON
    | {"seeds": 21, "steps": 200, "batch_size": 8, "faces": FACES[:1], "d_model": 32, "n_layers": 1}
    | {"eval_batches": 1, "test_batches": None, "arms": SMALL_ARMS},
    "full": COMMON
    | {"seeds": 12, "steps": 3000, "batch_size": 32, "faces": FACES, "d_model": 96, "n_layers": 2, "stream": "spoken"}
    | {"d_state": 16, "eval_batches": 4, "test_batches": None, "arms": tuple(ARMS)},
}
EVALUATIONS = 10


@cache
def stream(name: str, faces: Sequence[str]) -> GlyphStream:
    return STREAMS[name](faces)


def build(arm: str, seed: int, settings: Settings, task: GlyphStream) -> DecoderLM:
    """The model of one arm; what it has in common with dense, parts of text included, starts as there."""

    def made(split: Sequence[str], width: int) -> DecoderLM:
        torch.manual_seed(seed)

        def block() -> MixtureOfMambaBlock:
            return MixtureOfMambaBlock(width, len(task.modalities), settings["d_state"], split=split)

        return mamba_decoder(task.vocab, width, settings["n_layers"], task.length, block)

    width = settings["d_model"]
    if arm == "dense-total":
        with torch.device("meta"):
            total = count_params(made(ARMS["all"], width))
            sizes = itertools.takewhile(
                lambda found: found[1] <= total, ((w, count_params(made((), w))) for w in itertools.count(width))
            )
            width = max(sizes)[0]
        return made((), width)
    model, dense = made(ARMS[arm], width), made((), width)
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        state[name if name in state else name.replace("_proj.", "_proj.parts.0.")].copy_(value)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = stream(settings["stream"], settings["faces"])
    model = build(arm, seed, settings, task)
    steps, size = settings["steps"], settings["batch_size"]
    every = max(1, steps // EVALUATIONS)
    config = TrainConfig(
        steps, size, settings["lr"], seed=seed, eval_every=every, eval_batches=settings["eval_batches"]
    )
    history = train(model, task, config).history
    test = by_modality(task.evaluate(model, "test", settings["test_batches"]), task)
    curve = [[step, *(round(bits, 5) for bits in by_modality(metrics, task).values())] for step, metrics in history]
    budget = training_budget(model, task, size, seed)
    mean = sum(test.values()) / len(test)
    return trained_row(arm, seed, budget, steps, mean, **test, curve=curve, step_sizes=spread(model, task))


def by_modality(metrics: Mapping[str, float], task: GlyphStream) -> dict[str, float]:
    return {name: metrics[f"{task.metric}/{name}"] for name in task.modalities}


def spread(model: DecoderLM, task: GlyphStream) -> list[list[list[float]]]:
    """Of each block and modality, the 10, 50 and 90 % quantile of the step Delta over test tokens and channels."""
    batch = next(task.batches("test", EVALUATION_BATCH))
    with evaluating(model):
        found = step_sizes(model, lambda: task.loss(model, batch))
    modality = batch.modality.flatten()

    def quantiles(delta: Tensor) -> list[float]:
        ordered = delta.flatten().sort().values  # torch's own quantile takes no more than 2^24 numbers
        return [round(float(ordered[int(q * (len(ordered) - 1))]), 6) for q in QUANTILES]

    return [[quantiles(delta[modality == m]) for m in range(len(task.modalities))] for delta in found.values()]


def share_of_steps(curve: Sequence[Sequence[float]], column: int, target: float) -> float:
    """The share of the steps of a curve after which its loss is the target, by lines between the evaluations.

    Infinite where it never is; that of the first evaluation where it is then already.
    """
    points = [(row[0], row[column]) for row in curve]
    if points[0][1] <= target:
        return points[0][0] / points[-1][0]
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= target < high:
            return (before + (after - before) * (high - target) / (high - low)) / points[-1][0]
    return math.inf


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    modalities = STREAMS[settings["stream"]].modalities
    gains = {name: rows.minus("all", "dense", name) for name in modalities}
    verdict = decide(
        (NOT_REPRODUCED, any(gain.low > -MARGIN for gain in gains.values())),
        (REPRODUCED, all(gain.high < 0 for gain in gains.values())),
    )
    shares = {
        name: [
            share_of_steps(own, column, dense[-1][column])
            for own, dense in zip(rows.of("all", "curve"), rows.of("dense", "curve"), strict=True)
        ]
        for column, name in enumerate(modalities, start=1)
    }
    parts = [arm for arm in PROJECTIONS if arm in rows.arms] or ["in+out", "x+dt"]
    total = rows.minus("all", "dense-total")

    def synergy(name: str) -> list[float]:
        arms = [rows.of(arm, name) for arm in ("all", "dense", *parts)]
        return [(one - dense) - sum(part - dense for part in some) for one, dense, *some in zip(*arms, strict=True)]

    def first(name: str) -> str:
        early = sorted(shares[name])[len(shares[name]) // 2]
        reached = sum(share < math.inf for share in shares[name])
        return f"{name} {early:.0%} (reached in {reached} of {len(shares[name])} seeds)"

    overall = rows.minus("all", "dense")
    said = "; ".join(f"{name} {gain}" for name, gain in gains.items())
    reason = (
        f"Bits per token, all minus dense: {said}. Median share of dense's steps: {', '.join(map(first, modalities))}. "
        f"All minus dense of as many parameters: {total}. The effect is all minus dense, the mean over the modalities."
    )
    image = [
        (a - b) - (c - d)
        for a, b, c, d in zip(
            *(rows.of(arm, name) for name in ("image", "text") for arm in ("all", "dense")), strict=True
        )
    ]
    details = {
        "all_minus_dense": gains,
        "gains": {
            arm: {name: rows.minus(arm, "dense", name) for name in modalities} for arm in rows.arms if arm != "dense"
        },
        "image_minus_text": rows.interval(image),
        "synergy": {name: rows.interval(synergy(name)) for name in modalities},
        "synergy_over": parts,
        "all_minus_dense_total": {name: rows.minus("all", "dense-total", name) for name in modalities},
        "share_of_steps": {name: [s if s < math.inf else None for s in found] for name, found in shares.items()},
        "params": {arm: rows.arm(arm)[0].params for arm in rows.arms},
        "step_sizes": {
            arm: torch.tensor(rows.of(arm, "step_sizes"), dtype=torch.float64).mean(0).tolist() for arm in rows.arms
        },
    }
    return Judgement.on(overall, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_token",
    unit="bits/token",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="At equal steps and FLOPs, the four projections split by modality take a small Mamba model lower than the "
    "dense one on every modality of a stream of tokens.",
    # The effect is what the seeds of six core-minutes can see, by the deviation of the baselines alone.
    power=Power(BASELINES, effect=0.025, deviation={"small": (0.0382, 12)}),
    main="all",
)
