"""Is a dense detector tuned better as a mixture of slices of its own blocks, at the cost of one block? (2507.17436)

One dense detector, trained once; every arm tunes the same parts of it from there with the same data in the same order:
the decoder's feed-forward blocks, the enhancer's cross-attention and the heads. The arms differ in what becomes of the
blocks.
"""

import torch
from torch import Tensor, nn

from workbench.beds import glyph_detector as bed
from workbench.beds.glyph_detection import GlyphDetection
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.budget import count_params
from workbench.lib.core.observe import announcing, observing
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.lora_experts.dynamic_dino import METHOD, SlicedFeedForward, TunedLinear, same_copy_share
from workbench.lib.measures.coactivation import coactivation_counts, effective_partners
from workbench.lib.measures.curveball import coactivation_scores
from workbench.studies.core import Settings, Study
from workbench.studies.power import Power
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

COPIES = 8
DENSE = {"experts": 1, "top_k": 1, "balance": 0.0}
ARMS = {
    "dense": DENSE,
    "mixture": {"experts": 2 * COPIES, "top_k": 2},
    "random": {"experts": 2 * COPIES, "top_k": 2, "allocate": False},
    "untied": {"experts": 2 * COPIES, "top_k": 2, "tie": False},
    "wide": DENSE,
    "whole": {"experts": COPIES, "top_k": 1},
    "quarters": {"experts": 4 * COPIES, "top_k": 4},
}
"""Options of each arm. The detector of "wide" has blocks of COPIES times the hidden width, all of it active."""
CONTROLS = ("random", "untied")
KINDS = ("common", "rare", "unseen")  # of texts
FIRST = 20  # steps whose loss is compared
MARGIN = 0.01  # of average precision: the order of the paper's gain on COCO, 1.1 points
EXACT = 1e-4  # relative difference of two losses in float32 that are the same function

RULE = (
    "The metric is the average precision (overlap 0.5) on test scenes, mean over all sixty texts; all intervals are "
    "95% paired intervals over seeds. (a) Start: the mixture's first loss is the dense arm's to a relative "
    f"{EXACT:g} for every seed, and its mean loss over the first {FIRST} steps is below that of the mixture with "
    "random experts and that of the mixture with an untied router (intervals below 0). (b) Gain: mixture minus dense "
    "lies above 0. Reproduced if both hold. Otherwise not reproduced if a first loss differs, if an interval of (a) "
    "lies above 0, or if that of (b) lies below 0 or the paired TOST of the two at a margin of "
    f"{MARGIN}, fixed before the runs, shows them to be equivalent. Not resolved in all other cases."
)

COMMON = {"batch_size": 16, "layers": 3, "lr": 1e-3}
SMALL_ARMS = ("dense", "mixture", "random", "untied", "wide")
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "batch_size": 4, "base_steps": 5, "steps": 4, "held_out": 16, "arms": tuple(ARMS), "samples": 5},
    "small": COMMON
    | {"seeds": 3, "base_steps": 800, "steps": 250, "held_out": 1000, "arms": SMALL_ARMS, "samples": 50},
    "full": COMMON
    | {"seeds": 5, "base_steps": 4000, "steps": 2000, "held_out": 2000, "arms": tuple(ARMS), "samples": 200},
}


def widen(block: nn.Sequential, factor: int) -> nn.Sequential:
    """The same function by a block of `factor` times the hidden width: new units, which nothing downstream uses yet."""
    up, down = block[0], block[2]
    d_model, d_hidden = up.in_features, up.out_features
    wide = nn.Sequential(nn.Linear(d_model, factor * d_hidden), nn.ReLU(), nn.Linear(factor * d_hidden, d_model))
    with torch.no_grad():
        wide[0].weight[:d_hidden], wide[0].bias[:d_hidden] = up.weight, up.bias
        wide[2].weight.zero_()
        wide[2].weight[:, :d_hidden], wide[2].bias[:] = down.weight, down.bias
    return wide


def build(arm: str, seed: int, settings: Settings) -> Adapted:
    """The trained detector of one arm, ready to be tuned."""
    model = bed.base(settings)
    torch.manual_seed(seed)
    if arm == "wide":
        for layer in model.layers:
            layer.ffn = widen(layer.ffn, COPIES)
    return adapt(model, "dynamic-dino", bed.TARGETS, **ARMS[arm])


class Watch(Hook):
    """The losses of the first steps, and at some steps which experts are chosen together on validation scenes.

    Attributes:
        losses: of the first steps.
        shares, partners: by step, for each layer the share of co-selected pairs in one copy, and the effective number
            of partners of an expert (mean over experts).
    """

    def __init__(self, adapted: Adapted, images: Tensor, at: set[int]):
        self.adapted, self.images, self.at = adapted, images, at
        self.losses: list[float] = []
        self.shares: dict[int, list[float]] = {}
        self.partners: dict[int, list[float]] = {}

    def before_step(self, state: State) -> None:
        if state.step in self.at:
            self.look(state.step)

    def after_step(self, state: State) -> None:
        if state.step < FIRST:
            self.losses.append(state.loss)

    def look(self, step: int) -> list[Tensor]:
        """Note the co-selection now; the masks (N, E) of each layer."""
        masks = selections(self.adapted, self.images)
        counts = [coactivation_counts(mask) for mask in masks]
        slices = [layer.experts.slices for layer in announcing(self.adapted.model)]
        self.shares[step] = [same_copy_share(c, k) for c, k in zip(counts, slices, strict=True)]
        self.partners[step] = [float(effective_partners(c).nanmean()) for c in counts]
        return masks


