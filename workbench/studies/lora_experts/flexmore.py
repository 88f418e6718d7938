"""Can experts that were trained apart be cut to low rank, and to a third of their parameters, at no loss? (2602.08818)

A small byte model has learned three kinds of text together. The owners of five domains, these three on text it has not
seen and two new ones, train one whole feed-forward expert each, apart. The mixture of all six experts, the public one
among them, is then compared with the same mixture after the cut. All arms of one seed start from the same trained
experts, so their differences are paired; experts are trained once and kept.
"""

import hashlib
import random
import statistics
import sys
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from workbench.beds.pretrained import pretrained
from workbench.lib import data
from workbench.lib.core import low_rank, routers
from workbench.lib.core.adapt import Adapted, adapt, expert_ffn
from workbench.lib.core.budget import measure_budget
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains
from workbench.lib.lora_experts import flexmore
from workbench.lib.lora_experts.flexmore import Expert, count_parameters, domain_rows, merge_experts, take_expert
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, Row, Settings, Study

TEXT = ("python", "docs", "names")
KINDS = {"python": "text", "docs": "text", "names": "knowledge", "facts": "knowledge", "arithmetic": "reasoning"}
DOMAINS = tuple(KINDS)
RANKS = (1, 2, 4, 8, 16, 32)
THIRD = 16  # a third of a full expert's parameters, at widths 64 and 128
CHOICES = tuple(rank for rank in RANKS if rank <= THIRD)
TARGETS = "*.ffn.*"
MODULUS, FACTS = 97, 128
LR = 3e-3

#: Arm -> rank of every expert; None: chosen for each domain.
CUTS = {"full": 0, **{f"rank {rank}": rank for rank in RANKS}, "chosen ranks": None}
LORA = f"trained at rank {THIRD}"
MARGIN = 0.02  # bits per byte

RULE = (
    "The metric is bits per byte on the test split, the mean over five domains, of the mixture of all experts without "
    "any training after the merge. The rank of each domain's expert is the one of "
    f"{', '.join(map(str, CHOICES))} at which the mixture of it and the public expert does best on the domain's "
    f"validation split; {THIRD} is a third of a full expert's parameters, so a third is the most the cut mixture has. "
    "(a) Cut minus full: the 90% paired interval over seeds lies below the margin of "
    f"{MARGIN} bits per byte, fixed before the runs (a one-sided test of non-inferiority at 5%). (b) Cut minus public "
    "model: the 95% paired interval lies below 0. Not resolved if full minus public model does not lie below 0, for "
    "then the experts have nothing to lose. Reproduced if (a) and (b) hold. Not reproduced if the interval of (a) lies "
    "above the margin or that of (b) above 0. Not resolved otherwise. Experts that are trained at the rank from the "
    "start, and how much of its gain a domain keeps at each rank, are reported beside."
)

COMMON = {"d_model": 64, "d_hidden": 128, "n_layers": 2, "n_heads": 4, "batch_size": 16}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 1, "public_steps": 10, "steps": 3, "batch_size": 4, "seq_len": 16, "cap": 65_536}
    | {"n_layers": 1, "batches": 1},
    "small": COMMON | {"seeds": 3, "public_steps": 400, "steps": 120, "seq_len": 64, "cap": 262_144, "batches": 2},
    "full": COMMON
    | {"seeds": 5, "public_steps": 5000, "steps": 1000, "seq_len": 128, "cap": 1_048_576, "batches": None},
}


def arms(settings: Settings) -> list[str]:
    return ["public", *CUTS, LORA]


