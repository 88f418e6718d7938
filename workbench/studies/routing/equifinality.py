"""Does the topology of the routing matter, at equal active parameters? (2604.14419)

A byte model on Python sources with many rank-one experts. All hop variants have the same K * H, hence equally many
active parameters, and of one seed the same data in the same order, so differences are paired.
"""

import statistics

import torch
from torch import nn

from workbench.lib import data
from workbench.lib.core.budget import count_params, measure_budget
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.routers import HashRouter, LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.measures.statistics import mean_interval, paired_interval, tost, tost_matrix
from workbench.lib.routing.equifinality import (
    CosineRouter,
    GeometricMoE,
    HopStats,
    RankOneExperts,
    calibrate_halting,
    halting,
    hop_stats,
    iso_space,
    mean_saving,
)
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

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

COMMON = {
    "d_model": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_experts": 128,
    "d_space": 16,
    "balance": 0.4,
    "lr": 3e-3,
}
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


def arms(settings: Settings) -> list[str]:
    return list(settings["arms"])


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
    width, n_layers = settings["d_model"], settings["n_layers"]
    banks = [RankOneExperts(settings["n_experts"], width, top_k) for _ in range(n_layers)]
    shape = (LanguageModelling.vocab, width, n_layers, settings["n_heads"])
    model = DecoderLM(*shape, lambda _: nn.Identity(), settings["seq_len"])
    for block, bank in zip(model.blocks, banks, strict=True):
        block.ffn = GeometricMoE(router(arm, top_k, settings), bank, **options)
    return model


def run(arm: str, seed: int, settings: Settings) -> Row:
    source = data.load("text-domains", domains=("python",), cap=settings["cap"])
    task = LanguageModelling(source, settings["seq_len"])
    torch.manual_seed(seed)
    model = build(arm, settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_batches=1)
    budget = measure_budget(model, task, task.batch("train", config.batch_size, torch.Generator().manual_seed(seed)))
    train(model, task, config)
    perplexity = perplexity_of(model, task, settings)
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * config.steps,
        steps=config.steps,
        metric=perplexity,
        extra={
            "router_params": sum(count_params(block.ffn.hops[0].router) for block in model.blocks),
            "alpha": [block.ffn.alpha.item() for block in model.blocks if block.ffn.alpha is not None],
            **(hop_measures(model, task, perplexity, settings) if len(model.blocks[0].ffn.hops) > 1 else {}),
        },
    )


def perplexity_of(model: nn.Module, task: LanguageModelling, settings: Settings) -> float:
    return 2 ** task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]


def hop_measures(model: nn.Module, task: LanguageModelling, perplexity: float, settings: Settings) -> dict:
    """Collinearity and norms of the hops, and the halting curve: calibrated on validation text, judged on test text."""
    calibration = [batch.inputs for batch in first(task.batches("validation", 64), 2)]
    test = [batch.inputs for batch in first(task.batches("test", 64), settings["test_batches"])]
    stats = hop_stats(model, calibration)
    curve = []
    for target in sorted({SAVING, *settings["savings"]}):
        threshold = calibrate_halting(model, calibration, target)
        with halting(model, threshold):
            saved = mean_saving(hop_stats(model, test))
            cost = perplexity_of(model, task, settings) / perplexity - 1
        curve.append({"target": target, "threshold": threshold, "saved": saved, "cost": cost})
    return {
        "cosine": mean(s.cosines[0] for s in stats),
        "cosine_by_layer": [mean([s.cosines[0]]) for s in stats],
        "cosine_histogram": histogram(stats),
        "decay": mean(s.decay[1] for s in stats),
        "relative_norms": [mean(s.relative_norms[a] for s in stats) for a in range(len(stats[0].relative_norms))],
        "halting": curve,
    }


def first(batches, count: int | None):
    """The first `count` batches; all for None."""
    return [batch for i, batch in enumerate(batches) if count is None or i < count]


