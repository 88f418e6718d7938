"""Is one model of a mixture of denoisers as good as the specialists, and better than each in the mean? (2205.05131)

A decoder that reads a prefix in both directions, on the bytes of Python sources and their documentation. All arms have
the same weights at the start and process the same number of tokens, row by row; what differs is what is hidden in them,
and so how many tokens are to be said. Judged are three kinds of holes in held-out text, none of which is any arm's own:
a quarter of a row at its end, several of 4 bytes, one of a quarter of the row.

Each arm is asked in the way that it was trained to answer. A model that only ever went on has no use for sentinels: its
holes are what it says in their places while it reads the row from the left, earlier holes given, which is more than a
test by sentinels that it has never seen would grant. The T5 arm says the end of a row as one more hole. What each arm
makes of the other questions is beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean
from typing import Any

import torch
from torch import nn

from workbench.beds.denoised_text import ASKS, HOLES, Denoising, Questions, hidden, questions
from workbench.lib import data
from workbench.lib.core.attention import Attention
from workbench.lib.core.denoising import BYTES, PrefixForm
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains
from workbench.lib.data_mixtures.ul2 import (
    CAUSAL,
    METHOD,
    MODES,
    PREFIX_LM,
    SPAN_PLUS_LM,
    T5_ONLY,
    UL2_PAPER,
    DenoiserSpec,
    MixtureOfDenoisers,
    scaled,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MARGIN = 0.03  # of a specialist's bits: what the mixture may be worse on its ground
OWN = {"short": "R", "suffix": "S", "long": "X"}  # the mode that is meant for a kind of hole


@dataclass(frozen=True)
class Arm:
    """What is trained, and how it is asked for the end of a row and for holes, see `hidden`."""

    specs: tuple[DenoiserSpec, ...]
    modes: bool
    suffix: str
    holes: str

    def ask(self, kind: str) -> str:
        return self.suffix if kind == "suffix" else self.holes


ARMS: Mapping[str, Arm] = {
    "causal": Arm(CAUSAL, False, "causal", "causal"),
    "prefix": Arm(PREFIX_LM, False, "prefix", "prefix"),
    "t5": Arm(T5_ONLY, False, "fill", "fill"),
    "span-lm": Arm(SPAN_PLUS_LM, False, "causal", "fill"),
    "ul2": Arm(UL2_PAPER, True, "prefix", "fill"),
    "ul2-no-modes": Arm(UL2_PAPER, False, "prefix", "fill"),
}
SMALL_ARMS = ("causal", "t5", "span-lm", "ul2")
BASELINES = ("causal", "t5")
GROUND = {"suffix": "causal", "short": "t5", "long": "t5"}  # whose ground a kind of hole is

RULE = (
    "The metric is the mean of bits per hidden byte at the end of a row (suffix) and in its holes, these the mean of "
    "short and long ones; on test text, each arm asked in its own way; intervals are paired over seeds. (a) Ground: "
    "ul2 divided by causal on suffixes, and by t5 on short and on long holes, minus 1: each 90% interval lies below "
    f"{MARGIN:.0%} (one-sided tests of non-inferiority at 5%). (b) Mean: the metric of ul2 minus that of each other "
    "arm but ul2-no-modes: each 95% interval lies below 0. (c) Modes: in the mean over the seeds, of the three modes "
    "the one that is meant for a kind of hole has the fewest bits: R short, S suffix, X long. Reproduced if all three "
    f"hold. Not reproduced if causal or t5 is shown to be more than {MARGIN:.0%} better on a ground of its own and "
    "better in the mean as well. Not resolved otherwise. The effect is ul2 minus the best of the others in the mean."
)

COMMON = {"d_model": 48, "d_hidden": 96, "n_layers": 2, "n_heads": 4, "lr": 5e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "length": 48, "asked_length": 32, "asked": 4, "cap": 65_536}
    | {"d_model": 16, "d_hidden": 16, "arms": SMALL_ARMS},
    "small": COMMON
    | {"seeds": 12, "steps": 500, "batch_size": 16, "length": 64, "asked_length": 48, "asked": 192, "cap": 262_144}
    | {"arms": SMALL_ARMS},
    "full": COMMON
    | {"seeds": 12, "steps": 20_000, "batch_size": 64, "length": 256, "asked_length": 192, "asked": 512}
    | {"cap": 1_048_576, "d_model": 192, "d_hidden": 512, "n_layers": 6, "lr": 2e-3, "arms": tuple(ARMS)},
}


def mixture(arm: str, settings: Settings) -> MixtureOfDenoisers:
    found, length = ARMS[arm], settings["length"]
    return MixtureOfDenoisers(scaled(found.specs, length), PrefixForm(length), BYTES, found.modes)


def texts(settings: Settings) -> TextDomains:
    return data.load("text-domains", domains=("python", "docs"), cap=settings["cap"])


def make_model(settings: Settings) -> DecoderLM:
    width, heads = settings["d_model"], settings["n_heads"]
    return DecoderLM(
        BYTES.size,
        width,
        settings["n_layers"],
        heads,
        lambda layer: GLU(width, settings["d_hidden"]),
        settings["length"],
        attention=lambda layer: Attention(width, heads, causal=True, rope=True),
        learned_positions=False,
    )


def run(arm: str, seed: int, settings: Settings) -> Row:
    found, text = ARMS[arm], texts(settings)
    task = Denoising(text, mixture(arm, settings))
    torch.manual_seed(seed)
    model = make_model(settings)
    steps, size = settings["steps"], settings["batch_size"]
    train(model, task, TrainConfig(steps, size, settings["lr"], seed=seed, eval_every=None, eval_batches=2))
    asked = questions(text, settings["asked_length"], settings["asked"])
    extra: dict[str, Any] = {"said": round(task.mixture.said * size * steps)}
    for kind in HOLES:
        mode = OWN[kind] if found.modes else None
        bits = {ask: hidden(model, asked, kind, BYTES, ask=ask, mode=mode) for ask in ASKS}
        extra |= {kind: bits[found.ask(kind)]} | {f"{kind}_{ask}": value for ask, value in bits.items()}
    if found.modes:
        extra["modes"] = mode_matrix(model, asked, found)
    metric = fmean([extra["suffix"], fmean([extra["short"], extra["long"]])])
    return trained_row(arm, seed, training_budget(model, task, size, seed), steps, metric, **extra)


def mode_matrix(model: nn.Module, asked: Questions, arm: Arm) -> list[list[float]]:
    """Bits per hidden byte in each kind of hole, in the order of `OWN`, by the mode that the model is told."""
    return [[hidden(model, asked, kind, BYTES, ask=arm.ask(kind), mode=mode) for mode in MODES] for kind in OWN]


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    ground = {
        kind: rows.interval(
            [a / b - 1 for a, b in zip(rows.of("ul2", kind), rows.of(other, kind), strict=True)], level=0.9
        )
        for kind, other in GROUND.items()
    }
    others = [arm for arm in rows.arms if not arm.startswith("ul2")]
    mean = {arm: rows.minus("ul2", arm) for arm in others}
    best = min(others, key=rows.mean)
    matrix = torch.tensor(rows.of("ul2", "modes"), dtype=torch.float64).mean(0)
    diagonal = [MODES[int(i)] for i in matrix.argmin(1)] == list(OWN.values())
    beaten = {other for kind, other in GROUND.items() if ground[kind].low > MARGIN}
    verdict = decide(
        (
            REPRODUCED,
            all(found.high < MARGIN for found in ground.values())
            and all(found.high < 0 for found in mean.values())
            and diagonal,
        ),
        (NOT_REPRODUCED, any(mean[arm].low > 0 for arm in beaten)),
    )
    reason = (
        f"Bits per hidden byte, ul2 over the specialist minus 1 (90%; the margin is {MARGIN:.0%}): "
        + ", ".join(f"{kind} over {other} {ground[kind]}" for kind, other in GROUND.items())
        + "; in the mean, ul2 minus "
        + ", minus ".join(f"{arm} {found}" for arm, found in mean.items())
        + f"; the own mode is {'' if diagonal else 'not '}the best for every kind of hole. The effect is ul2 minus "
        f"{best} in the mean."
    )
    details = {
        "over_the_specialist": ground,
        "ul2_minus": mean,
        "modes": matrix.tolist(),
        "bits": {kind: rows.means(kind) for kind in HOLES},
        "asked": {ask: {kind: rows.means(f"{kind}_{ask}") for kind in HOLES} for ask in ASKS},
        "said": {arm: int(said) for arm, said in rows.means("said").items()},
    }
    return Judgement.on(mean[best], verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_hidden_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="With equal tokens processed, a decoder trained on UL2's mixture is within 3 % of a causal one at going on "
    "and of one trained on T5's spans at filling holes, better than each in the mean, and best in the right mode.",
    power=Power(BASELINES, effect=0.125, deviation={"small": (0.139, 12)}),  # 3 % of the bits of t5
)
