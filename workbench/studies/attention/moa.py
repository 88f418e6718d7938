"""Do spans fitted to each head keep more of the context's use than one span for all, at equal density? (2406.14909)

A small byte model with rotary positions learns Python text in which pairs of a key byte and a value byte are strewn at
random distances; wherever a key comes again, its value is the answer. The dense model is trained once for a seed (and
kept, since nothing that is compared trains) and then gets its spans from each arm. Plans are chosen on profiled lengths
and validated at a longer one; recall is measured at the longest profiled length and at one longer than all of these.
"""

import copy
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lib import data
from workbench.lib.attention import moa, moa_plan
from workbench.lib.attention.moa_plan import Plan, SpanRule
from workbench.lib.core import attention, experts, models, train
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.pretrained import pretrained
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch
from workbench.lib.measures.statistics import paired_interval, spearman, tost
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

KEYS, VALUES = 16, 8
FIRST_KEY, FIRST_VALUE = 14, 128  # bytes that the text does not hold; a value's byte says whose it is
TEXT_WEIGHT = 0.3  # of the text's loss beside that of the answers
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
    | {
        "profiled": (32, 64),
        "validated": 80,
        "unseen": 96,
        "rows": 4,
        "alpha_step": 16,
        "densities": (0.5,),
        "gap": 0.05,
    },
    "small": COMMON
    | {"seeds": 3, "steps": 300, "batch_size": 8, "d_model": 64, "d_hidden": 128, "n_layers": 3, "cap": 1_500_000}
    | {"profiled": (128, 256), "validated": 320, "unseen": 384, "rows": 16, "alpha_step": 32},
    "full": COMMON
    | {"seeds": 5, "steps": 3000, "batch_size": 16, "d_model": 128, "d_hidden": 256, "n_layers": 4, "cap": 1_500_000}
    | {"profiled": (128, 256, 512), "validated": 640, "unseen": 768, "rows": 64, "alpha_step": 64}
    | {"block": 16, "sink": 16},
}


def arms(settings: Settings) -> list[str]:
    return ["dense", *(f"{kind}@{rho}" for rho in settings["densities"] for kind in KINDS)]


class Recall:
    """A `Task`: next-byte prediction on text with pairs to recall; metric: accuracy on the answers.

    Args:
        source: text domains with the domain "python".
        seq_len: T, bytes predicted per row.
        spacing: a pair for every so many bytes; half as many of them as distinct keys, up to `KEYS`.
    """

    metric, unit, higher_is_better, name, domains = "recall", "fraction", True, "recall", ("python",)

    def __init__(self, source: data.TextDomains, seq_len: int, spacing: int):
        self.seq_len, self.spacing, self.manifest = seq_len, spacing, source.manifest
        self.text = {split: plain(texts["python"]) for split, texts in source.splits.items()}

    def rows(self, split: str, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (size, length) with pairs, and which of them are answers: values whose key came before."""
        text, pairs = self.text[split], length // self.spacing
        start = torch.randint(len(text) - length, (size, 1), generator=generator)
        tokens = text[start + torch.arange(length)]
        distinct = min(KEYS, max(pairs // 2, 1))
        keys = torch.rand(size, KEYS, generator=generator).argsort(1)[:, :distinct]
        values = keys * VALUES + torch.randint(VALUES, (size, distinct), generator=generator)
        which = torch.randint(distinct, (size, pairs), generator=generator)
        places = torch.rand(size, length // 2 - 1, generator=generator).argsort(1)[:, :pairs] * 2 + 1
        places = places.sort(1).values
        tokens.scatter_(1, places, FIRST_KEY + keys.gather(1, which))
        tokens.scatter_(1, places + 1, FIRST_VALUE + values.gather(1, which))
        return tokens, distances(tokens) > 0

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        tokens, _ = self.rows(split, size, self.seq_len + 1, generator)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(size, dtype=torch.int64))

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        yield self.batch(split, size, torch.Generator().manual_seed(0))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        context = Context()
        losses = F.cross_entropy(model(batch.inputs, context).flatten(0, 1), batch.targets.flatten(), reduction="none")
        answers = (distances(torch.cat([batch.inputs[:, :1], batch.targets], 1)) > 0)[:, 1:].flatten()
        return losses[answers].mean() + TEXT_WEIGHT * losses[~answers].mean(), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        tokens, answers = self.rows(split, 16, self.seq_len, torch.Generator().manual_seed(0))
        return {"recall": float(hits(model, tokens, answers).double().mean())}


def plain(text: Tensor) -> Tensor:
    """Text without the bytes of keys and values; they become question marks."""
    text = text.long()
    foreign = (text >= FIRST_VALUE) | ((text >= FIRST_KEY) & (text < FIRST_KEY + KEYS))
    return text.masked_fill(foreign, ord("?"))


def distances(tokens: Tensor) -> Tensor:
    """(B, T) tokens back to where a value was last said; 0 for what is no value, or a value said first."""
    value = tokens >= FIRST_VALUE
    last = torch.full((len(tokens), KEYS * VALUES), -1)
    result = torch.zeros_like(tokens)
    for place in value.any(0).nonzero().flatten().tolist():
        rows = value[:, place].nonzero().flatten()
        index = tokens[rows, place] - FIRST_VALUE
        before = last[rows, index]
        result[rows, place] = torch.where(before >= 0, place - before, 0)
        last[rows, index] = place
    return result


@torch.no_grad()
def hits(model: nn.Module, tokens: Tensor, answers: Tensor) -> Tensor:
    """(answers,) whether each answer is the model's first choice."""
    return (model(tokens, Context())[:, :-1].argmax(-1) == tokens[:, 1:])[answers[:, 1:]]


def build(settings: Settings) -> models.DecoderLM:
    """The dense model, with random weights."""
    width, heads = settings["d_model"], settings["n_heads"]
    return models.DecoderLM(
        256,
        width,
        settings["n_layers"],
        heads,
        lambda _: experts.GLU(width, settings["d_hidden"]),
        settings["unseen"],
        attention=lambda _: attention.Attention(width, heads, causal=True, rope=True),
        learned_positions=False,
    )


def make_task(settings: Settings) -> Recall:
    source = data.load("text-domains", domains=("python",), cap=settings["cap"])
    return Recall(source, max(settings["profiled"]), settings["spacing"])


def trained(recall: Recall, seed: int, settings: Settings) -> models.DecoderLM:
    """The dense model of a seed; it is kept, since nothing that is compared trains it further."""

    def seeded() -> nn.Module:
        torch.manual_seed(seed)
        return build(settings)

    names = ("lr", "n_heads", "spacing", "steps", "batch_size", "d_model", "d_hidden", "n_layers", "cap")
    recipe = {name: settings[name] for name in names}
    recipe |= {"seq_len": recall.seq_len, "seed": seed, "data": recall.manifest}
    config = train.TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed)
    return pretrained(
        "moa-base", recipe, seeded, lambda model: train.train(model, recall, config), [sys.modules[__name__]]
    )