@cache
def texts(cap: int) -> tuple[TextDomains, TextDomains]:
    """What the public model is trained on, and what the owners have: other halves of the training text."""
    found = data.load("text-domains", domains=TEXT, cap=cap)
    train_text = found.splits["train"]
    halves = [{}, {}]
    for name, text in train_text.items():
        halves[0][name], halves[1][name] = text.tensor_split(2)
    public = TextDomains(found.name, TEXT, found.splits | {"train": halves[0]}, found.manifest)
    splits, manifest = {"train": halves[1]}, dict(found.manifest)
    for split in ("validation", "test"):
        splits[split] = dict(found.splits[split])
    for name, lines in (("facts", facts), ("arithmetic", sums)):
        for split, share in (("train", 2), ("validation", 8), ("test", 8)):
            size = cap // share
            drawn = lines(split)
            text = "".join(next(drawn) for _ in range(size // 8))[:size].encode()
            splits[split][name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        stream = b"".join(bytes(splits[split][name].tolist()) for split in splits)
        manifest[name] = {"source": "generated", "sha256": hashlib.sha256(stream).hexdigest(), "bytes": len(stream)}
        manifest[name]["splits"] = {split: len(splits[split][name]) for split in splits}
    return public, TextDomains("owners", DOMAINS, splits, manifest)


def sums(split: str) -> Iterator[str]:
    """Sums and products of two numbers modulo 97; a split has a twentieth of the questions, training has the others."""
    questions = [(a, sign, b) for a in range(MODULUS) for b in range(MODULUS) for sign in "+*"]
    random.Random(0).shuffle(questions)
    held = len(questions) // 20
    parts = {"validation": questions[:held], "test": questions[held : 2 * held], "train": questions[2 * held :]}
    generator = random.Random(f"sums {split}")
    while True:
        a, sign, b = generator.choice(parts[split])
        yield f"{a}{sign}{b}={(a + b if sign == '+' else a * b) % MODULUS}\n"


def facts(split: str) -> Iterator[str]:
    """Names with random values: the same table in all splits, for facts can be known and not be found out."""
    table = random.Random(1)
    rows = ["".join(table.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(FACTS)]
    generator = random.Random(f"facts {split}")
    while True:
        row = generator.choice(rows)
        yield f"{row[:4]} is {row[4:]}\n"


def make_model(settings: Settings) -> DecoderLM:
    width, hidden = settings["d_model"], settings["d_hidden"]
    shape = (LanguageModelling.vocab, width, settings["n_layers"], settings["n_heads"])
    return DecoderLM(*shape, lambda layer: GLU(width, hidden), settings["seq_len"])


def public_model(settings: Settings) -> DecoderLM:
    """Trained once, then from the cache."""
    source = texts(settings["cap"])[0]
    task = LanguageModelling(source, settings["seq_len"])

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_model(settings)

    def teach(model: nn.Module) -> object:
        return train(model, task, TrainConfig(settings["public_steps"], settings["batch_size"], LR, eval_batches=1))

    return pretrained("flexmore-public", recipe(settings, source), build, teach, [sys.modules[__name__]])


def recipe(settings: Settings, source: TextDomains) -> dict:
    """All that decides weights, but for seed, domain and rank."""
    plain = {key: value for key, value in settings.items() if key not in ("seeds", "batches")}
    return plain | {"lr": LR, "sha256": {name: source.manifest[name]["sha256"] for name in source.domains}}


def alone(task: LanguageModelling, domain: str) -> LanguageModelling:
    """The task of one domain."""
    source = task.data
    splits = {split: {domain: parts[domain]} for split, parts in source.splits.items()}
    return LanguageModelling(TextDomains(domain, (domain,), splits, {domain: source.manifest[domain]}), task.seq_len)


def show(task: LanguageModelling):
    """A run of training text through a model, for `domain_rows`."""
    batch = task.batch("train", 128, torch.Generator().manual_seed(0))
    return lambda model: model(batch.inputs)


def train_apart(domain: str, rank: int, seed: int, settings: Settings) -> Adapted:
    """The public model with the expert of one owner: trained once, then from the cache."""
    (public, own), steps = texts(settings["cap"]), settings["steps"]
    task = alone(LanguageModelling(own, settings["seq_len"]), domain)
    model = public_model(settings)
    torch.manual_seed(seed)
    adapted = adapt(model, "flexmore", TARGETS, rank=rank)
    start = domain_rows(adapted, show(LanguageModelling(public, settings["seq_len"])))
    flexmore.set_rows(adapted, start, domain_rows(adapted, show(task)))

    def teach(model: nn.Module) -> object:
        config = TrainConfig(steps, settings["batch_size"], LR, weight_decay=0.0, seed=seed, eval_batches=1)
        return train(model, task, config, optimizer=adapted.optimizer(LR))

    what = recipe(settings, own) | {"domain": domain, "rank": rank, "seed": seed, "public": recipe(settings, public)}
    code = [flexmore, low_rank, routers, expert_ffn, sys.modules[__name__]]
    pretrained("flexmore-expert", what, lambda: model, teach, code)
    return adapted


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = LanguageModelling(texts(settings["cap"])[1], settings["seq_len"])
    model, extra, flops = public_model(settings), {}, 0
    if arm != "public":
        owners = [train_apart(domain, THIRD if arm == LORA else 0, seed, settings) for domain in DOMAINS]
        batch = task.batch("train", settings["batch_size"], torch.Generator().manual_seed(seed))
        flops = len(DOMAINS) * settings["steps"] * measure_budget(owners[0].model, task, batch).flops
        experts = [take_expert(owner) for owner in owners]
        ranks = [THIRD if arm == LORA else CUTS[arm]] * len(DOMAINS)
        if arm == "chosen ranks":
            extra["pairs"] = sweep(experts, task, settings)
            ranks = [chosen(extra["pairs"][domain]) for domain in DOMAINS]
            extra["energy"] = {d: [e.energy(r) for r in RANKS] for d, e in zip(DOMAINS, experts, strict=True)}
        merge_experts(model, experts, rank=ranks)
        shapes = [tuple(w.shape) for layer in experts[0].updates.values() for w in layer.values()]
        extra |= {"ranks": ranks, "share": count_parameters(shapes, ranks) / count_parameters(shapes, [0] * len(ranks))}
        if arm in ("full", "chosen ranks"):
            few = merge_experts(public_model(settings), experts, rank=ranks, top_k=2).model
            extra["two active"] = task.evaluate(few, "test", settings["batches"])[task.metric]
    bits = task.evaluate(model, "test", settings["batches"])
    budget = measure_budget(model, task, task.batch("train", 4, torch.Generator().manual_seed(seed)))
    extra["by_domain"] = {domain: bits[f"{task.metric}/{domain}"] for domain in DOMAINS}
    return Row(
        arm=arm,
        seed=seed,
        params=budget.params,
        active_params=budget.active_params,
        flops=flops,
        steps=settings["steps"] if arm != "public" else 0,
        metric=bits[task.metric],
        extra=extra,
    )


def sweep(experts: list[Expert], task: LanguageModelling, settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Domain -> split -> rank, or "full" or "public" -> bits per byte of the public expert and that of the domain."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for domain, expert in zip(DOMAINS, experts, strict=True):
        own = alone(task, domain)
        pairs = {"public": public_model(settings)}
        for rank in (*RANKS, 0):
            pairs[str(rank or "full")] = merge_experts(public_model(settings), [expert], rank=rank).model
        found[domain] = {
            split: {name: own.evaluate(m, split, settings["batches"])[own.metric] for name, m in pairs.items()}
            for split in ("validation", "test")
        }
    return found


def chosen(pairs: dict[str, dict[str, float]]) -> int:
    """The rank that is best on the validation split; the lower one of equals."""
    return min(CHOICES, key=lambda rank: pairs["validation"][str(rank)])


def kept(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Domain -> rank -> share of the full expert's gain over the public model on test text, means over seeds."""
    found = {}
    for domain in DOMAINS:
        bits = [row.extra["pairs"][domain]["test"] for row in rows]
        public, full = (statistics.fmean(b[name] for b in bits) for name in ("public", "full"))
        gain = public - full
        cuts = {str(rank): public - statistics.fmean(b[str(rank)] for b in bits) for rank in RANKS}
        found[domain] = {rank: value / gain if gain else float("nan") for rank, value in cuts.items()}
    return found


def judge(rows: list[Row], settings: Settings) -> Judgement:
    """Apply `RULE`."""
    names = list(dict.fromkeys(row.arm for row in rows))
    of = {arm: [row for row in rows if row.arm == arm] for arm in names}
    bits = {arm: [row.metric for row in found] for arm, found in of.items()}
    cut = of["chosen ranks"]
    loss = paired_interval(bits["chosen ranks"], bits["full"], level=0.9)
    gain, whole = (paired_interval(bits[arm], bits["public"]) for arm in ("chosen ranks", "full"))
    late = paired_interval(bits[f"rank {THIRD}"], bits[LORA])
    if whole.high >= 0:
        verdict = NOT_RESOLVED
    elif loss.high < MARGIN and gain.high < 0:
        verdict = REPRODUCED
    elif loss.low > MARGIN or gain.low > 0:
        verdict = NOT_REPRODUCED
    else:
        verdict = NOT_RESOLVED
    share = statistics.fmean(row.extra["share"] for row in cut)
    reason = (
        f"Bits per byte of the mixture cut to {100 * share:.0f}% of the experts' parameters minus the full one {loss} "
        f"(90%; the margin is {MARGIN}), minus the public model {gain} (95%); full minus public {whole}; rank {THIRD} "
        f"by cut minus trained at that rank {late}. The effect is the first."
    )
    by_domain = {
        arm: {d: statistics.fmean(row.extra["by_domain"][d] for row in found) for d in DOMAINS}
        for arm, found in of.items()
    }
    details = {
        "bits_per_byte": {arm: statistics.fmean(values) for arm, values in bits.items()},
        "by_domain": by_domain,
        "minus_full": {arm: paired_interval(bits[arm], bits["full"]).as_dict() for arm in names if arm != "full"},
        "share": {
            arm: statistics.fmean(r.extra["share"] for r in found) for arm, found in of.items() if arm != "public"
        },
        "ranks": {domain: [row.extra["ranks"][i] for row in cut] for i, domain in enumerate(DOMAINS)},
        "kinds": KINDS,
        "kept": kept(cut),
        "energy": {d: dict(zip(map(str, RANKS), cut[0].extra["energy"][d], strict=True)) for d in DOMAINS},
        "cut_minus_trained": late.as_dict(),
        "cut_minus_public": gain.as_dict(),
        "two_active": {a: statistics.fmean(r.extra["two active"] for r in of[a]) for a in ("full", "chosen ranks")},
    }
    return Judgement(verdict, loss.estimate, (loss.low, loss.high), reason, details)


STUDY = Study(
    slug="flexmore",
    title=flexmore.METHOD.title,
    claim=flexmore.METHOD.claim,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
)
