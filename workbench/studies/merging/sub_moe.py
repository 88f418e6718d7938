"""Does a shared singular basis, or at least grouping by output, merge experts better than pruning or averaging them?

2506.23266. A small byte model with mixtures of experts has learned five kinds of text; then it gets half, or a quarter,
fewer experts in each layer, without training. All arms of one seed start from the same trained model and see the same
calibration text, so their differences are paired; models are trained once and kept.

Two models a seed, see `mixtures`. The hidden units of experts that were upcycled from one block stand in the same
order; those of independent experts do not, and their average is asked for much. The rule is on the former.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import scipy
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from workbench.beds import byte_domains as bed
from workbench.lib.core.budget import count_params
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.merging.sub_moe import (
    METHOD,
    ExpertStats,
    calibrate,
    cluster_experts,
    merge_experts,
    numbered,
)
from workbench.studies.core import Power, Settings, Study
from workbench.studies.merging.mixtures import INITS, make_task, trained
from workbench.studies.rows import Row, Rows, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement, decide

ENERGIES = (0.99, 0.95, 0.9)
MARGIN = 0.005  # bits per byte
PRUNED, RANDOM, AVERAGED = "frequency pruning", "random clusters", "output clusters"
ARMS = ("whole", PRUNED, RANDOM, "router clusters", AVERAGED, "sub-moe", "hc-smoe", "aligned", "mean router")

RULE = (
    "The metric is bits per byte on the test split, the mean over five domains, of the upcycled model with half of its "
    "experts in each layer, without any training after. Sub-MoE joins experts of like outputs in a basis cut to the "
    f"share of energy, of {', '.join(map(str, ENERGIES))}, that does best on the validation split, for at full rank it "
    "is the weighted average itself. Intervals are 95% paired intervals over seeds. (a) Sub-MoE minus pruning the "
    "experts used least, and minus averaging random clusters, both lie below 0. (b) Sub-MoE minus averaging the same "
    "clusters, which is the same at full rank, lies below 0: the basis gains something. Not resolved if whole minus "
    "pruned does not lie below 0, for then nothing is lost that could be kept. Not reproduced if an interval of (a) "
    f"lies above 0, or if that of (b) lies above -{MARGIN} bits per byte, a gain fixed before the runs as too small to "
    "count. Reproduced if (a) and (b) hold. Not resolved otherwise. What output clusters alone gain over random ones, "
    "the other arms, three quarters of the experts, and the independent model are reported beside."
)

COMMON = {"d_model": 64, "d_hidden": 96, "n_layers": 2, "n_heads": 4, "n_experts": 8, "top_k": 2, "balance": 0.01}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "dense_steps": 8, "steps": 12, "batch_size": 4, "seq_len": 16, "cap": 65_536, "calibration": 16}
    | {"d_model": 32, "d_hidden": 24, "batches": 1},
    "small": COMMON
    | {"seeds": 12, "dense_steps": 200, "steps": 400, "batch_size": 16, "seq_len": 64, "cap": 262_144}
    | {"calibration": 64, "batches": 2},
    "full": COMMON
    | {"seeds": 5, "dense_steps": 2000, "steps": 4000, "batch_size": 32, "seq_len": 128, "cap": 1_048_576}
    | {"n_experts": 16, "d_model": 96, "d_hidden": 128, "calibration": 128, "batches": None},
}


@dataclass(frozen=True)
class Calibrated:
    """A layer, what its calibration tokens said, the cosines (E, E) of its router's logits, and a seed for what is
    drawn."""

    layer: MoELayer
    stats: ExpertStats
    logits: Tensor
    seed: int


def calibrated(init: str, seed: int, settings: Settings) -> tuple[DecoderLM, dict[str, Calibrated]]:
    """The trained model and its layers by name; held for the arms of one seed, so nothing of them may be written to."""
    return _calibrated(init, seed, tuple(settings.items()))


@lru_cache(maxsize=len(INITS))
def _calibrated(init: str, seed: int, items: tuple[tuple[str, Any], ...]) -> tuple[DecoderLM, dict[str, Calibrated]]:
    settings = dict(items)
    model, task = trained(init, seed, settings), make_task(settings)
    rows = task.batch("train", settings["calibration"], torch.Generator().manual_seed(1000 + seed)).inputs
    layers, found = moe_layers(model), {}
    with observing(layers.values(), lambda routing, _: routing.logits) as seen:
        stats = calibrate(model, rows.split(16))
    for name, layer in layers.items():
        logits = F.normalize(torch.cat(seen[layer]).double(), dim=0)
        found[name] = Calibrated(layer, stats[name], logits.T @ logits, seed)
    return model, found


def random_labels(found: Calibrated, clusters: int) -> Tensor:
    """Clusters of sizes as even as they can be, drawn."""
    order = torch.randperm(found.layer.n_experts, generator=torch.Generator().manual_seed(found.seed))
    return numbered(order % clusters)


def output_labels(found: Calibrated, clusters: int) -> Tensor:
    return cluster_experts(found.stats.similarity, clusters, found.seed)


def router_labels(found: Calibrated, clusters: int) -> Tensor:
    """By the router's logits, as MC-SMoE compares experts (Li et al. 2023, 2310.01334)."""
    return cluster_experts(found.logits, clusters, found.seed)