class Inputs:
    """What plans are made from and judged on: profiled, validation and test rows; answers of the model's own but in
    the test, where the true ones are asked for."""

    def __init__(self, model: nn.Module, recall: Recall, seed: int, settings: Settings):
        rows, lengths = settings["rows"], settings["profiled"]

        def draw(split: str, length: int, stream: int, own: bool = True):
            generator = torch.Generator().manual_seed(train.step_seed(seed, stream))
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
    recall = make_task(settings)
    model = trained(recall, seed, settings).eval()
    inputs = Inputs(model, recall, seed, settings)
    budget = measure_budget(
        model, recall, recall.batch("train", settings["batch_size"], torch.Generator().manual_seed(seed))
    )
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
        right, distance = hits(sparse, tokens, answers), distances(tokens)[answers]
        extra[f"recall_{'longest' if length == longest else 'unseen'}"] = float(right.double().mean())
        extra[f"recall_by_distance_{length}"] = by_distance(right, distance, length)
        extra[f"answer_loss_{length}"] = moa.answer_loss(sparse, tokens, answers)
        extra[f"cache_bytes_{length}"] = cache_bytes(sparse, length)
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=budget.flops * settings["steps"],
        steps=settings["steps"],
        metric=extra["recall_longest"],
        extra=extra,
    )


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


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    rho = min(settings["densities"])
    recall = {arm: [row.metric for row in rows if row.arm == arm] for arm in arms(settings)}
    chosen, uniform, random = (recall[f"{kind}@{rho}"] for kind in ("moa", "uniform", "random"))
    gain, luck = paired_interval(chosen, uniform), paired_interval(chosen, random)
    every = all(a > b for a, b in zip(chosen, uniform, strict=True))
    correlations = [row.extra["correlation"] for row in rows if row.arm == f"random@{rho}"]
    correlation = float(np.mean(correlations))
    equal = tost(chosen, random, MARGIN, paired=True)
    if gain.low > 0 and every and luck.low > 0 and correlation > CORRELATION:
        verdict = REPRODUCED
    elif gain.high < 0 or luck.high < 0 or equal.equivalent or correlation <= CORRELATION / 2:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    reason = (
        f"Recall at density {rho}, moa minus uniform {gain}, above 0 in "
        f"{'every' if every else 'not every'} seed; "
        f"moa minus random {luck}, {'' if equal.equivalent else 'not '}shown to be equivalent within {MARGIN}; "
        f"mean rank correlation of predicted and true rise in loss {correlation:.2f}. The effect is moa minus uniform."
    )
    details = {
        "minus_moa": {
            arm: paired_interval(values, recall[f"moa@{arm.split('@')[1]}"]).as_dict()
            for arm, values in recall.items()
            if "@" in arm and not arm.startswith("moa")
        },
        "recall_unseen": {
            arm: float(np.mean([row.extra["recall_unseen"] for row in rows if row.arm == arm])) for arm in recall
        },
        "correlations": {
            f"{rho}": [row.extra["correlation"] for row in rows if row.arm == f"random@{rho}"]
            for rho in settings["densities"]
        },
        "tost_moa_random": {"margin": MARGIN, "p": equal.p, "ci90": equal.ci90, "equivalent": equal.equivalent},
    }
    return Judgement(verdict, gain.estimate, (gain.low, gain.high), reason, details)


STUDY = Study(
    slug="moa",
    title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    claim="Attention spans fitted to each head by the influence of what they leave out keep more of the context's use "
    "than one span for all heads at the same density, and growing with the length they keep it at unseen lengths.",
    metric="recall",
    unit="fraction",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