def mean(parts) -> float:
    """Mean over tokens and layers of what is defined."""
    return float(torch.cat(list(parts)).nanmean())


def histogram(stats: list[HopStats], bins: int = 40) -> list[int]:
    """Tokens of all layers by cos(D_0, D_1), in equal bins from -1 to 1."""
    values = torch.cat([s.cosines[0] for s in stats]).clamp(-1, 1)  # rounding goes beyond, histc drops what is beyond
    return torch.histc(values[~values.isnan()], bins, min=-1, max=1).long().tolist()


HOLDS, OPEN, CONTRADICTED = "holds", "open", "contradicted"


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    value: dict[str, list[float]] = {}
    for row in rows:
        value.setdefault(row.arm, []).append(row.metric)
    h1 = statistics.fmean(value["H1"])
    margin = MARGIN * h1
    cosine = {arm: value[arm] for arm in COSINE if arm in value}
    matrix = tost_matrix(cosine, margin, paired=True)
    pair, widest = max(matrix.results.items(), key=lambda item: abs(item[1].diff))
    scalar = tost(value["alpha"], value["H2"], margin, paired=True)
    means = [statistics.fmean(values) for values in cosine.values()]
    losses = {arm: statistics.fmean(value[arm]) - statistics.fmean(means) for arm in CONTROLS if arm in value}
    hops = [row.extra for row in rows if row.arm == "H2"]
    collinear = mean_interval([extra["cosine"] for extra in hops])
    points = [next(p for p in extra["halting"] if p["target"] == SAVING) for extra in hops]
    saved, cost = (statistics.fmean(p[name] for p in points) for name in ("saved", "cost"))
    parts = {
        "equivalence": equivalence([*matrix.results.values()], margin),
        "controls": worst(
            control(loss, paired_interval(value[arm], value["H1"]), max(means) - min(means), SMALL_LOSS * h1)
            for arm, loss in losses.items()
        ),
        "collinear": HOLDS if collinear.low > COLLINEAR else CONTRADICTED if collinear.high < COLLINEAR else OPEN,
        "scalar": equivalence([scalar], margin),
        "halting": HOLDS if saved >= AT_LEAST and cost < AT_COST else CONTRADICTED,
    }
    verdict = {HOLDS: REPRODUCED, OPEN: NOT_RESOLVED, CONTRADICTED: NOT_REPRODUCED}[worst(parts.values())]
    reason = (
        f"Parts: {', '.join(f'{name} {state}' for name, state in parts.items())}. The effect is the widest difference "
        f"of perplexity between cosine topologies, {pair[0]} minus {pair[1]} with its 90% interval, against a margin "
        f"of {margin:.3g}."
    )
    details = {
        "margin": margin,
        "parts": parts,
        "pairs": [{"a": a, "b": b, "diff": r.diff, "ci90": r.ci90, "p": r.p} for (a, b), r in matrix.results.items()],
        "alpha_minus_H2": {"diff": scalar.diff, "ci90": scalar.ci90, "p": scalar.p},
        "control_loss": losses,
        "cosine": {"mean": collinear.estimate, "ci95": (collinear.low, collinear.high)},
        "halting": {"saved": saved, "cost": cost},
        "linear_minus_H1": statistics.fmean(value["linear"]) - h1,
    }
    if "iso_cosine" in value:
        gain = h1 - statistics.fmean(value["linear"])
        details["gap_closed_by_iso_cosine"] = (h1 - statistics.fmean(value["iso_cosine"])) / gain
    return Judgement(verdict, widest.diff, widest.ci90, reason, details)


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
    slug="equifinality",
    title="Equifinality in Mixture of Experts",
    claim="Cosine-routed models with one to four hops are equivalent in perplexity at equal active parameters; hops "
    "are collinear, one scalar replaces them, and skipping them where they do little costs nothing.",
    metric="perplexity",
    unit="per byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
