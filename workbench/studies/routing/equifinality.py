"""Does the topology of the routing matter, at equal active parameters? (2604.14419)

A byte model on Python sources with many rank-one experts. All hop variants have the same K * H, hence equally many
active parameters, and of one seed the same data in the same order, so differences are paired.
"""

import statistics
from itertools import combinations, islice
from operator import itemgetter

import torch
from torch import nn

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.budget import count_params
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routers import HashRouter, LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.routing.equifinality import (
    METHOD,
    CosineRouter,
    GeometricMoE,
    HopStats,
    RankOneExperts,
    calibrate_halting,
    halting,
    hop_stats,
    iso_space,
    mean_saving,
    observed_hops,
)
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

#: Topologies whose equivalence is the claim -> options of their layers.
COSINE = {
    "H1": {"hops": 1},
    "H2": {"hops": 2},
    "H3": {"hops": 3},
    "H4": {"hops": 4},
    "decoupled": {"hops": 2, "decoupled": True},
}
CONTROLS = ("hash", "random_fixed")
ACTIVE = 12  # K * H: the smallest that 1, 2, 3 and 4 hops divide

MARGIN = 0.03  # of the perplexity of H1: 1 of the paper's 34
SMALL_LOSS = 0.10  # of the perplexity of H1; the paper's controls lose up to 0.065
COLLINEAR = 0.5  # cos(D_0, D_1); the paper has 0.8
SAVING, AT_LEAST, AT_COST = 0.25, 0.20, 0.005  # halting is calibrated for the first, judged by the others

RULE = (
    f"The metric is the perplexity per byte on the test split; the margin is {MARGIN:.0%} of the mean of H1, fixed "
    "before the runs; seeds are paired. "
    "(a) Equivalence: every pair of cosine topologies passes the paired TOST at 5%; contradicted if the means of a "
    "pair differ by more than the margin. "
    "(b) Learning to route helps, a little: hash and random_fixed (those of them that ran) lose against the mean of "
    "the cosine topologies more than these differ among themselves, with a 95% paired interval against H1 above 0, and "
    f"at most {SMALL_LOSS:.0%} of H1; contradicted if that interval lies below 0 or above {SMALL_LOSS:.0%} of H1. "
    f"(c) Hops are collinear: the 95% interval over seeds of the mean cos(D_0, D_1) of H2 lies above {COLLINEAR}; "
    "contradicted if it lies below. "
    "(d) One learned scalar does as much as a second hop: alpha passes the TOST against H2; contradicted if the means "
    "differ by more than the margin. "
    f"(e) Halting of H2, calibrated on validation text to skip {SAVING:.0%} of the expert evaluations, skips at least "
    f"{AT_LEAST:.0%} on the test text and raises its perplexity by less than {AT_COST:.1%} (means over seeds); "
    "contradicted otherwise. "
    "Reproduced if all five hold. Not reproduced if one is contradicted. Not resolved otherwise: an inconclusive TOST "
    "is no equivalence, however large the p of a test for a difference."
)

COMMON = {"d_model": 64, "n_layers": 3, "n_heads": 4, "n_experts": 128, "d_space": 16, "balance": 0.4, "lr": 3e-3}
SMALL_ARMS = ("H1", "H2", "alpha", "hash", "linear")
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 8, "batch_size": 4, "seq_len": 16, "cap": 65_536, "arms": SMALL_ARMS}
    | {"d_model": 16, "n_layers": 2, "n_experts": 24, "d_space": 8, "savings": (), "test_batches": 1},
    "small": COMMON
    | {"seeds": 3, "steps": 400, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "arms": SMALL_ARMS}
    | {"savings": (0.1, 0.4), "test_batches": 8},
    "full": COMMON
    | {"seeds": 5, "steps": 600, "batch_size": 16, "seq_len": 128, "cap": 1_500_000}
    | {"arms": (*COSINE, "alpha", *CONTROLS, "top1", "linear", "iso_cosine")}
    | {"savings": (0.05, 0.1, 0.15, 0.2, 0.3, 0.35, 0.4, 0.45), "test_batches": None},
}


