"""Do spans fitted to each head keep more of the context's use than one span for all, at equal density? (2406.14909)

The dense model of `beds.pair_recall` is trained once for a seed, since nothing that is compared trains, and gets its
spans from each arm. Plans are chosen on profiled lengths and validated at a longer one; recall is measured at the
longest profiled length and at one longer than all of these.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from workbench.beds.pair_recall import PairRecall, base, distances, hits, pair_recall
from workbench.lib.attention import moa, moa_plan
from workbench.lib.attention.moa_plan import Plan, SpanRule
from workbench.lib.core.observe import outputs
from workbench.lib.core.train import step_seed
from workbench.lib.measures.statistics import spearman
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

KINDS = ("moa", "uniform", "random", "static")
MARGIN = 0.02  # recall, for the equivalence with random plans
CORRELATION = 0.6
RANDOM_PLANS, PLANS_TO_RANK = 20, 30

RULE = (
    "The metric is recall (accuracy on the answers) on test text at the longest profiled length; intervals are 95% "
    "paired intervals over seeds, at the lowest density. (a) Gain: moa minus uniform (one span and a sink for all "
    "heads, at least as dense) lies above 0, and every seed's difference does. (b) Not by chance: moa minus random "
    f"(the best of {RANDOM_PLANS} random plans by the same validation) lies above 0. (c) The influence finds it: the "
    f"mean rank correlation of the predicted loss of {PLANS_TO_RANK} further random plans of that density with their "
    f"true rise in loss is above {CORRELATION}. Reproduced if all hold. Not reproduced if the interval of (a) or (b) "
    f"lies below 0, if moa and random are shown to be equivalent within {MARGIN} (paired TOST), or if the mean "
    f"correlation is at most {CORRELATION / 2}. Not resolved otherwise."
)

COMMON = {"lr": 5e-3, "n_heads": 4, "block": 8, "sink": 8, "densities": (0.25, 0.5), "spacing": 12, "gap": 1e-3}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "d_model": 16, "d_hidden": 16, "n_layers": 2, "cap": 65_536}
    | {"profiled": (32, 64), "validated": 80, "unseen": 96, "rows": 4, "alpha_step": 16}
    | {"densities": (0.5,), "gap": 0.05},
    "small": COMMON
    | {"seeds": 12, "steps": 300, "batch_size": 8, "d_model": 64, "d_hidden": 128, "n_layers": 3, "cap": 1_500_000}
    | {"profiled": (128, 256), "validated": 320, "unseen": 384, "rows": 16, "alpha_step": 32},
    "full": COMMON
    | {"seeds": 5, "steps": 3000, "batch_size": 16, "d_model": 128, "d_hidden": 256, "n_layers": 4, "cap": 1_500_000}
    | {"profiled": (128, 256, 512), "validated": 640, "unseen": 768, "rows": 64, "alpha_step": 64}
    | {"block": 16, "sink": 16},
}


def arms(settings: Settings) -> list[str]:
    return ["dense", *(f"{kind}@{rho}" for rho in settings["densities"] for kind in KINDS)]


class Inputs:
    """What plans are made from and judged on: profiled, validation and test rows; answers of the model's own but in
    the test, where the true ones are asked for."""

    def __init__(self, model: nn.Module, recall: PairRecall, seed: int, settings: Settings):
        rows, lengths = settings["rows"], settings["profiled"]

        def draw(split: str, length: int, stream: int, own: bool = True):
            generator = torch.Generator().manual_seed(step_seed(seed, stream))
            tokens, answers = recall.rows(split, rows if own else 4 * rows, length, generator)
            return (moa.own_answers(model, tokens, answers) if own else tokens), answers

        self.profile = {n: draw("train", n, 10 + i) for i, n in enumerate(lengths)}
        self.ranking = draw("validation", max(lengths), 20)
        self.validation = draw("validation", settings["validated"], 21)
        self.test = {n: draw("test", n, 30 + i, own=False) for i, n in enumerate((max(lengths), settings["unseen"]))}


def random_plans(
    rules: list[SpanRule], importance: dict[int, Tensor], density: dict[int, float], block: int, count: int, seed: int
) -> list[Plan]:
    """Plans with a random rule for each head and at most two rules a layer, of the density that `solve_spans` asks for.

    Rules are drawn with a probability that falls with their cost, so that the mean cost is that of the density.
    """
    n_layers, n_heads = next(iter(importance.values())).shape[:2]
    rng = np.random.default_rng(seed)
    cost = np.array([[rule.kept(n) / n for rule in rules] for n in density])
    bound, mean = np.array(list(density.values()))[:, None], cost.mean(0)
    tilts = np.linspace(-40, 40, 801)
    weights = np.exp(-tilts[:, None] * (mean - mean.min()))
    weights /= weights.sum(1, keepdims=True)
    chance = weights[np.abs(weights @ mean - 0.95 * bound.mean()).argmin()]
    plans: dict[bytes, Plan] = {}
    for _ in range(2000):
        pair = rng.choice(len(rules), (1000, n_layers, 2, 1), p=chance)
        picks = np.where(rng.random((1000, n_layers, n_heads)) < 0.5, pair[:, :, 0], pair[:, :, 1])
        kept = cost[:, picks.reshape(1000, -1)].mean(-1)
        for pick in picks[((kept <= bound) & (kept >= 0.9 * bound)).all(0)]:
            if pick.tobytes() not in plans:
                chosen = [[rules[c] for c in layer] for layer in pick]
                plans[pick.tobytes()] = Plan.of(chosen, importance, block, *(set(density) - set(importance)))
            if len(plans) == count:
                return list(plans.values())
    raise RuntimeError(f"2,000,000 random plans hold only {len(plans)} within the densities {density}")


def plans_for(
    kind: str, rho: float, importance: dict[int, Tensor], seed: int, settings: Settings
) -> tuple[list[Plan], dict[int, float]]:
    """The plans an arm may choose from, and the densities that bound them."""
    block, sink, longest = settings["block"], settings["sink"], max(settings["profiled"])
    lengths = (*settings["profiled"], settings["unseen"])
    density = dict.fromkeys(lengths, rho)
    if kind == "uniform":
        shape = next(iter(importance.values())).shape[:2]
        rules = [[SpanRule(-sink, rho, sink)] * shape[1]] * shape[0]
        return [Plan.of(rules, importance, block, settings["unseen"])], density
    if kind == "static":  # one length, one span: what the rules are without their growth
        importance, density, betas = {longest: importance[longest]}, {longest: rho}, (0.0,)
    else:
        betas = ()
    rules = moa_plan.span_rules(list(density), alpha_step=settings["alpha_step"], betas=betas, sink=sink)
    if kind == "random":
        return random_plans(rules, importance, density, block, RANDOM_PLANS + PLANS_TO_RANK, seed), density
    return moa_plan.solve_spans(importance, rules, density, block, gap=settings["gap"]), density


def run(arm: str, seed: int, settings: Settings) -> Row:
    recall = pair_recall(settings)
    model = base(recall, seed, settings)
    inputs = Inputs(model, recall, seed, settings)
    budget = training_budget(model, recall, settings["batch_size"], seed)
    kind, longest, extra = arm.split("@")[0], max(settings["profiled"]), {}
    sparse = copy.deepcopy(model)
    if kind != "dense":
        importance = {n: moa.attention_influence(model, *rows, settings["block"]) for n, rows in inputs.profile.items()}
        plans, _ = plans_for(kind, float(arm.split("@")[1]), importance, seed, settings)
        if kind == "random":
            plans, to_rank = plans[:RANDOM_PLANS], plans[RANDOM_PLANS:]
            dense = moa.answer_loss(model, *inputs.ranking)
            rises = [moa.answer_loss(moa.use_spans(sparse, plan), *inputs.ranking) - dense for plan in to_rank]
            predicted = [plan.losses[longest] for plan in to_rank]
            extra |= {"correlation": spearman(predicted, rises).estimate, "predicted": predicted, "rises": rises}
        plan, losses = moa.best_plan(sparse, plans, *inputs.validation)
        extra |= {
            "density": {str(n): value for n, value in plan.density.items()},
            "predicted_loss": {str(n): value for n, value in plan.losses.items()},
            "candidates": [[*p.losses.values(), loss] for p, loss in zip(plans, losses, strict=True)],
            "validation_loss": min(losses),
            "rules": [[(rule.alpha, rule.beta) for rule in layer] for layer in plan.rules],
            "spans": {str(n): plan.spans(n) for n in (*settings["profiled"], settings["unseen"])},
        }
    for length, (tokens, answers) in inputs.test.items():
        with outputs(sparse) as logits:
            extra[f"answer_loss_{length}"] = moa.answer_loss(sparse, tokens, answers)
        right, distance = hits(*logits, tokens, answers), distances(tokens)[answers]
        extra[f"recall_{'longest' if length == longest else 'unseen'}"] = float(right.double().mean())
        extra[f"recall_by_distance_{length}"] = by_distance(right, distance, length)
        extra[f"cache_bytes_{length}"] = cache_bytes(sparse, length)
    return trained_row(arm, seed, budget, settings["steps"], extra["recall_longest"], **extra)


def by_distance(right: Tensor, distance: Tensor, length: int, bins: int = 8) -> list[list[float]]:
    """[centre of the distances, accuracy, answers] of each eighth of the length that holds answers."""
    which = distance * bins // (length + 1)
    rows = []
    for index in range(bins):
        found = right[which == index]
        if len(found):
            rows.append([(index + 0.5) * length / bins, float(found.double().mean()), len(found)])
    return rows


def cache_bytes(model: nn.Module, length: int) -> int:
    """Bytes of keys and values a text of a length leaves in the cache (one text, float32); read for every token."""
    total = 0
    for layer in moa.attention_layers(model):
        kept = layer.cache(length).capacity if isinstance(layer, moa.MoA) else [length] * layer.n_heads
        total += sum(kept) * (layer.qkv.in_features // layer.n_heads) * 2 * 4
    return total


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    rho = min(settings["densities"])
    chosen, uniform, random = (f"{kind}@{rho}" for kind in ("moa", "uniform", "random"))
    gain, luck, equal = rows.minus(chosen, uniform), rows.minus(chosen, random), rows.tost(chosen, random, MARGIN)
    every = all(a > b for a, b in zip(rows.of(chosen), rows.of(uniform), strict=True))
    correlation = rows.mean(random, "correlation")
    verdict = decide(
        (REPRODUCED, gain.low > 0 and every and luck.low > 0 and correlation > CORRELATION),
        (NOT_REPRODUCED, gain.high < 0 or luck.high < 0 or equal.equivalent or correlation <= CORRELATION / 2),
    )
    reason = (
        f"Recall at density {rho}, moa minus uniform {gain}, above 0 in "
        f"{'every' if every else 'not every'} seed; "
        f"moa minus random {luck}, {'' if equal.equivalent else 'not '}shown to be equivalent within {MARGIN}; "
        f"mean rank correlation of predicted and true rise in loss {correlation:.2f}. The effect is moa minus uniform."
    )
    others = [arm for arm in rows.arms if "@" in arm and not arm.startswith("moa")]
    details = {
        "minus_moa": {arm: rows.minus(arm, f"moa@{arm.split('@')[1]}") for arm in others},
        "recall_unseen": rows.means("recall_unseen"),
        "correlations": {f"{rho}": rows.of(f"random@{rho}", "correlation") for rho in settings["densities"]},
        "tost_moa_random": {"margin": MARGIN, "p": equal.p, "ci90": equal.ci90, "equivalent": equal.equivalent},
    }
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    moa.METHOD,
    metric="recall",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
    tested="Attention spans fitted to each head by the influence of what they leave out keep more of the context's use "
    "than one span for all heads at the same density, and growing with the length they keep it at unseen lengths.",
    power=Power(("uniform@0.25", "random@0.25"), effect=0.05, deviation={"small": (0.039, 12)}),
    trainings=lambda arm: "spans are fitted to a dense model that is trained once for a seed and kept",
)