def selections(adapted: Adapted, images: Tensor) -> list[Tensor]:
    """(N, E) of each layer: the experts chosen by every query of the images."""
    with torch.no_grad(), observing(announcing(adapted.model), lambda routing, context: routing.mask()) as seen:
        adapted.model(images)
    return [mask for (mask,) in seen.values()]


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, steps, size = GlyphDetection(settings["held_out"]), settings["steps"], settings["batch_size"]
    adapted = build(arm, seed, settings)
    model = adapted.model
    layers: list[SlicedFeedForward] = announcing(model)
    routed = layers[0].top_k > 1
    watched = next(task.batches("validation", 64)).inputs
    watch = Watch(adapted, watched, {steps * i // 4 for i in range(4)} if routed else set())
    flops = training_budget(model, task, size).flops * steps
    config = TrainConfig(steps, size, settings["lr"], weight_decay=0.0, seed=seed, eval_every=None)
    train(model, task, config, [watch], optimizer=adapted.optimizer(config.lr))
    extra = {"trained": adapted.report()["trained"], "first_losses": watch.losses}
    if routed:
        masks = watch.look(steps)
        generator = torch.Generator().manual_seed(seed)
        nulls = [coactivation_scores(mask, settings["samples"], generator).mean for mask in masks]
        extra |= {
            "steps": list(watch.shares),
            "same_copy": list(watch.shares.values()),
            "partners": list(watch.partners.values()),
            "partners_null": [float(effective_partners(null).nanmean()) for null in nulls],
            "loads": [mask.double().mean(0).tolist() for mask in masks],
            "counts": [coactivation_counts(mask).tolist() for mask in masks],
        }
    scores = task.evaluate(model, "test")
    extra |= {name: scores[name] for name in KINDS}
    unused = sum(count_params(layer.base) for layer in layers)
    unused += sum(layer.weight.numel() for layer in adapted.layers.values() if isinstance(layer, TunedLinear))
    params = count_params(model) - unused
    idle = sum(count_params(layer.experts) * (1 - layer.top_k / layer.n_experts) for layer in layers)
    return Row(arm, seed, params, round(params - idle), flops, steps, scores[task.metric], extra)


def early(row: Row) -> float:
    """Mean of the first losses."""
    return sum(row.extra["first_losses"]) / len(row.extra["first_losses"])


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    losses = {arm: rows.of(arm, "first_losses") for arm in rows.arms}
    starts = [abs(a[0] / b[0] - 1) for a, b in zip(losses["mixture"], losses["dense"], strict=True)]
    jumps = {arm: rows.minus("mixture", arm, early) for arm in CONTROLS}
    gains = {arm: rows.minus("mixture", arm) for arm in rows.arms if arm != "mixture"}
    gain, equal = gains["dense"], rows.tost("mixture", "dense", MARGIN)
    exact, lower = max(starts) <= EXACT, all(interval.high < 0 for interval in jumps.values())
    higher = any(interval.low > 0 for interval in jumps.values())
    verdict = decide(
        (REPRODUCED, exact and lower and gain.low > 0),
        (NOT_REPRODUCED, not exact or higher or gain.high < 0 or equal.equivalent),
    )
    by_kind = {name: rows.minus("mixture", "dense", name) for name in KINDS}
    reason = (
        f"Average precision, mixture minus dense {gain}, {'' if equal.equivalent else 'not '}shown to be "
        f"equivalent within {MARGIN}; first loss of the two within {max(starts):.1e}; loss of the first {FIRST} steps, "
        "mixture minus "
        + ", ".join(f"{arm} {interval}" for arm, interval in jumps.items())
        + f"; on rare texts {by_kind['rare']}. The effect is mixture minus dense."
    )
    details = {
        "ap50": gains,
        "mixture_minus_dense": by_kind,
        "first_loss_differs_by": starts,
        "first_losses": jumps,
        "tost": {"margin": MARGIN, "p": equal.p, "ci90": equal.ci90, "equivalent": equal.equivalent},
        "co_selection": {arm: together(rows.arm(arm)) for arm in rows.arms if "partners" in rows.arm(arm)[0].extra},
    }
    return Judgement.on(gain, verdict, reason, details)


def together(rows: Rows) -> dict:
    """Of each layer, mean over seeds: at the start and at the end the share of pairs in one copy and the effective
    number of partners, and the latter if partners were drawn at random at the same loads."""

    def mean(values: list[list[float]]) -> list[float]:
        return torch.tensor(values, dtype=torch.float64).mean(0).tolist()

    return {
        f"{name}_{when}": mean([row.extra[name][at] for row in rows])
        for name in ("same_copy", "partners")
        for when, at in (("start", 0), ("end", -1))
    } | {"partners_null": mean([row.extra["partners_null"] for row in rows])}


STUDY = Study(
    METHOD,
    metric="ap50",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=lambda settings: settings["arms"],
    run=run,
    judge=judge,
    power=Power(("dense", "random"), effect=MARGIN, level=0.9),
    main="mixture",
)
