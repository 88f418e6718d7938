"""Can experts that were trained apart be cut to low rank, and to a third of their parameters, at no loss? (2602.08818)

A small byte model has learned three kinds of text together. The owners of five domains, these three on text it has not
seen and two new ones, train one whole feed-forward expert each, apart. The mixture of all six experts, the public one
among them, is then compared with the same mixture after the cut. All arms of one seed start from the same trained
experts, so their differences are paired; experts are trained once and kept.
"""

import math
import sys
from statistics import fmean

import torch
from torch import nn

from workbench.beds import byte_domains as bed
from workbench.beds.byte_domains import DOMAINS, KINDS, alone
from workbench.beds.pretrained import pretrained
from workbench.lib.core import low_rank, routers
from workbench.lib.core.adapt import Adapted, adapt, expert_ffn
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts import flexmore
from workbench.lib.lora_experts.flexmore import Expert, count_parameters, domain_rows, merge_experts, take_expert
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, decide

RANKS = (1, 2, 4, 8, 16, 32)
THIRD = 16  # a third of a full expert's parameters, at widths 64 and 128
CHOICES = tuple(rank for rank in RANKS if rank <= THIRD)
TARGETS = "*.ffn.*"

#: Arm -> rank of every expert; None: chosen for each domain.
CUTS = {"full": 0, **{f"rank {rank}": rank for rank in RANKS}, "chosen ranks": None}
LORA = f"trained at rank {THIRD}"
ARMS = ("public", *CUTS, LORA)
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
    "small": COMMON | {"seeds": 12, "public_steps": 400, "steps": 120, "seq_len": 64, "cap": 262_144, "batches": 2},
    "full": COMMON
    | {"seeds": 5, "public_steps": 5000, "steps": 1000, "seq_len": 128, "cap": 1_048_576, "batches": None},
}


def show(task: LanguageModelling):
    """A run of training text through a model, for `domain_rows`."""
    batch = task.batch("train", 128, torch.Generator().manual_seed(0))
    return lambda model: model(batch.inputs)


def train_apart(domain: str, rank: int, seed: int, settings: Settings) -> Adapted:
    """The public model with the expert of one owner: trained once, then from the cache."""
    public, own = bed.texts(settings["cap"])
    task = alone(LanguageModelling(own, settings["seq_len"]), domain)
    model = bed.base(settings)
    torch.manual_seed(seed)
    adapted = adapt(model, "flexmore", TARGETS, rank=rank)
    start = domain_rows(adapted, show(LanguageModelling(public, settings["seq_len"])))
    flexmore.set_rows(adapted, start, domain_rows(adapted, show(task)))

    def teach(model: nn.Module) -> object:
        size = settings["batch_size"]
        config = TrainConfig(settings["steps"], size, bed.LR, weight_decay=0.0, seed=seed, eval_every=None)
        return train(model, task, config, optimizer=adapted.optimizer(bed.LR))

    recipe = {name: value for name, value in settings.items() if name not in ("seeds", "batches")}
    recipe |= {"domain": domain, "rank": rank, "seed": seed, "data": bed.digests(public) | bed.digests(task.data)}
    code = [flexmore, low_rank, routers, expert_ffn, bed, sys.modules[__name__]]
    pretrained("flexmore-expert", recipe, lambda: model, teach, code, watched=True)
    return adapted


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = LanguageModelling(bed.texts(settings["cap"])[1], settings["seq_len"])
    model, extra, flops = bed.base(settings), {}, 0
    if arm != "public":
        owners = [train_apart(domain, THIRD if arm == LORA else 0, seed, settings) for domain in DOMAINS]
        once = training_budget(owners[0].model, task, settings["batch_size"], seed)
        flops = len(DOMAINS) * settings["steps"] * once.flops
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
            few = merge_experts(bed.base(settings), experts, rank=ranks, top_k=2).model
            extra["two active"] = task.evaluate(few, "test", settings["batches"])[task.metric]
    bits = task.evaluate(model, "test", settings["batches"])
    budget = training_budget(model, task, 4, seed)
    extra["by_domain"] = {domain: bits[f"{task.metric}/{domain}"] for domain in DOMAINS}
    steps = settings["steps"] if arm != "public" else 0
    return Row(arm, seed, budget.params, budget.active_params, flops, steps, bits[task.metric], extra)