def hierarchical_labels(found: Calibrated, clusters: int) -> Tensor:
    """By mean outputs, average linkage, as HC-SMoE does (Chen et al. 2024, 2410.08589)."""
    tree = scipy.cluster.hierarchy.linkage(found.stats.mean_output.numpy(), "average")
    return numbered(torch.from_numpy(scipy.cluster.hierarchy.cut_tree(tree, clusters)[:, 0]))


@torch.no_grad()
def pruned(layer: MoELayer, frequency: Tensor, kept: int) -> MoELayer:
    """The experts that are used most, and their rows of the router."""
    bank, most = layer.experts, frequency.argsort(descending=True, stable=True)[:kept].sort().values
    experts = GLUExperts(kept, bank.down.shape[1], bank.down.shape[2])
    router = LinearRouter(bank.down.shape[1], kept, min(layer.top_k, kept), coefficients=layer.router.coefficients)
    for made, old in zip(experts.parameters(), bank.parameters(), strict=True):
        made.copy_(old[most])
    router.projection.weight.copy_(layer.router.projection.weight[most])
    return MoELayer(router, experts)


@torch.no_grad()
def aligned(layer: MoELayer, labels: Int64[Tensor, " experts"], frequency: Tensor) -> MoELayer:
    """The same layer with the hidden units of each expert in the order that is most like its cluster's leader.

    The leader is the cluster's most used expert; likeness is the inner product of a unit's three vectors, and the order
    is the best assignment (Ainsworth et al. 2022, 2209.04836). No expert computes anything else.
    """
    bank = layer.experts
    gate, up = (part.clone() for part in bank.gate_up.chunk(2, dim=1))
    down = bank.down.clone()
    for cluster in range(int(labels.max()) + 1):
        members = (labels == cluster).nonzero().flatten()
        leader = members[frequency[members].argmax()]
        for expert in members:
            like = gate[leader] @ gate[expert].T + up[leader] @ up[expert].T + down[leader].T @ down[expert]
            order = torch.from_numpy(scipy.optimize.linear_sum_assignment(like.numpy(), maximize=True)[1])
            gate[expert], up[expert], down[expert] = gate[expert, order], up[expert, order], down[expert][:, order]
    experts = GLUExperts(bank.n_experts, bank.down.shape[1], bank.down.shape[2])
    experts.gate_up.copy_(torch.cat([gate, up], dim=1))
    experts.down.copy_(down)
    return MoELayer(layer.router, experts)


Make = Callable[[Calibrated, int], tuple[MoELayer, int]]
"""Gives the layer of K experts, and how many numbers its experts and router are."""


def merged_by(labels_of: Callable, rank: float | None = None, router: str = "map", align: bool = False) -> Make:
    """A grouping, and the merge of its groups."""

    def make(found: Calibrated, clusters: int) -> tuple[MoELayer, int]:
        labels, frequency = labels_of(found, clusters), found.stats.frequency
        layer = aligned(found.layer, labels, frequency) if align else found.layer
        merged = merge_experts(layer, labels, frequency, rank, router)
        return merged.layer, merged.after

    return make


def whole(found: Calibrated, clusters: int) -> tuple[MoELayer, int]:
    return found.layer, count_params(found.layer)


def frequency_pruning(found: Calibrated, clusters: int) -> tuple[MoELayer, int]:
    layer = pruned(found.layer, found.stats.frequency, clusters)
    return layer, count_params(layer)


#: Arm -> the candidates for its layers, by what they are called; one is chosen on the validation split.
MAKE: dict[str, dict[str, Make]] = {
    "whole": {"": whole},
    PRUNED: {"": frequency_pruning},
    RANDOM: {"": merged_by(random_labels)},
    "router clusters": {"": merged_by(router_labels)},
    AVERAGED: {"": merged_by(output_labels)},
    "sub-moe": {f"{energy:g}": merged_by(output_labels, energy) for energy in ENERGIES},
    "hc-smoe": {"": merged_by(hierarchical_labels)},
    "aligned": {"": merged_by(output_labels, align=True)},
    "mean router": {"": merged_by(output_labels, router="mean")},
}