def router(arm: str, top_k: int, settings: Settings) -> nn.Module:
    """The router of one block."""
    width, n_experts, d_space = settings["d_model"], settings["n_experts"], settings["d_space"]
    balance = {"coefficients": {"band": settings["balance"]}}
    if arm == "hash":
        return HashRouter(LanguageModelling.vocab, n_experts, top_k)
    if arm == "linear":
        return LinearRouter(width, n_experts, top_k, **balance)
    d_space = iso_space(width, n_experts) if arm == "iso_cosine" else d_space
    return CosineRouter(width, n_experts, top_k, d_space, trained=arm != "random_fixed", **balance)


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm; what the arms have in common is drawn first, and so starts from the same weights."""
    options = {"hops": 1, "alpha": 1.0} if arm == "alpha" else COSINE.get(arm, {"hops": 1})
    top_k = 1 if arm == "top1" else ACTIVE // options["hops"]
    banks = [RankOneExperts(settings["n_experts"], settings["d_model"], top_k) for _ in range(settings["n_layers"])]
    model = decoder(settings)
    for block, bank in zip(model.blocks, banks, strict=True):
        block.ffn = GeometricMoE(router(arm, top_k, settings), bank, **options)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    budget = training_budget(model, task, config.batch_size, seed)
    train(model, task, config)
    perplexity = perplexity_of(model, task, settings)
    layers = [block.ffn for block in model.blocks]
    extra = hop_measures(model, task, perplexity, settings) if len(layers[0].hops) > 1 else {}
    extra["router_params"] = sum(count_params(layer.hops[0].router) for layer in layers)
    extra["alpha"] = [layer.alpha.item() for layer in layers if layer.alpha is not None]
    return trained_row(arm, seed, budget, config.steps, perplexity, **extra)


def perplexity_of(model: nn.Module, task: LanguageModelling, settings: Settings) -> float:
    return 2 ** task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]


def hop_measures(model: nn.Module, task: LanguageModelling, perplexity: float, settings: Settings) -> dict:
    """Collinearity and norms of the hops, and the halting curve: calibrated on validation text, judged on test text."""
    calibration = [batch.inputs for batch in islice(task.batches("validation", 64), 2)]
    stats = hop_stats(model, calibration)
    curve = []
    for target in sorted({SAVING, *settings["savings"]}):
        threshold = calibrate_halting(model, calibration, target)
        with halting(model, threshold), observed_hops(model) as halted:
            cost = perplexity_of(model, task, settings) / perplexity - 1
        curve.append({"target": target, "threshold": threshold, "saved": mean_saving(halted), "cost": cost})
    return {
        "cosine": mean(s.cosines[0] for s in stats),
        "cosine_by_layer": [mean([s.cosines[0]]) for s in stats],
        "cosine_histogram": histogram(stats),
        "decay": mean(s.decay[1] for s in stats),
        "relative_norms": [mean(s.relative_norms[a] for s in stats) for a in range(len(stats[0].relative_norms))],
        "halting": curve,
    }


def mean(parts) -> float:
    """Mean over tokens and layers of what is defined."""
    return float(torch.cat(list(parts)).nanmean())


def histogram(stats: list[HopStats], bins: int = 40) -> list[int]:
    """Tokens of all layers by cos(D_0, D_1), in equal bins from -1 to 1."""
    values = torch.cat([s.cosines[0] for s in stats]).clamp(-1, 1)  # rounding goes beyond, histc drops what is beyond
    return torch.histc(values[~values.isnan()], bins, min=-1, max=1).long().tolist()


HOLDS, OPEN, CONTRADICTED = "holds", "open", "contradicted"


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    perplexity, h1 = rows.means(), rows.mean("H1")
    margin = MARGIN * h1
    cosine = [arm for arm in COSINE if arm in perplexity]
    pairs = {pair: rows.tost(*pair, margin) for pair in combinations(cosine, 2)}
    pair, widest = max(pairs.items(), key=lambda item: abs(item[1].diff))
    scalar = rows.tost("alpha", "H2", margin)
    means = [perplexity[arm] for arm in cosine]
    losses = {arm: perplexity[arm] - statistics.fmean(means) for arm in CONTROLS if arm in perplexity}
    collinear = rows.interval(rows.of("H2", "cosine"))
    points = [next(p for p in curve if p["target"] == SAVING) for curve in rows.of("H2", "halting")]
    saved, cost = (statistics.fmean(p[name] for p in points) for name in ("saved", "cost"))
    parts = {
        "equivalence": equivalence([*pairs.values()], margin),
        "controls": worst(
            control(loss, rows.minus(arm, "H1"), max(means) - min(means), SMALL_LOSS * h1)
            for arm, loss in losses.items()
        ),
        "collinear": HOLDS if collinear.low > COLLINEAR else CONTRADICTED if collinear.high < COLLINEAR else OPEN,
        "scalar": equivalence([scalar], margin),
        "halting": HOLDS if saved >= AT_LEAST and cost < AT_COST else CONTRADICTED,
    }
    state = worst(parts.values())
    verdict = decide((NOT_REPRODUCED, state == CONTRADICTED), (REPRODUCED, state == HOLDS))
    reason = (
        f"Parts: {', '.join(f'{name} {found}' for name, found in parts.items())}. The effect is the widest difference "
        f"of perplexity between cosine topologies, {pair[0]} minus {pair[1]} with its 90% interval, against a margin "
        f"of {margin:.3g}."
    )
    details = {
        "margin": margin,
        "parts": parts,
        "pairs": [{"a": a, "b": b, "diff": r.diff, "ci90": r.ci90, "p": r.p} for (a, b), r in pairs.items()],
        "alpha_minus_H2": {"diff": scalar.diff, "ci90": scalar.ci90, "p": scalar.p},
        "control_loss": losses,
        "cosine": collinear,
        "halting": {"saved": saved, "cost": cost},
        "linear_minus_H1": perplexity["linear"] - h1,
    }
    if "iso_cosine" in perplexity:
        details["gap_closed_by_iso_cosine"] = (h1 - perplexity["iso_cosine"]) / (h1 - perplexity["linear"])
    return Judgement.on(widest, verdict, reason, details, claimed=(-margin, margin))


def equivalence(results, margin: float) -> str:
    if all(result.equivalent for result in results):
        return HOLDS
    return CONTRADICTED if any(abs(result.diff) > margin for result in results) else OPEN


def control(loss: float, against_h1, spread: float, small: float) -> str:
    if loss > spread and against_h1.low > 0 and loss <= small:
        return HOLDS
    return CONTRADICTED if against_h1.high < 0 or against_h1.low > small else OPEN


def worst(states) -> str:
    return max(states, key=(HOLDS, OPEN, CONTRADICTED).index)


STUDY = Study(
    METHOD,
    metric="perplexity",
    unit="per byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    version=2,
    tested="Cosine-routed models with one to four hops are equivalent in perplexity at equal active parameters; hops "
    "are collinear, one scalar replaces them, and skipping them where they do little costs nothing.",
    power=Power(("H1", "linear"), effect=0.44, level=0.9),  # MARGIN of a perplexity of 14.7
    main="H2",
)