def sweep(experts: list[Expert], task: LanguageModelling, settings: Settings) -> dict[str, dict[str, dict[str, float]]]:
    """Domain -> split -> rank, or "full" or "public" -> bits per byte of the public expert and that of the domain."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for domain, expert in zip(DOMAINS, experts, strict=True):
        own = alone(task, domain)
        pairs = {"public": bed.base(settings)}
        for rank in (*RANKS, 0):
            pairs[str(rank or "full")] = merge_experts(bed.base(settings), [expert], rank=rank).model
        found[domain] = {
            split: {name: own.evaluate(m, split, settings["batches"])[own.metric] for name, m in pairs.items()}
            for split in ("validation", "test")
        }
    return found


def chosen(pairs: dict[str, dict[str, float]]) -> int:
    """The rank that is best on the validation split; the lower one of equals."""
    return min(CHOICES, key=lambda rank: pairs["validation"][str(rank)])


def kept(rows: Rows) -> dict[str, dict[str, float]]:
    """Domain -> rank -> share of the full expert's gain over the public model on test text, means over seeds."""
    found = {}
    for domain in DOMAINS:
        bits = rows.of("chosen ranks", lambda row, domain=domain: row.extra["pairs"][domain]["test"])
        public, full, *cut = (fmean(b[name] for b in bits) for name in ("public", "full", *map(str, RANKS)))
        gain = public - full
        shares = [(public - value) / gain if gain else float("nan") for value in cut]
        found[domain] = dict(zip(map(str, RANKS), shares, strict=True))
    return found


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    loss = rows.minus("chosen ranks", "full", level=0.9)
    gain, whole = rows.minus("chosen ranks", "public"), rows.minus("full", "public")
    late = rows.minus(f"rank {THIRD}", LORA)
    verdict = decide(
        (NOT_RESOLVED, whole.high >= 0),
        (REPRODUCED, loss.high < MARGIN and gain.high < 0),
        (NOT_REPRODUCED, loss.low > MARGIN or gain.low > 0),
    )
    share = rows.means("share", ARMS[1:])
    reason = (
        f"Bits per byte of the mixture cut to {100 * share['chosen ranks']:.0f}% of the experts' parameters minus the "
        f"full one {loss} (90%; the margin is {MARGIN}), minus the public model {gain} (95%); full minus public "
        f"{whole}; rank {THIRD} by cut minus trained at that rank {late}. The effect is the first."
    )
    ranks, energy = rows.of("chosen ranks", "ranks"), rows.of("chosen ranks", "energy")[0]
    details = {
        "bits_per_byte": rows.means(),
        "by_domain": {
            arm: {d: rows.mean(arm, lambda row, d=d: row.extra["by_domain"][d]) for d in DOMAINS} for arm in ARMS
        },
        "minus_full": {arm: rows.minus(arm, "full") for arm in ARMS if arm != "full"},
        "share": share,
        "ranks": {domain: list(chosen) for domain, chosen in zip(DOMAINS, zip(*ranks, strict=True), strict=True)},
        "kinds": KINDS,
        "kept": kept(rows),
        "energy": {domain: dict(zip(map(str, RANKS), energy[domain], strict=True)) for domain in DOMAINS},
        "cut_minus_trained": late,
        "cut_minus_public": gain,
        "two_active": rows.means("two active", ("full", "chosen ranks")),
    }
    return Judgement.on(loss, verdict, reason, details, claimed=(-math.inf, MARGIN))


STUDY = Study(
    flexmore.METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power(("public", "full"), effect=MARGIN, level=0.9, deviation={"small": (0.0122, 12)}),
    main="chosen ranks",
    trainings=lambda arm: "it is the public model as it is kept" if arm == "public" else 1,  # the first owner's
)