def compressed(arm: str, init: str, kept: int, seed: int, settings: Settings) -> tuple[DecoderLM, dict[str, Any]]:
    """The model of an arm with so many experts a layer, and what is to be said of it.

    That is its "bits" on test, "by_domain", the "chosen" one of its candidates, "after" (parameters of experts and
    routers as factors, see `Merged`), and all "candidates" by split.
    """
    task = make_task(settings)
    whole_model, layers = calibrated(init, seed, settings)
    best, found = None, {}
    for name, make in MAKE[arm].items():
        model, after = deepcopy(whole_model), 0
        for at, layer in layers.items():
            made, numbers = make(layer, kept)
            model.set_submodule(at, made)
            after += numbers
        bits = {split: task.evaluate(model, split, settings["batches"]) for split in ("validation", "test")}
        found[name] = {split: scores[task.metric] for split, scores in bits.items()}
        if best is None or found[name]["validation"] < found[best[0]]["validation"]:
            best = (name, model, after, bits["test"])
    name, model, after, test = best
    by_domain = {domain: test[f"{task.metric}/{domain}"] for domain in task.domains}
    said = {"bits": test[task.metric], "by_domain": by_domain, "chosen": name, "after": after, "candidates": found}
    return model, said


def places(settings: Settings) -> dict[str, tuple[str, int]]:
    """Name -> initialisation and experts left; the first is the one the rule is on."""
    n = settings["n_experts"]
    return {f"{init} {share}": (init, kept) for init in INITS for share, kept in (("1/2", n // 2), ("3/4", 3 * n // 4))}


def run(arm: str, seed: int, settings: Settings) -> Row:
    found, models = {}, []
    for place, (init, kept) in places(settings).items():
        model, found[place] = compressed(arm, init, kept, seed, settings)
        models.append(model)
    budget = training_budget(models[0], make_task(settings), settings["batch_size"], seed)
    main = next(iter(found.values()))
    extra = {place: said["bits"] for place, said in found.items()}
    extra |= {key: main[key] for key in ("by_domain", "chosen", "after")}
    extra["candidates"] = {place: said["candidates"] for place, said in found.items()}
    if arm == "whole":
        for init in INITS:
            stats = [layer.stats for layer in calibrated(init, seed, settings)[1].values()]
            extra[f"{init} similarity"] = [each.similarity.tolist() for each in stats]
            extra[f"{init} frequency"] = [each.frequency.tolist() for each in stats]
    return Row(arm, seed, budget.params, budget.active_params, 0, 0, main["bits"], extra)


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    gain, grouped = rows.minus("sub-moe", AVERAGED), [rows.minus("sub-moe", arm) for arm in (PRUNED, RANDOM)]
    lost, clusters = rows.minus("whole", PRUNED), rows.minus(AVERAGED, RANDOM)
    verdict = decide(
        (NOT_RESOLVED, lost.high >= 0),
        (NOT_REPRODUCED, gain.low > -MARGIN or any(each.low > 0 for each in grouped)),
        (REPRODUCED, gain.high < 0 and all(each.high < 0 for each in grouped)),
    )
    reason = (
        f"Bits per byte with half of the experts, Sub-MoE minus the average of the same clusters {gain}, minus "
        f"frequency pruning {grouped[0]}, minus the average of random clusters {grouped[1]}; whole minus pruned "
        f"{lost}. Output clusters minus random ones, both averaged: {clusters}. The effect is the first."
    )
    names = list(places(settings))
    whole_bits = {place: rows.mean("whole", lambda row, place=place: row.extra[place]) for place in names}
    bits = {arm: {place: rows.mean(arm, lambda row, place=place: row.extra[place]) for place in names} for arm in ARMS}
    details = {
        "bits_per_byte": bits,
        "retained": {  # of what the model says better than eight bits a byte
            arm: {place: (8 - value) / (8 - whole_bits[place]) for place, value in own.items()}
            for arm, own in bits.items()
        },
        "minus_averaged": {
            arm: {place: rows.minus(arm, AVERAGED, lambda row, place=place: row.extra[place]) for place in names}
            for arm in ARMS
            if arm != AVERAGED
        },
        "output_minus_random": {
            place: rows.minus(AVERAGED, RANDOM, lambda row, place=place: row.extra[place]) for place in names
        },
        "by_domain": {
            arm: {d: rows.mean(arm, lambda row, d=d: row.extra["by_domain"][d]) for d in bed.DOMAINS} for arm in ARMS
        },
        "by_energy": {
            f"{energy:g}": fmean(
                rows.of("sub-moe", lambda row, e=energy: row.extra["candidates"][names[0]][f"{e:g}"]["test"])
            )
            for energy in ENERGIES
        },
        "chosen": rows.of("sub-moe", "chosen"),
        "after": rows.means("after"),
        "similarity": {init: rows.of("whole", f"{init} similarity")[0] for init in INITS},
        "frequency": {init: rows.of("whole", f"{init} frequency")[0] for init in INITS},
    }
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="Half of the experts of a small byte model, merged within clusters of like outputs in a shared basis, keep "
    "more than pruning, than averaging random clusters, and than averaging the same clusters.",
    power=Power((PRUNED, RANDOM, AVERAGED), effect=0.06, deviation={"small": (0.0627, 9)}),
    trainings=lambda arm: "it merges the experts of a model that is trained once for a seed and kept",
)
